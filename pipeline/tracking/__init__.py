"""MLflow: what is logged goes to a local journal first, and is sent to the server in the background."""
