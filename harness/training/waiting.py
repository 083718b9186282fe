"""How long a training waits for its data."""

import time
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..device import is_cuda


class Waiting:
    """Adds up the time in which the device had nothing to do because the next batch was not there.

    On a CPU, that is the time of each fetch. A GPU works behind the host, and a fetch costs nothing while it does: two
    events of its stream, before and after a fetch, are as far apart as it was idle in between.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._sum = 0.0
        self._fetches: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # that the GPU has not yet reached

    def around(self, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The batches, one after the other."""
        source, on_gpu = iter(batches), is_cuda(self.device)
        while True:
            started = time.perf_counter()
            before = self._event() if on_gpu else None
            batch = next(source, None)
            if before is None:
                self._sum += time.perf_counter() - started
            else:
                self._fetches.append((before, self._event()))
                self._count()
            if batch is None:
                return
            yield batch

    def seconds(self) -> float:
        """The sum of all fetches that the device has reached."""
        self._count()
        return self._sum

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _count(self) -> None:
        while self._fetches and self._fetches[0][1].query():
            before, after = self._fetches.popleft()
            self._sum += before.elapsed_time(after) / 1e3
