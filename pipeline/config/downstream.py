"""Settings of what follows pretraining: evaluation, sweeps, export, fine-tuning and segmentation."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.config.behaviour import setting
from pipeline.config.settings import Positive, Section, Share

Protocol = Literal["linear", "blocks", "knn", "attentive", "few_labels", "rank"]


class Evaluate(Section):
    """Evaluation of the encoder on frozen features."""

    protocols: tuple[Protocol, ...] = setting(
        ("linear", "knn", "few_labels", "rank"),
        "What is measured. linear: linear probe. blocks: linear probe of every block. knn: kNN classifier. attentive: "
        "attentive probe. few_labels: linear probe on few labels. rank: RankMe and alpha-ReQ. blocks and attentive each take "
        "at least as long as the others together.",
        min_length=1,
    )
    pool: tuple[Literal["mean", "token"], ...] = setting(
        ("mean", "token"),
        "Vision transformers: how the final tokens become features. mean: the mean of the patch tokens. token: the class token. "
        "The first one that the encoder has is that of all protocols, the second one is measured by linear and knn as well. "
        "Other encoders have features of their own.",
        min_length=1,
        added=True,
    )
    batch: Positive = setting(256, "Images per forward pass.", operational=True)
    max_images: Positive = setting(50_000, "Largest number of train images that probes are fitted to.")
    probe_strengths: tuple[Annotated[float, Field(gt=0)], ...] = setting(
        (0.01, 0.1, 1.0, 10.0),
        "Inverse regularisation strengths, of which the best on a held-out part of train is used.",
        min_length=1,
    )
    probe_iterations: Positive = setting(1000, "Largest number of solver steps of a linear probe.")
    knn_k: Positive = setting(
        20, "Number of neighbours of the kNN classifier. Its accuracy is also measured for 1 to 200 neighbours."
    )
    few_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = setting(
        (0.01, 0.1), "few_labels: shares of the train labels that are used, at least one label per class.", min_length=1
    )
    few_draws: Positive = setting(5, "few_labels: number of random draws of each share.")
    attentive_images: Positive = setting(
        10_000,
        "attentive: largest number of train images whose tokens are kept. Each takes 2 bytes × tokens × width of memory: "
        "0.3 MB for a ViT-B/16 at 224 pixels.",
    )
    attentive_epochs: Positive = setting(20, "attentive: passes over these images.")
    attentive_batch: Positive = setting(256, "attentive: images per step.")
    attentive_lrs: tuple[Annotated[float, Field(gt=0)], ...] = setting(
        (3e-4, 1e-3, 3e-3),
        "attentive: learning rates, of which the best on a held-out part of train is used.",
        min_length=1,
    )


def _spaces(value: Any) -> Any:
    """One search space, or several; a list of one is that one."""
    names = list(value) if isinstance(value, list | tuple) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("must be the name of a search space, the path of a YAML file, or a list of these")
    if len(set(names)) < len(names):
        raise ValueError("the same search space is given twice")
    return names[0] if len(names) == 1 else tuple(names)


class Tune(Section):
    """A sweep: each trial is a short pretraining with some settings changed, ranked by a measure of its frozen features."""

    space: Annotated[tuple[str, ...] | str, BeforeValidator(_spaces)] = setting(
        "level_weights",
        "Search space: a name in tune_spaces/, or the path of a YAML file; or a list of these, which are joined.",
    )
    trials: Positive = setting(
        8,
        "Number of points that are searched; of a space that is a grid, all of its points. It may be raised later: the sweep "
        "then goes on.",
        identity=(),
    )
    recipe_seeds: int = setting(
        3,
        "Trials of the recipe's own settings with different seeds, which measure the noise of a trial.",
        ge=0,
        identity=(),
    )
    finalists: int = setting(
        2, "Number of the best points that are run again with fresh seeds, which decide.", ge=0, identity=()
    )
    fresh_seeds: Positive = setting(3, "Fresh seeds of each finalist.", identity=())
    search: Literal["optuna", "random"] = setting(
        "optuna",
        "How trials are chosen: by Optuna's tree-structured Parzen estimator, or at random. Of a grid, all points are tried.",
    )
    scheduler: Literal["none", "asha", "pbt"] = setting(
        "none",
        "What happens to trials of the search at the rungs, by their objective there. asha: asynchronous successive halving, "
        "those that fall behind are stopped. pbt: population-based training, the worst go on from checkpoints of the best "
        "with changed settings; only settings that can change during training can be searched. Seeds of the recipe and "
        "finalists always run to their end with the same settings.",
        added=True,
    )
    rungs: Positive = setting(
        4,
        "Measurements of the objective per trial, evenly spaced over its training, the one at the end included; a further one "
        "is that of the untrained encoder. 1: only at the end. Those before the end use fewer images where that is needed to "
        "keep them cheap, and in short trials there are fewer of them, unless tune.scheduler needs them.",
        added=True,
    )
    reduction: float = setting(
        2,
        "asha: the reduction factor f. At the rungs 1, f, f², … only trials among the best 1/f of those seen there go on.",
        gt=1,
        added=True,
    )
    quantile: float = setting(
        0.25,
        "pbt: the share of the trials that is replaced at a rung, and the share of those that replace them.",
        gt=0,
        le=0.5,
        added=True,
    )
    cost: Literal["flops", "seconds", "gpu_hours"] | None = setting(
        None,
        "Cost of a trial as a second objective: Optuna then looks for points of high accuracy and low cost, and the report has "
        "the Pareto front. null: accuracy alone.",
        added=True,
    )
    epochs: float = setting(5, "Epochs per trial.", gt=0)
    images: Positive | None = setting(
        None,
        "Budget: images that all trials together are trained on, each epoch counted. Once the trials that are still to come "
        "(seeds of the recipe, finalists) would need the rest, no new point is searched. null: no limit.",
        identity=(),
    )
    hours: Annotated[float, Field(gt=0)] | None = setting(
        None,
        "Budget: wall-clock hours of the sweep, counted over all its calls, as tune.images. null: no limit.",
        identity=(),
    )
    gpu_hours: Annotated[float, Field(gt=0)] | None = setting(
        None, "Budget: GPU-hours of all trials together, as tune.images. null: no limit.", identity=()
    )
    max_images: Positive = setting(
        10_000,
        "Largest number of train images that the probe at the end of a trial is fitted to; of short trials, which are to be cheap, "
        "it is fitted to fewer.",
    )
    concurrent: Positive | None = setting(
        None, "Number of trials that run at the same time. null: one per free GPU or CPU.", operational=True
    )
    gpus_per_trial: float = setting(
        1,
        "GPUs that a trial reserves, at most 1: 0.25 lets four trials share a GPU and its memory. Without effect on CPUs.",
        gt=0,
        le=1,
        operational=True,
    )


class Export(Section):
    """Exports of the encoder in addition to the folder that timm and transformers load."""

    onnx: bool = setting(
        False,
        "Also export as ONNX, verified with onnxruntime. Needs pip install 'wavemim[onnx]'.",
        operational=True,  # added to the export that is there, as is a registered version
    )
    registry: Annotated[str, Field(pattern=r"^[^/:]+$")] | None = setting(
        None,
        "Name in MLflow's model registry under which the ONNX model is registered as a new version. null: none.",
        operational=True,
    )


_PARTS = r"(mstd|inc|m|n|p)\d+(\.\d+)?|t[a-z]+"


def _policy(value: str) -> str:
    """RandAugment in timm's notation. timm itself ignores the parts that it does not know."""
    if not re.fullmatch(rf"rand(-({_PARTS}))+", value):
        raise ValueError("must be a policy that timm calls rand-…, such as rand-m9-mstd0.5-inc1, or null for none")
    return value


