"""Settings of fine-tuning."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.settings import Positive, Section, Share

_PARTS = r"(mstd|inc|m|n|p)\d+(\.\d+)?|t[a-z]+"


def _policy(value: str) -> str:
    """RandAugment as timm writes it; timm itself passes over parts that it does not know."""
    if not re.fullmatch(rf"rand(-({_PARTS}))+", value):
        raise ValueError("allowed is what timm calls rand-…, such as rand-m9-mstd0.5-inc1, or null for none")
    return value


class Finetune(Section):
    """Fine-tuning of the encoder as a classifier. The defaults are those of MAE ViT-B."""

    epochs: float = Field(100, gt=0, description="passes over the train split")
    batch: Positive = Field(1024, description="images in a step, over all workers")
    accumulate: Positive = Field(
        1, description="parts of a worker's batch that are computed one after another, for batches that do not fit"
    )
    workers: Positive = Field(1, description="data-parallel workers")
    lr: float = Field(5e-4, gt=0, description="learning rate of the head for a batch of 256; scaled by batch/256")
    layer_decay: float = Field(
        0.65, gt=0, le=1, description="each layer's rate is that of the layer above times this; 1: the same for all"
    )
    min_lr_share: Share = Field(5e-4, description="the cosine ends at this share of the peak")
    warmup_epochs: float = Field(5, ge=0, description="epochs of linear warm-up")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay (none on norms, biases, positions)")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW betas"
    )
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(None, description="largest gradient norm; null: any")
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="share of images that pass the last block by; less in earlier ones"
    )
    mixup: float = Field(0.8, ge=0, description="alpha of mixup; 0: none")
    cutmix: float = Field(1.0, ge=0, description="alpha of cutmix, which takes turns with mixup; 0: none")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of a target that is spread over all classes")
    erasing: Share = Field(0.25, description="share of images of which a rectangle is replaced by noise")
    rand_augment: Annotated[str, AfterValidator(_policy)] | None = Field(
        "rand-m9-mstd0.5-inc1", description="RandAugment as timm writes it, done on the CPU; null: none"
    )
    crop_scale: tuple[Annotated[float, Field(ge=0.01, le=1)], Annotated[float, Field(ge=0.01, le=1)]] = Field(
        (0.08, 1.0), description="RandomResizedCrop: smallest and largest share of the image's area"
    )
    flip: bool = Field(True, description="mirror images at random")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay a step of an average of the weights, which is then what is judged and saved"
    )
    head: Literal["mean", "token"] = Field(
        "mean", description="ViT: on the mean of the patch tokens, normalised, as MAE; or on the class token"
    )
    freeze: bool = Field(False, description="train the head alone: a linear probe on augmented images")
    eval_every: Positive = Field(1, description="epochs between two measurements on val")
    eval_batch: Positive = Field(256, description="images in a forward pass of a worker while measuring")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs that have it")
    reader_threads: Positive | None = Field(
        None, description="threads that read and augment in a worker; null: its cores, up to 8"
    )
    log_every: Positive = Field(20, description="steps between logged metrics")
