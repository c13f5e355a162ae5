"""Sums of what training steps measured, kept on the device and read only when something is logged."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist


class LossMeter:
    """Sums of what steps measured, kept on the device; read only when something is logged."""

    def __init__(
        self, levels: list[int], device: torch.device, world: int, epoch_sums: list[float], window: list[float]
    ) -> None:
        self.levels = levels
        self.names = [f"train/loss_level{level}" for level in levels]
        self.world = world
        self.window = torch.zeros(len(levels) + 3, device=device)  # losses · images, gradient norm, steps, images
        self.epoch = torch.zeros(len(levels) + 1, device=device)  # losses · images, images
        if epoch_sums:
            self.epoch += torch.tensor(epoch_sums, device=device)
        if window:
            self.window += torch.tensor(window, device=device)
        self.images = self.waited = 0.0
        self.began = time.perf_counter()

    def add(self, losses: torch.Tensor, grad_norm: torch.Tensor, images: float, waited: float) -> None:
        """One step: no value is brought to the host. One that was left out counts nothing."""
        done = grad_norm.isfinite()
        measured = torch.cat((losses * images, grad_norm[None]))
        one = done.float()[None]
        measured = torch.cat((torch.where(done, measured, 0.0), one, one * images))
        self.window += measured
        self.epoch += torch.cat((measured[:-3], measured[-1:]))
        self.images += images
        self.waited += waited

    def read(self, weights: list[float]) -> dict[str, float]:
        """Metrics since the last call, as means over images and workers. Every worker has to call it.

        `weights` are those that the levels' losses have now; the loss is their sum under these.
        """
        values = self._mean_over_workers(self.window)
        seconds = max(time.perf_counter() - self.began, 1e-9)
        metrics: dict[str, float] = {}
        if values[-1]:  # a window of steps that were all left out has no loss
            losses = [value / values[-1] for value in values[:-3]]
            metrics |= dict(zip(self.names, losses, strict=True))
            metrics["train/loss"] = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
            metrics["train/grad_norm"] = values[-3] / values[-2]
        metrics |= {f"train/weight_level{level}": weight for level, weight in zip(self.levels, weights, strict=True)}
        metrics["perf/images_per_second"] = self.images / seconds
        metrics["perf/data_wait_share"] = self.waited / seconds
        self.window.zero_()
        self.images = self.waited = 0.0
        self.began = time.perf_counter()
        return metrics

    def read_epoch(self) -> dict[str, float]:
        """Mean loss of each level over the epoch so far."""
        values = self._mean_over_workers(self.epoch)
        self.epoch.zero_()
        return {name: value / max(values[-1], 1.0) for name, value in zip(self.names, values[:-1], strict=True)}

    def sums(self) -> tuple[list[float], list[float]]:
        """What `read` and `read_epoch` are made of, the same on every worker."""
        return self._mean_over_workers(self.window), self._mean_over_workers(self.epoch)

    def _mean_over_workers(self, sums: torch.Tensor) -> list[float]:
        total = sums.clone()
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        return total.tolist()
