"""Figures: reconstructions, curves, confusion matrices and segmentation."""
