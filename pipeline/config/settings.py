"""Settings of data and training: type, range, default and meaning of each; those of the model are in `model_settings`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.config.behaviour import setting

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def number_like(text: str) -> Any:
    """The number that a text such as 1e-4 stands for, which YAML 1.1 reads as text; other texts as they are."""
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _steps(value: Any) -> Any:
    """A list of steps; one number holds for all levels."""
    numbers = [value] if isinstance(value, int | float) else value
    if value == "lossless":
        return value
    if not isinstance(numbers, list | tuple) or not numbers:
        raise ValueError("must be numbers above 0, starting with the finest level, such as [4, 2, 1], or lossless")
    numbers = [number_like(step) if isinstance(step, str) else step for step in numbers]
    if any(isinstance(step, bool) or not isinstance(step, int | float) or not step > 0 for step in numbers):
        raise ValueError("every step must be a number above 0")
    return tuple(numbers)


Steps = Annotated[tuple[float, ...] | Literal["lossless"], BeforeValidator(_steps)]


TRAINING = ("pretrain", "finetune", "tune", "run")  # stages of the training harness, for settings that all of them read


class Section(BaseModel):
    """A group of settings: immutable, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """How images become a shard set."""

    image_size: Positive = setting(256, "Side of the stored images in pixels. Must be a multiple of 2^levels.", le=8192)
    channels: int = setting(
        3, "Number of channels. Numbers other than 1 and 3 need multi-band TIFF or .npy files.", ge=1, le=16
    )
    wavelet: str = setting("haar", "Wavelet of the stored pyramid: any discrete wavelet of PyWavelets.")
    levels: Positive = setting(5, "Number of levels of the stored pyramid.", le=8)
    steps: Steps = setting(
        (4, 4, 8),
        "Quantisation step of each level, starting with the finest; the last one also holds for all coarser levels. "
        "One number holds for all levels. lossless (Haar only) stores the exact pixels.",
    )
    value_range: tuple[float, float] | None = setting(
        None, "Pixel values that become black and white. null: the full range of the file's integer type."
    )
    nodata: float | Literal["nan"] | None = setting(
        None,
        "Value of pixels without data in 16-bit, floating-point and .npy images, such as -9999, or nan: these, NaN and "
        "infinite pixels become black. null: images with NaN or infinite pixels are rejected.",
        added=True,
    )
    max_pixels: Positive = setting(100_000_000, "Images with more pixels are rejected without decoding them.")
    min_side: Positive = setting(8, "Images whose shorter side has fewer pixels are rejected.")
    image_column: str | None = setting(
        None, "Column of a list or Parquet file that holds the images or their paths. null: recognised by its name."
    )
    label_column: str | None = setting(
        None,
        "Column of a list or Parquet file that holds the labels. null: recognised by its name. none: no labels, of folders too.",
    )
    compression: Literal["small", "fast"] = setting(
        "small",
        "small: levels are compressed, the finest one with Zstandard. fast: they are not, which reads nearly twice as fast and "
        "takes about twice the space.",
        added=True,
    )
    rows_per_shard: Positive = setting(1024, "Images per Parquet file.")
    rows_per_group: Positive = setting(64, "Images per row group, the unit of reading.")
    val_share: float = setting(
        0.1, "Share of the images held out as the val split where the input names no val split.", ge=0, lt=1
    )
    max_rejected: Share = setting(
        0.01, "Largest tolerated share of rejected inputs; 10 are always tolerated.", operational=True
    )


