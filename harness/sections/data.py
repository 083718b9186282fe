"""The section `data`: the images, and the section `encoder`: what the network sees of them."""

from dataclasses import dataclass, field, fields

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
    """What the network sees of an image. `pixels` is the image itself, in [-1, 1]. `latents` are read from a cache, the
    folder `path`, and samples are decoded. On a command line `encoder=FOLDER` sets all of it from the cache's index.

    Keys contain neither `path` nor `decoder`, because `identity` stands for what they contain.
    """

    kind: str = "pixels"  # or latents: of data/encoder.py
    path: str | None = field(default=None, metadata={"since": None})  # of the cache that lamabench encode wrote
    # The autoencoder that decodes: a folder, or an id of the Hugging Face hub. null: the one that the cache names.
    decoder: str | None = field(default=None, metadata={"since": None})
    identity: str | None = field(default=None, metadata={"since": None})  # of the autoencoder, 12 hex digits
    scale: float | None = field(default=None, metadata={"since": None})  # the network sees (latent - shift) · scale
    shift: float | None = field(default=None, metadata={"since": None})
    channels: int | None = field(default=None, metadata={"since": None})  # of a latent
    side: int | None = field(default=None, metadata={"since": None})

    def __post_init__(self) -> None:
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "kind"}
        given = [name for name, value in values.items() if value is not None]
        if self.kind == "pixels" and given:
            raise InputError(f"encoder.{given[0]} is a setting of latents, and encoder.kind is pixels: encoder=FOLDER")
        lacking = [name for name in values if name not in ("path", "decoder", *given)]
        if self.kind == "latents" and lacking:
            raise InputError(f"encoder.{lacking[0]} of latents is not set: encoder=FOLDER takes it from the cache")
