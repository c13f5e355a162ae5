"""Bytes of images in every shape, honest or damaged or hostile, and what becomes of them."""

from __future__ import annotations

import io
import json
import lzma
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from functools import cache
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from tiny_shards import smooth_texture

from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.decode import FORMATS, SUFFIXES, decode_image

SIDE = 32
SAME = Pixels(SIDE)  # of an image of SIDE×SIDE: nothing is resized


def noise(*shape: int, dtype: str = "u1", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, np.dtype(dtype), endpoint=True)


def photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    return smooth_texture(np.random.default_rng(seed), width, height)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def npy_claiming(header: str, body: bytes = b"") -> bytes:
    text = header.encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + body


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **({"photometric": "minisblack"} | options))
    return file.getvalue()


def pages(*arrays: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for array in arrays:
            writer.write(array, **({"photometric": "minisblack", "metadata": None} | options))
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows: bytes, width: int, height: int, bits: int, kind: int, *extra: bytes) -> bytes:
    """A PNG of unfiltered rows without their filter bytes."""
    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def png16(values: np.ndarray, *extra: bytes) -> bytes:
    height, width = values.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    return png(values.astype(">u2").tobytes(), width, height, 16, kind, *extra)


def eight(values: np.ndarray) -> np.ndarray:
    """16 bits → 8, rounded."""
    return np.rint(values / 257).astype(np.uint8)


