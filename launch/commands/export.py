"""`lamabench export`: a training as a folder, or a repository of the Hugging Face hub, for other people."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...harness.keys import config_of
from ...harness.model_card import card
from ...harness.release import check_folder, check_repository, collect, open_hub, upload, write_export
from ...harness.run import read_info
from ...harness.shards import images_of, labels_at, open_samples
from ...kernels.errors import InputError
from ...models import plugins
from ...models.exported import HUB
from ...reports.protocols import words_of_protocol
from ..compose import load_plugins, override
from ..grid import write_grid
from ..output import command
from .sample import run_and_overrides

TAKEN = ("sample.at=", "sample.weights=")


def run(args: argparse.Namespace) -> int:
    path, overrides = run_and_overrides(args.words)
    overrides = load_plugins(overrides)
    if wrong := [text for text in overrides if not text.startswith(TAKEN)]:
        raise InputError(f"export takes a run, sample.at=[STEP] and sample.weights=NAME, not {wrong[0]!r}")
    if not args.to:
        raise InputError(f"export needs a place: --to FOLDER, or --to {HUB}owner/name")
    info = read_info(path)
    plugins.load_recorded(info.get("plugins", ()), lambda text: print(text, file=sys.stderr))
    settings = override(config_of(path, info), overrides).sample
    at = settings.at if any(text.startswith("sample.at=") for text in overrides) else "last"
    if at == "all" or (isinstance(at, list) and len(at) > 1):
        raise InputError("export takes the weights of one step: sample.at=[N], or the last without it")
    kind = settings.weights if any(text.startswith("sample.weights=") for text in overrides) else "ema"
    hub = args.to.startswith(HUB)
    name, target = args.to.removeprefix(HUB), Path(args.to).expanduser()
    api = open_hub(name) if hub else None
    export = collect(path, at if isinstance(at, str) else at[0], kind)
    if api is not None:
        check_repository(api, name, export)
    else:
        check_folder(target, export)

    def text(info: dict[str, Any]) -> str:
        protocols = {row["protocol"]: words_of_protocol(row.get("evaluation")) for row in export.scores}
        return card(info, export.scores, export.samples_row, args.to if hub else target.name, protocols)

    if api is None:
        write_export(target, export, text, draw_grid)
        place = str(target)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_export(Path(folder) / "export", export, text, draw_grid)
            place = upload(api, name, Path(folder) / "export", export)
    count = len(export.scores)
    what = f"the {kind} weights of step {export.weights.step} with {count} score{'s' * (count != 1)}"
    print(f"{place}: {what}{'' if export.samples else ', without a picture, because no samples of them are kept'}")
    if hub:
        print("a new repository is private; no licence is stated: add `license:` to its README.md")
    if export.samples is None:
        print(f"next: {command('sample', path, 'sample.count=160', 'sample.method=ddim', 'sample.steps=25')}")
    return 0


def draw_grid(samples: Path, picture: Path) -> None:
    """Draw some images of a set of samples."""
    images = images_of(samples)
    write_grid(picture, open_samples(images), labels_at(images))
