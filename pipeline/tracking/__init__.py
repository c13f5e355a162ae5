"""MLflow: what is logged goes to a local journal first, and from there to the server, beside the work."""