def planes(array: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) → (3, H, W) or (C, H, W)."""
    return np.stack([array] * 3) if array.ndim == 2 else array.transpose(2, 0, 1)


def reason(data: bytes, name: str = "a.jpg", wanted: Pixels = SAME) -> str:
    with pytest.raises(RejectedImage) as raised:
        decode_image(data, name, wanted)
    text = str(raised.value)
    assert text and len(text) <= 160 and text.isprintable()
    assert "(" not in text or text.endswith(")")
    return text


def equal(found: np.ndarray, expected: np.ndarray, by: float = 0) -> None:
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.shape == expected.shape
    assert np.abs(found.astype(float) - expected).max() <= by


# Rejected


def _long_error() -> bytes:
    return npy_claiming("{'descr': '" + "\\ud800\\x1b\\u2028é" * 90 + "', 'fortran_order': False, 'shape': (9, 9)}\n")


WHOLE_JPEG = saved(photo(), "JPEG")
FLOATS = np.random.default_rng(0).random((SIDE, SIDE, 3)).astype(np.float32)
HOLES = np.where(FLOATS > 0.5, np.float32(np.nan), FLOATS)
RANGE = Pixels(SIDE, value_range=(0, 1))
REJECTED = {
    "empty": (b"", "a.jpg", SAME, "empty file"),
    "text": (b"just a note, of no particular kind\n" * 9, "a.jpg", SAME, "not an image"),
    "page": (b"<!DOCTYPE html><html>404</html>", "a.png", SAME, "not an image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "a.eps", SAME, "not an image"),
    "cut JPEG": (WHOLE_JPEG[:-400], "a.jpg", SAME, "truncated ("),
    "cut JPEG header": (WHOLE_JPEG[:60], "a.jpg", SAME, "truncated ("),
    "cut PNG": (saved(photo(), "PNG")[:3000], "a.png", SAME, "truncated ("),
    "cut deep PNG": (png16(noise(64, 64, 3, dtype="u2"))[:3000], "a.png", SAME, ""),
    "cut TIFF": (tiff(noise(SIDE, SIDE, dtype="u2"))[:-1000], "a.tif", SAME, "truncated ("),
    "TIFF without directory": (b"II*\0\xf0\0\0\0", "a.tif", SAME, "truncated ("),
    "cut npy": (npy(noise(SIDE, SIDE))[:-1], "a.npy", SAME, "truncated (1 bytes of .npy missing)"),
    "cut npy header": (npy(noise(SIDE, SIDE))[:40], "a.npy", SAME, "truncated (in the header of .npy)"),
    "cut npy magic": (b"\x93NUM", "a.npy", SAME, "truncated (in the header of .npy)"),
    "no npy": (b"1,2,3\n" * 50, "a.npy", SAME, "damaged (no header of .npy)"),
    "npy of objects": (npy(np.array([[{}] * 9] * 9, object)), "a.npy", SAME, "unsupported (Python objects in .npy)"),
    "npy of text": (npy(np.full((9, 9), "text")), "a.npy", SAME, "unsupported (<U4 pixels)"),
    "npy of fields": (npy(np.zeros((9, 9), "u1,u1")), "a.npy", SAME, "unsupported ("),
    "npy of complex": (npy(np.zeros((9, 9), complex)), "a.npy", RANGE, "unsupported (complex128 pixels)"),
    "npy of one axis": (npy(noise(99)), "a.npy", SAME, "unsupported (array of 1 dimensions)"),
    "npy of four axes": (npy(noise(1, 9, 9, 3)), "a.npy", SAME, "unsupported (array of 4 dimensions)"),
    "npy of negative size": (
        npy_claiming("{'descr': '|u1', 'fortran_order': False, 'shape': (-9, -9)}\n"),
        "a.npy",
        SAME,
        "damaged (negative size in .npy)",
    ),
    "npy of no rows": (npy(noise(0, 9)), "a.npy", Pixels(SIDE, min_side=0), "too small (9×0 pixels"),
    "long error": (_long_error(), "a.npy", SAME, "damaged ("),
    "npy of code": (npy_claiming("__import__('os').abort()"), "a.npy", SAME, "damaged ("),
    "bands of npy": (npy(noise(SIDE, SIDE, 5)), "a.npy", SAME, "wrong channel count (5, data.channels=3)"),
    "bands first": (npy(noise(5, SIDE, SIDE)), "a.npy", Pixels(SIDE, 4), "wrong channel count (5, data.channels=4)"),
    "bands of TIFF": (
        tiff(noise(SIDE, SIDE, 5), planarconfig="contig"),
        "a.tif",
        SAME,
        "wrong channel count (5, data.channels=3)",
    ),
    "pages of TIFF": (pages(*noise(4, 9, 9)), "a.tif", Pixels(8, 5), "wrong channel count (4, data.channels=5)"),
    "hundreds of bands": (
        tiff(noise(8, 8, 300), planarconfig="contig"),
        "a.tif",
        SAME,
        "wrong channel count (300, data.channels=3)",
    ),
    "photo as bands": (WHOLE_JPEG, "a.jpg", Pixels(SIDE, 4), "wrong channel count (3, data.channels=4)"),
    "grey as bands": (saved(photo().convert("L"), "PNG"), "", Pixels(8, 2), "wrong channel count (1, data.channels=2)"),
    "deep photo as bands": (png16(noise(9, 9, 3, dtype="u2")), "", Pixels(8, 5), "wrong channel count (3, "),
    "deep grey as bands": (png16(noise(9, 9, dtype="u2")), "", Pixels(8, 5), "wrong channel count (1, "),
    "small JPEG": (WHOLE_JPEG, "a.jpg", Pixels(SIDE, min_side=65), "too small (96×64 pixels, data.min_side=65)"),
    "small npy": (npy(noise(9, 7, 3)), "a.npy", SAME, "too small (7×9 pixels, data.min_side=8)"),
    "small TIFF": (tiff(noise(7, 9, dtype="u2")), "a.tif", SAME, "too small (9×7 pixels, data.min_side=8)"),
    "large JPEG": (
        WHOLE_JPEG,
        "a.jpg",
        Pixels(SIDE, max_pixels=6143),
        "too large (96×64 pixels, data.max_pixels=6143)",
    ),
    "large npy": (npy(noise(80, 80)), "a.npy", Pixels(SIDE, max_pixels=6399), "too large (80×80 pixels"),
    "large TIFF": (tiff(noise(80, 80)), "a.tif", Pixels(SIDE, max_pixels=6399), "too large (80×80 pixels"),
    "floats of npy": (npy(FLOATS), "a.npy", SAME, "floating-point pixels without a known range (set data.value_range)"),
    "floats of TIFF": (tiff(FLOATS[..., 0]), "a.tif", SAME, "floating-point pixels without a known range ("),
    "half floats": (npy(FLOATS.astype("f2")), "a.npy", SAME, "floating-point pixels without a known range ("),
    "signed npy": (npy(noise(9, 9, dtype="i2")), "a.npy", SAME, "signed pixels without a known range ("),
    "signed TIFF": (tiff(noise(9, 9, dtype="i1")), "a.tif", SAME, "signed pixels without a known range ("),
    "32 bits": (npy(noise(9, 9, dtype="u4")), "a.npy", SAME, "32-bit pixels without a known range ("),
    "32 bits of TIFF": (tiff(noise(9, 9, dtype="i4")), "a.tif", SAME, "32-bit pixels without a known range ("),
    "64 bits": (npy(noise(9, 9, dtype="i8")), "a.npy", SAME, "64-bit pixels without a known range ("),
    "PFM": (b"Pf\n9 9\n-1.0\n" + bytes(324), "a.pfm", SAME, "floating-point pixels without a known range ("),
    "NaN": (npy(HOLES), "a.npy", RANGE, "NaN or infinite pixels"),
    "infinite": (tiff(np.full((9, 9), np.inf, "f4")), "a.tif", RANGE, "NaN or infinite pixels"),
    "long text of PNG": (
        png(bytes(81), 9, 9, 8, 0, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))),
        "a.png",
        SAME,
        "metadata too large (",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_every_reason_is_in_words(case: str) -> None:
    data, name, wanted, words = REJECTED[case]
    assert reason(data, name, wanted).startswith(words)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("code", [256, 257, 277, 278, 322, 323])
def test_a_size_that_is_text_is_not_multiplied(code: int, channels: int) -> None:
    """In Python a text times a width is as much text."""
    data = bytearray(tiff(noise(64, 64, 5), planarconfig="contig", tile=(16, 16), rowsperstrip=None))
    (count,) = struct.unpack_from("<H", data, 8)
    for place in range(10, 10 + 12 * count, 12):
        if struct.unpack_from("<H", data, place)[0] == code or (code == 278 and place == 10):
            struct.pack_into("<HHII", data, place, code, 7, 64, 8)
    assert reason(bytes(data), "a.tif", Pixels(SIDE, channels)) == f"damaged (TIFF tag {code} is not a number)"


def test_the_first_page_is_enough() -> None:
    first = noise(SIDE, SIDE)
    whole = pages(first, noise(SIDE, SIDE, seed=1))
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        second = file.pages[1].offset
    assert second > SIDE * SIDE
    for cut in range(second, len(whole), 40):
        equal(decode_image(whole[:cut], "a.tif", SAME), planes(first))


def test_bounds_themselves_are_taken() -> None:
    assert decode_image(WHOLE_JPEG, "a.jpg", Pixels(8, max_pixels=96 * 64, min_side=64)).shape == (3, 8, 8)
    for data in (npy(noise(80, 64)), tiff(noise(80, 64, dtype="u2")), png16(noise(80, 64, 3, dtype="u2"))):
        assert decode_image(data, "", Pixels(8, max_pixels=80 * 64, min_side=64)).shape == (3, 8, 8)


@pytest.mark.parametrize("value_range", [(0, 0), (0, np.inf), (np.nan, 1), (-1e308, 1e308), (0, 5e-324)])
def test_no_range(value_range: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="is not a range"):
        Pixels(8, value_range=value_range)


@pytest.mark.parametrize("channels", [0, 17])
def test_no_such_count(channels: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Pixels(8, channels)


# Modes and depths


def _on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def _from_cmyk(cmyk: np.ndarray) -> np.ndarray:
    ink = cmyk.astype(float)
    return (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255


def _from_ycbcr(values: np.ndarray) -> np.ndarray:
    y, cb, cr = values.astype(float).transpose(2, 0, 1) - np.array([0, 128, 128])[:, None, None]
    return np.clip(np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1), 0, 255)


def _modes() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """What is in the file, its pixels in RGB (H, W, 3) by another way, and how far off rounding may be."""
    rgb, grey, alpha = noise(SIDE, SIDE, 3), noise(SIDE, SIDE, seed=1), noise(SIDE, SIDE, seed=2)
    bits, index = grey > 127, grey % 16
    table = noise(16, 3, seed=3)
    cmyk = noise(SIDE, SIDE, 4)
    palette = Image.fromarray(index)
    palette.putpalette(table.tobytes())
    see_through = bytes(range(0, 160, 10))
    of_table = np.frombuffer(see_through, np.uint8)[index]
    grey3 = np.stack([grey] * 3, -1)
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    keyed = np.where((rgb == rgb[3, 4]).all(-1, keepdims=True), 255, rgb)
    return {
        "RGB": (saved(Image.fromarray(rgb), "PNG"), rgb, 0),
        "RGB of BMP": (saved(Image.fromarray(rgb), "BMP"), rgb, 0),
        "RGB of WebP": (saved(Image.fromarray(rgb), "WEBP", lossless=True), rgb, 0),
        "RGB of JPEG 2000": (saved(Image.fromarray(rgb), "JPEG2000"), rgb, 0),
        "RGB of TIFF": (saved(Image.fromarray(rgb), "TIFF", compression="tiff_lzw"), rgb, 0),
        "RGB of PPM": (saved(Image.fromarray(rgb), "PPM"), rgb, 0),
        "RGB of TGA": (saved(Image.fromarray(rgb), "TGA"), rgb, 0),
        "one colour clear": (saved(Image.fromarray(rgb), "PNG", transparency=tuple(rgb[3, 4].tolist())), keyed, 0),
        "L": (saved(Image.fromarray(grey), "PNG"), grey3, 0),
        "1": (saved(Image.fromarray(bits), "PNG"), np.where(bits, 255, 0)[..., None].repeat(3, -1), 0),
        "1 of TIFF": (
            saved(Image.fromarray(bits), "TIFF", compression="group4"),
            np.where(bits, 255, 0)[..., None].repeat(3, -1),
            0,
        ),
        "P": (saved(palette, "PNG"), table[index], 0),
        "P of GIF": (saved(palette, "GIF"), table[index], 0),
        "P of TIFF": (saved(palette, "TIFF"), table[index], 0),
        "P with transparency": (saved(palette, "PNG", transparency=see_through), _on_white(table[index], of_table), 1),
        "P with a clear colour": (
            saved(palette, "GIF", transparency=5),
            np.where((index == 5)[..., None], 255, table[index]),
            0,
        ),
        "LA": (saved(la, "PNG"), _on_white(grey3, alpha), 1),
        "LA of TIFF": (saved(la, "TIFF"), _on_white(grey3, alpha), 1),
        "RGBA": (saved(rgba, "PNG"), _on_white(rgb, alpha), 1),
        "RGBA of TIFF": (saved(rgba, "TIFF"), _on_white(rgb, alpha), 1),
        "RGBA of WebP": (saved(rgba, "WEBP", lossless=True, exact=True), _on_white(rgb, alpha), 1),
        "CMYK": (saved(Image.fromarray(cmyk, "CMYK"), "TIFF"), _from_cmyk(cmyk), 2),
        "YCbCr": (saved(Image.fromarray(rgb, "YCbCr"), "TIFF"), _from_ycbcr(rgb), 2),
    }


@cache
def modes() -> dict[str, tuple[bytes, np.ndarray, float]]:
    return _modes()


@pytest.mark.parametrize("mode", _modes())
def test_every_mode_becomes_rgb_and_luminance(mode: str) -> None:
    data, rgb, by = modes()[mode]
    equal(decode_image(data, "a", SAME), rgb.transpose(2, 0, 1), by)
    grey = rgb @ np.array([0.299, 0.587, 0.114])
    equal(decode_image(data, "a", Pixels(SIDE, 1)), grey[None], by + 1)


def test_lab() -> None:
    values = noise(SIDE, SIDE, 3)
    lab = Image.frombytes("LAB", (SIDE, SIDE), values.tobytes())
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    expected = np.asarray(ImageCms.profileToProfile(lab, *profiles, outputMode="RGB"))
    equal(decode_image(saved(lab, "TIFF"), "a.tif", SAME), expected.transpose(2, 0, 1), 2)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg(mode: str) -> None:
    image = photo(SIDE, SIDE).convert(mode)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    found = decode_image(saved(image, "JPEG", quality=98, subsampling=0), "a.jpg", SAME)
    assert np.abs(found.astype(float) - expected).mean() < 2
    grey = decode_image(saved(image, "JPEG", quality=98, subsampling=0), "a.jpg", Pixels(SIDE, 1))
    assert np.abs(grey[0].astype(float) - np.asarray(image.convert("L"))).mean() < 2


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF big-endian, planar"])
def test_16_bits_are_scaled_exactly(bands: int, kind: str) -> None:
    values = np.arange(64 * 64 * bands, dtype="u2").reshape(64, 64, bands)
    values = values * np.uint16(65535 // values.max())
    values.flat[-1] = 65535
    if bands in (2, 4):
        values[..., -1] = noise(64, 64, dtype="u2")
    share = values[..., -1:] / 65535 if bands in (2, 4) else 1.0
    expected = np.rint(values[..., : 1 if bands < 3 else 3] / 257 * share + 255 * (1 - share))
    if kind == "PNG":
        data = png16(values if bands > 1 else values[..., 0])
    else:
        options: dict = {"photometric": "rgb" if bands > 2 else "minisblack"}
        if bands in (2, 4):
            options["extrasamples"] = ["unassalpha"]
        if bands == 1:
            values = values[..., 0]
        elif "planar" in kind:
            values, options = np.ascontiguousarray(values.transpose(2, 0, 1)), options | {"planarconfig": "separate"}
        else:
            options["planarconfig"] = "contig"
        data = tiff(values, **options, byteorder=">" if "big" in kind else "<")
    found = decode_image(data, "a", Pixels(64))
    equal(found, np.broadcast_to(expected, (64, 64, 3)).transpose(2, 0, 1), 1 if bands in (2, 4) else 0)
    if bands in (2, 4):  # rounded once, so that more than nearly all are equal
        assert (found == np.broadcast_to(expected, (64, 64, 3)).transpose(2, 0, 1)).mean() > 0.999


@pytest.mark.parametrize("bands", [1, 3])
def test_16_bit_png_with_one_clear_colour(bands: int) -> None:
    values = noise(SIDE, SIDE, bands, dtype="u2")
    key = chunk(b"tRNS", values[3, 4].astype(">u2").tobytes())
    expected = np.where((values == values[3, 4]).all(-1, keepdims=True), 255, eight(values))
    data = png16(values if bands == 3 else values[..., 0], key)
    equal(decode_image(data, "a.png", SAME), np.broadcast_to(expected, (SIDE, SIDE, 3)).transpose(2, 0, 1))


def test_luminance_of_16_bit_colours() -> None:
    values = noise(SIDE, SIDE, 3, dtype="u2")
    expected = np.rint(values / 257 @ np.array([0.299, 0.587, 0.114]))[None]
    for data in (png16(values), tiff(values, photometric="rgb")):
        equal(decode_image(data, "a", Pixels(SIDE, 1)), expected, 1)


def test_pgm_of_16_bits() -> None:
    for top in (65535, 4095):
        values = np.minimum(noise(SIDE, SIDE, dtype="u2") >> (0 if top == 65535 else 4), top)
        data = f"P5 {SIDE} {SIDE} {top}\n".encode() + values.astype(">u2").tobytes()
        equal(decode_image(data, "a.pgm", SAME), planes(np.rint(values / top * 255)), 1)
        raw = decode_image(data, "a.pgm", Pixels(SIDE, value_range=(0, 2000)))
        equal(raw, planes(np.rint(np.minimum(values, 2000) / 2000 * 255)), 1)


def test_12_bits_and_white_at_zero_in_tiff() -> None:
    values = noise(SIDE, SIDE, dtype="u2")
    packed = tiff(values >> 4, bitspersample=12)
    equal(decode_image(packed, "a.tif", SAME), planes(np.rint((values >> 4) / 4095 * 255)))
    equal(decode_image(tiff(values, photometric="miniswhite"), "a.tif", SAME), planes(255 - eight(values)), 1)
    byte = noise(SIDE, SIDE)
    equal(decode_image(tiff(byte, photometric="miniswhite"), "a.tif", SAME), planes(255 - byte))


# Orientation

TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(photo(SIDE, SIDE))
    expected = TURNS[orientation](upright).transpose(2, 0, 1)
    for kind, options in (
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ):
        equal(decode_image(saved(Image.fromarray(upright), kind, exif=exif, **options), "a", SAME), expected)
    jpeg = saved(Image.fromarray(upright), "JPEG", exif=exif)
    turned = TURNS[orientation](np.asarray(Image.open(io.BytesIO(jpeg)))).transpose(2, 0, 1)
    equal(decode_image(jpeg, "a.jpg", SAME), turned)
    tag = [(274, "H", 1, orientation, True)]
    deep = upright * np.uint16(257)
    equal(decode_image(tiff(deep, photometric="rgb", extratags=tag), "a.tif", SAME), expected)
    equal(decode_image(png16(deep, chunk(b"eXIf", exif.tobytes()[6:])), "a.png", SAME), expected)
    bands = np.dstack([upright, upright[..., ::-1], upright[..., :1]])
    found = decode_image(tiff(bands, extratags=tag, planarconfig="contig"), "a.tif", Pixels(SIDE, 7))
    equal(found, TURNS[orientation](bands).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_of_an_oblong_image(orientation: int) -> None:
    """Pillow may swap the sides itself: the middle square is the same, whoever turns."""
    upright = np.asarray(photo(SIDE + 8, SIDE))
    expected = TURNS[orientation](upright[:, 4:-4]).transpose(2, 0, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        equal(decode_image(saved(Image.fromarray(upright), kind, exif=exif), "a", SAME), expected)


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"\xff" * 80, b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 30])
def test_damaged_exif_is_no_reason_to_reject(exif: bytes) -> None:
    image = photo(SIDE, SIDE)
    for kind, options in (("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        found = decode_image(saved(image, kind, exif=b"Exif\0\0" + exif, **options), "a", SAME)
        equal(found, decode_image(saved(image, kind, **options), "a", SAME))
    deep = np.asarray(image) * np.uint16(257)
    equal(decode_image(png16(deep, chunk(b"eXIf", exif)), "a.png", SAME), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("pointer", [0, 9, 2**31])
def test_damaged_exif_of_tiff_is_no_reason_to_reject(pointer: int) -> None:
    values = noise(SIDE, SIDE, 3)
    tags = [(34665, "I", 1, pointer, True), (34853, "I", 1, pointer, True), (274, "s", 9, "nonsense", True)]
    for compression in (None, "lzw"):
        data = tiff(values, photometric="rgb", extratags=tags, compression=compression)
        equal(decode_image(data, "a.tif", SAME), values.transpose(2, 0, 1))


# Geometry


def test_only_the_first_frame_is_read() -> None:
    frames = [photo(SIDE, SIDE, seed) for seed in range(4)]
    first = np.asarray(frames[0]).transpose(2, 0, 1)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        equal(decode_image(data, "a", SAME), first)
    gifs = [frame.quantize(200) for frame in frames]
    data = saved(gifs[0], "GIF", save_all=True, append_images=gifs[1:])
    equal(decode_image(data, "a.gif", SAME), np.asarray(gifs[0].convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["a.png", "a.npy", "a.tif", "a", "", "/.npy", "a.npy/b.\0é"])
def test_the_content_decides_not_the_name(name: str) -> None:
    values = noise(SIDE, SIDE, 3)
    for data in (saved(Image.fromarray(values), "BMP"), tiff(values, photometric="rgb"), npy(values)):
        equal(decode_image(data, name, SAME), values.transpose(2, 0, 1))


def test_what_is_read_has_suffixes() -> None:
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".npy"} <= SUFFIXES
    assert not {"EPS", "PDF", "WMF", "IPTC"} & set(FORMATS)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_fine_stripes_become_grey(dtype: str) -> None:
    stripes = np.zeros((256, 256), dtype)
    stripes[:, ::2] = np.iinfo(dtype).max
    for data in (npy(stripes), tiff(stripes), saved(Image.fromarray(stripes), "PNG")):
        found = decode_image(data, "a", Pixels(32))
        assert np.abs(found[:, 2:-2, 2:-2].astype(float) - 127.5).max() < 8


def test_stripes_of_a_jpeg_become_grey() -> None:
    stripes = np.repeat(np.tile(np.array([0, 255], np.uint8), 256)[None], 512, 0)
    found = decode_image(saved(Image.fromarray(stripes), "JPEG", quality=95), "a.jpg", Pixels(32))
    assert np.abs(found[:, 2:-2, 2:-2].astype(float) - 127.5).max() < 8


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_middle_square_of_extreme_shapes(wide: bool, deep: bool) -> None:
    values = np.zeros((60001, 1), np.uint16 if deep else np.uint8)
    values[29990:30011] = np.iinfo(values.dtype).max  # more than the middle one: the filter looks around
    values = values.T if wide else values
    for data in (
        npy(values),
        tiff(np.ascontiguousarray(values)),
        saved(Image.fromarray(np.ascontiguousarray(values)), "PNG"),
    ):
        assert (decode_image(data, "a", Pixels(8, min_side=1)) == 255).all()
        assert reason(data, "a").startswith("too small (")


def test_it_equals_crop_and_resize() -> None:
    image = photo(200, 120)
    small = image.crop((40, 0, 160, 120)).resize((48, 48), Image.Resampling.BICUBIC)
    expected = np.asarray(small).transpose(2, 0, 1)[..., 3:-3]  # the filter looks beyond the square at its sides
    for data in (saved(image, "PNG"), npy(np.asarray(image)), tiff(np.asarray(image), photometric="rgb")):
        found = decode_image(data, "a", Pixels(48))
        equal(np.ascontiguousarray(found[..., 3:-3]), expected, 2)


# Bands


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("bands", [5, 13])
def test_bands_of_tiff(bands: int, dtype: str, compression: str | None) -> None:
    values = noise(bands, SIDE, SIDE, dtype=dtype)
    expected = values if dtype == "u1" else eight(values)
    last, wanted = np.ascontiguousarray(values.transpose(1, 2, 0)), Pixels(SIDE, bands)
    files = {
        "contiguous": tiff(last, planarconfig="contig", compression=compression),
        "planar": tiff(values, planarconfig="separate", compression=compression),
        "tiles": tiff(last, planarconfig="contig", tile=(16, 16), compression=compression, predictor=compression and 2),
        "pages": pages(*values, compression=compression),
        "RGB and more": tiff(last, planarconfig="contig", photometric="rgb", compression=compression),
        "big": tiff(last, planarconfig="contig", bigtiff=True, byteorder=">", compression=compression),
    }
    for data in files.values():
        equal(decode_image(data, "a.tif", wanted), expected)
        assert reason(data, "a.tif", Pixels(SIDE, 6)).startswith(f"wrong channel count ({bands}, data.channels=6)")


@pytest.mark.parametrize("channels", range(1, 17))
def test_any_number_of_channels(channels: int) -> None:
    values = noise(channels, SIDE, SIDE)
    last, wanted = np.ascontiguousarray(values.transpose(1, 2, 0)), Pixels(SIDE, channels)
    files = [
        npy(values),
        npy(last),
        tiff(last, planarconfig=None if channels == 1 else 1, photometric="rgb" if channels == 3 else "minisblack"),
    ]
    files += [tiff(values[0])] if channels == 1 else [pages(*values)] * (channels != 3)
    for data in files:
        equal(decode_image(data, "a", wanted), values)


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<u2", "?"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_layouts_of_npy(dtype: str, version: tuple[int, int]) -> None:
    values = noise(3, SIDE, SIDE + 1, dtype="u1" if dtype == "?" else "u2").astype(dtype)
    values = values[:, :, :SIDE] > 99 if dtype == "?" else values[:, :, :SIDE]
    expected = values * 255 if dtype == "?" else values if dtype == "u1" else eight(values)
    for order in "CF":
        for array in (values, values.transpose(1, 2, 0)):
            equal(decode_image(npy(np.array(array, order=order), version), "a.npy", SAME), expected)
        grey = np.array(values[0], order=order)
        for array in (grey, grey[..., None], grey[None]):
            equal(decode_image(npy(array, version), "a.npy", Pixels(SIDE, 1)), expected[:1])
            equal(decode_image(npy(array, version), "a.npy", SAME), expected[:1].repeat(3, 0))


# The range of values


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f8", "i2", "i4", "i8", "u4"])
def test_range_of_arrays(dtype: str) -> None:
    values = (
        np.random.default_rng(0).uniform(-40, 1200, (SIDE, SIDE, 3)).clip(0 if dtype[0] == "u" else -40).astype(dtype)
    )
    expected = np.floor(np.clip((values.astype(float) - 100) / 900 * 255, 0, 255) + 0.5)
    wanted = Pixels(SIDE, value_range=(100, 1000))
    equal(decode_image(npy(values), "a.npy", wanted), expected.transpose(2, 0, 1))
    if dtype in ("f4", "i2", "u4"):
        equal(decode_image(tiff(values, photometric="rgb"), "a.tif", wanted), expected.transpose(2, 0, 1))
        grey = decode_image(tiff(values[..., 0]), "a.tif", wanted)
        equal(grey, planes(expected[..., 0]))


def test_range_upside_down_and_of_huge_numbers() -> None:
    values = np.array([-3.4e38, -1, 0, 0.25, 1, 3.4e38] * 2, "f4")[:, None].repeat(12, 1)
    expected = np.array([255, 255, 255, 191, 0, 0] * 2)[:, None].repeat(12, 1)
    equal(decode_image(npy(values), "a.npy", Pixels(12, value_range=(1, 0))), planes(expected), 1)
    doubles = np.array([-1.7e308, 0, 1.7e308] * 4)[:, None].repeat(12, 1)
    equal(decode_image(npy(doubles), "", Pixels(12, value_range=(0, 1))), planes(np.where(doubles > 0, 255, 0)))


def test_range_of_photos_counts_in_the_files_values() -> None:
    wanted, values = Pixels(SIDE, value_range=(20, 80)), noise(SIDE, SIDE, 3)
    expected = np.floor(np.clip((values.astype(float) - 20) / 60 * 255, 0, 255) + 0.5).transpose(2, 0, 1)
    for data in (npy(values), tiff(values, photometric="rgb"), saved(Image.fromarray(values), "PNG")):
        equal(decode_image(data, "a", wanted), expected)
    deep = values * np.uint16(256)
    for data in (npy(deep), tiff(deep, photometric="rgb"), png16(deep)):
        equal(decode_image(data, "a", Pixels(SIDE, value_range=(20 * 256, 80 * 256))), expected)
    bits = noise(SIDE, SIDE) > 99
    for data in (npy(bits), saved(Image.fromarray(bits), "PNG")):
        equal(decode_image(data, "a", RANGE), planes(bits * 255))


def test_range_and_transparency() -> None:
    """White is white, whatever the range: what shows through has no value in the file."""
    wanted, rgb, alpha = Pixels(SIDE, value_range=(0, 1000)), noise(SIDE, SIDE, 3), noise(SIDE, SIDE, seed=1)
    share = (alpha / 255)[..., None]
    expected = (rgb * 0.255 * share + 255 * (1 - share)).transpose(2, 0, 1)
    rgba = np.dstack([rgb, alpha])
    files = saved(Image.fromarray(rgba), "PNG"), tiff(rgba, photometric="rgb", extrasamples=["unassalpha"])
    for data in files:
        equal(decode_image(data, "a", wanted), expected, 1.5)
    deep = png16(rgba * np.array([1, 1, 1, 257], "u2"))
    equal(decode_image(deep, "a", wanted), expected, 1.5)


def test_range_of_few_bits() -> None:
    for bits in (2, 4):
        values = noise(SIDE, SIDE) % 2**bits
        packed = np.packbits(np.unpackbits(values[..., None], -1)[..., 8 - bits :].reshape(SIDE, -1), -1)
        codes = [(256, 4, 1, SIDE), (257, 4, 1, SIDE), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, 1)]
        codes += [(273, 4, 1, 10 + 12 * 8 + 4), (278, 4, 1, SIDE), (279, 4, 1, packed.size)]
        files = png(packed.tobytes(), SIDE, SIDE, bits, 0), _tiff_of_tags(*codes, data=packed.tobytes())
        for data in files:
            equal(decode_image(data, "a", SAME), planes(np.rint(values / (2**bits - 1) * 255)), 1)
            equal(
                decode_image(data, "a", Pixels(SIDE, value_range=(0, 2**bits - 1))),
                planes(values * (255 // (2**bits - 1))),
                1,
            )


def test_range_where_zero_is_white() -> None:
    for dtype in ("u1", "u2"):
        values = noise(SIDE, SIDE, dtype=dtype)
        top = int(np.iinfo(dtype).max) // 2
        expected = 255 - np.clip(values / top * 255, 0, 255)
        data = tiff(values, photometric="miniswhite")
        equal(decode_image(data, "a.tif", Pixels(SIDE, value_range=(0, top))), planes(expected), 1)


# Bombs


def _tiff_of_tags(*tags: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """A TIFF by hand: tags (code, type, count, value), then data, which starts at offset 10 + 12 × tags + 4."""
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0\x08\0\0\0" + body + data


def _tiff_claiming(
    width: int, height: int, bits: int = 8, samples: int = 1, data: bytes = bytes(64), compression: int = 1
) -> bytes:
    codes = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, 1)]
    codes += [(273, 4, 1, 10 + 12 * 9 + 4), (277, 3, 1, samples), (278, 4, 1, height), (279, 4, 1, len(data))]
    return _tiff_of_tags(*codes, data=data)


def _tile_bomb(data: bytes) -> bytes:
    """A small image, deflated, of one tile as large as a gigabyte."""
    side = 2**15
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 10 + 12 * 10 + 4), (325, 4, 1, len(data))]
    return _tiff_of_tags(*tags, data=data)


def _overlapping_tags() -> bytes:
    """Thousands of tags, each of them the whole file."""
    tags = [(256, 4, 1, 64), (257, 4, 1, 64)] + [(40000 + i, 1, 2**20, 8) for i in range(4000)]
    return _tiff_of_tags(*tags, data=bytes(2**20))


def _exif_bomb() -> bytes:
    """EXIF of a JPEG, in ten segments that Pillow joins: tags that are each the whole of it."""
    tags = b"".join(struct.pack("<HHII", i, 1, 600_000, 8) for i in range(40000))
    whole = b"II*\0\x08\0\0\0" + struct.pack("<H", 40000) + tags + bytes(200_000)
    jpeg = saved(photo(SIDE, SIDE), "JPEG")
    pieces = (whole[i : i + 65000] for i in range(0, len(whole), 65000))
    segments = [b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece for piece in pieces]
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def _webp_claiming(width: int, height: int) -> bytes:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    data = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def _huge_headers() -> tuple[bytes, bytes, bytes]:
    """GIF, JPEG and JPEG 2000 of which the header alone is changed."""
    gif = bytearray(saved(Image.new("L", (8, 8)), "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    jpeg = bytearray(WHOLE_JPEG)
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xf0\xff\xf0"
    jp2 = bytearray(saved(photo(SIDE, SIDE), "JPEG2000", no_jp2=True))
    jp2[8:16] = b"\0\xff\xff\xf0" * 2
    return bytes(gif), bytes(jpeg), bytes(jp2)


@cache
def bombs() -> dict[str, tuple[bytes, Pixels, str]]:
    """Small files that claim or hold much more, as a reason the start of which is given."""
    gif, jpeg, jp2 = _huge_headers()
    five, zeros = Pixels(SIDE, 5), bytes(2**27)
    huge = "{'descr': '%s', 'fortran_order': False, 'shape': %s}\n"
    wide = Pixels(SIDE, max_pixels=10**18)
    return {
        "PNG of 1 bit": (png(bytes(3750 * 30000), 30000, 30000, 1, 0), SAME, "too large ("),
        "PNG of 16 bits": (
            png16(noise(8, 8, 3, dtype="u2")).replace(struct.pack(">II", 8, 8), b"\0\1\0\0" * 2),
            SAME,
            "",
        ),
        "GIF": (gif, SAME, "too large ("),
        "JPEG": (jpeg, SAME, "too large ("),
        "JPEG 2000": (jp2, SAME, "too large ("),
        "WebP": (_webp_claiming(2**24, 255), SAME, "too large ("),
        "TIFF": (_tiff_claiming(2**20, 2**20), SAME, "too large ("),
        "deep TIFF": (_tiff_claiming(2**20, 2**20, bits=16), SAME, "too large ("),
        "TIFF of bands": (_tiff_claiming(9999, 9999, samples=60000), five, "wrong channel count ("),
        "cut TIFF": (_tiff_claiming(9999, 9999, bits=16, data=bytes(64)), SAME, "truncated ("),
        "deflated strip": (_tiff_claiming(64, 64, 16, data=zlib.compress(zeros, 1), compression=8), SAME, "*"),
        "zstd strip": (_tiff_claiming(64, 64, 16, data=imagecodecs.zstd_encode(zeros), compression=50000), SAME, "*"),
        "LZMA strip": (_tiff_claiming(64, 64, 16, data=lzma.compress(zeros, preset=0), compression=34925), SAME, "*"),
        "deflated tile": (_tile_bomb(zlib.compress(zeros, 1)), SAME, "damaged (TIFF tiles of 32768×32768 pixels)"),
        "deflated tile of bands": (_tile_bomb(zlib.compress(zeros, 1)), five, ""),
        "thousands of pages": (pages(*[noise(8, 8)] * 3000), five, "wrong channel count ("),
        "overlapping tags": (_overlapping_tags(), SAME, "damaged (TIFF tags larger than the file)"),
        "overlapping tags of bands": (_overlapping_tags(), five, "damaged (TIFF tags larger than the file)"),
        "overlapping EXIF": (_exif_bomb(), SAME, "*"),
        "npy": (npy_claiming(huge % ("|u1", (10**6, 10**6, 3))), SAME, "too large ("),
        "npy of large values": (npy_claiming(huge % ("|u2", (9000, 9000, 3))), SAME, "truncated ("),
        "npy beyond any bound": (npy_claiming(huge % ("|u1", (2**62, 2**62))), wide, "too large ("),
        "npy beyond any memory": (npy_claiming(huge % ("|u1", (2**29, 2**29))), wide, "truncated ("),
        "long npy header": (npy_claiming("(" * 60000), SAME, "damaged ("),
    }


LIMITED = """
import json, resource, sys, time
import imagecodecs, tifffile, numpy, PIL.Image
sys.path[:0] = sys.argv[1:4]
import test_decode as t
from pipeline.images.decode import RejectedImage, decode_image
from pathlib import Path
cases = {name: (wanted, Path(sys.argv[4], f"{i}").read_bytes()) for i, (name, wanted) in enumerate(eval(sys.argv[5], vars(t)))}
decode_image(t.tiff(t.FLOATS[..., 0], compression="zstd"), "", t.Pixels(8, value_range=(0, 1)))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 96 * 2**20,) * 2)
for name, (wanted, data) in cases.items():
    start = time.perf_counter()
    try:
        said = str(decode_image(data, name, wanted).shape)
    except RejectedImage as error:
        said = str(error)
    print(json.dumps([name, said, time.perf_counter() - start]), flush=True)
