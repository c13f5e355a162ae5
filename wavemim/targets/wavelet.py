"""Wavelet coefficients of every tapped level (Xiang et al., AAAI 2025). Legend as in `wavemim.targets.base`; K bands."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wavemim.data_statistics import Statistics
from wavemim.masking import filled_in, share_at
from wavemim.registry import register_target
from wavemim.targets.base import Loss, Normalise, Tap, Target, from_positions, moments, to_positions
from wavemim.wavelets import decompose, reconstruct


@register_target("wavelet")
class WaveletTarget(Target):
    """Wavelet coefficients as vectors a position.

    `normalise`: "dataset" by the data set's mean and standard deviation per level, band and channel; "patch" in
    addition by those of the position's own vector; "contrast" in addition by the mean and deviation of the position's
    own pixels (for Haar: coefficients of the image that MAE's normalised patches make up, each level and band in its
    own unit); "none" in units of the pixels' standard deviation, orthonormal, so that the sum over all levels is a
    plain pixel loss.
    """

    predicts_bands = True

    def __init__(
        self,
        taps: list[Tap],
        statistics: Statistics,
        *,
        image_size: int,
        token_sizes: Mapping[int, int],
        wavelet: str = "haar",
        normalise: Normalise = "dataset",
        loss: Loss = "l2",
        on_device: bool = False,
    ) -> None:
        """`on_device`: compute the coefficients from the images instead of taking those of the pyramid."""
        super().__init__(
            taps, statistics, image_size=image_size, token_sizes=token_sizes, normalise=normalise, loss=loss
        )
        self.wavelet, self.on_device = wavelet, on_device
        pixel_scale = sum(statistics.pixel_std) / self.channels
        for tap in self.taps:
            mean = torch.tensor([statistics.mean[tap.level][band] for band in tap.bands])  # (K, C)
            std = torch.tensor([statistics.std[tap.level][band] for band in tap.bands])
            is_a = torch.tensor([[band == "A"] for band in tap.bands])
            if normalise == "none":
                mean = torch.where(is_a, mean, torch.zeros_like(mean))
                std = torch.full_like(std, pixel_scale)
            elif normalise == "contrast":
                mean = is_a * 2**tap.level * torch.tensor(statistics.pixel_mean)
            self.register_buffer(f"mean{tap.level}", mean.T[None, :, :, None, None].float().clone(), persistent=False)
            # a band that never varies (a data set of flat images) must not become an infinity
            self.register_buffer(
                f"std{tap.level}", std.T[None, :, :, None, None].float().clamp_min(1e-6).clone(), persistent=False
            )
            if normalise == "contrast":  # what a mean of 1 in normalised pixels adds to each value: to A alone
                shift = is_a * 2**tap.level * torch.tensor(statistics.pixel_std) / std.clamp_min(1e-6)  # (K, C)
                shift = shift.T[:, :, None].expand(-1, -1, self.cells(tap.level) ** 2).flatten()
                self.register_buffer(f"shift{tap.level}", shift.float().clone(), persistent=False)

    def values(self, tap: Tap) -> int:
        """D: C · K · cells²."""
        return self.channels * len(tap.bands) * self.cells(tap.level) ** 2

    def forward(self, images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Targets {level: (B, P², D)}."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            pyramid = self.pyramid_of(images, pyramid)
            targets = {}
            for tap in self.taps:
                vectors = self._vectors(tap, pyramid)
                if self.normalise in ("patch", "contrast"):
                    mean, scale = self._moments(tap, vectors, images)
                    vectors = (vectors - mean) / scale
                targets[tap.level] = vectors
            return targets

    def pyramid_of(self, images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The coefficients that targets come from: those given, or those of the images."""
        if not self.on_device:
            return dict(pyramid)
        return decompose(self.to_pixels(images), max(tap.level for tap in self.taps), self.wavelet)

    def coefficients(
        self, predictions: Mapping[int, torch.Tensor], images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Predictions {level: (B, P², D)} as coefficients {level: (B, C, K, h, w)} of each tap's bands.

        With normalise="patch" or "contrast" the scale of a position is no part of the prediction: it is that of the
        true `images` and `pyramid`.
        """
        found = {}
        for tap in self.taps:
            if tap.level not in predictions:
                continue
            vectors = predictions[tap.level].float()
            if self.normalise in ("patch", "contrast"):
                mean, scale = self._moments(tap, self._vectors(tap, pyramid), images)
                vectors = vectors * scale + mean
            maps = from_positions(vectors, self.channels, len(tap.bands), self.cells(tap.level))
            found[tap.level] = maps * self._std(tap.level) + self._mean(tap.level)
        return found

    def picture(
        self,
        level: int,
        vectors: torch.Tensor,
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """What the bands of this level alone make of an image: around mid-grey, with A the image as A shows it."""
        pyramid = self.pyramid_of(images, pyramid)
        tap = next(tap for tap in self.taps if tap.level == level)
        found = self.coefficients({level: vectors}, images, pyramid)[level]
        bands = found.new_zeros(*found.shape[:2], 4, *found.shape[3:])
        for index, band in enumerate(tap.bands):
            bands[:, :, "AHVD".index(band)] = found[:, :, index]
        alone = {level: bands}
        for lower in range(1, level):
            side = self.image_size >> lower
            alone[lower] = found.new_zeros(*found.shape[:2], 3, side, side)
        made = reconstruct(alone, self.wavelet)
        if "A" in tap.bands:
            return made
        true = self._bands(pyramid, tap)
        return 127.5 + made * (100 * 2**level / torch.quantile(true.abs().flatten()[:1_000_000], 0.99).clamp_min(1e-6))

    def rebuild(
        self,
        predictions: Mapping[int, torch.Tensor],
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden pixels of the completed pyramid, visible ones of the input."""
        made = reconstruct(self.complete(predictions, images, pyramid, mask), self.wavelet)
        return filled_in(self.to_pixels(images), made, mask)

    def complete(
        self,
        predictions: Mapping[int, torch.Tensor],
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> dict[int, torch.Tensor]:
        """The pyramid from the coarsest tap to level 1, of which nothing that is hidden is part.

        Cells that are wholly visible keep their own coefficients; all others, since theirs depend on hidden pixels too,
        are predicted. A coefficient that no tap answers for is 0 there (A: that of the data set's mean).
        """
        pyramid = self.pyramid_of(images, pyramid)
        grid = round(mask.shape[1] ** 0.5)
        predicted = self.coefficients(predictions, images, pyramid)
        bands = {tap.level: tap.bands for tap in self.taps}
        coarsest = max(bands)
        completed = {}
        for level in range(1, coarsest + 1):
            truth, names = pyramid[level][:, :, -3:], "HVD"
            if level == coarsest:
                truth = torch.cat((reconstruct(dict(pyramid), self.wavelet, to=level)[:, :, None], truth), 2)
                names = "AHVD"
            guess = torch.zeros_like(truth)
            if names == "AHVD":
                guess[:, :, 0] = self.get_buffer("pixel_mean")[:, None, None] * 2**level
            for index, band in enumerate(names):
                if band in bands.get(level, ""):
                    guess[:, :, index] = predicted[level][:, :, bands[level].index(band)]
            side = truth.shape[-1]
            hidden = share_at(mask, grid, side).reshape(-1, 1, 1, side, side) > 0
            completed[level] = torch.where(hidden, guess, truth)
        return completed

    def _vectors(self, tap: Tap, pyramid: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The tap's coefficients, by the data set's (or no) normalisation, as vectors (B, P², D)."""
        standardised = (self._bands(pyramid, tap) - self._mean(tap.level)) / self._std(tap.level)
        return to_positions(standardised, self.cells(tap.level))

    def _moments(self, tap: Tap, vectors: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a position's own vector, or its own pixels, say of its mean (B, P², 1 or D) and scale (B, P², 1)."""
        if self.normalise == "patch":
            return moments(vectors)
        side = self.image_size // self.positions(tap.level)
        mean, scale = moments(to_positions(images.float()[:, :, None], side))
        return mean * self.get_buffer(f"shift{tap.level}"), scale

    def _bands(self, pyramid: Mapping[int, torch.Tensor], tap: Tap) -> torch.Tensor:
        """(B, C, K, h, w) of the tap's bands; A of a level that stores none is rebuilt from the coarser levels."""
        stored = pyramid[tap.level]
        details = {"H": stored[:, :, -3], "V": stored[:, :, -2], "D": stored[:, :, -1]}
        if "A" in tap.bands:
            given = stored.shape[2] == 4
            details["A"] = stored[:, :, 0] if given else reconstruct(dict(pyramid), self.wavelet, to=tap.level)
        return torch.stack([details[band] for band in tap.bands], 2).float()

    def _mean(self, level: int) -> torch.Tensor:
        return self.get_buffer(f"mean{level}")

    def _std(self, level: int) -> torch.Tensor:
        return self.get_buffer(f"std{level}")
