"""timm backbones as encoders of masked images."""
