"""What filters, loss and estimator cost: `verl-krpo bench`."""
