"""Checkpoints of a run: written in the background, found, and copied to an object store."""
