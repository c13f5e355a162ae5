"""Evaluation of frozen encoders on a shard set: features, segmentation tokens, tables and files."""
