"""timm backbones as encoders for masked image modelling."""
