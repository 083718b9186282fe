"""The sections of the configuration of a run, one dataclass each. `Config` (config.py) holds them.

A field that is added later declares the value that means "as before": `field(default=…, metadata={"since": VALUE})`.
A field with that value is left out of keys and of comparisons with checkpoints, so that no run of an earlier version
is lost.
"""

from .bench import MODES, BackendConfig, BenchConfig
from .compiling import BENCH_COMPILE, COMPILE, CUDA_GRAPHS, TRAIN_COMPILE
from .data import DataConfig, EncoderConfig
from .evaluate import FEATURES, HELDOUT, METRICS, EvaluateConfig, check_metric
from .limits import MOST_SIDE
from .objective import ObjectiveConfig
from .released import ReleasedConfig
from .run import RunConfig
from .sample import LABELS, SampleConfig
from .train import TrainConfig

__all__ = [
    "BENCH_COMPILE",
    "COMPILE",
    "CUDA_GRAPHS",
    "FEATURES",
    "HELDOUT",
    "LABELS",
    "METRICS",
    "MODES",
    "MOST_SIDE",
    "TRAIN_COMPILE",
    "BackendConfig",
    "BenchConfig",
    "DataConfig",
    "EncoderConfig",
    "EvaluateConfig",
    "ObjectiveConfig",
    "ReleasedConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "check_metric",
]
