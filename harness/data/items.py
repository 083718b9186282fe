"""Items of training: images with everything that is random about them, from the seed and the item's index alone, and
their batches."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...kernels.errors import InputError
from ...kernels.triton_support import triton_reasons
from .. import parallel
from ..config import Config
from ..device import device_type, is_cuda
from ..random import Generators, Stream, generator
from ..sections import TrainConfig
from .encoder import DataSet, Encoder, Pixels, encoder
from .workers import PREFETCH, start, workers

_INPUT_ERROR = f"{InputError.__module__}.{InputError.__qualname__}"


class Timesteps(Protocol):
    """The part of an objective that an item needs."""

    def draw_t(self, rng: np.random.Generator) -> float:
        """The t of one item, in the unit of the objective's paper (DDPM: 0 … 999)."""
        ...


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of an epoch's images, a permutation of 0 … n-1."""
    return generator(seed, Stream.ORDER, epoch).permutation(n)


class TrainItems(Dataset[dict[str, Tensor]]):
    """The images of a training, counted from its start over all epochs, with everything that is random about them.

    Item i is `x0` float32 [C, S, S] from the encoder, `y` int64 (`null_class` where the label is dropped), `t` float32
    from `objective.draw_t`, and `noise` float32 [C, S, S]. It depends only on the seed and on i, so a DataLoader takes
    `sampler=range(start, stop)` and any number of workers. A label is dropped with probability `class_dropout`. With
    `flip`, half of the images are flipped. Of latents, `x0` is a sample of the posterior of the image or of its mirror
    image. A DataLoader gets whole batches with `collate_fn=whole`.
    """

    def __init__(
        self,
        data: DataSet,
        objective: Timesteps,
        *,
        seed: int,
        flip: bool,
        class_dropout: float,
        null_class: int | None,
        encoder: Encoder | None = None,
        noise: bool = True,
    ) -> None:
        """`encoder` defaults to `Pixels`. Without `noise`, an item has its `index` i, int64, instead. Raises InputError
        if labels are dropped but there is no null class."""
        if class_dropout > 0 and data.num_classes > 0 and null_class is None:
            raise InputError(
                f"train.class_dropout is {class_dropout:g}, but the model has no null class for dropped labels; use 0"
            )
        self.data, self.objective, self.encoder = data, objective, encoder or Pixels()
        self.seed, self.flip = seed, flip
        self.class_dropout, self.null_class = class_dropout, null_class
        self.noise = noise
        self.generators = Generators(seed, Stream.TRAIN)
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([i]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch of items: every tensor of an item with one more dimension, the first."""
        sources = np.array([self._source(i) for i in indices])
        labels = self.data.labels[sources]
        channels, side = self.encoder.shape(self.data)
        drawn = np.empty((len(indices), 3))
        noise = np.empty((len(indices), channels, side, side), dtype=np.float32) if self.noise else None
        for row, i in enumerate(indices):
            rng = self.generators.at(i)  # all four numbers are drawn in this order, with any options
            drawn[row] = self.objective.draw_t(rng), rng.random(), rng.random()
            if noise is not None:
                rng.standard_normal(dtype=np.float32, out=noise[row])
        t, drop, flip = drawn.T
        if self.null_class is not None and self.data.num_classes > 0:
            labels[drop < self.class_dropout] = self.null_class
        return {
            "x0": self.encoder.inputs(self.data, sources, indices, self.seed, flip < 0.5 if self.flip else None),
            "y": torch.from_numpy(labels),
            "t": torch.from_numpy(t.astype(np.float32)),
        } | ({"index": torch.tensor(indices)} if noise is None else {"noise": torch.from_numpy(noise)})

    def _source(self, i: int) -> int:
        epoch, position = divmod(i, len(self.data))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(self.seed, epoch, len(self.data))
        return int(self.order[position])


def whole(batch: Any) -> dict[str, Tensor]:
    """The batch that `__getitems__` returns, as it is: what a DataLoader has to collate of it."""
    return batch


def check_noise(settings: TrainConfig, device: str) -> None:
    """Raise InputError if the noise of a training cannot be drawn here."""
    if settings.noise == "gpu" and (reasons := triton_reasons(device_type(device))):
        raise InputError(
            f"train.noise=gpu cannot be drawn on the device {device}: {'; '.join(reasons)}. train.noise=cpu is drawn "
            "everywhere, with other numbers"
        )


def batches(
    data: DataSet, goal: Timesteps, config: Config, null_class: int | None, step: int, device: str
) -> Iterator[dict[str, Tensor]]:
    """The batches of all steps after `step`, of which each of several processes has an equal part: process r of n has
    the r-th n-th. Noise that is drawn on the GPU is there already, and the rest is on the CPU. InputError in a worker
    process becomes one line without its traceback."""
    settings = config.train
    part = settings.batch_size // parallel.size()

    def indices(step: int) -> list[int]:
        start = step * settings.batch_size + parallel.rank() * part
        return list(range(start, start + part))

    items = TrainItems(
        data,
        goal,
        encoder=encoder(config.encoder),
        seed=config.seed,
        flip=config.data.flip,
        class_dropout=settings.class_dropout,
        null_class=null_class,
        noise=settings.noise == "cpu",
    )
    loader = DataLoader(
        items,
        batch_sampler=map(indices, range(step, settings.steps)),
        collate_fn=whole,
        num_workers=(count := workers(config, settings.steps - step, device)),
        prefetch_factor=PREFETCH if count else None,
        worker_init_fn=start,
        pin_memory=is_cuda(device),
    )
    try:
        for batch in loader:
            if settings.noise == "gpu":
                from .noise import noise  # with Triton, which not every machine has

                index = batch.pop("index").to(device, non_blocking=True)
                batch["noise"] = noise(config.seed, index, batch["x0"].shape[1:])
            yield batch
    except InputError as error:
        raise InputError(str(error).strip().splitlines()[-1].removeprefix(f"{_INPUT_ERROR}: ")) from None
