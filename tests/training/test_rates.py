"""Learning rates of the recipes against the formulas of the methods' code, as functions of the epochs trained so far.

Step number s, from 0 on, trains at the formula's rate after s + 1 steps. MAE's and LocalMIM's code has the rate after s
steps there, whose first is 0; SimMIM's and MFM's have that after s - 1, and the warm-up's first rate in the first two.
"""

import math

import pytest
import torch

from pipeline.config.load import load
from pipeline.training.schedule import TrainSchedule
from pipeline.training.setup import schedule_of

IMAGES = 1_281_167  # ImageNet's train split


def after_warm_up(epoch, peak, lowest, epochs, warm):
    """MAE, LocalMIM: half a cycle of a cosine, from the end of the warm-up to that of training."""
    if epoch < warm:
        return peak * epoch / warm
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (epochs - warm)))


def from_step_zero(epoch, peak, lowest, epochs, warm):
    """SimMIM, MFM: half a cycle over all of training, behind the warm-up."""
    return (
        peak * epoch / warm
        if epoch < warm
        else lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    )


# Of the papers' code: the formula, the highest and the final rate, epochs, epochs of warm-up.
PRETRAINED = {
    "mae_vit_base": (after_warm_up, 1.5e-4 * 4096 / 256, 0.0, 1600, 40),
    "localmim_vit_base": (after_warm_up, 2e-4 * 2048 / 256, 1e-6, 100, 10),
    "mfm_vit_base": (from_step_zero, 3e-4 * 2048 / 512, 2.5e-6 * 2048 / 512, 300, 20),
    "simmim_swin_base": (from_step_zero, 1e-4 * 2048 / 512, 5e-6 * 2048 / 512, 800, 10),  # their cosine; see the header
    "wamim_vit_base": (after_warm_up, 2e-4 * 2048 / 256, 0.01 * 1.6e-3, 100, 10),  # LocalMIM's, but for the end
    "wamim_swin_base": (after_warm_up, 1e-4 * 2048 / 256, 0.01 * 8e-4, 100, 10),
    "wamim_vit_large": (after_warm_up, 1.5e-4 * 4096 / 256, 0.01 * 2.4e-3, 800, 40),
}
PRETRAINED |= {name.replace("base", "small"): PRETRAINED[name] for name in ("mae_vit_base", "localmim_vit_base")}
FINETUNED = {
    "mae_vit_base": (after_warm_up, 5e-4 * 1024 / 256, 1e-6, 100, 5),
    "localmim_vit_base": (after_warm_up, 4e-3, 1e-6, 100, 20),
    "mfm_vit_base": (from_step_zero, 2e-3 * 2048 / 512, 2.5e-7 * 2048 / 512, 100, 5),
    "simmim_swin_base": (from_step_zero, 1.25e-3 * 2048 / 512, 2.5e-7 * 2048 / 512, 100, 20),
    "wamim_vit_base": (after_warm_up, 4e-3, 1e-6, 100, 20),
    "wamim_vit_large": (after_warm_up, 3e-3, 1e-6, 50, 5),
}
FINETUNED |= {name.replace("base", "small"): FINETUNED[name] for name in ("mae_vit_base", "localmim_vit_base")}


def rates_of(settings, lengths, steps, layer_decay):
    """{steps done: (rate of the head, rate of a layer below)} by the recipe, of optimisers whose rate is the peak."""
    groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr_scale": layer_decay}]
    optimizer = torch.optim.SGD(groups, lr=settings.lr * lengths.batch / 256)
    schedule, found = schedule_of(settings, lengths, optimizer), {}
    for step in steps:
        schedule.step_update(step)
        found[step] = [group["lr"] for group in optimizer.param_groups]
    return found


@pytest.mark.parametrize(
    ("name", "stage"), [*((name, "train") for name in PRETRAINED), *((name, "finetune") for name in FINETUNED)]
)
def test_rates_are_those_of_the_published_formula(name, stage):
    recipe = load(name)
    if stage == "train":
        settings, lengths = recipe.train, TrainSchedule.of(recipe, IMAGES)
        formula, peak, lowest, epochs, warm = PRETRAINED[name]
    else:
        settings, lengths = recipe.finetune, TrainSchedule.of_finetuning(recipe, IMAGES)
        formula, peak, lowest, epochs, warm = FINETUNED[name]
    a = lengths.batches_per_epoch
    # In the warm-up, at its end, soon after it, late, and at the end of training.
    steps = [warm * a // 3, warm * a, (warm + 1) * a, epochs * a * 3 // 4, epochs * a]
    assert lengths.total_steps == steps[-1]
    found = rates_of(settings, lengths, steps, 0.3)
    for step in steps:
        expected = formula(step / a, peak, lowest, epochs, warm)
        assert found[step] == pytest.approx([expected, 0.3 * expected], rel=1e-4, abs=1e-12), step
    if stage == "finetune" and warm / epochs >= 0.2:  # the formulas are well apart where the warm-up ends
        assert found[warm * a][0] / peak == pytest.approx(1.0 if formula is after_warm_up else 0.9046, abs=1e-4)


def test_a_run_whose_warm_up_rounds_to_all_of_its_steps_ends_at_the_peak():
    recipe = load("mae_vit_base", ["train.epochs=0.004", "train.warmup_epochs=0.0035"])
    lengths = TrainSchedule.of(recipe, IMAGES)
    assert lengths.total_steps == lengths.warmup_steps == 1
    peak = pytest.approx(1.5e-4 * 4096 / 256)
    assert rates_of(recipe.train, lengths, [1], 1.0) == {1: [peak, peak]}
