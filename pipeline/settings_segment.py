"""Settings of segmentation by a linear head."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.settings import Positive, Section, Share


class Segment(Section):
    """How well frozen patch tokens tell what each pixel belongs to: mean IoU of a linear head."""

    images: str | None = Field(
        None, description="folder of images, or s3://…; with train/ and val/ in it, or a share is held out"
    )
    masks: str | None = Field(
        None, description="folder of PNG masks under the images' relative paths; a pixel's value is its class"
    )
    image_ending: str = Field("", description="end of the images' names that masks lack, such as _leftImg8bit")
    mask_ending: str = Field("", description="end of the masks' names that images lack; other files are passed over")
    classes: Positive | str | None = Field(
        None, description="number of classes, or a text file with a name a line, of value 0 on; null: as in train"
    )
    ignore: tuple[Annotated[int, Field(ge=0, le=65535)], ...] = Field(
        (255,), description="values of pixels that count nowhere"
    )
    image_size: Positive | None = Field(
        None, description="side of the middle square that images are resized to; null: as the encoder was trained"
    )
    blocks: tuple[Positive, ...] | None = Field(
        None, min_length=1, description="blocks or stages, from 1, whose tokens the head sees; null: the last"
    )
    val_share: float = Field(0.2, gt=0, lt=1, description="share held out for val where the folders name no val split")
    max_images: Positive = Field(5000, description="images of each split that are used, at most; drawn by the seed")
    max_rejected: Share = Field(
        0.01, description="share of rejected inputs that ends the stage (10 are always allowed)"
    )
    steps: Positive = Field(1500, description="steps of fitting a head")
    train_batch: Positive = Field(16, description="images in a step of fitting")
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-2, 1e-1), min_length=1, description="AdamW rates tried on a held-out part of train (of 1000 images at most)"
    )
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (1e-3, 1.0), min_length=1, description="AdamW weight decays tried with each rate"
    )
    batch: Positive = Field(32, description="images in a forward pass of the encoder")
