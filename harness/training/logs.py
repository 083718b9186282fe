"""What the first process of a training says of it from line to line: means, speed, loggers, spikes and previews."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType

import torch

from ...kernels.errors import InputError
from ...models.registry import Backbone
from ..config import Config
from ..data.encoder import DataSet, encoder
from ..device import is_cuda
from ..disk import read_lines, write_lines
from ..keys import config_to_dict
from ..measure.gpus import peak_flops
from ..run import read_info
from .failures import Failures
from .folder import Position, TrainingFolder
from .loggers import Identity, Loggers
from .previews import FOLDER, write_preview, write_real
from .steps import Diverged
from .window import LARGEST


class Speed:
    """How fast a training runs from line to line. `macs` are those of a forward pass of one image, and `peak` is the
    sum of the peaks of all its GPUs in FLOP/s, None if it is not known."""

    def __init__(self, at: Position, batch_size: int, macs: int, peak: float | None, device: str) -> None:
        self.step, self.seconds = at.step, at.seconds
        self.batch_size, self.macs, self.peak, self.device = batch_size, macs, peak, device

    def since(self, at: Position) -> dict[str, float]:
        """Fields of the line at a position: `images_per_s` since the line before and, where they are known, `mfu` (as
        `gpus.mfu`) and `peak_memory_gib`."""
        images, seconds = (at.step - self.step) * self.batch_size, at.seconds - self.seconds
        self.step, self.seconds = at.step, at.seconds
        facts: dict[str, float] = {}
        if seconds > 0:
            facts["images_per_s"] = round(images / seconds, 3)
            if self.peak is not None:
                facts["mfu"] = round(3 * 2 * self.macs * images / seconds / self.peak, 6)
        if is_cuda(self.device):
            facts["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 4)
        return facts


def peak_of(devices: Iterable[str], precision: str) -> float | None:
    """The sum of the peaks of GPUs, given by torch's names, in FLOP/s; None if one of them is not known."""
    peaks = [peak_flops(name, precision) for name in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if len(known) == len(peaks) else None


class Log:
    """The log of a training from a position on. Used as a context, it closes the loggers, and a training that diverges
    leaves a snapshot.

    A few images of `data` are written beside it. `macs` are those of a forward pass of one image, and `peak` is as in
    `Speed`.
    """

    def __init__(
        self,
        files: TrainingFolder,
        config: Config,
        data: DataSet,
        at: Position,
        *,
        macs: int,
        peak: float | None,
        say: Callable[[str], None],
    ) -> None:
        folder, step = files.path, files.step
        self.files, self.config, self.at, self.say = files, config, at, say
        lines = read_lines(folder / "metrics.jsonl")
        kept = [line for line in lines if line["step"] <= at.window_start]
        write_lines(folder / "metrics.jsonl", kept)
        with suppress(OSError):  # the training itself says what is wrong with the data or the disk
            try:
                write_real(folder, data, encoder(config.encoder), step.device)
            except InputError as error:
                say(f"no real images beside the samples of this training: {error}")
        study = None
        with suppress(InputError):  # a folder without config.json
            study = read_info(folder).get("study")
        pictures = [int(path.stem.removeprefix("step-")) for path in (folder / FOLDER).glob(f"step-{'[0-9]' * 8}.png")]
        sent = max([line["step"] for line in lines] + pictures, default=0)
        training = Identity(folder, study, config_to_dict(config), at.window_start, sent)
        self.loggers = Loggers(config.run.log_to, training, say)
        self.speed = Speed(at, config.train.batch_size, macs, peak, step.device)
        losses = [line["loss"] for line in kept if line.get("loss") is not None]
        self.failures = Failures(folder, config, files.fingerprint, files.stretches, losses, say)

    def line(self, at: Position, means: dict[str, float | None]) -> None:
        """Write a line of metrics, send it to the loggers, and look whether the loss of a step was a spike."""
        shown = {name: value for name, value in means.items() if name != LARGEST}
        line = self.files.log(at, shown, self.speed.since(at))
        self.loggers.line(at.step, line)
        self.failures.look(at, means.get(LARGEST) or line["loss"])

    def preview(self, at: Position, net: Backbone) -> None:
        """Draw and send a preview with the averaged weights. One that cannot be written is one line,
        and so are images that are not finite: the next line of metrics says whether the training is."""
        try:
            path = write_preview(self.files.path, at.step, net, self.config)
        except (OSError, FloatingPointError) as error:
            self.say(f"no preview of step {at.step}: {error}")
        else:
            self.loggers.picture(at.step, "preview", path)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Diverged):
            self.failures.diverged(self.at, str(error))
        self.loggers.close()