"""


def test_bombs_are_refused_with_little_memory(tmp_path: Path) -> None:
    listed = []
    for number, (name, (data, wanted, _)) in enumerate(bombs().items()):
        assert len(data) < 20e6
        (tmp_path / str(number)).write_bytes(data)
        listed.append((name, wanted))
    here = Path(__file__).parents[1]
    command = [
        sys.executable,
        "-c",
        LIMITED,
        str(here.parent),
        str(here / "images"),
        str(here),
        str(tmp_path),
        repr(listed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in said] == list(bombs())
    for name, text, seconds in said:
        words = bombs()[name][2]
        assert "not enough memory" not in text, name
        # "*": refused or decoded, but with no more memory than that.
        assert words == "*" or (text.startswith(words) and text[0] != "("), (name, text)
        assert seconds < 2, name


@pytest.mark.parametrize("case", ["npy", "npy of large values", "TIFF", "PNG of 1 bit", "thousands of pages"])
def test_bombs_are_refused_before_anything_is_allocated(case: str) -> None:
    data, wanted, words = bombs()[case]
    reason(data, "a", wanted)
    tracemalloc.start()
    try:
        assert reason(data, "a", wanted).startswith(words)
        assert tracemalloc.get_traced_memory()[1] < 4e6 + 3 * len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bound", [None, 1000, 2_000])
def test_pillows_own_bound_is_left_as_it_is(bound: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
    for max_pixels in (1500, 100_000_000, 10**12):
        wanted = Pixels(SIDE, max_pixels=max_pixels)
        for data in (WHOLE_JPEG, tiff(noise(64, 64, dtype="u2")), png16(noise(64, 64, 3, dtype="u2"))):
            if max_pixels == 1500:
                assert reason(data, "a", wanted).startswith("too large (")
            else:
                assert decode_image(data, "a", wanted).shape == (3, SIDE, SIDE)
            assert bound == Image.MAX_IMAGE_PIXELS
            assert reason(data[:700], "a", wanted)
            assert bound == Image.MAX_IMAGE_PIXELS


# Anything at all


@cache
def seeds() -> dict[str, list[bytes]]:
    image, values = photo(40, 30), noise(30, 40, 3, dtype="u2")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker " * 9
    return {
        "JPEG": [saved(image, "JPEG", exif=exif), saved(image, "JPEG", progressive=True)],
        "PNG": [saved(image, "PNG", exif=exif), saved(image.quantize(16), "PNG"), png16(values)],
        "TIFF": [
            saved(image, "TIFF", exif=exif),
            saved(image, "TIFF", compression="jpeg"),
            tiff(values, photometric="rgb", compression="lzw", tile=(16, 16)),
            tiff(noise(30, 40, 5), compression="deflate", planarconfig="contig"),
            pages(*noise(5, 30, 40)),
        ],
        "GIF": [saved(image.quantize(64), "GIF", save_all=True, append_images=[image.rotate(9).quantize(64)])],
        "WEBP": [saved(image, "WEBP", exif=exif), saved(image, "WEBP", lossless=True)],
        "BMP": [saved(image, "BMP"), saved(image.quantize(16), "BMP")],
        "other": [saved(image, kind) for kind in ("JPEG2000", "PPM", "TGA", "PCX", "SGI")],
        "npy": [npy(values), npy(FLOATS, (2, 0))],
    }


@pytest.mark.parametrize("kind", seeds())
def test_damage_raises_nothing_else(kind: str) -> None:
    rng = random.Random(kind)
    slowest = 0.0
    for turn in range(100):
        whole = rng.choice(seeds()[kind])
        data = bytearray(whole)
        if turn % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            reach = rng.choice((64, 400, len(data)))  # most of what matters is near the start, of a TIFF or npy too
            for _ in range(rng.choice((1, 2, 8, 30))):
                data[rng.randrange(min(reach, len(data)))] = rng.randrange(256)
        wanted = Pixels(16, rng.choice((3, 3, 1, 5)), 10**6, value_range=rng.choice((None, (0, 0.5))))
        start = time.perf_counter()
        try:
            pixels = decode_image(bytes(data), "a." + kind.lower(), wanted)
        except RejectedImage as error:
            text = str(error)
            assert text and len(text) <= 160 and text.isprintable()
        else:
            assert pixels.shape == (wanted.channels, 16, 16) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 1


def by_pillow(data: bytes, wanted: Pixels, monkeypatch: pytest.MonkeyPatch) -> np.ndarray | str:
    """What Pillow alone makes of a JPEG: pixels, or the reason why not."""
    with monkeypatch.context() as only_pillow:
        only_pillow.setattr("pipeline.images.decode._whole_jpeg", lambda *_: None)
        return pixels_or_reason(data, wanted)


def pixels_or_reason(data: bytes, wanted: Pixels) -> np.ndarray | str:
    try:
        return decode_image(data, "a.jpg", wanted)
    except RejectedImage as error:
        return str(error)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_jpegs_in_full_size_have_pillows_pixels(
    subsampling: str, progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where imagecodecs is not used, or decodes, upsamples or converts colours in another way."""
    decoded = []
    monkeypatch.setattr(
        imagecodecs, "jpeg8_decode", lambda data, decode=imagecodecs.jpeg8_decode: decoded.append(1) or decode(data)
    )
    options = {"subsampling": subsampling, "progressive": progressive}
    for quality, (width, height), exif in ((40, (97, 71), 6), (90, (64, 85), 1), (100, (127, 90), 3)):
        about = Image.Exif()
        about[0x0112] = exif
        data = saved(photo(width, height), "JPEG", quality=quality, exif=about, restart_marker_blocks=3, **options)
        for given in (data, data + b"anything after its end"):
            np.testing.assert_array_equal(
                decode_image(given, "", Pixels(48)), by_pillow(given, Pixels(48), monkeypatch)
            )
    assert len(decoded) == 6


def test_damaged_jpegs_are_what_pillow_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where libjpeg reads beyond the end of a file, and makes up the rest of the image without a word."""
    rng, wanted = random.Random(0), Pixels(24)
    for progressive in (False, True):
        whole = saved(photo(40, 40), "JPEG", quality=60, progressive=progressive)
        ends = range(len(whole) - 2, 2, -7)
        changed = []
        for _ in range(100):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 3))):
                data[rng.randrange(2, len(data))] = rng.randrange(256)
            changed.append(bytes(data))
        for data in [*(whole[:end] for end in ends), *(whole[:end] + b"\xff\xd9" for end in ends), *changed]:
            found, wants = pixels_or_reason(data, wanted), by_pillow(data, wanted, monkeypatch)
            assert isinstance(found, str) == isinstance(wants, str) and np.array_equal(found, wants), (found, wants)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_goes_through(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "load", interrupted)
    with pytest.raises(error):
        decode_image(WHOLE_JPEG, "a.jpg", SAME)


@pytest.mark.parametrize("error", [RecursionError("deep"), MemoryError(), AssertionError(), KeyError("x" * 999)])
def test_any_error_is_in_words(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "load", failing)
    assert reason(WHOLE_JPEG)