class Train(Section):
    """Pretraining: duration, batch, optimiser, augmentation, checkpoints and workers."""

    epochs: float = setting(100, "Passes over the train split.", gt=0, resumable=True)
    batch: Positive = setting(256, "Global batch size: images per step over all workers.")
    accumulate: Positive = setting(
        1,
        "Gradient accumulation: number of parts in which each worker computes its batch, for batches that do not fit into "
        "memory.",
        resumable=True,
    )
    workers: Positive = setting(1, "Number of data-parallel workers.", operational=True)
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "ddp: every worker holds the whole model. fsdp: weights, gradients and optimiser state are sharded over the workers, "
        "for models that do not fit into the memory of one.",
        operational=True,  # sums are added in another order
    )
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "adamw: AdamW for all parameters. muon: Muon for the matrices of linear layers, AdamW for the others and for the "
        "layers that predict; learning rate and weight decay keep their meaning. Not for train.parallel=fsdp.",
        added=True,
    )
    lr: float = setting(
        1.5e-4, "Learning rate for a batch of 256; scaled linearly with the batch.", gt=0, resumable=True
    )
    progressive: Annotated[dict[Positive, Share], BeforeValidator(lambda value: {} if value is None else value)] = (
        setting(
            {},
            "Progressive image sizes: growing sizes in pixels up to encoder.image_size, each with its share of the epochs, such "
            "as {128: 0.5, 224: 0.5}. Smaller images are read from the coarse levels of the shards only.",
        )
    )
    min_lr_share: Share = setting(
        0.01, "Final learning rate of the cosine schedule, as a share of the peak.", resumable=True
    )
    warmup_epochs: float = setting(10, "Epochs of linear warm-up.", ge=0, resumable=True)
    warmup_prefix: bool = setting(
        False,
        "Where the cosine schedule starts. true: at the end of the warm-up, at the peak, as in MAE. false: at the first step; "
        "the warm-up replaces its first part, and the rate drops where the warm-up ends, as in SimMIM.",
        resumable=True,
        added=True,
    )
    weight_decay: float = setting(
        0.05, "Weight decay. Norms, biases, tokens and positions have none.", ge=0, resumable=True
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = setting(
        (0.9, 0.95), "Betas of AdamW.", resumable=True
    )
    clip_grad: Annotated[float, Field(gt=0)] | None = setting(
        1.0, "Gradients are clipped to this norm. null: no clipping.", resumable=True
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = setting(
        None,
        "Decay per step of an exponential moving average of the weights, which is then evaluated and exported. null: no "
        "average.",
    )
    augment: Literal["window", "rrc"] = setting(
        "window",
        "window: aligned windows of the stored coefficients. rrc: RandomResizedCrop, computed on the training device.",
    )
    crop_scale: tuple[Annotated[float, Field(ge=0.01, le=1)], Annotated[float, Field(ge=0.01, le=1)]] = setting(
        (0.2, 1.0), "rrc: smallest and largest share of the image's area that a crop covers.", resumable=True
    )
    flip: bool = setting(True, "Random horizontal flips.", resumable=True)
    mix_groups: Positive = setting(8, "Number of row groups that a worker shuffles together in its buffer.")
    reader_threads: Positive | None = setting(
        None, "Threads per worker that read ahead. null: as many as the worker has cores, at most 8.", operational=True
    )
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Precision of the computation. auto: bfloat16 on GPUs that support it, float32 elsewhere.",
        resumable=True,
    )
    compile: bool = setting(
        False, "Use torch.compile: faster on GPUs after some minutes of compilation.", operational=True
    )
    channels_last: bool | Literal["auto"] = setting(
        "auto",
        "Channels-last memory format of images and feature maps in backbones with stages. auto: in convolutional ones.",
        operational=True,
    )
    recompute: bool = setting(
        False, "Activation checkpointing: less memory for about a third more time.", operational=True
    )
    max_skipped: Positive = setting(
        20,
        "Steps with a non-finite gradient are skipped; training ends after this many in a row. It has failed, too, if the "
        "last steps in a row, more than half of all, were skipped.",
        operational=True,
        stages=TRAINING,
    )
    checkpoint_every: float = setting(1, "Epochs between checkpoints.", gt=0, operational=True)
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = setting(
        30, "Longest time between checkpoints in minutes. null: no limit.", operational=True, stages=TRAINING
    )
    checkpoints_at: str | None = setting(
        None,
        "Folder or URL, such as s3://BUCKET/RUNS, to which checkpoints are also copied. null: none.",
        operational=True,
        stages=TRAINING,
        place=True,
        in_card=False,
    )
    keep_checkpoints: Positive = setting(
        2, "Number of latest checkpoints that are kept.", operational=True, stages=TRAINING
    )
    keep_best: Annotated[str, Field(pattern="^(train|eval)/")] | None = setting(
        None,
        "Metric, such as train/loss, whose best checkpoint is kept in addition: the lowest value of a train/ metric, the "
        "highest of an eval/ metric.",
        operational=True,
        stages=TRAINING,
    )
    log_every: Positive = setting(20, "Steps between logged metrics.", operational=True)
    hang_timeout: Annotated[float, Field(ge=1)] | None = setting(
        600,
        "Seconds without progress after which a worker counts as hung; training then resumes from the last checkpoint. Six "
        "times as long, and at least 300 seconds, before the first steps are done. null: no limit.",
        operational=True,
        stages=TRAINING,
    )
    progress_seconds: float = setting(
        30,
        "Seconds between progress lines where the output is not a terminal.",
        gt=0,
        operational=True,
        stages=TRAINING,
    )
    monitor_minutes: Annotated[float, Field(gt=0)] | None = setting(
        10,
        "Shortest time in minutes between reconstruction pictures and probes during training. null: none.",
        operational=True,
    )


class Tracking(Section):
    """Tracking of runs with MLflow."""

    uri: str | None = setting(
        None, "MLflow tracking URI. null: MLFLOW_TRACKING_URI, or an SQLite database in the out folder."
    )
    experiment: str = setting("wavemim", "Name of the MLflow experiment.", min_length=1)
    system_metrics: bool = setting(True, "Log the use of CPU, memory, disk, network and GPU.")


class Cluster(Section):
    """Where stages run: an existing Ray cluster, or a private Ray on this machine."""

    address: str | None = setting(
        None, "Address of the Ray cluster. null: RAY_ADDRESS, or a private Ray on this machine."
    )
    gpus: bool | None = setting(None, "Whether to train on GPUs. null: if the cluster has any.")
    cpus_per_worker: float = setting(1, "CPUs per training worker or sweep trial.", gt=0)
    max_failures: int = setting(
        3, "How often a failed worker group is restarted from the last checkpoint before the stage fails.", ge=0
    )
    min_workers: Positive | None = setting(
        None,
        "Elastic training: continue with as few workers as this while the cluster has no room for all of them, and "
        "scale up again once it has. null: wait for all workers.",
    )
