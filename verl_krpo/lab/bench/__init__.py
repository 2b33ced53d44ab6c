"""What filters, loss, estimator, memory and rewards cost: `verl-krpo bench`."""
