"""Protocols for frozen features: probes, kNN, ranks and segmentation."""
