"""Sandboxed execution; arrives with its own release."""
