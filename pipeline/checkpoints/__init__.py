"""Checkpoints of a run: written beside training, found, and copied to an object store."""
