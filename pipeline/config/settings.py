"""Settings of data, model and training: type, range, default and meaning of each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from wavemim import registry

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Bands = Annotated[str, Field(pattern="^A?H?V?D?$", min_length=1)]


def number_like(text: str) -> Any:
    """YAML 1.1 reads 1e-4 as a string; a person means the number."""
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _steps(value: Any) -> Any:
    """One number stands for all levels."""
    numbers = [value] if isinstance(value, int | float) else value
    if value == "lossless":
        return value
    if not isinstance(numbers, list | tuple) or not numbers:
        raise ValueError("allowed are numbers above 0, from the finest level on, such as [4, 2, 1], or lossless")
    numbers = [number_like(step) if isinstance(step, str) else step for step in numbers]
    if any(isinstance(step, bool) or not isinstance(step, int | float) or not step > 0 for step in numbers):
        raise ValueError("every step has to be a number above 0")
    return tuple(numbers)


def _options(value: Any) -> Any:
    """Arguments of timm's by name; YAML's 1e-5 is a number, and a null would be dropped by timm without a word."""
    if not isinstance(value, dict):
        return value
    for key, inner in value.items():
        if inner is None:
            raise ValueError(f"{key} has no value; give it one after a colon and a space, such as {{reg_tokens: 4}}")
    return {key: number_like(inner) if isinstance(inner, str) else inner for key, inner in value.items()}


Steps = Annotated[tuple[float, ...] | Literal["lossless"], BeforeValidator(_steps)]


class Section(BaseModel):
    """Base of every group of settings: frozen, and no key that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """How images become a shard set."""

    image_size: Positive = Field(256, description="side of the stored images in pixels; a multiple of 2^levels")
    channels: int = Field(3, ge=1, le=16, description="channels; other than 1 and 3 come from multi-band TIFF or .npy")
    wavelet: str = Field("haar", description="wavelet of the stored pyramid: any discrete one of PyWavelets")
    levels: Positive = Field(5, le=8, description="levels of the stored pyramid")
    steps: Steps = Field(
        (4, 4, 8),
        description="quantisation step of each level from the finest, the last one counts for the rest; "
        "or 'lossless' (Haar alone): the very pixels come back",
    )
    value_range: tuple[float, float] | None = Field(
        None, description="pixel values that become black and white; null: the whole range of the file's integer type"
    )
    max_pixels: Positive = Field(100_000_000, description="larger images are rejected undecoded")
    min_side: Positive = Field(8, description="images with a shorter side below this are rejected")
    image_column: str | None = Field(None, description="column of a list or of Parquet that names or holds the image")
    label_column: str | None = Field(None, description="column of a list or of Parquet that holds the label")
    rows_per_shard: Positive = Field(1024, description="images in one Parquet file")
    rows_per_group: Positive = Field(64, description="images in one row group, the unit of reading")
    val_share: float = Field(0.1, ge=0, lt=1, description="share held out for val where the folder names no val split")
    max_rejected: Share = Field(
        0.01, description="share of rejected inputs that ends the stage (10 are always allowed)"
    )


class Encoder(Section):
    """The backbone, a timm model."""

    name: str = Field("vit_base_patch16_224", description="timm model: a plain ViT, or one with features at 4 to 32 px")
    image_size: Positive = Field(224, description="side of the training window; a multiple of patch_size and 2^levels")
    patch_size: Positive | None = Field(
        16, description="side of a patch in pixels; null: the timm model's own; ViT alone"
    )
    width: Positive | None = Field(None, description="embedding width; null: the timm model's own; ViT alone")
    depth: Positive | None = Field(None, description="number of blocks; null: the timm model's own; ViT alone")
    heads: Positive | None = Field(None, description="attention heads; null: the timm model's own; ViT alone")
    class_token: bool = Field(True, description="with a class token; ViT alone")
    positions: Literal["sincos", "learned"] = Field(
        "sincos", description="fixed sine-cosine or learned positions; ViT alone"
    )
    sees: Literal["auto", "visible", "masked"] = Field(
        "auto",
        description="visible: hidden patches are dropped (ViT alone); masked: they are replaced by a learned token; "
        "auto: visible for a ViT, masked for others",
    )
    pretrained: Annotated[bool | str, BeforeValidator(lambda value: False if value is None else value)] = Field(
        False, description="start from timm's weights of this name (true), from a timm folder or a .safetensors file"
    )
    options: Annotated[dict[str, Any], BeforeValidator(_options)] = Field(
        {}, description="further arguments of the timm model, such as {reg_tokens: 4} or {window_size: 6}"
    )


