"""`lamabench encode`: a cache of latents, from which trainings read what an autoencoder makes of images."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ...harness import signals
from ...harness.data.latents import Index
from ...harness.progress import Progress, clock
from ...kernels.errors import InputError
from ..compose import choices, compose
from ..output import command

ANY_SIZE = ("model=dit_nano", "model.patch_size=1")  # the encoding has no model, and this one takes images of any size


def run(args: argparse.Namespace) -> int:
    from ...harness.encoding import encode

    sources = [word.partition("=")[2] for word in args.words if word.startswith("encoder=")]
    words = [word for word in args.words if not word.startswith("encoder=")]
    if wrong := [word for word in words if not word.startswith(("data=", "data.", "run."))]:
        raise InputError(f"encode takes data=NAME, encoder=FOLDER|ID, and settings of data and run, not {wrong[0]!r}")
    if not any(word.startswith("data=") for word in words):
        raise InputError(f"encode needs data: data=NAME; choices: {', '.join(choices('data'))}")
    if len(sources) != 1 or sources[0] in ("", "pixels"):
        raise InputError(
            "encode needs one autoencoder: encoder=FOLDER, with config.json and *.safetensors, or encoder=OWNER/NAME "
            "of the Hugging Face hub, such as stabilityai/sd-vae-ft-ema"
        )
    if args.to is None:
        raise InputError("encode needs the folder of the cache: --to FOLDER")
    config, begin = compose([*ANY_SIZE, *words])[0], time.monotonic()
    with signals.noted():
        index = encode(config, sources[0], args.to, Progress(), args.dtype, args.download, args.verify)
    facts = {**asdict(replace(index, shards=[])), "shards": len(index.shards)}
    facts["seconds"] = round(time.monotonic() - begin, 3)
    print(json.dumps(facts, indent=1) if args.json else "\n".join(_lines(args.to, index, facts["seconds"])))
    return 0


def _lines(target: Path, index: Index, seconds: float) -> Iterator[str]:
    facts, mirrored = index.encoder, ", plain and mirrored" if index.mirrored else ""
    shards = "1 shard" if len(index.shards) == 1 else f"{len(index.shards):,} shards"
    shape = f"{facts.channels} x {facts.side} x {facts.side}"
    yield f"{target}: latents {shape} of {index.images:,} images{mirrored}, {index.dtype}, {shards}"
    yield f"encoder: {facts.kind} {facts.identity}, scale {facts.scale:g}, shift {facts.shift:g}, {facts.source}"
    yield f"data: {index.data['kind']}, fingerprint {index.fingerprint}"
    yield f"complete after {clock(seconds)}"
    if index.data.get("split") == "test":
        yield "latents of a test split are for held-out loss, in the folder test of the training's cache"
    else:
        yield f"next: {command('train', 'model=dit_s_2', f'encoder={target}')}"
