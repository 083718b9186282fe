"""The section `sample`: how images are drawn."""

import math
from dataclasses import dataclass, field
from typing import Any

from ...kernels.errors import InputError, unknown
from ..checks import check_positive, check_precision, check_seed, check_steps, check_weights
from ..diffusion.samplers import AUTO, SAMPLERS, TIMESTEPS
from .compiling import check_compile
from .limits import MOST_AT_ONCE, MOST_SAMPLES

LABELS = ("balanced", "random", "cyclic")
KEEP = ("images", "features")  # of samples


@dataclass
class SampleConfig:
    """How images are drawn. The default is the papers' protocol: 250 steps without guidance, ancestral where the
    objective has that."""

    count: int = 50_000
    # Images of one more set at every moment of the training (`train.snapshots` and the end), for curves; null: no more.
    curve_count: int | None = field(default=None, metadata={"since": None})
    # Of diffusion/samplers.py: ancestral (ddpm, v), ddim, euler (flow), heun, dpmpp_2m. auto: ancestral; of flow euler.
    # A configuration and its keys have the name, never auto.
    method: str = "auto"
    steps: int = 250
    guidance: float = 1.0  # 1: none
    guidance_channels: int | None = None  # how many of the first channels are guided; null: all
    # [low, high]: guide where noise over signal (edm2's sigma) is above low and at most high; null: everywhere. A high
    # of null has no end. Outside, nothing is computed for guidance.
    guidance_interval: Any = field(default=None, metadata={"since": None})
    # The folder of another training, to guide away from in place of the null class (autoguidance). In no key.
    guide: str | None = field(default=None, metadata={"since": None})
    guide_at: Any = field(default="last", metadata={"since": "last"})  # or a step, which studies need
    guide_weights: str = field(default="ema", metadata={"since": "ema"})  # as `weights`
    guide_key: str | None = field(default=None, metadata={"since": None})  # of `guide`, from its folder
    clip: bool = False  # clamp predicted images to [-1, 1], as ADM does for pixels; latents have no bounds
    precision: str = "float32"
    compile: str = "eager"  # or compile, reduce-overhead, max-autotune: faster, with different rounding
    batch_size: int = 64
    at: Any = "last"  # or all (every kept moment), or a list of steps
    # Or live: not averaged; ema@DECAY: of train.ema_decays; power@WIDTH: of any relative width, by train.ema_powers.
    weights: str = "ema"
    seed: int | None = None  # of the noise; null: the training's
    # The class of each image. balanced: index modulo classes or, of fewer images than classes, evenly over all classes.
    # random: drawn for each image, as in the papers of DiT and ADM. cyclic: index modulo classes, however few images.
    labels: str = field(default="balanced", metadata={"since": "balanced"})
    # Which of an objective's timesteps are steps. even: from the first to the last; of flow equal steps from 1 to 0.
    # ddim (ddpm, v): 0, 40, … 960 for 25 of 1000.
    timesteps: str = field(default="even", metadata={"since": "even"})
    # Or features: of the network evaluate.features, by which the set is scored, and no images. In no key.
    keep: str = "images"

    def __post_init__(self) -> None:
        check_positive("sample", {"count": self.count}, MOST_SAMPLES)
        if self.curve_count is not None:
            check_positive("sample", {"curve_count": self.curve_count}, MOST_SAMPLES)
        check_positive("sample", {"batch_size": self.batch_size}, MOST_AT_ONCE)
        check_positive("sample", {"steps": self.steps})
        if not math.isfinite(self.guidance):
            raise InputError(f"sample.guidance must be finite, not {self.guidance}; 1 is no guidance")
        self.weights = check_weights("sample.weights", self.weights)
        self.guide_weights = check_weights("sample.guide_weights", self.guide_weights)
        self.guidance_interval = check_interval("sample.guidance_interval", self.guidance_interval)
        if self.guide_at != "last" and not (type(self.guide_at) is int and self.guide_at >= 0):
            raise InputError(f"sample.guide_at must be last or a step, not {self.guide_at!r}")
        if self.at not in ("last", "all"):
            self.at = check_steps("sample.at", self.at, words=("last", "all"), least=0)
            if not self.at:
                raise InputError("sample.at is empty: give last, all, or a list of steps")
        if self.seed is not None:
            check_seed("sample.seed", self.seed)
        if self.method not in (AUTO, *SAMPLERS):
            raise unknown("sample.method", self.method, (AUTO, *SAMPLERS))
        if self.labels not in LABELS:
            raise unknown("sample.labels", self.labels, LABELS)
        if self.timesteps not in TIMESTEPS:
            raise unknown("sample.timesteps", self.timesteps, TIMESTEPS)
        if self.keep not in KEEP:
            raise unknown("sample.keep", self.keep, KEEP)
        check_precision("sample.precision", self.precision)
        check_compile("sample.compile", self.compile)
        if self.guidance_channels is not None and self.guidance_channels < 1:
            raise InputError(
                f"sample.guidance_channels must be 1 or more, or null for all, not {self.guidance_channels}"
            )


def check_interval(name: str, value: Any) -> list[float | None] | None:
    """An interval of noise-to-signal ratios: None, or two numbers, of which the second may be None. Raises InputError
    for anything else, and if the first is negative or above the second."""
    if value is None:
        return None
    ends = list(value) if isinstance(value, list | tuple) else []
    numbers = [end for end in ends if type(end) in (int, float) and math.isfinite(end)]
    if len(ends) != 2 or numbers != (ends if ends[1] is not None else ends[:1]):
        raise InputError(f"{name} must be [low, high], such as [0.28, 2.9] or [0.28, null], or null, not {value!r}")
    if numbers[0] < 0 or numbers[-1] < numbers[0]:
        raise InputError(f"{name} must be two numbers of at least 0, the smaller one first, not {value}")
    return [float(numbers[0]), None if ends[1] is None else float(numbers[1])]
