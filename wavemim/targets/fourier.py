"""Pixels compared by their Fourier spectrum (MFM, Xie et al., ICLR 2023). Legend as in `wavemim.targets.base`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from wavemim.data_statistics import Statistics
from wavemim.masking import Frequencies, filled_in, frequency_numbers, share_at
from wavemim.registry import register_target
from wavemim.targets.base import Normalise, Tap, from_positions, to_positions
from wavemim.targets.pixels import PixelTarget

Average = Literal["image", "frequency"]


@register_target("fourier")
class FourierTarget(PixelTarget):
    """The pixels of a position as in `PixelTarget`, with an error over the spectrum of the whole image.

    A single tap covers all frequencies. With several taps, the tap at level n covers the octave of wavelet level n:
    max(|u|, |v|) in (H / 2^(n+1), H / 2^n] cycles per side. The gap up to the octave of the next finer tap belongs to
    the coarser of the two; the coarsest tap also covers all lower frequencies, the finest all higher ones. Every
    frequency thus belongs to exactly one tap.

    `normalise`: "dataset" and "none" as in `PixelTarget`; "patch" divides the distances by the image's own root mean
    square amplitude over the tap's frequencies, per channel, so that octaves and images of different contrast become
    comparable. Predictions have the same unit as with "dataset".

    `average` matters where masking is by frequency, since images then differ in how many frequencies are removed. With
    "image", the error is the mean over the removed frequencies of an image, and all images weigh the same. With
    "frequency", all removed frequencies of all images weigh the same (MFM): the error of an image is the sum over its
    removed frequencies, divided by their expected number. MFM's code divides by their actual number in the batch of a
    GPU, which differs from the expected one by chance (by 6 % of it with 256 images). The expected number depends on
    neither batch, workers nor gradient accumulation, so gradients do not either.
    """

    def __init__(
        self,
        taps: list[Tap],
        statistics: Statistics,
        *,
        image_size: int,
        token_sizes: Mapping[int, int],
        normalise: Normalise = "dataset",
        gamma: float = 1.0,
        focal: float = 0.0,
        average: Average = "image",
        frequencies: Frequencies | None = None,
    ) -> None:
        """Create the target.

        Args:
            taps: The taps.
            statistics: Statistics of the data set.
            image_size: H = W, in pixels.
            token_sizes: {level: pixels per side of the encoder's tokens at that tap}.
            normalise: "dataset", "patch" or "none".
            gamma: Exponent of the frequency distance, above 0 (MFM: 1).
            focal: Exponent of the focal weight of the distance (Jiang et al. 2021); 0: no weight.
            average: "image" or "frequency": what weighs the same in the mean over a batch.
            frequencies: How frequencies are removed from the input; None: masking is not by frequency.

        Raises:
            ValueError: If an exponent is out of range, or level 0, which has no octave, is not the only tap.
        """
        super().__init__(taps, statistics, image_size=image_size, token_sizes=token_sizes, normalise=normalise)
        if gamma <= 0:
            raise ValueError(f"target.gamma={gamma}: the exponent of the frequency distance has to be above 0")
        if focal < 0:
            raise ValueError(f"target.focal={focal}: the exponent of the focal weight cannot be below 0")
        if len(self.taps) > 1 and self.taps[0].level == 0:
            raise ValueError(
                "target.taps.0: level 0 has no octave of frequencies; with several taps every level has to be 1 or more"
            )
        self.gamma, self.focal, self.average = gamma, focal, average
        removed = frequencies.probability(image_size) if frequencies is not None else torch.ones(image_size, image_size)
        numbers = frequency_numbers(image_size).abs()
        octaves = torch.maximum(numbers[:, None], numbers[None, :])
        upper = float(image_size)
        for tap in self.taps:
            lower = -1.0 if tap is self.taps[-1] else image_size / 2 ** (tap.level + 1)
            ring = (octaves > lower) & (octaves <= upper)
            self.register_buffer(f"ring{tap.level}", ring, persistent=False)
            expected = (removed * ring).sum().float()
            self.register_buffer(f"expected{tap.level}", expected, persistent=False)
            upper = lower

    def frequencies(self, level: int) -> torch.Tensor:
        """Return the frequencies of the tap at `level`: bool (H, W) in the layout of `torch.fft.fft2`."""
        return self.get_buffer(f"ring{level}")

    def error(
        self,
        level: int,
        prediction: torch.Tensor,
        target: torch.Tensor,
        share: torch.Tensor,
        index: torch.Tensor | None = None,
        spectrum: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the mean of |F(prediction) − F(truth)|^gamma over frequencies and channels (MFM, eq. 3 and 4).

        With `focal`, each distance is weighted by a power of itself, scaled to at most 1 per image and channel. With
        `average="frequency"`, the sum is divided by the expected number of removed frequencies.

        Args:
            level: The level of the tap.
            prediction: (B, S, D). It replaces the true image in its hidden part.
            target: (B, P², D), the true pixels.
            share: (B, P²), the hidden fraction of each position.
            index: (B, S), the predicted positions; all others keep the truth. None: all positions.
            spectrum: bool (B, H, W), the removed frequencies if masking is by frequency. Every position is predicted
                then, and the mean is over these frequencies only.

        Returns:
            Error (B,), float32; 0 for an image that hides none of the tap's frequencies.
        """
        with torch.autocast(prediction.device.type, enabled=False):
            difference = self._difference(level, prediction.float(), target, share, index, spectrum)
            counted = self.frequencies(level)[None, None]
            if spectrum is not None:
                counted = counted & spectrum[:, None]
            spectral = torch.fft.fft2(difference, norm="ortho")
            amplitude = (spectral.real.square() + spectral.imag.square() + 1e-12).sqrt()
            if self.normalise == "patch":
                amplitude = amplitude / self._deviation(level, target)
            distance = amplitude if self.gamma == 1 else amplitude**self.gamma
            if self.focal:
                weight = (amplitude.detach() * counted) ** self.focal
                distance = distance * (weight / weight.amax((2, 3), keepdim=True).clamp_min(1e-12))
            total = (distance * counted).sum((1, 2, 3))
            number = counted.sum((1, 2, 3))
            if self.average == "frequency" and spectrum is not None:
                number = self.get_buffer(f"expected{level}")
            return total / (number * self.channels).clamp_min(1)

    def picture(
        self,
        level: int,
        vectors: torch.Tensor,
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return the tap's frequencies of the true image completed by the prediction, as an image (B, C, H, W).

        Arguments as for `Target.picture`.
        """
        return self.to_pixels(self._in_octave(level, vectors, images, mask))

    def rebuild(
        self,
        predictions: Mapping[int, torch.Tensor],
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Reconstruct the hidden pixels from the sum of all taps' frequencies. Arguments as for `Target.rebuild`.

        If masking is by frequency, `mask` has to hide everything.
        """
        parts = [
            self._in_octave(tap.level, predictions[tap.level], images, mask)
            for tap in self.taps
            if tap.level in predictions
        ]
        return self.to_pixels(filled_in(images.float(), torch.stack(parts).sum(0), mask))

    def _vectors(self, level: int, scaled: torch.Tensor) -> torch.Tensor:
        """As in `PixelTarget`, but "patch" does not change the pixels: seams between patches would fill the spectrum."""
        return to_positions(scaled[:, :, None], self.side(level))

    def _spectral_images(self, level: int, vectors: torch.Tensor) -> torch.Tensor:
        return from_positions(vectors, self.channels, 1, self.side(level))[:, :, 0]

    def _difference(
        self,
        level: int,
        prediction: torch.Tensor,
        target: torch.Tensor,
        share: torch.Tensor,
        index: torch.Tensor | None,
        spectrum: torch.Tensor | None,
    ) -> torch.Tensor:
        """Completed minus true image (B, C, H, W): the transform is linear, so one of the difference is enough."""
        if index is None:
            difference = prediction - target
        else:
            places = index[:, :, None].expand(-1, -1, target.shape[2])
            difference = torch.zeros_like(target).scatter(1, places, prediction - target.gather(1, places))
        if spectrum is None:
            difference = difference * share[:, :, None]
        return self._spectral_images(level, difference)

    def _deviation(self, level: int, target: torch.Tensor) -> torch.Tensor:
        """Root mean square amplitude (B, C, 1, 1) of the true image over the tap's frequencies."""
        spectral = torch.fft.fft2(self._spectral_images(level, target), norm="ortho")
        ring = self.frequencies(level)
        power = (spectral.real.square() + spectral.imag.square()) * ring
        return (power.sum((2, 3), keepdim=True) / ring.sum() + 1e-6).sqrt()

    def _in_octave(self, level: int, vectors: torch.Tensor, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) of vectors (B, P², D), limited to the tap's frequencies.

        As in the error, vectors only count at hidden positions: elsewhere they are never trained.
        """
        image = self._spectral_images(level, vectors.float()) / self.get_buffer("unit")
        if len(self.taps) == 1:
            return image
        share = share_at(mask, round(mask.shape[1] ** 0.5), self.positions(level))
        image = filled_in(images.float(), image, share)
        return torch.fft.ifft2(torch.fft.fft2(image) * self.frequencies(level)).real
