"""Weights on disk: checkpoints, timm folders, ONNX, and published MAE weights."""
