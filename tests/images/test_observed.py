"""What is noticed of the values of images, and pixels without data."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.decode import decode_image
from pipeline.images.observed import Observed, cropped_share, narrow_values


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def seen(*files: bytes, value_range=None) -> dict:
    observed = Observed()
    wanted = Pixels(16, value_range=value_range, observed=observed)
    for data in files:
        observed.add(decode_image(data, "x.png", wanted), mapped=value_range is not None)
    return observed.state()


def values(low: int, high: int, dtype: str = "u2") -> np.ndarray:
    return np.linspace(low, high, 32 * 16).reshape(16, 32).astype(dtype)


def test_values_that_fill_little_of_their_range_are_said_with_the_setting():
    """Fails where 12 bits in 16 become black without a word, or where ordinary images are warned of."""
    dim, full, photo = png(values(0, 4000)), png(values(0, 65535)), png(values(0, 255, "u1"))
    [note] = narrow_values([seen(dim), seen(png(values(3, 4095)), full)])  # as two tasks report them
    assert "2 of 3 images reach 4095 of 65535" in note and note.endswith("set data.value_range=[0, 4095]")
    assert "of 255 and fill" in narrow_values([seen(png(values(0, 9, "u1")))])[0]  # a mask
    assert "data.value_range=[30000, 32000]" in narrow_values([seen(png(values(30000, 32000)))])[0]
    for value in (0, 255):  # nothing in them at all
        note = f"2 of 2 images have the value {value} in every pixel: check the files"
        assert narrow_values([seen(*[png(values(value, value, "u1"))] * 2)]) == [note]
    for ordinary in ([full, full, dim], [photo], [png(values(0, 0, "u1")), photo, photo]):
        assert narrow_values([seen(*ordinary)]) == []
    assert narrow_values([seen(dim, value_range=(0, 4095))]) == []


def test_one_pixel_is_enough_to_fill_the_range():
    """Fails where only some of the pixels are looked at."""
    image = values(0, 9, "u1")
    image[7, 17] = 200
    assert narrow_values([seen(png(image))]) == []


def test_the_share_of_pixels_outside_the_square_is_counted():
    state = seen(png(values(0, 255, "u1")), png(values(0, 255, "u1")[:, :16]))
    assert cropped_share([state, state]) == pytest.approx(1 - 512 / 768)
    assert cropped_share([]) is None


def test_pixels_without_data_become_black_where_a_setting_says_so():
    image = np.full((16, 16), 0.75, np.float32)
    image[:4], image[4, 4] = -9999, np.nan
    with pytest.raises(RejectedImage, match=r"NaN or infinite pixels \(set data.nodata=nan to make them black; 0.4%"):
        decode_image(npy(image), "x.npy", Pixels(16, 1, value_range=(0.5, 1)))
    image[4, 4] = np.inf
    found = decode_image(npy(image), "x.npy", Pixels(16, 1, value_range=(0, 1), nodata=-9999))[0]
    assert (found[:4] == 0).all() and found[4, 4] == 0 and (found[5:] == 191).all()
    found = decode_image(npy(-image), "x.npy", Pixels(16, 1, value_range=(-1, 10000), nodata="nan"))[0]
    assert (found[:4] == 255).all() and found[4, 4] == 0
    white = np.full((16, 16), 65535, np.uint16)
    white[0] = 100
    assert decode_image(npy(white), "x.npy", Pixels(16, 1, nodata=65535)).max() == 0
    with pytest.raises(RejectedImage, match=r"no data \(data.nodata=65535 in all pixels"):
        decode_image(npy(white[1:]), "x.npy", Pixels(16, 1, nodata=65535))
