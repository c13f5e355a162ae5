"""Wavelet coefficients of every tapped level (Xiang et al., AAAI 2025).

Legend as in `wavemim.targets.base`; K bands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from wavemim.data_statistics import Statistics
from wavemim.masking import filled_in, share_at
from wavemim.registry import register_target
from wavemim.targets.base import Loss, Normalise, Tap, Target, from_positions, moments, to_positions
from wavemim.wavelets import decompose, reconstruct

BandScale = Literal["auto", "kept", "erased"]


@register_target("wavelet")
class WaveletTarget(Target):
    """The wavelet coefficients of every position, as vectors.

    `normalise`: "dataset": by the data set's mean and standard deviation per level, band and channel; "patch": in
    addition by those of the position's own vector; "contrast": by the mean and standard deviation of the position's own
    pixels (for Haar these are the coefficients of the image of MAE's normalised patches); "none": minus the data set's mean,
    in units of the pixels' standard deviation.

    `band_scale`: "kept": coefficients are those of an orthonormal transform, so that the scale between levels and bands is
    that of the images; "erased": each level, band and channel in the unit of its own standard deviation over the data set;
    "auto": erased for "dataset" and "patch", kept for "contrast" and "none". Where it is kept, the sum of squares over all
    levels and bands of a patch is that of its pixels.
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
        band_scale: BandScale = "auto",
    ) -> None:
        """Create the target.

        Args:
            taps: The taps.
            statistics: Statistics of the data set.
            image_size: H = W, in pixels.
            token_sizes: {level: pixels per side of the encoder's tokens at that tap}.
            wavelet: PyWavelets' name of the wavelet.
            normalise: "dataset", "patch", "contrast" or "none".
            loss: The error of an element.
            on_device: Compute the coefficients from the images instead of using the stored pyramid.
            band_scale: "auto", "kept" or "erased".

        Raises:
            ValueError: If a level's cells and the tokens do not divide each other or the image.
        """
        super().__init__(
            taps, statistics, image_size=image_size, token_sizes=token_sizes, normalise=normalise, loss=loss
        )
        self.wavelet, self.on_device = wavelet, on_device
        kept = normalise in ("contrast", "none") if band_scale == "auto" else band_scale == "kept"
        # per channel where channels are normalised by themselves, as the encoder's images are
        mean_std = sum(statistics.pixel_std) / self.channels
        unit = torch.tensor(statistics.pixel_std if normalise == "contrast" else [mean_std] * self.channels)
        for tap in self.taps:
            mean = torch.tensor([statistics.mean[tap.level][band] for band in tap.bands])  # (K, C)
            std = torch.tensor([statistics.std[tap.level][band] for band in tap.bands])
            is_a = torch.tensor([[band == "A"] for band in tap.bands])
            if kept:
                std = unit.expand_as(std)
            if normalise == "none":
                mean = torch.where(is_a, mean, torch.zeros_like(mean))
            elif normalise == "contrast":
                mean = is_a * 2**tap.level * torch.tensor(statistics.pixel_mean)
            self.register_buffer(f"mean{tap.level}", mean.T[None, :, :, None, None].float().clone(), persistent=False)
            # a band that never varies (a data set of flat images) must not become infinite
            self.register_buffer(
                f"std{tap.level}", std.T[None, :, :, None, None].float().clamp_min(1e-6).clone(), persistent=False
            )
            if normalise == "contrast":  # what a mean of 1 in normalised pixels adds to each value: only to A
                shift = is_a * 2**tap.level * torch.tensor(statistics.pixel_std) / std.clamp_min(1e-6)  # (K, C)
                shift = shift.T[:, :, None].expand(-1, -1, self.cells(tap.level) ** 2).flatten()
                self.register_buffer(f"shift{tap.level}", shift.float().clone(), persistent=False)

    def values(self, tap: Tap) -> int:
        """Return D = C · K · cells²."""
        return self.channels * len(tap.bands) * self.cells(tap.level) ** 2

    def forward(self, images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Compute targets {level: (B, P², D)}. Arguments as for `Target.forward`."""
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
        """Return the coefficients {level: (B, C, K, h, w)} of the targets: those given, or those of the images."""
        if not self.on_device:
            return dict(pyramid)
        return decompose(self.to_pixels(images), max(tap.level for tap in self.taps), self.wavelet)

    def coefficients(
        self, predictions: Mapping[int, torch.Tensor], images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Convert predictions to coefficients of each tap's bands.

        With normalise="patch" or "contrast", predictions do not include the mean and scale of a position; those of the
        true image are used.

        Args:
            predictions: {level: (B, P², D)}.
            images: The true images (B, C, H, W), normalised.
            pyramid: Their coefficients {level: (B, C, K, h, w)}.

        Returns:
            {level: (B, C, K, h, w)} in coefficient units.
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
        """Reconstruct an image from this level's bands only: details around mid-grey, or with A the blurred image.

        Arguments as for `Target.picture`.
        """
        pyramid = self.pyramid_of(images, pyramid)
        tap = next(tap for tap in self.taps if tap.level == level)
        found = self.coefficients({level: vectors}, images, pyramid)[level]
        bands = found.new_zeros(*found.shape[:2], 4, *found.shape[3:])
        for index, band in enumerate(tap.bands):
            bands[:, :, "AHVD".index(band)] = found[:, :, index]
        only = {level: bands}
        for lower in range(1, level):
            side = self.image_size >> lower
            only[lower] = found.new_zeros(*found.shape[:2], 3, side, side)
        made = reconstruct(only, self.wavelet)
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
        """Fill hidden pixels with the image of the completed pyramid. Arguments as for `Target.rebuild`."""
        made = reconstruct(self.complete(predictions, images, pyramid, mask), self.wavelet)
        return filled_in(self.to_pixels(images), made, mask)

    def complete(
        self,
        predictions: Mapping[int, torch.Tensor],
        images: torch.Tensor,
        pyramid: Mapping[int, torch.Tensor],
        mask: torch.Tensor,
    ) -> dict[int, torch.Tensor]:
        """Complete the pyramid, from the coarsest tap to level 1, without using hidden pixels.

        Cells that are entirely visible keep their coefficients. All others depend on hidden pixels and are replaced by
        predictions, or by 0 if no tap predicts them (A: by that of the data set's mean).

        Args:
            predictions: {level: (B, P², D)}.
            images: The true images (B, C, H, W), normalised.
            pyramid: Their coefficients {level: (B, C, K, h, w)}.
            mask: (B, N), True = hidden.

        Returns:
            {level: (B, C, K, h, w)} with A at the coarsest level.
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
        """The tap's coefficients, normalised by the data set's statistics (or not), as vectors (B, P², D)."""
        standardised = (self._bands(pyramid, tap) - self._mean(tap.level)) / self._std(tap.level)
        return to_positions(standardised, self.cells(tap.level))

    def _moments(self, tap: Tap, vectors: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, P², 1 or D) and scale (B, P², 1) of each position, from its own vector or its own pixels."""
        if self.normalise == "patch":
            return moments(vectors)
        side = self.image_size // self.positions(tap.level)
        mean, scale = moments(to_positions(images.float()[:, :, None], side))
        return mean * self.get_buffer(f"shift{tap.level}"), scale

    def _bands(self, pyramid: Mapping[int, torch.Tensor], tap: Tap) -> torch.Tensor:
        """The tap's bands (B, C, K, h, w); an A that is not stored is reconstructed from the coarser levels."""
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
