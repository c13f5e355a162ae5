"""The method: wavelet targets, masks, encoders, decoders, losses, evaluation.

Needs torch, timm, numpy and PyWavelets; imports no Ray, no MLflow and no pyarrow, so that it runs wherever torch does.
"""

__version__ = "0.1.0"
