"""Small images of any number of channels, and what targets need to know of them."""

import numpy as np
import pywt
import torch

from wavemim.targets import Statistics

SIZE, TOKEN = 32, 8


def images_of(count=3, channels=3, size=SIZE, seed=0):
    """Smooth random images with some noise (count, channels, size, size), float32 of whole numbers in [0, 255]."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, channels, 5, 5)))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").numpy()
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).round().astype(np.float32)


def statistics_of(images, levels=4):
    """Statistics by PyWavelets."""
    mean, std = {}, {}
    approximation = images.astype(np.float64)
    for level in range(1, levels + 1):
        approximation, details = pywt.dwt2(approximation, "haar", mode="periodization")
        bands = dict(zip("AHVD", (approximation, *details), strict=True))
        mean[level] = {name: band.mean((0, 2, 3)).tolist() for name, band in bands.items()}
        std[level] = {name: band.std((0, 2, 3)).tolist() for name, band in bands.items()}
    return Statistics(mean, std, images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist())


def normalised_of(images):
    """The images as an encoder takes them, float32."""
    mean, std = images.mean((0, 2, 3), keepdims=True), images.std((0, 2, 3), keepdims=True)
    return torch.from_numpy((images - mean) / std)


def assert_float32_and_whole_graph(target, images, **kwargs):
    """Under autocast the same numbers as without, in one graph, without gradients; for bfloat16 predictions too."""
    torch.manual_seed(0)
    made = target(images, {})
    level = target.taps[-1].level
    assert all(values.dtype == torch.float32 and not values.requires_grad for values in made.values())
    prediction = torch.randn(made[level].shape).bfloat16()
    share = (torch.rand(len(images), made[level].shape[1]) < 0.5).float()
    share[:, 0] = 1
    error = target.error(level, prediction, made[level], share, **kwargs)
    assert error.dtype == torch.float32 and error.shape == (len(images),)

    with torch.autocast("cpu", torch.bfloat16):
        again = target(images, {})
        torch.testing.assert_close(
            target.error(level, prediction, again[level], share, **kwargs), error, atol=0, rtol=0
        )
    for key in made:
        assert torch.equal(again[key], made[key])

    def step(images, prediction, share):
        return target.error(level, prediction, target(images, {})[level], share, **kwargs)

    torch.compiler.reset()  # graphs of other targets count toward the limit of this function
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, prediction, share), error, atol=0, rtol=0)
