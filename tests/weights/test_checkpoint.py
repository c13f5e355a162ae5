"""Checkpoints: complete or absent, strict, resumed exactly; the export as timm loads it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import make_step, photos, stored

from wavemim.weights import checkpoint
from wavemim.weights.timm_folder import export_timm

CONTRACT = (  # what other tools may rely on in a checkpoint's names
    "encoder.model.patch_embed.proj.weight",
    "encoder.model.blocks.0.attn.qkv.weight",
    "encoder.model.norm.weight",
    "decoders.3.trunk.mask_token",
    "decoders.3.head.weight",
)


def steps(step, images, first, last):
    return [
        step(stored(images), torch.arange(8), torch.ones(8), 8.0, epoch=0, step=i).losses for i in range(first, last)
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_equals_no_interruption(tmp_path, optimizer):
    images = photos(8)
    undisturbed = make_step(images, optimizer=optimizer)
    steps(undisturbed, images, 0, 3)
    checkpoint.save(tmp_path / "c", undisturbed.model, undisturbed.optimizer, {"images": 24})
    expected = steps(undisturbed, images, 3, 6)
    resumed = make_step(images, seed=99, optimizer=optimizer)
    checkpoint.load_model(tmp_path / "c", resumed.model)
    checkpoint.load_optimizer(tmp_path / "c", resumed.model, resumed.optimizer)
    for a, b in zip(steps(resumed, images, 3, 6), expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(resumed.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_names_are_a_contract_and_weights_hold_no_pickle(tmp_path):
    from safetensors import safe_open

    step = make_step(photos(4))
    checkpoint.save(tmp_path / "c", step.model, step.optimizer, {"images": 0})
    with safe_open(tmp_path / "c" / "model.safetensors", "pt") as file:
        assert set(CONTRACT) <= set(file.keys())
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_damaged_and_unfinished_checkpoints_are_skipped(tmp_path):
    step = make_step(photos(4))
    for images in (10, 20, 30):
        checkpoint.save(tmp_path / f"images-{images}", step.model, step.optimizer, {"images": images})
    assert checkpoint.latest(tmp_path).name == "images-30"
    weights = tmp_path / "images-30" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.read_state(tmp_path / "images-30")
    assert checkpoint.latest(tmp_path).name == "images-20"
    (tmp_path / "images-20" / "state.json").unlink()
    assert checkpoint.latest(tmp_path).name == "images-10"
    (tmp_path / "images-10" / "optimizer.safetensors").unlink()
    assert checkpoint.latest(tmp_path) is None


def test_newer_format_is_refused(tmp_path):
    step = make_step(photos(4))
    checkpoint.save(tmp_path / "c", step.model, None, {"images": 0})
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    (tmp_path / "c" / "state.json").write_text(json.dumps(state | {"format": checkpoint.FORMAT + 1}))
    with pytest.raises(
        checkpoint.CheckpointError, match=f"format {checkpoint.FORMAT + 1}.*reads {checkpoint.FORMAT}; train again"
    ):
        checkpoint.read_state(tmp_path / "c")


FRESH = """
import json, sys, numpy, timm, torch, warnings
folder, images, out = sys.argv[1:]
config = json.load(open(f"{folder}/config.json"))
by_name = timm.create_model(config["architecture"], pretrained=True,
    pretrained_cfg_overlay={**config["pretrained_cfg"], "file": f"{folder}/model.safetensors"},
    **config["model_args"]).eval()
by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
x = torch.from_numpy(numpy.load(images))
with torch.no_grad():
    numpy.savez(out, name=by_name(x).numpy(), folder=by_folder(x).numpy())
classifier = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
assert classifier(x).shape == (len(x), 7)
assert "wavemim" not in sys.modules
"""


def test_timm_loads_the_export_in_a_fresh_process(tmp_path):
    images = photos(8)
    step = make_step(images)
    steps(step, images, 0, 2)
    model = step.model.eval()
    export_timm(
        tmp_path / "export",
        model.encoder.model,
        architecture=model.encoder.name,
        arguments=model.encoder.arguments,
        pixel_mean=[120.0, 110.0, 100.0],
        pixel_std=[60.0, 61.0, 62.0],
        about={"recipe": "tiny"},
    )
    x = step.views.inputs(stored(images))[0]
    np.save(tmp_path / "x.npy", x.numpy())
    arguments = [str(tmp_path / "export"), str(tmp_path / "x.npy"), str(tmp_path / "out.npz")]
    done = subprocess.run([sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.encoder.model(x).numpy()
    for features in np.load(tmp_path / "out.npz").values():
        assert np.abs(features - expected).max() < 1e-5


def test_a_missing_weight_is_not_loaded_silently(tmp_path):
    """The strictness that the export relies on is timm's: this holds timm to it."""
    import timm
    from safetensors.torch import load_file, save_file

    model = make_step(photos(4)).model
    config = export_timm(
        tmp_path / "export", model.encoder.model, architecture=model.encoder.name, arguments=model.encoder.arguments,
        pixel_mean=[1.0] * 3, pixel_std=[1.0] * 3, about={},
    )  # fmt: skip
    weights = load_file(tmp_path / "export" / "model.safetensors")
    del weights["blocks.1.norm1.weight"]
    save_file(weights, tmp_path / "broken.safetensors")
    overlay = {**config["pretrained_cfg"], "file": str(tmp_path / "broken.safetensors")}
    with pytest.raises(RuntimeError, match=r"blocks\.1\.norm1\.weight"):
        timm.create_model(
            config["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, **config["model_args"]
        )


def test_a_checkpoint_that_the_disk_does_not_return_is_skipped(tmp_path, monkeypatch, caplog):
    step = make_step(photos(4))
    for images in (10, 20):
        checkpoint.save(tmp_path / f"images-{images}", step.model, step.optimizer, {"images": images})
    real = checkpoint.checksum

    def failing(path):
        if path.parent.name == "images-20":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "checksum", failing)
    assert checkpoint.latest(tmp_path).name == "images-10"
    assert "images-20 is skipped" in caplog.text and "Input/output error" in caplog.text
    state = json.loads((tmp_path / "images-20" / checkpoint.STATE).read_text())
    del state["files"]
    (tmp_path / "images-20" / checkpoint.STATE).write_text(json.dumps(state))
    with pytest.raises(checkpoint.CheckpointError, match="lists no files"):
        checkpoint.read_state(tmp_path / "images-20")
