"""Pictures: what they show of a model is right; files are real pictures, whole or absent."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, make, masking_of, photos, statistics, stored
from tiny_images import images_of

from wavemim.encoders.hierarchical import HierarchicalEncoder
from wavemim.encoders.vit import ViTEncoder
from wavemim.figures.plots import loss_figure, plt, save_figure
from wavemim.figures.reconstruction import HIDDEN_GREY, VISIBLE_GREY, _figure, compare, reconstruction_figure
from wavemim.inputs import Inputs
from wavemim.masking import Frequencies, Masking
from wavemim.model import DecoderSettings, MaskedImageModel
from wavemim.targets import FourierTarget, HOGTarget, PixelTarget, Tap, WaveletTarget
from wavemim.views import Views
from wavemim.wavelets import decompose

SIDE = 64  # that the smallest hierarchical encoder takes
LEVELS = {  # name -> (target, levels from the first tap on, further arguments)
    "wavelet": (WaveletTarget, (2, 3, 4, 5), {}),
    "wavelet per patch": (WaveletTarget, (2, 4), {"normalise": "patch"}),
    "wavelet by contrast": (WaveletTarget, (2, 4), {"normalise": "contrast"}),
    "pixels": (PixelTarget, (0,), {"normalise": "patch"}),
    "pixels at two cells": (PixelTarget, (2, 3), {"loss": "l1"}),
    "hog": (HOGTarget, (2, 3), {"bins": 18}),
    "fourier": (FourierTarget, (0,), {}),
    "fourier in octaves": (FourierTarget, (1, 2, 3), {"gamma": 2.0}),
}
MASKS = {
    "random": lambda cell: Masking("random", 0.75, SIDE // cell, unit=8 // cell),
    "block": lambda cell: Masking("block", 0.5, SIDE // cell, unit=32 // cell),
    "energy": lambda cell: Masking("energy", 0.5, SIDE // cell, unit=8 // cell),
    "frequency": lambda cell: Masking("frequency", 0.5, SIDE // cell),
}


def build(kind, encoder="vit", mask="random", channels=3, count=2):
    """(model, view, pixels) of a tiny untrained model."""
    torch.manual_seed(0)
    pixels = images_of(count, channels, SIDE)
    stats = statistics(pixels, 5)
    if encoder == "vit":
        shape = {"image_size": SIDE, "patch_size": 8, "channels": channels, "width": 32, "depth": 4, "heads": 2}
        backbone = ViTEncoder("vit_tiny_patch16_224", **shape, sees="whole" if mask == "frequency" else "visible")
    else:
        options = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
        backbone = HierarchicalEncoder(
            "swin_tiny_patch4_window7_224",
            image_size=SIDE,
            channels=channels,
            options=options,
            sees="whole" if mask == "frequency" else "masked",
        )
    target_class, levels, arguments = LEVELS[kind]
    taps = [Tap(level, 4 - place, "") for place, level in enumerate(reversed(levels))]
    if target_class is WaveletTarget:
        taps = [Tap(tap.level, tap.block, "AHVD" if tap.level == max(levels) else "HVD") for tap in taps]
    sizes = {tap.level: backbone.token_size(tap.block) for tap in taps}
    target = target_class(taps, stats, image_size=SIDE, token_sizes=sizes, **arguments)
    masking = MASKS[mask](backbone.cell)
    settings = DecoderSettings(width=16, depth=0 if encoder == "swin" else 1, heads=2)
    model = MaskedImageModel(backbone, target, hidden=masking.hidden, decoder=settings).eval()
    inputs = Inputs(dict.fromkeys(range(1, 6), 1.0), stats)
    views = Views(inputs, masking, seed=1, frequencies=Frequencies(8) if mask == "frequency" else None)
    values = torch.from_numpy(pixels)
    view = views.of(inputs.normalise(values), decompose(values, 5), torch.arange(count), epoch=0)
    return model, view, pixels


def losses_one_by_one(model, view):
    """(B, T): the model's losses of every image in a batch of its own."""
    found = []
    with torch.no_grad():
        truth = model.target(view.images, view.pyramid)
        for number in range(len(view.images)):
            one = slice(number, number + 1)
            spectrum = None if view.spectrum is None else view.spectrum[one]
            targets = {level: values[one] for level, values in truth.items()}
            scheduled = model.level_weights.at(1.0)
            _, losses = model(view.seen[one], targets, view.mask[one], torch.ones(1), scheduled, None, spectrum)
            found.append(losses)
    return torch.stack(found)


