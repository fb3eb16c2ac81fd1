"""Graders and evals; arrive with their own release."""
