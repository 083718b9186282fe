"""Sampling of images from the weights of a training, by any number of processes.

Each image is seeded by its index, so that kills, batch size and the number of processes change nothing.
"""

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import OPERATORS
from ..kernels.errors import InputError
from ..models import plugins
from ..models.registry import Backbone, build, describe, select_backends
from . import parallel, signals
from .caches import keep_compiled
from .config import Config, check_fit
from .data.encoder import encoder
from .device import autocast, compiled, device_type, exact_float32, own_device, pick_device, round_weights
from .diffusion.guidance import Net
from .diffusion.objective import objective
from .diffusion.samplers import draws, index_noise, sample
from .guide import Guide, flops, guides, open_guide, passes
from .keys import config_from_dict, config_to_dict, encoder_facts, label_rule, sample_seed
from .progress import Progress, Quiet
from .random import Stream, generator
from .released import training_facts
from .run import Busy, is_held
from .scoring.kept import describe as describe_features
from .scoring.protocol import interval_words
from .shards import FIRST, Claims, joined, write_array, write_first
from .training.checkpoint import Weights, load_weights

if TYPE_CHECKING:
    from .scoring.features import FeatureNetwork

WAIT_S = 0.5  # between two looks at what other processes draw


def labels_of(config: Config, indices: range) -> NDArray[np.int64]:
    """The class of each sampled image by `keys.label_rule`, int64 [len(indices)]. It depends on the image's index and,
    where labels are spread over all classes, on the number of images; random ones on the seed of the noise too."""
    classes, rule = max(config.model.num_classes, 1), label_rule(config)
    numbers = np.arange(indices.start, indices.stop, dtype=np.int64)
    if rule == "random":
        seed = sample_seed(config)
        return np.array([generator(seed, Stream.LABEL, index).integers(classes) for index in indices], np.int64)
    if rule == "spread":
        numbers = numbers * classes // config.sample.count
    return numbers % classes


def generate(out: Path, training: Path, config: Config, step: int, progress: Progress) -> dict[str, Any]:
    """`draw_shards`, then `finish`, for a caller that holds no lock."""
    return finish(out, config, draw_shards(out, training, config, step, progress))


def drawn(out: Path, training: Path, config: Config, step: int, progress: Progress) -> "Future[dict[str, Any]]":
    """`draw_shards`, with its result or its error for the record, which the holder of the lock of `out` writes. Raises
    Busy and Stopped as it does."""
    future: Future[dict[str, Any]] = Future()
    try:
        check_fit(config)
        future.set_result(draw_shards(out, training, config, step, progress))
    except (Busy, signals.Stopped):
        raise
    except Exception as error:
        future.set_exception(error)
    return future


def draw_shards(out: Path, training: Path, config: Config, step: int, progress: Progress) -> dict[str, Any]:
    """Sample `config.sample.count` images from the weights of a step in the folder `training`, together with every
    other process that calls this for `out`, and return when all are drawn.

    Each process claims `config.sample.batch_size` images at a time and writes them to `out/shards/KEY` (shards.py), so
    that its memory holds one batch. With `sample.keep=features`, it writes their features instead, which depend on the
    batch size by rounding at most. What a killed process had claimed is drawn by another, or by the next call. KEY
    stands for the weights and all that determines an image, so that no set mixes two of them. Returns the fields of the
    `sample` record that the weights and the settings give. Raises InputError if the weights are missing or of another
    model, if guidance does not fit, or if images are not finite; Busy as `joined` does; Stopped after a batch in which
    a signal came. The other processes of the run, if it has several, draw too (`join`).
    """
    settings = config.sample
    parallel.call(
        "sample",
        out=str(out.absolute()),
        training=str(training.absolute()),
        config=config_to_dict(config),
        step=step,
        sources=plugins.loaded(),
    )
    with parallel.attending("sample"):
        sampler, weights, key = _draw(out, training, config, step, progress)
    guide, (own, of_guide) = sampler.guide, passes(config)
    return {
        "shards": key,
        "features": config.evaluate.features if settings.keep == "features" else None,
        "count": settings.count,
        "method": settings.method,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "guidance_channels": settings.guidance_channels,
        "guidance_interval": interval_words(settings.guidance_interval),
        "guide": guide and guide.text,
        "guide_key": guide and guide.key,
        "passes": own,
        "guide_passes": of_guide,
        "sampling_flops": flops(config),
        "clip": settings.clip,
        "labels": label_rule(config),
        "timesteps": settings.timesteps,
        "seed": sample_seed(config),
        "checkpoint_step": step,
        "weights": settings.weights,
        "weights_error": weights.error,
        **training_facts(config, step, weights.seconds),
        "precision": settings.precision,
        "compile": settings.compile,
        "batch_size": settings.batch_size,
        "backend": sampler.backend,
    }


