"""The laboratory: simulations, a tiny model in training, and what things cost. No job imports it."""
