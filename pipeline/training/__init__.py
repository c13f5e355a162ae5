"""Training: loops, schedule, metrics, divergence and online evaluation. Does not use Ray."""