def join(out: str, training: str, config: dict[str, Any], step: int, sources: Sequence[dict[str, str]]) -> None:
    """What the other processes of a run do in `draw_shards` of the first one: they claim images too, without
    messages."""
    with suppress(signals.Stopped), parallel.attending("sample"):
        try:
            plugins.load_recorded(sources)
            here = config_from_dict(config)
            keep_compiled(here.run.root, own_device(pick_device(here.run.device)))
        except Exception as error:
            parallel.check(error)
            raise
        _draw(Path(out), Path(training), here, step, Quiet())


def _draw(out: Path, training: Path, config: Config, step: int, progress: Progress) -> tuple["Sampler", Weights, str]:
    """The part of `draw_shards` that all processes do. Returns also the weights, and the key of the shards."""
    settings, network = config.sample, None
    with parallel.agreeing():
        exact_float32()
        device = own_device(pick_device(config.run.device))
        encoder(config.encoder).check_decoder(device)
        weights = load_weights(training, step, settings.weights, config.model)
        sampler = Sampler(config, weights.tensors, device)
        key = sampler.key(weights.tensors)
        if settings.keep == "features":
            from .scoring.features import FeatureNetwork

            network = FeatureNetwork(config.evaluate, device)
            key = f"{key}-{network.key}"
    parallel.facts(device, shards=key)
    with joined(out / "shards" / key, settings.count) as claims:
        if network is not None:
            describe_features(claims.folder, network.name, network.identity)
        try:
            _draw_claims(sampler, network, claims, f"the {settings.weights} weights of step {step}", progress)
        except Exception:  # such as too little memory for a CUDA graph
            _kept.forget()
            raise
    return sampler, weights, key


def _draw_claims(
    sampler: "Sampler", network: "FeatureNetwork | None", claims: Claims, weights: str, progress: Progress
) -> None:
    settings, waiting = sampler.config.sample, False
    while True:
        parallel.heed()
        begin = time.time()
        if (indices := claims.take(settings.batch_size)) is None:
            if claims.complete():
                return
            if not waiting:
                progress.say(f"sample: waiting for {claims.count - claims.drawn} images that other processes draw")
            waiting = True
            time.sleep(WAIT_S)
            continue
        # A compiled network takes only whole batches. Images beyond the claim are dropped.
        whole = range(indices.start, indices.start + settings.batch_size)
        x = sampler.draw(indices if settings.compile == "eager" else whole)[: len(indices)]
        if not torch.isfinite(x).all():
            raise InputError(f"{weights} give images that are not finite")
        images = sampler.images(x)
        if network is not None:
            write_first(claims.folder, indices, images)
        claims.write(indices, images if network is None else network(images), begin)
        progress.update("sample", claims.drawn + len(indices), settings.count)


