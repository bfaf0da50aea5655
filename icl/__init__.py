"""In-context linear regression: train small transformers, compare them with Bayes, watch them develop."""
