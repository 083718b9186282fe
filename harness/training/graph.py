"""The work of a training step on a GPU as one CUDA graph, so that the host does not limit how fast kernels start."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: libraries allocate, kernels compile, and the optimizer creates its state

Update = Callable[[Sequence[Tensor]], None]


class NotCaptured(RuntimeError):
    """The work of a step cannot be captured as a CUDA graph."""


class WholeStep:
    """`update`, captured as a CUDA graph at the call after `warm_up` calls and replayed from then on.

    `update` takes tensors on a GPU and changes others in place. It must do the same work on the same memory in every
    call, with inputs of the same shapes, and never wait for the GPU. The calls before the capture run `update` itself,
    so that every call is a step of the training.
    """

    def __init__(
        self,
        update: Update,
        fallback: Callable[[str], None] | None = None,
        warm_up: int = WARM_UP,
        most: Callable[[int], int] = int,
        stream: "torch.cuda.Stream | None" = None,
    ) -> None:
        """`fallback` gets the reason if the capture fails, and the calls run `update` itself from then on. Without a
        `fallback`, the call raises NotCaptured. `most` is the largest number of all processes that capture the step
        together: if it fails in one of them, none replays it. `stream` is where all calls run, None: one of its own."""
        self.update, self.fallback, self.warm_up, self.most = update, fallback, warm_up, most
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.stream = stream

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        """Update once, for one batch."""
        self.calls += 1
        # One stream for the warm-up and the capture, because a backward pass uses the stream of its forward pass.
        self.stream = self.stream or torch.cuda.Stream(inputs[0].device)
        if self.calls == self.warm_up + 1:
            self._capture(inputs)
        if self.graph is not None:
            for place, value in zip(self.inputs, inputs, strict=True):
                place.copy_(value)
            self.graph.replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.update(inputs)
        torch.cuda.current_stream().wait_stream(self.stream)

    def close(self) -> None:
        """Free the graph. NCCL waits at its end for every graph that has a call of it."""
        if self.graph is not None:
            self.graph.reset()
            self.graph = None

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [value.clone() for value in inputs]
        graph, failure = torch.cuda.CUDAGraph(), None
        try:
            # A capture forbids some calls. In other threads they go on: the loader of data pins memory in one.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.update(self.inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure = error
        if not self.most(failure is not None):
            self.graph = graph
            return
        reason = _reason(failure) if failure else "another process cannot capture it"
        if self.fallback is None:
            raise NotCaptured(f"the step cannot be captured as a CUDA graph: {reason}") from failure
        self.fallback(reason)


def _reason(error: BaseException) -> str:
    """The first line of the error in which the capture began to fail."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