def finish(out: Path, config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """Complete a set of samples whose images are all drawn: write its labels, and delete what it does not need. Returns
    the fields of its record from the `facts` of `draw_shards`. The caller holds the lock of `out`."""
    folder, count = out / "shards" / facts["shards"], config.sample.count
    write_array(folder / "labels.npy", labels_of(config, range(count)))
    if facts["features"]:
        write_array(folder / "first" / "labels.npy", labels_of(config, range(min(count, FIRST))))
    for file in (*folder.glob("*.lock"), *folder.glob(".*.tmp")):
        if file.name != ".lock" and not is_held(file):
            file.unlink(missing_ok=True)
    for other in folder.parent.iterdir():
        if other.name != folder.name:
            shutil.rmtree(other)
    wall, processes, total = Claims(folder, count, "").times()
    return {
        **facts,
        "seconds": round(wall, 3),
        "images_per_s": count / wall if wall else None,
        "processes": processes,
        "process_seconds": round(total, 3),
    }


class Sampler:
    """A network with weights on a device that draws images by their index.

    `backend` names the implementation of each operator that the network calls.
    """

    def __init__(self, config: Config, tensors: dict[str, Tensor], device: str) -> None:
        self.config, self.device, self.encoder = config, device, encoder(config.encoder)
        models, weights = [config.model], [tensors]
        self.guide: Guide | None = None
        if guides(config):
            self.guide = open_guide(config)
            models.append(self.guide.config.model)
            weights.append(self.guide.tensors(config.sample))
        networks = _networks(models, config, device)
        for network, own in zip(networks, weights, strict=True):
            network.net.load_state_dict(own)
        self.call, self.backend, self.null_class = networks[0].call, networks[0].backend, networks[0].net.null_class
        self.guide_call = networks[1].call if self.guide else None

    def key(self, tensors: dict[str, Tensor]) -> str:
        """16 hex digits of everything that determines an image, except its index."""
        config, settings = self.config, vars(self.config.sample)
        left_out = ("batch_size", "at", "seed", "keep", "guide")
        facts = {name: value for name, value in settings.items() if name not in left_out}
        facts |= {
            "labels": label_rule(config),
            "seed": sample_seed(config),
            "model": describe(config.model),
            "encoder": encoder_facts(config.encoder),
        }
        # Not the distribution of t in training, which is in the weights.
        facts |= {"objective": {"kind": config.objective.kind, "schedule": config.objective.schedule}}
        # Half of a set may have been drawn before the network called an operator.
        backend = {name: value for name, value in self.backend.items() if value != OPERATORS[name].since}
        facts |= {"backend": backend, "device": device_type(self.device)}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def draw(self, indices: range) -> Tensor:
        """The network's images for these indices, encoded, float32 [B, C, S, S] on the device."""
        labels = torch.from_numpy(labels_of(self.config, indices))
        return _sampled(self.call, self.config, indices, labels, self.null_class, self.device, self.guide_call)

    def images(self, x: Tensor) -> NDArray[np.uint8]:
        """Images uint8 [B, H, W, C] from the result of `draw`."""
        return self.encoder.decode(x).permute(0, 2, 3, 1).cpu().numpy()


class _Network(NamedTuple):
    """A network on a device, the implementation of each operator that it calls, and the network as it is called."""

    net: Backbone
    backend: dict[str, str]
    call: Net


def _network(model: Any, config: Config, device: str) -> _Network:
    """A network as `config.sample` calls it, whose weights are still to be loaded."""
    net = build(model).to(device).eval()
    round_weights(net, config.sample.precision)
    backend = select_backends(net, vars(config.backend), device_type(device))
    return _Network(net, backend, compiled(net, config.sample.compile))


class _Kept:
    """The networks of the last set of samples that this process drew, and `use`, for what they were made."""

    use: str | None = None
    networks: tuple[_Network, ...] = ()

    def forget(self) -> None:
        """Free the networks, with the code and the CUDA graphs that torch keeps for them."""
        if self.networks:
            self.use, self.networks = None, ()
            torch.compiler.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


_kept = _Kept()


def _networks(models: Sequence[Any], config: Config, device: str) -> tuple[_Network, ...]:
    """The network that draws and, if there is one, its guide, whose weights are still to be loaded.

    Compiled ones are kept: the next set of this process that calls them alike takes their code and CUDA graphs."""
    settings = config.sample
    called = [settings.precision, settings.compile, settings.batch_size, settings.guidance == 1]
    use = json.dumps([[describe(model) for model in models], vars(config.backend), called, device], sort_keys=True)
    if use != _kept.use:
        _kept.forget()
        networks = tuple(_network(model, config, device) for model in models)
        if config.sample.compile == "eager":
            return networks
        _kept.use, _kept.networks = use, networks
    return _kept.networks


def draw(net: Backbone, config: Config, labels: Sequence[int], seed: int) -> NDArray[np.uint8]:
    """Draw images uint8 [N, H, W, C] with a network by `config.sample`: one for each label, image i from (seed, i).

    Runs on the network's device. Raises InputError for labels out of range and settings that do not fit.
    """
    most = max(config.model.num_classes, 1) - 1
    if not labels or not all(0 <= label <= most for label in labels):
        raise InputError(f"labels must be a list of classes from 0 to {most}, not {list(labels)}")
    config = replace(config, sample=replace(config.sample, seed=seed))
    check_fit(config)
    exact_float32()
    device = str(next(net.parameters()).device)
    guide = None
    if guides(config):
        other = open_guide(config)
        network = _network(other.config.model, config, device)
        network.net.load_state_dict(other.tensors(config.sample))
        guide = network.call
    x = _sampled(net, config, range(len(labels)), torch.tensor(labels), net.null_class, device, guide)
    return encoder(config.encoder).decode(x).permute(0, 2, 3, 1).cpu().numpy()


def _sampled(
    net: Net,
    config: Config,
    indices: range,
    labels: Tensor,
    null_class: int | None,
    device: str,
    guide: Net | None = None,
) -> Tensor:
    settings, model = config.sample, config.model
    shape = (model.in_channels, model.input_size, model.input_size)
    noise = index_noise(sample_seed(config), indices, shape, draws(settings.method, settings.steps))
    with autocast(device, settings.precision):
        return sample(
            net,
            next(noise).to(device),
            labels.to(device),
            objective=objective(config.objective),
            method=settings.method,
            steps=settings.steps,
            timesteps=settings.timesteps,
            guidance=settings.guidance,
            guidance_channels=settings.guidance_channels,
            guidance_interval=settings.guidance_interval,
            guide=guide,
            null_class=null_class,
            clip=settings.clip,
            noise=lambda _: next(noise).to(device),
        )
