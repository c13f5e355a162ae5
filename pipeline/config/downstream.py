"""Settings of what judges an encoder: evaluation and sweeps."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.config.settings import Positive, Section, Share

Protocol = Literal["linear", "blocks", "knn", "attentive", "few_labels", "rank"]


class Evaluate(Section):
    """What the encoder is worth, on frozen features."""

    protocols: tuple[Protocol, ...] = Field(
        ("linear", "knn", "few_labels", "rank"),
        min_length=1,
        description="what is measured: linear probe, the same for every block, kNN, attentive probe, linear probe on few "
        "labels, RankMe and alpha-ReQ; those left out by default take as long as the rest together, or longer",
    )
    batch: Positive = Field(256, description="images in a forward pass")
    max_images: Positive = Field(50_000, description="train images that probes are fitted to, at most")
    probe_strengths: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.1, 1.0, 10.0), min_length=1, description="inverse regularisations tried on a held-out part of train"
    )
    probe_iterations: Positive = Field(1000, description="steps of the linear probes' solver, at most")
    knn_k: Positive = Field(20, description="neighbours of the kNN classifier; its curve goes from 1 to 200")
    few_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.01, 0.1), min_length=1, description="few_labels: shares of the train labels, at least one a class"
    )
    few_draws: Positive = Field(5, description="few_labels: times that each share is drawn")
    attentive_images: Positive = Field(
        10_000,
        description="attentive: train images whose tokens are kept, at most; each takes 2 bytes × tokens × width of "
        "memory, 0.3 MB of a ViT-B/16 at 224 pixels",
    )
    attentive_epochs: Positive = Field(20, description="attentive: passes over those images")
    attentive_batch: Positive = Field(256, description="attentive: images in a step")
    attentive_lrs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (3e-4, 1e-3, 3e-3), min_length=1, description="attentive: learning rates tried on a held-out part of train"
    )


class Tune(Section):
    """A sweep: each trial is a short pretraining with some settings changed, judged by a frozen-feature measure."""

    space: str = Field("level_weights", description="file of tune_spaces/, by name or path")
    trials: Positive = Field(8, description="number of trials")
    search: Literal["optuna", "random"] = Field("optuna", description="how the next trial is chosen")
    epochs: float = Field(5, gt=0, description="epochs of a trial")
    max_images: Positive = Field(10_000, description="train images a trial's probe is fitted to, at most")
    concurrent: Positive | None = Field(None, description="trials at once; null: one for each free CPU or GPU")


class Export(Section):
    """Where the encoder goes, beside the folder that timm and transformers load."""

    onnx: bool = Field(False, description="also as ONNX, checked with onnxruntime; needs pip install 'wavemim[onnx]'")
    registry: Annotated[str, Field(pattern=r"^[^/:]+$")] | None = Field(
        None, description="name in MLflow's model registry that the ONNX model becomes a version of; null: none"
    )


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
