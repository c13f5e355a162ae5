"""RandomResizedCrop on the device: torchvision's boxes, Pillow's pixels, and a pure function of (seed, epoch, row)."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from tiny import photos
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop as torchvision_resized_crop

from wavemim.augment import boxes_of, random_resized_crop, resized_crop
from wavemim.wavelets import decompose, reconstruct

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def images(n=4, height=48, width=48, channels=3):
    """Smooth pictures with sharp edges and noise, float32 (n, channels, height, width)."""
    rng = np.random.default_rng(height + width)
    pixels = rng.uniform(0, 255, (n, channels, height, width)).astype(np.float32)
    pixels[:, :, height // 3 :, width // 2 :] *= 0.1
    return torch.from_numpy(pixels)


def boxes(n, height=256, width=256, *, seed=0, epoch=0, scale=SCALE, ratio=RATIO):
    return boxes_of(torch.arange(n), height, width, seed=seed, epoch=epoch, scale=scale, ratio=ratio)


def pillow(pixels, box, size):
    """One image (C, H, W), cropped and resized a channel at a time by Pillow in float."""
    top, left, height, width = (int(v) for v in box)
    planes = [
        Image.fromarray(plane, mode="F")
        .crop((left, top, left + width, top + height))
        .resize((size, size), Image.Resampling.BICUBIC)
        for plane in pixels.numpy()
    ]
    return np.clip(np.stack([np.asarray(plane) for plane in planes]), 0, 255)


BOXES = [(0, 0, 48, 48), (3, 7, 41, 29), (0, 20, 13, 17), (30, 0, 18, 48), (47, 47, 1, 1)]


@pytest.mark.parametrize("size", [8, 32, 40, 64])  # smaller and larger than the boxes
@pytest.mark.parametrize("box", BOXES)
def test_pixels_are_those_of_pillow(box, size):
    batch = images()
    ours = resized_crop(batch, torch.tensor([box] * len(batch)), size, None)
    for pixels, result in zip(batch, ours, strict=True):
        np.testing.assert_allclose(result.numpy(), pillow(pixels, box, size), atol=1e-3)


def test_pixels_are_those_of_torchvision_box_by_box():
    batch = images(12, 64, 56)
    rows = torch.arange(12)
    drawn = boxes(12, 64, 56)
    assert len(drawn.unique(dim=0)) == 12
    ours = random_resized_crop(batch, rows, size=40, seed=0, epoch=0, flip=False)
    for pixels, box, result in zip(batch, drawn.int().tolist(), ours, strict=True):
        expected = torchvision_resized_crop(pixels, *box, [40, 40], interpolation=3, antialias=True).clamp(0, 255)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("side", [512, 1000])
def test_interpolation_is_as_exact_far_from_the_corner(side):
    pixels = images(1, side, side, 1)
    box = (side - 301, side - 257, 301, 257)
    ours = resized_crop(pixels, torch.tensor([box]), 224, None)
    np.testing.assert_allclose(ours[0].numpy(), pillow(pixels[0], box, 224), atol=1e-3)


def test_a_box_of_the_same_size_gives_its_very_pixels():
    pixels = torch.from_numpy(photos(4, size=64)).float()
    top_left = [(0, 0), (32, 0), (16, 32), (5, 27)]
    ours = resized_crop(pixels, torch.tensor([(top, left, 32, 32) for top, left in top_left]), 32, None)
    for image, (top, left), result in zip(pixels, top_left, ours, strict=True):
        assert torch.equal(result, image[:, top : top + 32, left : left + 32])
    whole = random_resized_crop(
        pixels, torch.arange(4), size=64, seed=0, epoch=0, scale=(1, 1), ratio=(1, 1), flip=False
    )
    assert torch.equal(whole, pixels)


def test_an_aligned_box_has_the_coefficients_of_the_window():
    """The two ways to train from the same shards meet: cut coefficients, and cut pixels transformed again."""
    pyramid = decompose(torch.from_numpy(photos(2, size=64)).float(), 3)
    cut = {level: v[..., 16 >> level : 48 >> level, 8 >> level : 40 >> level] for level, v in pyramid.items()}
    pixels = resized_crop(reconstruct(pyramid), torch.tensor([(16, 8, 32, 32)] * 2), 32, None)
    for level, values in decompose(pixels, 3).items():
        torch.testing.assert_close(values, cut[level], rtol=0, atol=1e-3)


def test_mirroring_is_exact_and_hits_half_of_the_images():
    rows = torch.arange(2000)
    pixels = images(1, 16, 16, 1).expand(2000, 1, 16, 16)
    options = {"size": 12, "seed": 3, "epoch": 1}
    plain = random_resized_crop(pixels, rows, **options, flip=False)
    flipped = random_resized_crop(pixels, rows, **options, flip=True)
    same = torch.isclose(plain, flipped, rtol=0, atol=1e-3).all(-1).all(-1).all(-1)
    mirror = torch.isclose(plain.flip(-1), flipped, rtol=0, atol=1e-3).all(-1).all(-1).all(-1)
    assert (same | mirror).all() and abs(mirror.float().mean() - 0.5) < 0.05
    # Mirroring says nothing about the box.
    area = boxes(2000, 16, 16, seed=3, epoch=1)[:, 2:].prod(1).numpy()
    assert abs(np.corrcoef(area, mirror.numpy())[0, 1]) < 0.08


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [(256, 256, SCALE, RATIO), (200, 310, (0.08, 1.0), RATIO), (64, 256, (0.3, 0.6), (0.5, 2.0))],
)
def test_boxes_are_distributed_as_torchvisions(height, width, scale, ratio):
    n = 4000
    ours = boxes(n, height, width, scale=scale, ratio=ratio).double().numpy()
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)], float)
    assert np.array_equal(ours, ours.round())
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    for what in (
        lambda b: b[:, 2] * b[:, 3],  # area
        lambda b: np.log(b[:, 3] / b[:, 2]),  # aspect
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] / (height - b[:, 2] + 1),
        lambda b: b[:, 1] / (width - b[:, 3] + 1),
    ):
        assert stats.ks_2samp(what(ours), what(theirs)).pvalue > 1e-3


def test_area_and_aspect_are_uniform_where_every_box_fits():
    ours = boxes(5000, 1000, 1000, scale=(0.1, 0.5), ratio=(0.8, 1.25)).double().numpy()
    area, aspect = ours[:, 2] * ours[:, 3] / 1e6, np.log(ours[:, 3] / ours[:, 2])
    assert stats.kstest((area - 0.1) / 0.4, "uniform").pvalue > 1e-3
    assert stats.kstest((aspect - math.log(0.8)) / math.log(1.25 / 0.8), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(30, 300, (0, 130, 30, 40)), (300, 30, (130, 0, 40, 30)), (90, 100, (0, 0, 90, 100))],
)
def test_where_no_box_fits_it_is_the_largest_in_the_middle(height, width, expected):
    drawn = boxes(20, height, width, scale=(1.2, 1.2))
    assert (drawn == torch.tensor(expected)).all()
    theirs = RandomResizedCrop.get_params(torch.empty(1, height, width), [1.2, 1.2], list(RATIO))
    assert tuple(theirs) == expected


def test_a_crop_is_a_function_of_seed_epoch_and_row_alone():
    pixels = images(6)
    rows = torch.tensor([4, 70, 3, 10**9, 12, 0])
    options = {"size": 24, "seed": 1, "epoch": 2}
    together = random_resized_crop(pixels, rows, **options)
    assert torch.equal(random_resized_crop(pixels, rows, **options), together)
    for image, row, result in zip(pixels, rows, together, strict=True):
        alone = random_resized_crop(image[None], row[None], **options)[0]
        torch.testing.assert_close(alone, result, rtol=0, atol=1e-3)
    for other in ({"seed": 2}, {"epoch": 3}):
        assert not torch.allclose(random_resized_crop(pixels, rows, **(options | other)), together, atol=1)
    many = torch.arange(50, 90)
    drawn = boxes_of(many, 256, 256, seed=5, epoch=1, scale=SCALE, ratio=RATIO)
    assert torch.equal(drawn[7:9], boxes_of(many[7:9], 256, 256, seed=5, epoch=1, scale=SCALE, ratio=RATIO))
    assert len(drawn.unique(dim=0)) == 40


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_channels_are_treated_alike(channels):
    one = images(2, 32, 32, 1)
    ours = random_resized_crop(one.expand(2, channels, 32, 32), torch.arange(2), size=20, seed=0, epoch=0)
    alone = random_resized_crop(one, torch.arange(2), size=20, seed=0, epoch=0)
    torch.testing.assert_close(ours, alone.expand_as(ours), rtol=0, atol=1e-3)


def test_low_precision_around_it_changes_nothing_and_the_range_is_kept():
    pixels = images() > 100
    pixels = pixels.float() * 255  # black and white: bicubic overshoots
    options = {"size": 64, "seed": 0, "epoch": 0}
    plain = random_resized_crop(pixels, torch.arange(4), **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = random_resized_crop(pixels, torch.arange(4), **options)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)
    assert plain.min() == 0 and plain.max() == 255


def test_resampling_compiles_to_one_graph():
    given = (images(), torch.tensor(BOXES[:4]), 24, torch.tensor([True, False, False, True]))
    compiled = torch.compile(resized_crop, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), resized_crop(*given), rtol=0, atol=1e-3)


def test_nothing_waits_for_the_device():
    """Tensors without values: whatever reads one of them on the host raises."""
    rows = torch.empty(4, dtype=torch.int64, device="meta")
    drawn = boxes_of(rows, 48, 64, seed=0, epoch=3, scale=SCALE, ratio=RATIO)
    assert drawn.shape == (4, 4) and drawn.device.type == "meta"
    with FakeTensorMode():  # autocast knows no meta device
        drawn, pixels = torch.empty(4, 4), torch.empty(4, 3, 48, 64)
        assert resized_crop(pixels, drawn, 24, drawn[:, 0] > 0).shape == (4, 3, 24, 24)
