"""One model call: choice of a deployment, attempt, verdict."""
