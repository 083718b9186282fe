"""The section `data`: the images, and the section `encoder`: what the network sees of them."""

from dataclasses import dataclass

from ...kernels.errors import InputError
from ..checks import check_positive
from .limits import MOST_NAME, MOST_SIDE


@dataclass
class DataConfig:
    """The images: `kind` names the loader, `path` is a file, a folder, or a pattern of names of shards, `size` the side
    in pixels after resizing.

    Keys contain `name` but not `path`, so set `name` where two paths hold different sets.
    """

    kind: str = "digits"
    name: str = ""
    path: str | None = None
    size: int = 16
    channels: int = 1
    num_classes: int = 10
    flip: bool = False  # random horizontal flips in training
    split: str = "train"  # or test, and most of the digits: what each set has is in data/splits.py

    def __post_init__(self) -> None:
        check_positive("data", {"size": self.size}, MOST_SIDE)
        check_positive("data", {"channels": self.channels})
        if not self.name.isprintable() or len(self.name.encode()) > MOST_NAME:
            raise InputError(
                f"data.name is part of a folder's name: at most {MOST_NAME} bytes that can be printed, "
                f"not {self.name[:40]!r}"
            )
        if self.num_classes < 0:
            raise InputError(f"data.num_classes must be 0 (unconditional) or more, not {self.num_classes}")


@dataclass
class EncoderConfig:
    """What the network sees of an image. `pixels` is the image itself, in [-1, 1]."""

    kind: str = "pixels"  # of data/encoder.py
