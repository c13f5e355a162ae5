"""The training harness: loops, schedule, metrics, divergence and online evaluation. Knows no Ray."""
