"""`wavemim.load_encoder`: from every kind of folder the same features, and images as pretraining sees them."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from stage_calls import run_stage
from tiny_checkpoint import SIDE, SMALL, write_checkpoint
from tiny_images import images_of
from tiny_shards import smooth_texture

import wavemim
from pipeline.config.load import load
from pipeline.images.arrays import Pixels
from pipeline.images.decode import decode_image
from pipeline.stages import export
from wavemim.finetune import make_classifier
from wavemim.weights import checkpoint
from wavemim.weights.checkpoint import CheckpointError
from wavemim.weights.timm_folder import export_timm


def expected_of(model, statistics, pixels):
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (statistics.pixel_mean, statistics.pixel_std))
    with torch.inference_mode():
        return model.encoder.model((pixels - mean) / std)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run with a checkpoint and an export, its model, the statistics of its images)."""
    recipe = load("small", [*SMALL, f"out={tmp_path_factory.mktemp('out')}", "tracking.system_metrics=false"])
    model, statistics = write_checkpoint(recipe.stage_dir("pretrain") / "images-000000000008")
    run_stage(export, recipe)
    return recipe.run_dir, model, statistics


@pytest.fixture(scope="module")
def encoder(run):
    return wavemim.load_encoder(run[0])


def pixels_of(count=3, channels=3):
    return torch.from_numpy(images_of(count, channels, SIDE, seed=9))


PLACES = ["", "pretrain", "pretrain/images-000000000008", "export", "export/encoder"]


@pytest.mark.parametrize("place", PLACES)
def test_every_folder_gives_the_features_of_the_trained_encoder(run, place):
    folder, model, statistics = run
    found = wavemim.load_encoder(folder / place)
    assert not found.training and found.image_size == SIDE and found.channels == 3 and found.num_features == 32
    pixels = pixels_of()
    expected = expected_of(model, statistics, pixels)
    with torch.inference_mode():
        torch.testing.assert_close(found(pixels.byte()), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found(found.normalise(pixels)), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.model(found.normalise(pixels.byte())), expected, atol=1e-5, rtol=1e-5)
    assert str(folder) in repr(found)


def test_a_run_without_checkpoints_gives_its_export(run, tmp_path):
    folder, model, statistics = run
    shutil.copytree(folder / "export", tmp_path / "run" / "export")
    found = wavemim.load_encoder(str(tmp_path / "run"))
    assert found.source.endswith("export/encoder")
    with torch.inference_mode():
        expected = expected_of(model, statistics, pixels_of())
        torch.testing.assert_close(found(pixels_of().byte()), expected, atol=1e-5, rtol=1e-5)


def test_the_average_of_the_weights_is_taken_where_there_is_one(run, tmp_path):
    folder, model, _ = run
    state = checkpoint.read_state(folder / "pretrain" / "images-000000000008")
    averaged, _ = write_checkpoint(tmp_path / "other")
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(0.5)
    about = {key: value for key, value in state.items() if key not in ("format", "files")}
    checkpoint.save(tmp_path / "both", model, None, about, averaged)
    found = wavemim.load_encoder(tmp_path / "both").model.state_dict()
    for key, value in averaged.encoder.model.state_dict().items():
        assert torch.equal(found[key], value), key
    (tmp_path / "best.json").write_text(json.dumps({"checkpoint": "both", "metric": "train/loss", "value": 1.0}))
    assert wavemim.load_encoder(tmp_path / "best.json").source == str(tmp_path / "both")


