"""Shard sets: layout, writing, reading in training, statistics and verification."""
