"""Training against the original's answers."""