class Finetune(Section):
    """Fine-tuning of the encoder as a classifier. The defaults are those of MAE ViT-B, but for finetune.warmup_prefix."""

    epochs: float = setting(100, "Passes over the train split.", gt=0)
    image_size: Positive | None = setting(
        None,
        "Side of the images in pixels, at most that of the stored ones. Positions are resampled; windows of Swin keep their "
        "share of the image. null: the encoder's training size.",
        added=True,
    )
    batch: Positive = setting(1024, "Global batch size: images per step over all workers.")
    accumulate: Positive = setting(
        1,
        "Gradient accumulation: number of parts in which each worker computes its batch, for batches that do not fit into "
        "memory.",
    )
    workers: Positive = setting(1, "Number of data-parallel workers.", operational=True)
    lr: float = setting(5e-4, "Learning rate of the head for a batch of 256; scaled linearly with the batch.", gt=0)
    layer_decay: float = setting(
        0.65,
        "Layer-wise learning rate decay: each layer's rate is that of the layer above times this. 1: the same for all.",
        gt=0,
        le=1,
    )
    min_lr_share: Share = setting(5e-4, "Final learning rate of the cosine schedule, as a share of the peak.")
    warmup_epochs: float = setting(5, "Epochs of linear warm-up.", ge=0)
    warmup_prefix: bool = setting(
        False,
        "Where the cosine schedule starts. true: at the end of the warm-up, at the peak, as in MAE. false: at the first step; "
        "the warm-up replaces its first part, and the rate drops where the warm-up ends, as in SimMIM.",
        added=True,
    )
    weight_decay: float = setting(0.05, "Weight decay of AdamW. Norms, biases, tokens and positions have none.", ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = setting(
        (0.9, 0.999), "Betas of AdamW."
    )
    clip_grad: Annotated[float, Field(gt=0)] | None = setting(
        None, "Gradients are clipped to this norm. null: no clipping."
    )
    drop_path: float = setting(
        0.1,
        "Stochastic depth: probability that an image skips the last block, decreasing linearly towards the first.",
        ge=0,
        lt=1,
    )
    mixup: float = setting(0.8, "Alpha of mixup. 0: none.", ge=0)
    cutmix: float = setting(1.0, "Alpha of CutMix, which alternates with mixup. 0: none.", ge=0)
    label_smoothing: float = setting(0.1, "Label smoothing: share of a label spread over all classes.", ge=0, lt=1)
    erasing: Share = setting(0.25, "Random erasing: share of images in which a rectangle is replaced by noise.")
    rand_augment: Annotated[str, AfterValidator(_policy)] | None = setting(
        "rand-m9-mstd0.5-inc1", "RandAugment policy in timm's notation, computed on the CPU. null: none."
    )
    crop_scale: tuple[Annotated[float, Field(ge=0.01, le=1)], Annotated[float, Field(ge=0.01, le=1)]] = setting(
        (0.08, 1.0), "RandomResizedCrop: smallest and largest share of the image's area that a crop covers."
    )
    flip: bool = setting(True, "Random horizontal flips.")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = setting(
        None,
        "Decay per step of an exponential moving average of the weights, which is then evaluated and saved. null: no "
        "average.",
    )
    head: Literal["mean", "token"] = setting(
        "mean",
        "ViT: what the classifier is applied to. mean: the mean of the patch tokens, then normalised, as in MAE. token: the "
        "class token.",
    )
    freeze: bool = setting(False, "Train the classifier only: a linear probe on augmented images.")
    eval_every: Positive = setting(1, "Epochs between evaluations on val.")
    eval_batch: Positive = setting(256, "Images per worker and forward pass during evaluation.", operational=True)
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Precision of the computation. auto: bfloat16 on GPUs that support it, float32 elsewhere."
    )
    reader_threads: Positive | None = setting(
        None,
        "Threads per worker that read and augment images. null: as many as the worker has cores, at most 8.",
        operational=True,
    )
    log_every: Positive = setting(20, "Steps between logged metrics.", operational=True)


