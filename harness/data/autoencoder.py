"""Autoencoders of latent diffusion: diffusers' AutoencoderKL (Rombach et al., arXiv 2112.10752) and AutoencoderTiny.

A source is a folder with `config.json` and weights as safetensors, or an id of the Hugging Face hub: `owner/name`, or
`owner/name/folder` for an autoencoder inside a pipeline, such as `stabilityai/stable-diffusion-3-medium-diffusers/vae`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import InputError, unknown
from ..device import exact_float32
from ..run import read_json
from .encoder import to_model_range, to_uint8

PIXELS = 2**19  # of the images that are in the network at a time: 8 of 256 × 256, 2 of 512 × 512
CONFIG = "config.json"
# Of each kind: the settings that change the function, but neither a name nor a shape of a tensor.
SETTINGS = {
    "AutoencoderKL": ("act_fn", "norm_num_groups", "down_block_types", "up_block_types"),
    "AutoencoderTiny": ("act_fn", "upsample_fn", "upsampling_scaling_factor"),
}
WEIGHTS = "diffusion_pytorch_model"
FILES = (CONFIG, *(f"{WEIGHTS}{end}" for end in (".safetensors", "-*.safetensors", ".safetensors.index.json")))


class Autoencoder:
    """A trained autoencoder on a device, in float32.

    `kind` is diffusers' class. `identity` is 12 hex digits of the SHA-256 of the tensors, as float32, and of the
    settings that change the function. `scale` and `shift` map a raw latent z to what a network sees: (z - shift) ·
    scale. Images have `in_channels`, latents have `channels` and a side that is `factor` times smaller.
    """

    def __init__(self, kind: str, net: Any, device: str) -> None:
        config = net.config
        self.kind, self.net, self.device = kind, net.to(device), device
        self.scale, self.shift = float(config.scaling_factor), float(config.shift_factor or 0)
        self.in_channels, self.channels = int(config.in_channels), int(config.latent_channels)
        blocks = config.block_out_channels if kind == "AutoencoderKL" else config.encoder_block_out_channels
        self.factor = 2 ** (len(blocks) - 1)
        self.identity = _identity(kind, {name: config[name] for name in SETTINGS[kind]}, net.state_dict())

    def check(self, channels: int, size: int) -> None:
        """Raise InputError if images of `channels` and the side `size`, in pixels, do not fit."""
        if channels != self.in_channels:
            raise InputError(
                f"data.channels is {channels}, but the autoencoder takes images of {self.in_channels}: "
                f"set data.channels={self.in_channels}"
            )
        if size % self.factor:
            near = max(size // self.factor, 1) * self.factor
            raise InputError(
                f"data.size {size} is not divisible by {self.factor}, the autoencoder's factor; the nearest sizes are "
                f"{near} and {near + self.factor}"
            )

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images uint8 [B, C, H, W] -> raw mean and log-variance of the posterior, float32 [B, c, H/f, W/f] on the
        device; AutoencoderTiny has no log-variance. Raises InputError for images that do not fit."""
        self.check(images.shape[1], images.shape[-1])

        def part(x: Tensor) -> Tensor:
            x = to_model_range(x.to(self.device))
            if self.kind == "AutoencoderTiny":
                return self.net.encode(x).latents
            posterior = self.net.encode(x).latent_dist
            return torch.cat((posterior.mean, posterior.logvar), 1)

        output = _in_parts(part, images, images.shape[-2:])
        if self.kind == "AutoencoderTiny":
            return output, None
        mean, logvar = output.chunk(2, dim=1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """What the network sees, float32 [B, c, s, s], scaled -> images uint8 [B, C, f·s, f·s] on the device.

        Raises FloatingPointError for NaN or infinity.
        """

        def part(x: Tensor) -> Tensor:
            return to_uint8(self.net.decode(x.to(self.device, torch.float32) / self.scale + self.shift).sample)

        return _in_parts(part, z, tuple(side * self.factor for side in z.shape[-2:]))


def _in_parts(work: Callable[[Tensor], Tensor], x: Tensor, sides: tuple[int, ...]) -> Tensor:
    """The results of `work` for parts of a batch whose images of `sides` have `PIXELS` together. The parts are the same
    on every machine, because results depend on the size of a batch by rounding."""
    count = max(1, PIXELS // (sides[0] * sides[1]))
    with torch.inference_mode(), torch.autocast(x.device.type, enabled=False):
        return torch.cat([work(part) for part in x.split(count)])


def _identity(kind: str, settings: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps({"kind": kind, **settings}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def load(source: str, device: str = "cpu", download: bool = False) -> Autoencoder:
    """The autoencoder of a folder or of an id of the hub. An id is read from the local cache of huggingface-hub, and is
    fetched only with `download`.

    Raises InputError, one line, if diffusers is missing, for a source that does not exist or is not in the cache, for
    another kind of network, for weights that lack a tensor or have others, and for settings that are not supported.
    """
    if find_spec("diffusers") is None:
        raise InputError("an autoencoder needs diffusers: pip install 'lamabench[latents]'")
    folder = find(source, download)
    config = _config(folder, source)
    kind = str(config.get("_class_name"))
    if kind not in SETTINGS:
        raise unknown(f"kind of autoencoder in {source}", kind, SETTINGS)
    if any(config.get(name) is not None for name in ("latents_mean", "latents_std")):
        raise InputError(f"{source} has latents_mean or latents_std, a scale for each channel, which is not supported")
    exact_float32()
    return Autoencoder(kind, _network(kind, folder, source), device)


def find(source: str, download: bool = False) -> Path:
    """The folder of a source. Raises InputError if there is none."""
    path = Path(source).expanduser()
    if path.exists():
        if not path.is_dir():
            raise InputError(f"autoencoder {source} is a file; give its folder, with {CONFIG} and *.safetensors")
        if not (path / CONFIG).is_file() and (path / "vae" / CONFIG).is_file():
            path = path / "vae"  # the folder of a pipeline
        return path
    parts = source.split("/")
    if len(parts) < 2 or source.startswith((".", "/", "~")) or not all(parts):
        raise InputError(f"autoencoder {source} does not exist; give a folder, or owner/name of the Hugging Face hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    below = "/".join(parts[2:])
    patterns = [f"{below}/{name}" if below else name for name in FILES]
    try:
        root = snapshot_download("/".join(parts[:2]), allow_patterns=patterns, local_files_only=not download)
    except HFValidationError:
        raise InputError(f"autoencoder {source} does not exist and is no id of the Hugging Face hub") from None
    except LocalEntryNotFoundError as error:
        if download:
            raise InputError(f"cannot download {source}: {_line(error)}") from None
        raise InputError(
            f"autoencoder {source} is neither a folder nor in the cache of huggingface-hub. Fetch it where there is "
            f"internet (hf download {'/'.join(parts[:2])}), or allow it here: --download"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"cannot download {source}: {_line(error)}") from None
    return Path(root, below)


def _config(folder: Path, source: str) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"autoencoder {source} has no {CONFIG}; give a folder that diffusers saved")
    if not isinstance(config := read_json(path), dict):
        raise InputError(f"{path} is no JSON object")
    return config


def _network(kind: str, folder: Path, source: str) -> Any:
    """diffusers' network with all of its weights, in float32."""
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"autoencoder {source} has no weights as safetensors; other files may hold code")
    import diffusers

    try:
        with _quiet():
            net, info = getattr(diffusers, kind).from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,  # which needs accelerate
                output_loading_info=True,
            )
    except Exception as error:  # of diffusers, torch and safetensors, of many types
        raise InputError(f"autoencoder {source} cannot be read: {_line(error)}") from None
    for key, verb in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "have an unknown"),
        ("mismatched_keys", "do not fit"),
    ):
        if names := sorted(str(name) for name in info.get(key) or ()):
            raise InputError(f"the weights of autoencoder {source} {verb} {names[0]} ({len(names)} such tensors)")
    if net.config.in_channels != net.config.out_channels:
        raise InputError(
            f"autoencoder {source} takes {net.config.in_channels} channels and returns {net.config.out_channels}"
        )
    return net.requires_grad_(False).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of diffusers, which are about other uses or come as an error here."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
