"""Evaluation of frozen features: probes, kNN, rank measures and segmentation."""