class Segment(Section):
    """Evaluation of frozen patch tokens by semantic segmentation: mean IoU of a linear head."""

    images: str | None = setting(
        None,
        "Folder or URL of the images. If it has train/ and val/, these are the splits; otherwise segment.val_share is held "
        "out.",
        place=True,
    )
    masks: str | None = setting(
        None,
        "Folder or URL of the PNG masks, which have the same relative paths as the images. Pixel values are classes.",
        place=True,
    )
    image_ending: str = setting(
        "", "Ending of the images' names that the masks' names do not have, such as _leftImg8bit."
    )
    mask_ending: str = setting(
        "", "Ending of the masks' names that the images' names do not have. Other files are skipped."
    )
    classes: Positive | str | None = setting(
        None,
        "Number of classes, or a text file with one class name per line, starting with value 0. null: the values found in "
        "train.",
    )
    ignore: tuple[Annotated[int, Field(ge=0, le=65535)], ...] = setting(
        (255,), "Values of pixels that are ignored in training and evaluation."
    )
    image_size: Positive | None = setting(
        None, "Side in pixels to which the central square of each image is resized. null: the encoder's training size."
    )
    blocks: tuple[Positive, ...] | None = setting(
        None, "Blocks or stages, counted from 1, whose tokens the head receives. null: the last one.", min_length=1
    )
    val_share: float = setting(
        0.2, "Share of the images held out as the val split where the folders name no val split.", gt=0, lt=1
    )
    max_images: Positive = setting(5000, "Largest number of images of each split that are used, drawn by the seed.")
    max_rejected: Share = setting(
        0.01, "Largest tolerated share of rejected inputs; 10 are always tolerated.", operational=True
    )
    steps: Positive = setting(1500, "Training steps of each head.")
    train_batch: Positive = setting(16, "Images per training step.")
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = setting(
        (1e-2, 1e-1),
        "Learning rates of AdamW, of which the best on a held-out part of train (at most 1000 images) is used.",
        min_length=1,
    )
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = setting(
        (1e-3, 1.0), "Weight decays of AdamW that are tried with each learning rate.", min_length=1
    )
    batch: Positive = setting(32, "Images per forward pass of the encoder.", operational=True)
