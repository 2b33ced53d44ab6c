"""Log-probabilities to a policy loss."""