CASES = [(kind, "vit", "random") for kind in LEVELS]
CASES += [("wavelet", "swin", "block"), ("wavelet", "vit", "energy"), ("hog", "swin", "frequency")]
CASES += [("fourier", "swin", "frequency"), ("fourier in octaves", "vit", "frequency")]


@pytest.mark.parametrize(("kind", "encoder", "mask"), CASES)
def test_losses_are_the_models_and_maps_average_to_them(kind, encoder, mask):
    model, view, pixels = build(kind, encoder, mask)
    comparison = compare(model, view)
    assert [level.level for level in comparison.levels] == sorted(LEVELS[kind][1], reverse=True)
    expected = losses_one_by_one(model, view)
    for level in comparison.levels:
        torch.testing.assert_close(level.loss, expected[:, model.levels.index(level.level)], rtol=1e-4, atol=1e-5)
        if comparison.by_frequency or level.hidden is None:
            mean = level.error.nanmean((1, 2)).nan_to_num(0)  # of what was not hidden at all: 0
        else:
            known = level.error.nan_to_num(0)
            assert torch.equal(level.error.isnan(), level.hidden == 0)
            mean = (known * level.hidden).sum((1, 2)) / level.hidden.sum((1, 2))
        torch.testing.assert_close(mean, level.loss, rtol=1e-4, atol=1e-5)
        assert level.note == (" (hidden)" if comparison.by_frequency and mask == "frequency" else "")
        assert level.true.shape == level.predicted.shape and level.true.isfinite().all()
        for shown, error in zip(level.true, level.error, strict=True):
            assert (shown.std() > 10) == bool(error.isfinite().any())  # what was asked for can be seen
    np.testing.assert_allclose(comparison.image.numpy(), pixels, atol=1e-2)
    assert (comparison.rebuilt is None) == (kind == "hog")


@pytest.mark.parametrize(("kind", "encoder"), [("wavelet", "vit"), ("pixels", "vit"), ("fourier in octaves", "swin")])
def test_visible_patches_are_kept_and_hidden_ones_are_the_prediction(kind, encoder):
    model, view, pixels = build(kind, encoder)
    comparison = compare(model, view)
    hidden = torch.nn.functional.interpolate(
        view.mask.float().reshape(len(pixels), 1, model.encoder.grid, -1), scale_factor=model.encoder.cell
    ).numpy()[:, 0]
    seen, rebuilt = comparison.seen.numpy(), comparison.rebuilt.numpy()
    for image, shown, made, away in zip(pixels, seen, rebuilt, hidden > 0, strict=True):
        np.testing.assert_allclose(shown[:, ~away], image[:, ~away], atol=1e-2)
        assert (shown[:, away] == HIDDEN_GREY).all()
        if kind != "wavelet":  # whose coarse cells are mixed by their hidden share
            np.testing.assert_allclose(made[:, ~away], image[:, ~away], atol=1e-2)
        assert np.abs(made - image)[:, away].mean() > 1
    assert comparison.seen_as == ["masked (75% hidden)"] * 2


def test_wavelet_cells_that_are_visible_whole_come_back_exactly():
    images = photos(3)
    model, inputs = make(images)
    view = Views(inputs, masking_of(), seed=0)(stored(images), torch.arange(3), epoch=0)
    rebuilt = compare(model.eval(), view).rebuilt.numpy()
    cells = view.mask.reshape(3, 4, 2, 4, 2).any(4).any(2).numpy()  # of 8 pixels: the coarsest tap's
    partly = cells.repeat(8, 1).repeat(8, 2)[:, None].repeat(3, 1)
    assert not partly.all()
    np.testing.assert_allclose(rebuilt[~partly], images[~partly], atol=1e-2)


@pytest.mark.parametrize("kind", ["fourier", "wavelet"])
def test_frequencies_that_were_seen_are_kept(kind):
    model, view, pixels = build(kind, "vit", "frequency", count=6)
    comparison = compare(model, view)
    kept = ~view.spectrum.numpy()
    assert {"low-pass filtered", "high-pass filtered"} == set(comparison.seen_as)
    for number, image in enumerate(pixels):
        truth, made, seen = (
            np.fft.fft2(values[number]) for values in (pixels, comparison.rebuilt.numpy(), comparison.seen.numpy())
        )
        where = kept[number]
        np.testing.assert_allclose(made[:, where], truth[:, where], atol=2)
        np.testing.assert_allclose(seen[:, where], truth[:, where], atol=2)
        assert np.abs(made - truth)[:, ~where].mean() > 20
        assert comparison.seen_as[number].startswith("low") == where[0, 0]
        if kind == "fourier" and where[0, 0]:  # what was asked for is without the mean, around mid-grey
            np.testing.assert_allclose(comparison.levels[0].true[number].mean((1, 2)), 127.5, atol=0.1)
        elif kind == "fourier":
            smooth = image - np.fft.ifft2(np.fft.fft2(image) * where).real
            np.testing.assert_allclose(comparison.levels[0].true[number], smooth, atol=0.05)