@pytest.mark.parametrize(
    "settings",
    [
        ["encoder.sees=masked", "encoder.positions=learned"],
        ["encoder.class_token=false", "encoder.options={reg_tokens: 2}"],
        [
            *("encoder.name=swin_tiny_patch4_window7_224", "encoder.patch_size=null", "encoder.width=null"),
            *("encoder.depth=null", "encoder.heads=null", "target.taps={2: 1, 3: 4}", "mask.unit=8"),
            "encoder.options={window_size: 2, embed_dim: 24, depths: [1, 1, 1, 1], num_heads: [1, 2, 2, 2]}",
        ],
    ],
    ids=["masked", "registers", "swin"],
)
def test_encoders_of_every_kind_without_touching_the_random_state(tmp_path, settings):
    model, statistics = write_checkpoint(tmp_path / "checkpoint", *settings, channels=4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = wavemim.load_encoder(tmp_path / "checkpoint")
    assert torch.equal(torch.get_rng_state(), before) and found.channels == 4
    pixels = pixels_of(2, 4)
    expected = expected_of(model, statistics, pixels)
    arrays = list(pixels.byte().permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(found.features(arrays), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"takes images of 4 channels; give uint8 arrays"):
        found.features(Image.new("RGB", (40, 40)))


def test_a_classifier_gives_its_encoder(run, tmp_path):
    _, model, statistics = run
    encoder = model.encoder
    classifier, arguments = make_classifier(
        encoder.model, encoder.name, encoder.arguments, classes=3, drop_path=0.0, head="mean"
    )
    values = {"pixel_mean": statistics.pixel_mean, "pixel_std": statistics.pixel_std}
    export_timm(
        tmp_path / "classifier", classifier, architecture=encoder.name, arguments=arguments,
        about={}, classes=["a", "b", "c"], **values,
    )  # fmt: skip
    found = wavemim.load_encoder(tmp_path / "classifier")
    assert found.features(Image.new("RGB", (50, 40), "red")).shape == (1, 32)


def encoded(image, kind, **options):
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def with_orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def photo(width=150, height=110, seed=1):
    return smooth_texture(np.random.default_rng(seed), width, height)


def see_through():
    image = photo(60, 80).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


FILES = {
    "jpeg.jpg": lambda: encoded(photo(), "JPEG", quality=90),
    "large.jpg": lambda: encoded(photo(700, 520), "JPEG", quality=90),  # decoded at a part of its size
    **{
        f"turned{number}.jpg": (lambda number=number: encoded(photo(), "JPEG", exif=with_orientation(number)))
        for number in range(2, 9)
    },
    "grey.jpg": lambda: encoded(photo().convert("L"), "JPEG"),
    "cmyk.jpg": lambda: encoded(photo().convert("CMYK"), "JPEG"),
    "transparent.png": lambda: encoded(see_through(), "PNG"),
    "grey-transparent.png": lambda: encoded(see_through().convert("LA"), "PNG"),
    "palette.png": lambda: encoded(photo().quantize(32), "PNG"),
    "one-bit.png": lambda: encoded(photo().convert("1"), "PNG"),
    "small.webp": lambda: encoded(photo(20, 31), "WEBP"),
    "photo.tif": lambda: encoded(photo(), "TIFF"),
    "colours.gif": lambda: encoded(photo(), "GIF"),
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("limits", [None, (30.0, 200.0)], ids=["whole", "range"])
@pytest.mark.parametrize("name", FILES)
def test_files_become_the_pixels_that_pretraining_sees(tmp_path, run, name, channels, limits):
    data = FILES[name]()
    (tmp_path / name).write_bytes(data)
    wanted = decode_image(data, name, Pixels(SIDE, channels, value_range=limits))
    loaded = wavemim.ImageEncoder(
        torch.nn.Flatten(), image_size=SIDE, mean=[0.0] * channels, std=[1.0] * channels, value_range=limits
    )
    if name == "one-bit.png" and limits:  # the range counts in values that Pillow does not keep
        with pytest.raises(ValueError, match=r"one-bit.png: an image of mode '1', not of 8 bits"):
            loaded.preprocess(tmp_path / name)
        return
    found = loaded.preprocess(tmp_path / name)
    assert found.shape == (1, channels, SIDE, SIDE) and found.dtype == torch.float32
    assert np.array_equal(found[0].numpy(), wanted)


def test_images_in_memory_are_taken_like_files(encoder, tmp_path):
    image = photo()
    image.save(tmp_path / "photo.png")
    expected = encoder.preprocess(tmp_path / "photo.png")
    for same in (image, np.asarray(image), str(tmp_path / "photo.png"), [image], iter([image])):
        assert torch.equal(encoder.preprocess(same), expected)
    grey = np.asarray(image.convert("L"))
    assert torch.equal(encoder.preprocess([grey, grey[..., None]]), encoder.preprocess([image.convert("L")] * 2))
    assert encoder.preprocess([]).shape == (0, 3, SIDE, SIDE)
    assert image.size == (150, 110)  # left as it was


def test_features_in_batches_are_those_of_all_at_once(encoder):
    images = [photo(50 + number, 60, number) for number in range(5)]
    features = encoder.features(images)
    assert features.shape == (5, 32) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(encoder.features(iter(images), batch=2), features, atol=1e-5, rtol=1e-5)
    assert encoder.features([]).shape == (0, 32)
    assert len(set(map(tuple, features.tolist()))) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: np.zeros((8, 8, 3), np.float32), "an array of float32 8 × 8 × 3: must be uint8"),
        (lambda folder: np.zeros((8, 8, 5), np.uint8), "an array of 8 × 8 × 5: the encoder takes images of 3 channels"),
        (lambda folder: Image.new("I;16", (40, 40)), "mode 'I;16', not of 8 bits"),
        (lambda folder: written(folder / "text.jpg", b"no image"), r"text.jpg: not an image of a known format"),
        (lambda folder: written(folder / "cut.jpg", FILES["jpeg.jpg"]()[:900]), r"cut.jpg: .*truncated"),
        (lambda folder: folder / "none.jpg", "none.jpg"),
    ],
)
def test_images_that_cannot_be_taken_are_named(encoder, tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        encoder.features([make(tmp_path)])


def written(path, data):
    path.write_bytes(data)
    return path


def damaged(source, target, change):
    shutil.copytree(source, target)
    change(target)
    return target


def test_folders_that_hold_no_encoder_are_refused_in_one_line(run, tmp_path):
    folder = run[0]
    newest, exported = folder / "pretrain" / "images-000000000008", folder / "export" / "encoder"
    (tmp_path / "empty").mkdir()

    def cut(path):
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[:-8] + bytes(8 * [1]))

    def unpickled(path):
        (path / "model.safetensors").rename(path / "pytorch_model.bin")

    def renamed(path):
        state = json.loads((path / "state.json").read_text())
        state["recipe"]["encoder"]["name"] = "vit_nothing"
        (path / "state.json").write_text(json.dumps(state))

    cases = [
        (tmp_path / "nothing", "no such folder"),
        (written(tmp_path / "file.pt", b""), "a file; give a folder"),
        (tmp_path / "empty", "no encoder in it; give a run's folder"),
        (tmp_path / "best.json", "no such file, or not one that pretraining wrote"),
        (damaged(newest, tmp_path / "cut", cut), "is damaged"),
        (damaged(newest, tmp_path / "renamed", renamed), "cannot be built: encoder.name: timm has no model"),
        (damaged(exported, tmp_path / "pickle", unpickled), "lacks model.safetensors; other files of weights are not"),
        (damaged(exported, tmp_path / "config", lambda path: (path / "config.json").write_text("{}")), "not one of timm's"),
    ]  # fmt: skip
    for place, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            wavemim.load_encoder(place)
        assert "\n" not in str(caught.value)
