"""Segmentation: measures against scikit-learn, the loss against a literal one, what can and cannot be learnt, pairing."""

import csv
import json
import os
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from stage_calls import run_stage

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError, StageError
from pipeline.evaluation.left_out import counted, left_out, share_without
from pipeline.evaluation.segmentation import plan_segmentation
from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.pairs import Pair, find_pairs, mask_values, nearest_square, read_pair, upright_size
from pipeline.storage.folder import Folder
from wavemim.evaluation.segmentation import (
    IGNORED,
    Fitting,
    LinearHead,
    Scores,
    choose,
    fit,
    measures,
    pixel_loss,
    score,
    tokens_of,
)
from wavemim.figures.segmentation import class_colour
from wavemim.weights.timm_folder import export_timm

COLOURS = np.array([[120, 120, 120], [200, 40, 40], [40, 180, 60], [50, 60, 210]])
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0, "in_chans": 3}


def quarters(count, seed=0, size=32):
    """Images (n, 3, S, S) of four flat quarters with noise, and their classes (n, S, S), IGNORED in a corner."""
    generator = np.random.default_rng(seed)
    classes = generator.integers(0, 4, (count, 2, 2)).repeat(size // 2, 1).repeat(size // 2, 2)
    images = (COLOURS[classes] + generator.normal(0, 20, (*classes.shape, 3))).clip(0, 255)
    classes[:, :2, :2] = IGNORED
    return images.transpose(0, 3, 1, 2).astype(np.uint8), classes


class InMemory:
    """Tokens of a random tiny encoder."""

    def __init__(self, images, classes):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
        with torch.no_grad():
            tokens = tokens_of(model, torch.from_numpy(images).float() / 64 - 2, [1, 2])
        self.tokens = [values.half().clone() for values in tokens]
        self.classes = torch.from_numpy(classes)

    def __len__(self):
        return len(self.classes)

    def fetch(self, rows):
        return [values[rows] for values in self.tokens], self.classes[rows]


# measures


@pytest.fixture
def pixels():
    """Truth with ignored pixels and without class 4, and predictions without classes 3 and 4."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, (6, 16, 16))
    predicted = np.where(generator.random(truth.shape) < 0.6, truth % 3, generator.integers(0, 3, truth.shape))
    truth[generator.random(truth.shape) < 0.2] = IGNORED
    truth[5] = IGNORED  # an image that counts nowhere
    return truth, predicted


def test_measures_are_those_of_scikit_learn(pixels):
    truth, predicted = pixels
    scores = Scores.of(truth, predicted, 5)
    true, found = truth[truth != IGNORED], predicted[truth != IGNORED]
    by_class = jaccard_score(true, found, average=None, labels=[0, 1, 2, 3])
    np.testing.assert_allclose(scores.iou()[:4], by_class, rtol=1e-12)
    assert by_class[3] == 0 and np.isnan(scores.iou()[4])  # missed everywhere, and nowhere to be missed
    assert scores.miou() == pytest.approx(jaccard_score(true, found, average="macro"), rel=1e-12)
    np.testing.assert_array_equal(scores.confusion, confusion_matrix(true, found, labels=range(5)))
    assert scores.pixel_accuracy() == pytest.approx((true == found).mean(), rel=1e-12)


def test_measures_are_those_of_a_literal_loop(pixels):
    truth, predicted = pixels
    ious = []
    for number in range(5):
        both = either = 0
        for true, found in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if true != IGNORED:
                both += true == number and found == number
                either += true == number or found == number
        ious += [both / either] if either else []
    assert Scores.of(truth, predicted, 5).miou() == pytest.approx(sum(ious) / len(ious), rel=1e-12)
    halves = Scores.joined([Scores.of(truth[part], predicted[part], 5) for part in (slice(2), slice(2, None))])
    assert halves.miou() == Scores.of(truth, predicted, 5).miou()


def test_a_set_without_counted_pixels_has_no_miou():
    scores = Scores.of(np.full((2, 4, 4), IGNORED), np.zeros((2, 4, 4), int), 3)
    assert np.isnan(scores.miou()) and np.isnan(scores.pixel_accuracy())


def test_what_is_not_measured_is_said_with_its_share():
    """Fails where ignored or cropped pixels, or classes without val pixels, go unsaid or are counted wrongly."""
    counts = Counter({int(value): n for value, n in json.loads(counted(np.array([[0, 255], [255, 3]]))).items()})
    assert share_without(counts, (0, 3)) == 0.5
    result = {
        "classes": 4,
        "classes_without_val": ["sky"],
        "ignored_share": {"train": 0.384, "val": 0.25},
        "cropped_share": 0.333,
    }
    said = left_out(result, (255,))
    assert "25% of the classes have no pixel in val and no IoU: sky." in said
    assert "segment.ignore=[255]: 25.0% of the pixels of val and 38.4% of those of train" in said
    assert "33.3% of an image on average" in said and left_out({"classes": 4}, (255,)) == ""


def test_the_interval_is_of_images_and_covers_as_often_as_it_says():
    """Images right to a share each: the bootstrap's interval of the accuracy has the width of that of their mean."""
    generator = np.random.default_rng(1)
    shares = generator.uniform(0.3, 0.9, 60)
    truth = np.zeros((60, 20, 20), int)
    predicted = (generator.random(truth.shape) > shares[:, None, None]).astype(int)
    found = dict(measures(Scores.of(truth, predicted, 2), seed=0))
    means = 100 * (predicted == 0).mean((1, 2))
    width = found["eval/segment_pixel_accuracy_high"] - found["eval/segment_pixel_accuracy_low"]
    assert width == pytest.approx(2 * 1.96 * means.std() / 60**0.5, rel=0.1)
    assert found["eval/segment_pixel_accuracy"] == pytest.approx(means.mean())
    assert found["eval/segment_miou_low"] < found["eval/segment_miou"] < found["eval/segment_miou_high"]
    whole = dict(measures(Scores.of(truth, truth, 2), seed=0))
    assert whole["eval/segment_miou"] == whole["eval/segment_miou_low"] == 100  # class 1 occurs nowhere


# the head


def test_the_head_and_its_loss_are_a_literal_restatement():
    """Concatenated maps, standardised, times a matrix; every pixel's logits a weighted mean of four tokens'."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, d, side, side, generator=generator) for d, side in ((5, 4), (3, 2))]
    means, stds = ([torch.rand(d, generator=generator) + add for d in (5, 3)] for add in (0.0, 0.5))
    head = LinearHead(means, stds, 3)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    truth = torch.randint(-1, 3, (2, 8, 8), generator=generator)

    def resized(values, side):  # (B, c, h, w) → (B, c, side, side), half-pixel centres, edges repeated
        old = values.shape[-1]
        at = ((torch.arange(side) + 0.5) * old / side - 0.5).clamp(0, old - 1)
        low = at.floor().long()
        high, share = (low + 1).clamp_max(old - 1), at - low
        rows = values[:, :, low] * (1 - share)[:, None] + values[:, :, high] * share[:, None]
        return rows[..., low] * (1 - share) + rows[..., high] * share

    joined = torch.cat(
        [resized((v - m[:, None, None]) / s[:, None, None], 4) for v, m, s in zip(maps, means, stds, strict=True)], 1
    )
    matrix = torch.cat([linear.weight.flatten(1) for linear in head.maps], 1)
    logits = resized(torch.einsum("cd,bdhw->bchw", matrix, joined) + head.maps[0].bias[:, None, None], 8)
    torch.testing.assert_close(head(maps, 8), logits)
    terms = [
        -torch.log_softmax(logits[b, :, y, x], 0)[truth[b, y, x]]
        for b in range(2)
        for y in range(8)
        for x in range(8)
        if truth[b, y, x] != IGNORED
    ]
    torch.testing.assert_close(pixel_loss(head(maps, 8), truth), torch.stack(terms).mean())
    assert pixel_loss(logits, torch.full((2, 8, 8), IGNORED)) == 0


def test_coloured_quarters_are_learnt_and_shuffled_masks_are_not():
    train, val = InMemory(*quarters(60)), InMemory(*quarters(30, seed=1))
    how = Fitting(classes=4, size=32, steps=80, batch=16, seed=0)
    lr, weight_decay, tried = choose(train, how, (1e-4, 0.1), (0.01,))
    assert (lr, weight_decay) == (0.1, 0.01) and tried[1]["miou"] > tried[0]["miou"]
    head = fit(train, np.arange(60), how, lr=lr, weight_decay=weight_decay)
    assert score(head, val, np.arange(30), how).miou() > 0.8
    train.classes = train.classes[torch.randperm(60, generator=torch.Generator().manual_seed(2))]
    shuffled = fit(train, np.arange(60), how, lr=lr, weight_decay=weight_decay)
    assert score(shuffled, val, np.arange(30), how).miou() < 0.35


@pytest.mark.parametrize(
    ("name", "arguments", "shapes"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}, [(8, 16, 16), (64, 2, 2)]),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}, [(8, 16, 16), (64, 2, 2)]),
        ("vit_tiny_patch16_224", {"img_size": 64, "embed_dim": 16, "depth": 4, "num_heads": 2, "reg_tokens": 2}, [(16, 4, 4)] * 2),
    ],
)  # fmt: skip
def test_tokens_lie_where_the_image_has_them(name, arguments, shapes):
    """Channels first whatever the model's own order, prefix tokens gone, and a bright corner is in the first token."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    images = torch.zeros(2, 3, 64, 64)
    images[1, :, :4, :4] = 1
    with torch.no_grad():
        found = tokens_of(model, images, [1, 4])
    assert [tuple(values.shape[1:]) for values in found] == shapes
    changed = (found[0][1] - found[0][0]).abs().sum(0)
    assert changed.argmax() == 0


# images and masks


def write_pair(root, name, values, size=None, suffix=".jpg"):
    for folder in ("images", "masks"):
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
    width, height = size or (values.shape[1], values.shape[0])
    Image.new("RGB", (width, height), (90, 120, 60)).save(root / "images" / f"{name}{suffix}")
    Image.fromarray(values).save(root / "masks" / f"{name}.png")


def test_pairs_splits_and_rejects_are_complete(tmp_path):
    values = np.zeros((10, 12), np.uint8)
    for name in ("training/a/1", "training/2", "Val/3"):
        write_pair(tmp_path, name, values)
    (tmp_path / "masks/Val").rename(tmp_path / "masks/validation")
    write_pair(tmp_path, "beside", values)
    (tmp_path / "images/training/alone.png").touch()
    (tmp_path / "images/training/notes.txt").touch()
    (tmp_path / "images/training/2.png").touch()
    (tmp_path / "masks/training/other.png").touch()
    images, masks = str(tmp_path / "images"), str(tmp_path / "masks")
    found = find_pairs(images, masks)
    assert found.splits == {
        "train": [Pair("training/2.jpg", "training/2.png"), Pair("training/a/1.jpg", "training/a/1.png")],
        "val": [Pair("Val/3.jpg", "validation/3.png")],
    }
    assert dict(found.rejects) == {
        "training/alone.png": "no mask",
        "training/notes.txt": "not an image (suffix .txt)",
        "training/2.png": "the same name as training/2.jpg",
        "training/other.png": "mask without an image",
    }
    assert found.inputs == 3 + 4
    fewer = find_pairs(images, masks, max_images=1)
    assert (len(fewer.splits["train"]), fewer.skipped, fewer.inputs) == (1, 1, 7)


@pytest.mark.parametrize(("train", "val"), [("train2017", "val2017"), ("training", "validation")])
def test_splits_of_pairs_by_the_names_of_the_field(train, val, tmp_path):
    """Fails where the given val images of ADE20K or COCO are shuffled into train."""
    for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
        for split, count in ((train, 3), (val, 2)):
            for number in range(count):
                path = tmp_path / kind / split / f"{number}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    found = find_pairs(str(tmp_path / "images"), str(tmp_path / "masks"))
    assert {split: len(pairs) for split, pairs in found.splits.items()} == {"train": 3, "val": 2}
    assert found.layout == f"{train}/ and {val}/"


def test_endings_and_a_held_out_share(tmp_path):
    for number in range(10):
        write_pair(tmp_path, f"city/{number}", np.zeros((9, 9), np.uint8))
        (tmp_path / f"masks/city/{number}.png").rename(tmp_path / f"masks/city/{number}_ids.png")
        (tmp_path / f"masks/city/{number}_colour.png").touch()
    places = str(tmp_path / "images"), str(tmp_path / "masks")
    found = find_pairs(*places, mask_ending="_ids", val_share=0.3)
    assert [len(found.splits[split]) for split in ("train", "val")] == [7, 3] and not found.rejects
    assert not set(found.splits["train"]) & set(found.splits["val"])
    at = tuple(Folder.at(place) for place in places)
    again, other = (find_pairs(*places, mask_ending="_ids", val_share=0.3, seed=seed) for seed in (0, 1))
    assert again == found and other.splits != found.splits and again.digest(*at) != other.digest(*at)
    before = again.digest(*at)
    mended = tmp_path / "masks" / again.splits["val"][0].mask
    os.utime(mended, (0, 0))
    assert again.digest(*at) != before
    with pytest.raises(SettingError, match=r"no image has a mask.*city/0\.jpg: no mask.*segment\.mask_ending"):
        find_pairs(*places)


def png(values, mode=None, bits=None):
    import io

    buffer = io.BytesIO()
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([(7 * k) % 256 for k in range(768)])
    elif mode:
        image = image.convert(mode)
    image.save(buffer, format="PNG", **({"bits": bits} if bits else {}))
    return buffer.getvalue()


def grey_png(values, bits):
    """A grey PNG of few bits, which Pillow does not write: by the format's description."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    spread = ((values[..., None] >> np.arange(bits)[::-1]) & 1).reshape(len(values), -1).astype(np.uint8)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in spread)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_masks_values_are_the_numbers_in_the_file():
    few = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(mask_values(png(few.astype(np.uint8))), few)
    np.testing.assert_array_equal(mask_values(png(few.astype(np.uint8), "P")), few)
    np.testing.assert_array_equal(mask_values(png(few.astype(np.uint8), "P", bits=4)), few)
    np.testing.assert_array_equal(mask_values(png((few * 5000).astype(np.uint16))), few * 5000)
    for bits in (1, 2, 4):
        np.testing.assert_array_equal(mask_values(grey_png(few % 2**bits, bits)), few % 2**bits)
    for data, reason in (
        (png(few.astype(np.uint8), "RGB"), "colours"),
        (png(few.astype(np.uint8), "LA"), "colours"),
        (png(np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8))[:900], "damaged"),
        (b"GIF89a" + bytes(30), "not a PNG"),
        (b"", "empty"),
    ):
        with pytest.raises(RejectedImage, match=reason):
            mask_values(data)


def test_image_and_mask_are_cut_at_the_same_place(tmp_path):
    """A picture of its own mask: the resized image, rounded to two colours, is the resized mask."""
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2, (6, 8)).repeat(24, 0).repeat(24, 1).astype(np.uint8)
    (tmp_path / "1.png").write_bytes(png(values))
    Image.fromarray(values * 255).save(tmp_path / "1.bmp")
    folder = Folder.at(tmp_path)
    image, mask = read_pair(folder, folder, Pair("1.bmp", "1.png"), Pixels(48, 1))
    assert (image[0] > 127).astype(int).tolist() == mask.tolist()
    np.testing.assert_array_equal(nearest_square(values, 144), values[:, 24:168])


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_sizes_have_to_agree_as_the_image_is_shown(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown on its side
    Image.new("RGB", (30, 20)).save(tmp_path / f"1{suffix}", exif=exif)
    assert upright_size((tmp_path / f"1{suffix}").read_bytes(), Pixels(16)) == (20, 30)
    (tmp_path / "1.png").write_bytes(png(np.zeros((20, 30), np.uint8)))
    folder = Folder.at(tmp_path)
    with pytest.raises(RejectedImage, match="sizes differ"):
        read_pair(folder, folder, Pair(f"1{suffix}", "1.png"), Pixels(16))
    (tmp_path / "1.png").write_bytes(png(np.zeros((30, 20), np.uint8)))
    assert read_pair(folder, folder, Pair(f"1{suffix}", "1.png"), Pixels(16))[0].shape == (3, 16, 16)


def test_colours_are_of_the_value_alone_and_differ():
    colours = [class_colour(value) for value in range(60)]
    assert len(set(colours)) == 60
    near = [np.abs(np.subtract(colours[i], colours[j])).sum() for i in range(21) for j in range(i)]
    assert min(near) > 40


# the stage


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random tiny encoder as a folder of timm's."""
    folder = tmp_path_factory.mktemp("encoder") / "vit"
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    export_timm(
        folder, model, architecture="vit_tiny_patch16_224", arguments=TINY, pixel_mean=[128.0] * 3, pixel_std=[64.0] * 3, about={}
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sixteen pairs in train/ and six in val/, where one mask holds a class that train lacks; three bad ones."""
    root = tmp_path_factory.mktemp("quarters")
    for split, count, seed in (("train", 16, 0), ("val", 6, 1)):
        for number, (image, classes) in enumerate(zip(*quarters(count, seed, 36), strict=True)):
            values = np.where(classes == IGNORED, 255, classes * 10).astype(np.uint8)
            if (split, number) == ("val", 0):
                values[-3:] = 77
            write_pair(root, f"{split}/{number}", values)
            Image.fromarray(image.transpose(1, 2, 0)).save(root / f"images/{split}/{number}.jpg", quality=95)
    write_pair(root, "train/small", np.zeros((8, 8), np.uint8), size=(9, 8))
    (root / "images/train/broken.jpg").write_bytes(b"no image")
    (root / "masks/train/broken.png").write_bytes(b"no mask")
    (root / "masks/train/lonely.png").write_bytes(b"")
    return root


def recipe_of(encoder, folders, out, **changes):
    settings = {"checkpoint": str(encoder), "out": str(out), "tracking.system_metrics": False}
    sections = {"images": str(folders / "images"), "masks": str(folders / "masks"), "lrs": [0.03], "steps": 100}
    sections |= {"weight_decays": [0.0], "batch": 8}
    return with_overrides(
        load("small"), {**settings, **{f"segment.{k}": v for k, v in {**sections, **changes}.items()}}
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"masks": None}, SettingError, r"segment\.masks is not set.*segment\.masks=FOLDER"),
        ({"masks": "nowhere"}, SettingError, r"segment\.masks=nowhere: no such folder"),
        ({"classes": "nowhere.txt"}, SettingError, r"segment\.classes=nowhere\.txt: No such file.*one name per line"),
        ({"blocks": [3]}, SettingError, r"block 3 does not exist, the encoder has blocks \(or stages\) 1 to 2"),
        (
            {"image_size": 30},
            SettingError,
            r"segment\.image_size=30: not a multiple of the token size, 8 pixels.*allowed: 24",
        ),
        ({"mask_ending": "x"}, SettingError, r"no image has a mask"),
    ],
)
def test_mistakes_are_found_before_ray_starts(encoder, folders, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        plan_segmentation(recipe_of(encoder, folders, tmp_path, **changes))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_images_in_the_masks_folder_and_too_many_rejects(encoder, folders, tmp_path):
    with pytest.raises(SettingError, match="one folder contains the other"):
        plan_segmentation(recipe_of(encoder, folders, tmp_path, masks=str(folders / "images" / "train")))
    for number in range(30):
        write_pair(tmp_path / "set", f"{number}", np.zeros((8, 8), np.uint8))
        (tmp_path / f"set/images/more{number}.jpg").touch()
    with pytest.raises(
        StageError, match=r"30 of 60 images and masks are rejected, segment\.max_rejected=0\.01 allows 10"
    ):
        plan_segmentation(recipe_of(encoder, tmp_path / "set", tmp_path))


@pytest.mark.ray
def test_the_stage_on_made_up_images(ray_local, encoder, folders, tmp_path):
    from pipeline.stages import segment

    recipe = recipe_of(encoder, folders, tmp_path, blocks=[1, 2])
    result = run_stage(segment, recipe, ray_local)
    assert (result["train_images"], result["val_images"], result["classes"]) == (16, 6, 5)
    assert result["inputs"] == 16 + 6 + result["rejected"] == 25
    assert result["classes_only_in_val"] == ["77"] and result["classes_without_val"] == []
    masks = [mask_values(path.read_bytes()) for path in sorted((folders / "masks/val").glob("*.png"))]
    ignored = np.mean([nearest_square(mask, result["image_size"]) == 255 for mask in masks])
    assert 0 < result["ignored_share"]["val"] == pytest.approx(ignored) and result["cropped_share"] == 0
    said = segment.summary(recipe, result)
    assert f"Left out by segment.ignore=[255]: {ignored:.1%} of the pixels of val" in said and "central" not in said
    trained = result["measured"]["trained"]
    assert trained["eval/segment_pixel_accuracy"] > 80
    assert trained["eval/segment_miou_low"] <= trained["eval/segment_miou"] <= trained["eval/segment_miou_high"]
    assert trained["eval/segment_miou"] <= 80  # one class of five is never predicted
    folder = recipe.stage_dir("segment")
    with open(folder / "rejected.csv", newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert "sizes differ (image 9×8, mask 8×8)" in reasons["train/small.jpg"] and len(reasons) == 3
    with open(folder / "classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == ["0", "10", "20", "30", "77"] and table[-1]["iou"] == "0.00"
    mean = np.mean([float(row["iou"]) for row in table])
    assert mean == pytest.approx(trained["eval/segment_miou"], abs=0.01)
    with open(folder / "confusion.csv", newline="") as file:
        counts = np.array([line[1:] for line in csv.reader(file)][1:], int)
    assert counts.sum() == sum(int(row["pixels"]) for row in table)
    assert 100 * counts.trace() / counts.sum() == pytest.approx(trained["eval/segment_pixel_accuracy"])
    assert Image.open(folder / "segmentation.png").width > 600
    assert not (folder / ".tokens").exists()
    logged = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/segment_miou_untrained" in metrics for metrics in logged)
    again = run_stage(segment, recipe, ray_local)
    assert again["state"] == "finished already" and "rejected.csv" in segment.summary(recipe, again)
