"""What is recorded: each recipe as it is, and settings that no recipe has. Data alone, without imports of the project."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 20
TWO_LEVELS = str(Path(__file__).with_name("two_levels.yaml"))  # a recipe with targets at two blocks
TRAIN_ROWS = 38  # five batches an epoch, the last one of six images

# For every case. The learning rate, 1e-3 at the peak, is one at which losses move within 20 steps.
COMMON: dict[str, Any] = {
    "decoder.width": 16,
    "decoder.heads": 2,
    "train.epochs": 4,
    "train.batch": 8,
    "train.workers": 1,
    "train.lr": 0.032,
    "train.warmup_epochs": 1,
    "train.log_every": 1,
    "train.checkpoint_every": 0.6,  # three steps: also in the middle of epochs
    "finetune.epochs": 4,
    "finetune.batch": 8,
    "finetune.workers": 1,
    "finetune.lr": 0.1,
    "finetune.warmup_epochs": 1,
    "finetune.log_every": 1,
    # Crops by Pillow and no operation: recorded when what RandAugment drew depended on the timing of threads.
    "finetune.rand_augment": "rand-n0",
    "finetune.eval_every": 2,
    "finetune.eval_batch": 8,
    "finetune.reader_threads": 1,
    "cluster.cpus_per_worker": 1,
}


@dataclass(frozen=True)
class Case:
    """A run of 20 steps."""

    recipe: str = TWO_LEVELS
    settings: dict[str, Any] = field(default_factory=dict)  # dotted keys, over the narrowed recipe
    resume: int | None = None  # what is recorded after this step is of a run that is resumed from its checkpoint
    encoder: str | None = None  # fine-tuning: the recipe whose last checkpoint is fine-tuned


PRETRAINING = {
    "two levels": Case(),
    "gradient accumulation, average of the weights, resumed": Case(
        settings={"train.accumulate": 2, "train.ema": 0.9}, resume=12
    ),
    "growing images, resumed in the first size": Case(
        settings={"train.progressive": {32: 0.5, 64: 0.5}, "encoder.positions": "learned"}, resume=6
    ),
    "growing images, resumed in the second size": Case(
        settings={"train.progressive": {32: 0.5, 64: 0.5}, "train.ema": 0.8, "train.accumulate": 2}, resume=12
    ),
    "activation checkpointing": Case(settings={"train.recompute": True, "encoder.options": {"drop_path_rate": 0.2}}),
    "bfloat16": Case(settings={"train.precision": "bfloat16"}),
    "learned level weights": Case(settings={"target.weighting": "learned"}),
    "level weights from coarse to fine": Case(
        settings={"target.weighting": "coarse_to_fine", "target.weights": {3: 0.5}}
    ),
    "level weights from fine to coarse": Case(settings={"target.weighting": "fine_to_coarse"}),
    "shared decoder": Case(settings={"decoder.shared": True}),
    "cross-attention to half of the hidden patches": Case(
        settings={"decoder.attention": "cross", "decoder.predict": 0.5}
    ),
    "energy masks": Case(settings={"mask.kind": "energy", "mask.strength": -1.0}),
    "energy masks of blocks, of a hierarchy": Case(
        recipe="wamim_convnext_tiny", settings={"mask.kind": "energy", "mask.strength": 2.0}
    ),
    "frequency masks with a decoder": Case(settings={"mask.kind": "frequency", "mask.radius": 8}),
    "block masks, SimMIM with a ViT": Case(
        settings={
            "target": {"kind": "pixels", "taps": {0: 4}, "loss": "l1"},
            "mask": {"kind": "block", "unit": 16},
            "encoder.sees": "masked",
            "decoder.depth": 0,
        }
    ),
    "wavelet db2": Case(settings={"data.wavelet": "db2", "target.normalise": "dataset"}),
    "coefficients computed on the device, of crops": Case(
        recipe="wamim_vit_tiny", settings={"target.source": "device", "train.augment": "rrc"}
    ),
    "lossless grey images, contrast, smooth L1": Case(
        settings={
            "data.steps": "lossless",
            "data.channels": 1,
            "target.normalise": "contrast",
            "target.loss": "smooth_l1",
        }
    ),
    "HOG of 18 bins, not normalised": Case(
        settings={"target.kind": "hog", "target.bins": 18, "target.normalise": "none"}
    ),
    "Fourier with focal weights": Case(
        settings={"target": {"kind": "fourier", "taps": {0: 4}, "gamma": 0.5, "focal": 1.0}, "mask.ratio": 0.5}
    ),
    "bands of single levels, without class token and mirroring": Case(
        settings={
            "target.bands": {3: "HV", 4: "AD"},
            "encoder.class_token": False,
            "train.flip": False,
            "train.mix_groups": 2,
        }
    ),
    "a hierarchy with batch norm": Case(
        settings={
            "encoder": {
                "name": "resnet10t",
                "image_size": 64,
                "options": {"channels": [8, 8, 16, 16], "stem_width": 8},
            },
            "target.taps": {2: 1, 3: 2, 4: 4},
            "mask.unit": 16,
            "train.accumulate": 2,
        },
        resume=9,
    ),
}

# Both ranks train at the same time; the checkpoint of the first is gone on with by one process alone.
TWO_WORKERS = {
    "two workers, DDP": Case(settings={"train.workers": 2, "train.accumulate": 2, "train.clip_grad": 0.5}, resume=12),
    "two workers, FSDP": Case(settings={"train.workers": 2, "train.parallel": "fsdp", "train.ema": 0.9}),
}
AFTER_TWO = "one worker resumes from two"

FINETUNING = {
    "fine-tuning: ViT, mixing and erasing, resumed": Case(
        encoder="two levels",
        settings={
            "finetune.mixup": 0.8,
            "finetune.cutmix": 1.0,
            "finetune.erasing": 0.5,
            "finetune.drop_path": 0.2,
            "finetune.ema": 0.9,
            "finetune.accumulate": 2,
            "finetune.clip_grad": 1.0,
        },
        resume=10,
    ),
    "fine-tuning: Swin, mixing on the device": Case(
        recipe="wamim_swin_tiny",
        encoder="wamim_swin_tiny",
        settings={"finetune.rand_augment": None, "finetune.accumulate": 2, "finetune.drop_path": 0.2},
    ),
    "fine-tuning: ConvNeXt in bfloat16": Case(
        recipe="wamim_convnext_tiny",
        encoder="wamim_convnext_tiny",
        settings={"finetune.precision": "bfloat16", "finetune.mixup": 0.0, "finetune.ema": 0.5},
    ),
    "fine-tuning: frozen ViT, class token": Case(
        encoder="two levels", settings={"finetune.freeze": True, "finetune.head": "token", "finetune.flip": False}
    ),
}

# Not recorded: the smallest change of a weight of the loss that float32 has, to see that it is noticed.
PROBE = Case(settings={"target.weights": {3: 1 + 2**-23}})
