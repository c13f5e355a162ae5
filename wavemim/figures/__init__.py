"""Figures: reconstructions, curves, confusion matrices and segmentations."""
