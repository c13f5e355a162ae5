"""`wavemim show`: numbers are the model's losses on the user's picture, and mistakes are one line each."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from PIL import Image
from stage_calls import wavemim
from tiny_checkpoint import SIDE, write_checkpoint
from tiny_images import images_of

from pipeline import cli
from wavemim.masking import random_mask
from wavemim.weights import checkpoint


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with one checkpoint."""
    folder = tmp_path_factory.mktemp("out") / "runs" / "small"
    write_checkpoint(folder / "pretrain" / "images-000000000008")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with two photos: one as large as the model takes, one that is cut and resized."""
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("a.png", "b.jpg"), images_of(2, 3, SIDE, seed=5), strict=True):
        Image.fromarray(image.astype(np.uint8).transpose(1, 2, 0)).save(tmp_path / name)
    Image.open("b.jpg").resize((90, 60)).save("b.jpg")
    return tmp_path


def literal_losses(model, stats, pixels, *, ratio, seed):
    """{level: loss} of one image (3, H, W), its targets by PyWavelets, normalised per patch."""
    _, *details = pywt.wavedec2(pixels, "haar", "periodization", 3, axes=(-2, -1))
    approximation = pywt.wavedec2(pixels, "haar", "periodization", 3, axes=(-2, -1))[0]
    mask = random_mask(torch.arange(1), 8, ratio, seed=seed, epoch=0)
    normal = (pixels - np.reshape(stats.pixel_mean, (3, 1, 1))) / np.reshape(stats.pixel_std, (3, 1, 1))
    with torch.no_grad():
        predicted = model.predict(torch.from_numpy(normal).float()[None], mask)
    hidden = mask.numpy().reshape(8, 8).astype(float)
    losses = {}
    for level, bands in ((3, dict(zip("AHVD", (approximation, *details[0]), strict=True))), (2, details[1])):
        bands = bands if level == 3 else dict(zip("HVD", bands, strict=True))
        standard = np.stack(
            [
                (values - np.reshape(stats.mean[level][band], (3, 1, 1)))
                / np.reshape(stats.std[level][band], (3, 1, 1))
                for band, values in bands.items()
            ],
            1,
        )  # (C, K, h, w), a cell a position
        vectors = standard.reshape(-1, standard.shape[-1] ** 2).T
        vectors = (vectors - vectors.mean(1, keepdims=True)) / np.sqrt(vectors.var(1, ddof=1, keepdims=True) + 1e-6)
        error = np.square(predicted[level][0].numpy() - vectors).mean(1)
        share = hidden if level == 2 else hidden.reshape(4, 2, 4, 2).mean((1, 3))
        losses[level] = (error * share.flatten()).sum() / share.sum()
    return losses


def test_numbers_are_the_models_losses_on_that_picture(run_folder, here, monkeypatch, capsys):
    folder = run_folder / "pretrain" / "images-000000000008"
    model, stats = write_checkpoint(here / "same")  # the same seed: the same weights
    pixels = np.asarray(Image.open("a.png")).transpose(2, 0, 1).astype(float)
    for where, options, ratio, seed in (
        (folder, [], 0.75, 0),
        (folder.parent, ["--seed", 7], 0.75, 7),
        (run_folder, ["--mask-ratio", 0.5, "--out", "other.png"], 0.5, 0),
    ):
        out = options[-1] if "--out" in options else "show.png"
        code, said, err = wavemim(monkeypatch, capsys, "show", where, "a.png", *options)
        assert (code, err, said.count("\n")) == (0, "", 1)
        assert said.startswith(f"{out}: 1 image; error of level 3 ")
        model.visible = 64 - round(64 * ratio)
        losses = literal_losses(model, stats, pixels, ratio=ratio, seed=seed)
        printed = {int(level): float(value) for level, value in re.findall(r"level (\d) ([\d.]+)", said)}
        assert printed == {level: pytest.approx(loss, rel=1e-3) for level, loss in losses.items()}
        assert np.asarray(Image.open(out).convert("RGB")).std() > 20
    shutil.rmtree("same")
    assert sorted(path.name for path in here.iterdir()) == ["a.png", "b.jpg", "other.png", "show.png"]


def test_several_pictures_are_decoded_as_prepare_does(run_folder, here, monkeypatch, capsys):
    Image.open("a.png").convert("L").save("grey.png")
    one = {}
    for name in ("a.png", "b.jpg", "grey.png"):
        code, said, _ = wavemim(monkeypatch, capsys, "show", run_folder, name)
        one[name] = [float(value) for value in re.findall(r"level \d ([\d.]+)", said)]
        assert code == 0 and len(one[name]) == 2
    assert one["grey.png"] != one["a.png"]
    single = Image.open("show.png").size
    names = ["a.png"] * 16  # other masks of the same picture
    code, said, _ = wavemim(monkeypatch, capsys, "show", run_folder, *names)
    assert code == 0 and said.startswith("show.png: 16 images; mean error of level 3 ")
    assert Image.open("show.png").size > single
    code, _, err = wavemim(monkeypatch, capsys, "show", run_folder, *names, "b.jpg")
    assert code == 2 and "17 images" in err and "16" in err


TARGETS = {
    "pixels": ["target.kind=pixels", "target.normalise=patch", "target.taps={0: 2}"],
    "hog": ["target.kind=hog", "target.taps={2: 1, 3: 2}"],
    "fourier": ["target.kind=fourier", "target.taps={0: 2}", "mask.kind=frequency", "mask.radius=6"],
    "energy": ["mask.kind=energy", "data.channels=2"],
}


@pytest.mark.parametrize("kind", TARGETS)
def test_every_target(here, monkeypatch, capsys, kind):
    channels = 2 if kind == "energy" else 3
    write_checkpoint(here / "c", *TARGETS[kind], channels=channels)
    name = "a.png"
    if channels == 2:
        np.save("two.npy", images_of(1, 2, 40)[0].astype(np.uint8))
        name = "two.npy"
    code, said, err = wavemim(monkeypatch, capsys, "show", "c", name)
    first = "patch" if kind in ("pixels", "fourier") else "level 3"
    assert (code, err) == (0, "") and said.startswith(f"show.png: 1 image; error of {first} ")
    if kind == "fourier":
        code, _, err = wavemim(monkeypatch, capsys, "show", "c", name, "--mask-ratio", 0.5)
        assert code == 2 and "mask.kind=frequency" in err


def test_mistakes_are_one_line_and_nothing_is_written(run_folder, here, monkeypatch, capsys):
    (here / "notes.jpg").write_text("not a picture, but long enough to be looked at")
    (here / "empty.jpg").write_bytes(b"")
    (here / "folder").mkdir()
    (here / "notes.png").write_text("mine")
    Image.new("RGB", (5, 50)).save("thin.png")
    np.save("five.npy", np.zeros((5, 40, 40), np.uint8))
    before = sorted(path.name for path in here.iterdir())
    mistakes = [
        (["nowhere", "a.png"], "nowhere: no such folder"),
        (["a.png", "a.png"], "a.png: a file; give the folder of a checkpoint"),
        (["folder", "a.png"], "folder: no checkpoint in it"),
        ([run_folder, "c.jpg"], "c.jpg: No such file"),
        ([run_folder, "a.png", "notes.jpg"], "notes.jpg: not an image"),
        ([run_folder, "empty.jpg"], "empty.jpg: empty file"),
        ([run_folder, "folder"], "folder: a folder; name image files"),
        ([run_folder, "thin.png"], "thin.png: too small (5×50 pixels, data.min_side=8)"),
        ([run_folder, "five.npy"], "five.npy: wrong channel count (5, data.channels=3)"),
        ([run_folder, "a.png", "--out", "x/y.png"], "'x/y.png' cannot be written: its folder does not exist"),
        ([run_folder, "a.png", "--out", "show.jpg"], "ends with .png"),
        ([run_folder, "a.png", "--out", "notes.png"], "is not a PNG"),
        ([run_folder, "a.png", "--mask-ratio", "0.001"], "mask.ratio=0.001: a ratio of 0.001 hides 0 of 64"),
        ([run_folder, "a.png", "--mask-ratio", "1"], "mask-ratio"),
        ([run_folder], "Missing argument 'IMAGE...'"),
    ]
    for arguments, words in mistakes:
        code, out, err = wavemim(monkeypatch, capsys, "show", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err, (arguments, err)
    assert sorted(path.name for path in here.iterdir()) == before and (here / "notes.png").read_text() == "mine"


def test_a_damaged_checkpoint_ends_with_1(run_folder, here, monkeypatch, capsys):
    shutil.copytree(run_folder, "run")
    folder = Path("run/pretrain/images-000000000008")
    weights = folder / checkpoint.MODEL
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for where in (folder, folder.parent, "run"):
        code, out, err = wavemim(monkeypatch, capsys, "show", where, "a.png")
        assert (code, out, err.count("\n")) == (1, "", 1) and "is damaged" in err
    assert not Path("show.png").exists()


def test_a_process_of_its_own_loads_no_ray(run_folder, here):
    root = os.path.dirname(os.path.dirname(cli.__file__))
    code = (
        "import sys; from pipeline.tools.show import show; print(show(sys.argv[1], ['a.png', 'b.jpg'], out='s.png')); "
        "print(sorted({'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_folder)],
        capture_output=True,
        text=True,
        cwd=here,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("s.png: 2 images; mean error of level 3 ")
    assert done.stdout.splitlines()[1] == "[]" and "Traceback" not in done.stderr