class Target(Section):
    """What each tap is asked for. Keys of the three mappings are levels: cells of 2^level pixels, 1 is the finest."""

    kind: str = Field(
        "wavelet",
        description="what is predicted: wavelet, pixels, hog or fourier, or a target of your own by its registered name",
    )
    module: str | None = Field(
        None, description="Python file, or module, that registers a target of your own; null: none"
    )
    options: Annotated[dict[str, Any], BeforeValidator(_options)] = Field(
        {}, description="further arguments of the target's class, such as {signed: true} for hog"
    )
    taps: dict[Annotated[int, Field(ge=0)], Positive] = Field(
        {2: 2, 3: 4, 4: 10, 5: 12},
        min_length=1,
        description="level: encoder block or stage (from 1) that predicts it; 0: the patch, for pixels and fourier",
    )
    weights: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]] = Field(
        {}, description="level: weight of its loss in the sum; 1 where not named"
    )
    weighting: Literal["fixed", "coarse_to_fine", "fine_to_coarse", "learned"] = Field(
        "fixed", description="weights as given, coming in over training in this order, or learned (by uncertainty)"
    )
    bands: dict[Positive, Bands] = Field(
        {}, description="wavelet: level: bands predicted, of A, H, V, D; else HVD, and AHVD at the coarsest tap"
    )
    normalise: Literal["dataset", "patch", "contrast", "none"] = Field(
        "patch",
        description="by the shard set's statistics, per patch (HOG: per cell), wavelet: by the patch's contrast, or not",
    )
    loss: Literal["l2", "l1", "smooth_l1"] = Field("l2", description="error of each value; not for fourier")
    source: Literal["stored", "device"] = Field(
        "stored", description="wavelet: coefficients of the shards, or computed again from the images, on the device"
    )
    bins: Literal[9, 18] = Field(9, description="hog: 9 orientations without sign, or 18 with")
    gamma: float = Field(1.0, gt=0, le=4, description="fourier: power of the distance between spectra")
    focal: float = Field(0.0, ge=0, le=4, description="fourier: power of the weight of large errors; 0: none")

    @property
    def predicts_bands(self) -> bool:
        """Whether taps predict bands of wavelet levels: `wavelet`, and targets of one's own that say so."""
        return registry.predicts_bands(self.kind, self.module)


class Decoder(Section):
    """The light decoder of each tap."""

    width: Positive = Field(256, description="embedding width")
    depth: int = Field(1, ge=0, description="transformer blocks; 0: linear, for encoders that see masked tokens")
    heads: Positive = Field(8, description="attention heads")
    attention: Literal["self", "cross"] = Field(
        "self", description="self: among all tokens; cross: from predicted positions to the encoder's tokens alone"
    )
    shared: bool = Field(False, description="the same blocks for all taps")
    predict: float = Field(1.0, gt=0, le=1, description="share of the hidden positions that is predicted in a step")


class Mask(Section):
    """What is hidden."""

    kind: Literal["random", "block", "energy", "frequency"] = Field(
        "random",
        description="patches or blocks at random; energy: where the wavelet energy is; frequency: a circle of the spectrum",
    )
    ratio: float = Field(0.75, gt=0, lt=1, description="share of the image that is hidden; not for frequency")
    unit: Positive | None = Field(
        None, description="side in pixels of what is hidden at once; null: the patch, and 32 for block and hierarchies"
    )
    strength: float = Field(
        1.0, ge=-10, le=10, description="energy: above 0 hides where the detail is, below 0 where it is not"
    )
    radius: float = Field(16, gt=0, description="frequency: radius of the circle, in cycles an image")
    low_pass_share: Share = Field(0.5, description="frequency: share of images that keep the circle, others lose it")