@pytest.mark.parametrize(("kind", "across"), [("wavelet", 1), ("hog", 2), ("fourier", 2)])
def test_every_image_has_all_its_panels(kind, across):
    model, view, _ = build(kind, count=4)
    comparison = compare(model, view)
    taps = len(comparison.levels)
    figure = _figure(comparison, ["one", "$two$", "three", "鳥"])
    try:
        assert len(figure.axes) == 4 * 3 * (1 + taps) + across * taps  # colour bars
        titles = [axis.get_title() for axis in figure.axes]
        for level in comparison.levels:
            name = f"level {level.level}" if level.level else "patch"
            assert titles.count(f"{name} · target") == titles.count(f"{name} · predicted") == 4
            for loss in level.loss:
                assert f"{name} · error {loss:.3g}" in titles
        assert titles.count("image") == titles.count("masked (75% hidden)") == 4
        assert titles.count("reconstruction") == (0 if kind == "hog" else 4)
        assert [text.get_text() for text in figure.texts] == ["one", "$two$", "three", "鳥"]
        predicted = figure.axes[titles.index(f"{comparison.levels[-1].name} · predicted")]
        shown = predicted.images[0].get_array()
        visible = ~view.mask[0].reshape(8, 8).numpy()
        scale = shown.shape[0] // 8
        assert (shown[visible.repeat(scale, 0).repeat(scale, 1)] == int(255 * VISIBLE_GREY)).all()
        pixels = figure.get_size_inches() * figure.dpi
        boxes = [axis.get_position() for axis in figure.axes]
        assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
        panel = boxes[0].x1 * pixels[0] - boxes[0].x0 * pixels[0]
        assert panel == pytest.approx(192)  # a whole multiple of the image's side
    finally:
        plt.close(figure)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_the_file_of_any_number_of_channels(tmp_path, channels):
    images = photos(2)[:, [0, 1, 2, 0, 1][:channels]]
    stats = statistics(images)
    encoder = ViTEncoder(
        "vit_tiny_patch16_224", image_size=SIZE, patch_size=4, channels=channels, width=32, depth=1, heads=2
    )
    target = WaveletTarget([Tap(2, 1, "AHVD")], stats, image_size=SIZE, token_sizes={2: 4})
    masking = masking_of()
    model = MaskedImageModel(encoder, target, hidden=masking.hidden, decoder=DecoderSettings(16, 1, 2)).eval()
    views = Views(Inputs({level: 2.0**-level for level in range(1, 5)}, stats), masking, seed=0)
    path = tmp_path / "r.png"
    reconstruction_figure(path, model=model, views=views, stored=stored(images), rows=torch.arange(2), epoch=2)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert picture.std() > 20 and min(picture.shape[:2]) > 600
    first = picture[40:220, 20:190]  # within the first image
    assert (np.abs(first[..., 0] - first[..., 2]).max() > 10) == (channels > 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.png"]


def test_the_mask_is_that_of_the_epoch(tmp_path):
    images = photos(1)
    model, inputs = make(images)
    views = Views(inputs, masking_of(), seed=0)
    given = {"model": model.eval(), "views": views, "stored": stored(images), "rows": torch.arange(1)}
    drawn = reconstruction_figure(tmp_path / "r.png", **given, epoch=1)
    seen = [compare(model, views(stored(images), torch.arange(1), epoch=epoch)).seen for epoch in (0, 1)]
    assert torch.equal(drawn.seen, seen[1]) and not torch.equal(drawn.seen, seen[0])


def test_a_figure_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "r.png"
    path.write_bytes(b"before")
    figure = plt.figure()

    def full(target, **_):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        save_figure(figure, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.png"] and path.read_bytes() == b"before"
    assert not plt.fignum_exists(figure.number)


def test_loss_figure(tmp_path):
    loss_figure(tmp_path / "l.png", [{"epoch": e, "train/loss_level3": 1 / e} for e in (1, 2, 3)])
    assert Image.open(tmp_path / "l.png").size[0] > 200


def test_class_names_are_no_mathematics(tmp_path):
    from wavemim.figures.confusion import confusion_figure

    confusion_figure(tmp_path / "c.png", np.eye(3), ["a$_$", "x_$^$", "$"], title="of a$_$")
    assert (tmp_path / "c.png").stat().st_size > 1000
