"""Masking in the frequency domain: Masked Frequency Modeling (Xie et al., ICLR 2023, arXiv 2206.07706).

Legend: B images, C channels, H = W pixels a side. Spectra are laid out as `torch.fft.fft2` gives them: the mean of the
image at [0, 0], negative frequencies in the second half of each axis.
"""

from __future__ import annotations

import torch

from wavemim.randomness import uniform


def frequency_numbers(size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Cycles a side of the image, int64 (size,), with sign: 0, 1, …, -2, -1; `size` · `torch.fft.fftfreq(size)`."""
    places = torch.arange(size, device=device)
    return torch.where(places < (size + 1) // 2, places, places - size)


def hidden_frequencies(
    rows: torch.Tensor, size: int, *, radius: float, low_pass_share: float, seed: int, epoch: int
) -> torch.Tensor:
    """Frequencies that are taken away, bool (B, H, W): a pure function of (seed, epoch, row of the image).

    With probability `low_pass_share` an image keeps the frequencies u² + v² < `radius`² alone (low-pass), otherwise all
    but these (high-pass). Raises ValueError for a circle that is empty or wider than the image, or no probability.
    """
    if not 0 < radius <= size / 2:
        raise ValueError(
            f"mask.radius={radius}: the circle has to lie within the spectrum of images of {size} pixels: "
            f"more than 0, at most {size // 2}"
        )
    if not 0 <= low_pass_share <= 1:
        raise ValueError(f"mask.low_pass_share={low_pass_share}: a probability lies between 0 and 1")
    squares = frequency_numbers(size, rows.device).square()
    inside = (squares[:, None] + squares[None, :]) < radius**2
    low_pass = uniform(seed, "frequencies", epoch, rows, 1) < low_pass_share
    return inside[None] ^ low_pass[:, :, None]


def corrupt(images: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) without the `hidden` frequencies (B, H, W), float32.

    On normalised images an image whose mean is taken away gets the data set's; the authors' code works on values in
    [0, 1] and clips to them, so that there it turns mostly black. Of a `hidden` that is not symmetric about 0 the
    real part of the result is given.
    """
    with torch.autocast(images.device.type, enabled=False):
        spectrum = torch.fft.fft2(images.float(), norm="ortho") * ~hidden[:, None]
        return torch.fft.ifft2(spectrum, norm="ortho").real
