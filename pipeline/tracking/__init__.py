"""MLflow: what is logged is written locally first and sent beside the work."""
