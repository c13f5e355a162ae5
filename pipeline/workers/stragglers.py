"""Stragglers: which worker holds up the others. Each worker's own time per step is compared where metrics are logged.

Workers that exchange gradients all take as long for a step as the slowest of them, so the time of a step says nothing.
A worker's own time is the time that it waited for its data, and that it computed from there until its last gradients
were ready to be exchanged; from then on it waits for others. On a GPU the second part is measured between two events in
its stream, which are read only at logging steps. With FSDP a forward pass waits for other workers too: then only the time
for data counts. No Ray in here.
"""

# No `from __future__ import annotations`: DDP compares the annotations of its hook with types.
import inspect
import logging
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

_log = logging.getLogger(__name__)

SLOW = 2.0  # times the median of the others
WINDOWS = 3  # windows between logging steps, in a row, after which a slow worker is named
_NAME = 64  # bytes of a host's name
# An option of DDP, under its name in this torch: buffers are not broadcast before every step, which would make workers
# wait for rank 0 unnoticed. They are constant, or statistics that training does not use and of which rank 0's are saved.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
KEEP_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False}


@dataclass
class StragglerDetector:
    """Measures this worker's own time, step by step, and compares it with that of the others from time to time."""

    device: torch.device
    rank: int
    world: int
    ready: Callable[[], None] = lambda: None  # called once per step, when this worker has done its part of it
    data: float = 0.0  # seconds waited for batches in this window
    computed: float = 0.0
    steps: int = 0
    began: Any = None  # of this step: a time or an event
    spans: list[tuple[Any, Any]] = field(default_factory=list)  # pairs of events, read when the window ends
    slow: dict[int, int] = field(default_factory=dict)  # rank -> windows in a row in which it was slow
    hosts: list[str] = field(default_factory=list)

    def follow(self, wrapped: nn.Module) -> None:
        """Notice when a step's last gradients are ready. To be called by every worker."""
        if self.world == 1:
            return
        self.hosts = self._hosts()
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, self._exchange)

    def begin(self, waited: float) -> None:
        """A step begins, after `waited` seconds for its batch."""
        self.data += waited
        self.steps += 1
        self.began = self._now() if self.world > 1 else None

    def read(self) -> dict[str, float]:
        """Metrics of the window since the last call, the same on every worker; warns of a slow one. To be called by all."""
        if self.world == 1:
            self._reset()
            return {}
        for began, ended in self.spans:
            self.computed += began.elapsed_time(ended) / 1000
        times = torch.zeros(self.world, 2, dtype=torch.float32, device=self.device)
        times[self.rank] = torch.tensor([self.data, self.computed]) / max(self.steps, 1)
        dist.all_reduce(times)
        self._reset()
        return self._compare(times.tolist())

    def _compare(self, times: list[list[float]]) -> dict[str, float]:
        """`times`: seconds per step that each worker waited for data and computed."""
        own = [data + computed for data, computed in times]
        rank = max(range(self.world), key=own.__getitem__)
        usual = statistics.median(own[:rank] + own[rank + 1 :])
        ratio = own[rank] / max(usual, 1e-9)
        self.slow = {rank: self.slow.get(rank, 0) + 1} if ratio >= SLOW else {}
        if self.slow.get(rank) == WINDOWS and self.rank == 0:
            data, computed = times[rank]
            _log.warning(
                "rank %d on %s is slow: it takes %.3g s per step for its own work, the median of the others is %.3g s "
                "(%.1f ×), and all wait for it; it waits %.3g s for data and computes for %.3g s",
                rank, self.hosts[rank], own[rank], usual, ratio, data, computed,
            )  # fmt: skip
        return {
            "perf/slowest_rank": float(rank),
            "perf/slowest_ratio": ratio,
            "perf/slowest_seconds": own[rank],
            "perf/slowest_data_share": times[rank][0] / max(own[rank], 1e-9),
        }

    def _exchange(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP does by default; the time is taken before the last bucket."""
        if bucket.is_last():
            if self.began is not None:
                if self.device.type == "cuda":
                    self.spans.append((self.began, self._now()))
                else:
                    self.computed += time.perf_counter() - self.began
            self.ready()
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _reset(self) -> None:
        self.data = self.computed = 0.0
        self.steps, self.spans = 0, []

    def _hosts(self) -> list[str]:
        """Name and address of the host of each worker."""
        name = f"{socket.gethostname()} ({_address()})".encode()[:_NAME]
        names = torch.zeros(self.world, _NAME, dtype=torch.int32, device=self.device)
        names[self.rank, : len(name)] = torch.tensor(list(name), dtype=torch.int32)
        dist.all_reduce(names)
        return [bytes(byte for byte in line if byte).decode(errors="replace") for line in names.tolist()]


def _address() -> str:
    """This machine's address as other machines see it; connecting a UDP socket sends nothing."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("10.255.255.255", 1))
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