class Train(Section):
    """Pretraining: length, batch, optimiser, workers."""

    epochs: float = Field(100, gt=0, description="passes over the train split")
    batch: Positive = Field(256, description="images in a step, over all workers")
    accumulate: Positive = Field(
        1, description="parts of a worker's batch that are computed one after another, for batches that do not fit"
    )
    workers: Positive = Field(1, description="data-parallel workers")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="ddp: every worker holds the model; fsdp: weights, gradients and moments are shared out over the "
        "workers, for encoders that do not fit",
    )
    lr: float = Field(1.5e-4, gt=0, description="learning rate for a batch of 256; scaled by batch/256")
    progressive: Annotated[dict[Positive, Share], BeforeValidator(lambda value: {} if value is None else value)] = (
        Field(
            {},
            description="image sizes in pixels, from small to encoder.image_size, each with its share of training, such as "
            "{128: 0.5, 224: 0.5}; smaller images come from the coarse levels alone",
        )
    )
    min_lr_share: Share = Field(0.01, description="the cosine ends at this share of the peak")
    warmup_epochs: float = Field(10, ge=0, description="epochs of linear warm-up")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay (none on norms, biases, positions)")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW betas"
    )
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest gradient norm; null: any")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay a step of an average of the weights, which is then what is judged and exported"
    )
    augment: Literal["window", "rrc"] = Field(
        "window",
        description="window: aligned windows of the stored coefficients; rrc: RandomResizedCrop on the device",
    )
    crop_scale: tuple[Annotated[float, Field(ge=0.01, le=1)], Annotated[float, Field(ge=0.01, le=1)]] = Field(
        (0.2, 1.0), description="rrc: smallest and largest share of the image's area"
    )
    flip: bool = Field(True, description="mirror images at random")
    mix_groups: Positive = Field(8, description="row groups mixed with each other in a worker's buffer")
    reader_threads: Positive | None = Field(
        None, description="threads that read ahead in a worker; null: its cores, up to 8"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs that have it")
    compile: bool = Field(False, description="torch.compile: faster on GPUs after minutes of compiling")
    channels_last: bool | Literal["auto"] = Field(
        "auto",
        description="memory order of images and feature maps in encoders with stages; auto: in those of convolutions",
    )
    recompute: bool = Field(
        False, description="recompute activations going backwards: less memory, about a third more time"
    )
    max_skipped: Positive = Field(
        20, description="steps in a row with a gradient that is not finite, each left out, before training ends"
    )
    checkpoint_every: float = Field(1, gt=0, description="epochs between checkpoints")
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = Field(
        30, description="minutes after a checkpoint that the next one is written at the latest; null: any"
    )
    checkpoints_at: str | None = Field(
        None, description="folder or URL, such as s3://BUCKET/RUNS, that checkpoints are also copied to; null: none"
    )
    keep_checkpoints: Positive = Field(2, description="checkpoints kept")
    keep_best: Annotated[str, Field(pattern="^(train|eval)/")] | None = Field(
        None,
        description="metric by which one more checkpoint is kept, such as train/loss: the lowest, of eval/… the highest",
    )
    log_every: Positive = Field(20, description="steps between logged metrics")
    hang_timeout: Annotated[float, Field(ge=1)] | None = Field(
        600,
        description="seconds without progress after which a worker is ended and training goes on from the last checkpoint; "
        "until the first steps are done 6 times as many, and 300 at least; null: any",
    )
    progress_seconds: float = Field(30, gt=0, description="seconds between lines of progress where no terminal is")
    monitor_minutes: Annotated[float, Field(gt=0)] | None = Field(
        10, description="least minutes between pictures and probes while training; null: none"
    )


class Tracking(Section):
    """MLflow."""

    uri: str | None = Field(None, description="MLflow store; null: MLFLOW_TRACKING_URI, or SQLite in the out folder")
    experiment: str = Field("wavemim", min_length=1, description="MLflow experiment")
    system_metrics: bool = Field(True, description="log CPU, memory, disk, network and GPU")


class Cluster(Section):
    """Where it runs: a Ray cluster, or a private Ray on this machine."""

    address: str | None = Field(None, description="Ray address; null: RAY_ADDRESS, or a private Ray on this machine")
    gpus: bool | None = Field(None, description="train on GPUs; null: where the cluster has them")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of a training worker or trial")
    max_failures: int = Field(3, ge=0, description="times a lost worker group is restarted from its checkpoint")
    min_workers: Positive | None = Field(
        None,
        description="elastic pretraining: go on with as few workers while the cluster has no room for train.workers, and "
        "with more once it has; null: wait for all",
    )
