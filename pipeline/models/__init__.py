"""From settings, checkpoints or timm names to models."""
