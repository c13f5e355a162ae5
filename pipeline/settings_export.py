"""Settings of the export."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.settings import Section


class Export(Section):
    """Where the encoder goes, beside the folder that timm and transformers load."""

    onnx: bool = Field(False, description="also as ONNX, checked with onnxruntime; needs pip install 'wavemim[onnx]'")
    registry: Annotated[str, Field(pattern=r"^[^/:]+$")] | None = Field(
        None, description="name in MLflow's model registry that the ONNX model becomes a version of; null: none"
    )
