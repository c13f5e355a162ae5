"""Predicted pixels, compared by their Fourier spectrum (MFM, Xie et al., ICLR 2023). Legend as in `base`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wavemim.data_statistics import Statistics
from wavemim.masking import filled_in, frequency_numbers, share_at
from wavemim.registry import register_target
from wavemim.targets.base import Normalise, Tap, from_positions, to_positions
from wavemim.targets.pixels import PixelTarget


@register_target("fourier")
class FourierTarget(PixelTarget):
    """Vectors hold the pixels of a position as in `PixelTarget`; the error is that of the whole image's spectrum.

    One tap answers for all frequencies. Of several, the tap at level n answers for the octave of the wavelet level n:
    max(|u|, |v|) in (H / 2^(n+1), H / 2^n] cycles a side. The coarsest one answers for all below too, each for what
    lies between its octave and that of the next finer tap, and the finest for all above: every frequency has one tap.

    `normalise`: "dataset" and "none" as in `PixelTarget`; "patch" divides the distances by the image's own root mean
    square amplitude over the tap's frequencies, per channel, so that octaves and images of unlike contrast compare.
    What is predicted has the same unit as with "dataset".
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
    ) -> None:
        """`gamma`: exponent of the distance (MFM: 1); `focal`: exponent of its weight (Jiang et al. 2021), 0 for none.

        Raises ValueError for exponents out of range, and for a tap at level 0 beside others, as it has no octave.
        """
        super().__init__(taps, statistics, image_size=image_size, token_sizes=token_sizes, normalise=normalise)
        if gamma <= 0:
            raise ValueError(f"target.gamma={gamma}: the exponent of the frequency distance has to be above 0")
        if focal < 0:
            raise ValueError(f"target.focal={focal}: the exponent of the focal weight cannot be below 0")
        if len(self.taps) > 1 and self.taps[0].level == 0:
            raise ValueError(
                "target.taps.0: level 0 has no octave of frequencies of its own; beside other taps give it a level ≥ 1"
            )
        self.gamma, self.focal = gamma, focal
        numbers = frequency_numbers(image_size).abs()
        octaves = torch.maximum(numbers[:, None], numbers[None, :])
        upper = float(image_size)
        for tap in self.taps:
            lower = -1.0 if tap is self.taps[-1] else image_size / 2 ** (tap.level + 1)
            ring = (octaves > lower) & (octaves <= upper)
            self.register_buffer(f"ring{tap.level}", ring, persistent=False)
            upper = lower

    def frequencies(self, level: int) -> torch.Tensor:
        """Frequencies that the tap at `level` answers for, bool (H, W), laid out as of `torch.fft.fft2`."""
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
        """Error of each image (B,), float32: the mean of |F(prediction) − F(truth)|^gamma over frequencies and channels.

        Predictions (B, S, D) are put into the true image where it is hidden, by `share`; positions that `index` does
        not name keep the truth. Where frequencies were taken away, `spectrum` (B, H, W), everything is predicted, and
        the mean is over these frequencies alone (MFM, eq. 3 and 4); an image of which the tap's frequencies are all
        known has error 0. With `focal` each distance is weighted by its own power, at most 1 per image and channel.
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
            return total / (counted.sum((1, 2, 3)) * self.channels).clamp_min(1)

    def picture(
        self,
        level: int,
        vectors: torch.Tensor,
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """The frequencies that the tap answers for, as an image (B, C, H, W): of the true image completed by it."""
        return self.to_pixels(self._answer(level, vectors, images, mask))

    def rebuild(
        self,
        predictions: Mapping[int, torch.Tensor],
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden pixels of the sum of all taps' answers. For what was hidden by frequency, a mask that hides all."""
        answers = [
            self._answer(tap.level, predictions[tap.level], images, mask)
            for tap in self.taps
            if tap.level in predictions
        ]
        return self.to_pixels(filled_in(images.float(), torch.stack(answers).sum(0), mask))

    def _vectors(self, level: int, scaled: torch.Tensor) -> torch.Tensor:
        """As in `PixelTarget`, but "patch" does not touch the pixels: seams between patches would fill the spectrum."""
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
        """Completed less true image (B, C, H, W): the transform is linear, so that one of it is enough."""
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

    def _answer(self, level: int, vectors: torch.Tensor, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) of vectors (B, P², D), of the tap's frequencies alone.

        As in the error, vectors count at hidden positions: what a tap says elsewhere is never trained.
        """
        image = self._spectral_images(level, vectors.float()) / self.get_buffer("unit")
        if len(self.taps) == 1:
            return image
        share = share_at(mask, round(mask.shape[1] ** 0.5), self.positions(level))
        image = filled_in(images.float(), image, share)
        return torch.fft.ifft2(torch.fft.fft2(image) * self.frequencies(level)).real
