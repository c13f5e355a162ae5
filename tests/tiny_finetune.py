"""A tiny encoder, and settings and images for fine-tuning it within seconds."""

import timm
import torch
from tiny_shards import photos, write_set

from pipeline.config.load import load, with_overrides
from pipeline.models.encoder_source import subject_of
from pipeline.training.finetune_loop import finetune
from wavemim.weights.timm_folder import export_timm

VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "in_chans": 3, "num_classes": 0}
VIT |= {"global_pool": "avg", "fc_norm": False, "class_token": True}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (1, 1, 2, 2)}
SWIN |= {"in_chans": 3, "num_classes": 0}
NAMES = {"vit_tiny_patch16_224": VIT, "swin_tiny_patch4_window7_224": SWIN}
EASY = {  # a lot in a few steps, on pictures whose class is their colour
    **{"finetune.epochs": 10, "finetune.batch": 16, "finetune.warmup_epochs": 1, "finetune.lr": 3e-2},
    **{"finetune.rand_augment": None, "finetune.mixup": 0, "finetune.cutmix": 0, "finetune.erasing": 0},
    **{"finetune.label_smoothing": 0, "finetune.eval_every": 5, "finetune.log_every": 5},
    **{"finetune.reader_threads": 1, "finetune.crop_scale": [0.5, 1.0], "tracking.system_metrics": False},
}


def encoder_of(name, **changes):
    torch.manual_seed(0)
    arguments = {**NAMES[name], **changes}
    return timm.create_model(name, **arguments), arguments


def coloured_set(folder):
    """A shard set of 64 train and 32 val pictures of three classes, each brighter in a channel of its own."""
    images = photos(96) // 2
    for i in range(len(images)):
        images[i, i % 3] += 100
    return write_set(folder, images)


def recipe_for(shards, folder, **changes):
    """Easy settings, and as checkpoint= an untrained encoder in timm's format, written to `folder`."""
    encoder, arguments = encoder_of("vit_tiny_patch16_224", depth=2)
    export_timm(
        folder / "encoder",
        encoder,
        architecture="vit_tiny_patch16_224",
        arguments=arguments,
        pixel_mean=shards.pixel_mean,
        pixel_std=shards.pixel_std,
        about={},
    )
    places = {"shards": str(shards.folder), "checkpoint": str(folder / "encoder"), "out": str(folder / "out")}
    return with_overrides(load("small"), {**places, **EASY, **changes})


def tuned(recipe, shards, **options):
    """Fine-tune in this process."""
    return finetune(recipe, subject_of(recipe, shards), shards, device=torch.device("cpu"), **options)
