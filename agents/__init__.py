"""Agent definitions and the loop that drives them."""
