"""`lamabench data check`: what a set of images contains, what was left out, and which files cannot be read."""

import argparse
import json
import sys
from collections.abc import Iterator

from ...harness.data.files import few
from ...harness.data.summary import Summary, summary
from ...harness.sections import DataConfig
from ...kernels.errors import InputError
from ..compose import choices, compose


def run(args: argparse.Namespace) -> int:
    if wrong := [word for word in args.words if not word.startswith(("data=", "data."))]:
        raise InputError(f"data check takes data=NAME and settings such as data.path=FOLDER, not {wrong[0]!r}")
    if not any(word.startswith("data=") for word in args.words):
        raise InputError(f"data check needs data: data=NAME; choices: {', '.join(choices('data'))}")
    config = compose(args.words)[0].data
    given = any(word.startswith("data.num_classes=") for word in args.words)
    content = summary(config, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(content.as_dict(), indent=1) if args.json else "\n".join(lines(content, config, given)))
    if problem := content.problem():
        raise InputError(problem)
    return 0


def lines(content: Summary, config: DataConfig, given: bool) -> Iterator[str]:
    """The summary of a set as text. `given` is whether `data.num_classes` is not the default."""
    where, count = config.path or config.kind, len(content.classes)
    classes = "1 class" if count == 1 else f"{count:,} classes"
    fingerprint = f", fingerprint {content.fingerprint}" if content.fingerprint else ""
    yield f"{where}: {content.images:,} images in {classes}{fingerprint}"
    yield f"classes: {few([f'{name} {images:,}' for name, images in content.classes.items()])}"
    if content.empty:
        yield f"empty classes: {few(content.empty, content.empty_count)}"
    sizes = sorted(content.sizes, key=lambda size: (size[0] * size[1], size))
    if sizes:
        (width, height), (widest, highest) = sizes[0], sizes[-1]
        largest = f" to {widest} x {highest}" if len(sizes) > 1 else ""
        yield f"sizes: {width} x {height}{largest} pixels, {len(sizes):,} different"
    yield f"modes: {', '.join(f'{mode} {count:,}' for mode, count in content.modes.items())}"
    if content.links:
        yield f"links followed: {content.links:,}"
    for reason, paths in content.left_out.items():
        yield f"left out, {reason}: {len(paths):,} ({few(paths)})"
    for file, reason in content.unreadable.items():
        yield f"unreadable: {file}: {reason}"
    if config.num_classes not in (0, count) and not content.empty:
        now = f"data.num_classes is {config.num_classes}; " if given else ""
        yield f"{now}training takes data.num_classes={count}, or 0 without classes"
