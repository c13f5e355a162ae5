"""Pictures: what is completed is right; files are real pictures, whole or absent."""

import numpy as np
import torch
from PIL import Image
from tiny import make, photos, stored

from wavemim.figures import _grid, complete, loss_figure, reconstruction_figure, sweep_figure
from wavemim.masking import random_mask, share_at
from wavemim.wavelets import reconstruct


def test_visible_patches_are_kept_and_hidden_ones_are_the_prediction():
    images = photos(3)
    model, inputs = make(images)
    normalised, pyramid = inputs(stored(images))
    mask = random_mask(torch.arange(3), model.encoder.grid, 0.5, seed=0, epoch=0)
    completed, _ = complete(model.eval(), normalised, pyramid, mask)
    rebuilt = reconstruct(completed)
    # a coarse cell that is partly hidden is mixed, so only cells that are visible whole come back exactly
    whole = (
        share_at(mask, model.encoder.grid, 4).reshape(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3) == 0
    )
    assert whole.any()
    difference = (rebuilt - torch.from_numpy(images).float()).abs()
    assert difference[whole.expand(-1, 3, -1, -1)].max() < 1e-2
    assert difference[~whole.expand(-1, 3, -1, -1)].mean() > 1


def test_reconstruction_figure(tmp_path):
    images = photos(3)
    model, inputs = make(images)
    path = tmp_path / "r.png"
    reconstruction_figure(
        path, model=model, inputs=inputs, stored=stored(images), rows=torch.arange(3), mask_ratio=0.5, seed=0
    )
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] > picture.shape[0] > 300  # 6 columns, 3 lines
    assert picture.std() > 20
    assert [p.name for p in tmp_path.iterdir()] == ["r.png"]


def test_sweep_and_loss_figures(tmp_path):
    trials = [
        {"mask.ratio": 0.5, "target.weights.3": 0.1, "eval/rankme": 20.0},
        {"mask.ratio": 0.7, "target.weights.3": 3.0, "eval/rankme": 24.0},
        {"mask.ratio": 0.6, "target.weights.3": 1.0, "eval/rankme": float("nan")},
    ]
    sweep_figure(tmp_path / "s.png", trials, parameters=["mask.ratio", "target.weights.3"], metric="eval/rankme")
    sweep_figure(tmp_path / "none.png", trials[2:], parameters=["mask.ratio"], metric="eval/rankme")
    loss_figure(tmp_path / "l.png", [{"epoch": e, "train/loss_level3": 1 / e} for e in (1, 2, 3)])
    for name in ("s.png", "none.png", "l.png"):
        assert Image.open(tmp_path / name).size[0] > 200


def test_other_channel_counts_are_drawn_too(tmp_path):
    for channels in (1, 2, 3, 5):
        path = tmp_path / f"{channels}.png"
        _grid(path, [("a", torch.rand(2, channels, 16, 16) * 255), ("b", torch.rand(2, channels, 16, 16) * 255)])
        assert np.asarray(Image.open(path).convert("RGB")).std() > 10
