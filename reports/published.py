"""Numbers that papers print, from `published.yaml` and a user's file of the same format.

Such a file is YAML with any of these lists, whose rows need the fields in brackets:

    steps_400k                  ImageNet at 256 px, 400K steps of 256 images, no guidance (`model`, `source`, `fid`)
    imagenet_256, imagenet_512  final models (`model`, `source`, `fid`)
    ablations                   twins of a study of ours (`study`, `variant`, `model`, `source`, `fid`)
    counted_from_released_code  what the suite must count (`model`, `size`, `params_m`, `macs_g`)

Scores are of 50,000 samples with FID's network and reference; else they have no place beside ours. For example:

    imagenet_256:
      - {model: MyNet-XL, params_m: 612, macs_g: 91.2, fid: 2.31, guidance: classifier-free, guidance_scale: 1.5,
         source: our draft}
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from ..kernels.errors import InputError, unknown

FILE = Path(__file__).with_name("published.yaml")
CHOICES = {
    "convention": ("macs", "macs+norms", "macs+norms+scans", "printed"),
    "guidance": ("none", "classifier", "classifier-free"),
}
WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A published model. Numbers that its source does not give are None.

    model, source            as the paper writes it, and where the numbers stand
    params_m                 parameters in 1e6
    macs_g, convention       multiply-adds of one forward pass of one image in 1e9, and what they count (CHOICES)
    macs_vs_dit_xl2_percent  the difference of `macs_g` to DiT-XL/2, where a paper prints that instead
    fid, sfid, is_, precision, recall   scores of 50,000 samples; `is` in the file
    guidance, guidance_scale   none, classifier or classifier-free, and its scale
    conditional              whether the model knows the class; scores of others never stand beside those that do
    checked                  whether numbers and guidance were compared with the source
    """

    model: str
    source: str
    fid: float
    params_m: float | None = None
    macs_g: float | None = None
    convention: str = "printed"
    macs_vs_dit_xl2_percent: float | None = None
    sfid: float | None = None
    is_: float | None = None
    precision: float | None = None
    recall: float | None = None
    guidance: str = "none"
    guidance_scale: float | None = None
    conditional: bool = True
    checked: bool = True


@dataclass(frozen=True, kw_only=True)
class PublishedVariant(PublishedRow):
    """A variant of a published ablation. `study` is ours that asks the same; `variant` is in the paper's words."""

    study: str
    variant: str


@dataclass(frozen=True, kw_only=True)
class CountedRow:
    """A model whose released code was counted, at an input of side `size`: parameters in 1e6, multiply-adds in 1e9, and
    what the rule of its paper gives."""

    model: str
    size: int
    params_m: float
    macs_g: float
    paper_g: float | None = None


@dataclass(frozen=True)
class Published:
    """The rows of the lists of the file, by their names."""

    steps_400k: tuple[PublishedRow, ...] = ()
    imagenet_256: tuple[PublishedRow, ...] = ()
    imagenet_512: tuple[PublishedRow, ...] = ()
    ablations: tuple[PublishedVariant, ...] = field(default=(), metadata={"row": PublishedVariant})
    counted_from_released_code: tuple[CountedRow, ...] = field(default=(), metadata={"row": CountedRow})


def read(path: Path | None = None) -> Published:
    """The rows of the suite and, after them, those of a user's file.

    Raises InputError, one line that names the file and the row, for a file that is missing or is not YAML, a list or
    field that does not exist, a missing field, a value of another type, and a row that is there already.
    """
    own = _own()
    if path is None:
        return own
    more = _read(path)
    both = {name: (*getattr(own, name), *getattr(more, name)) for name in _lists()}
    for name, rows in both.items():
        seen = set()
        for row in rows:
            if row in seen:
                raise InputError(f"{path}: {name} has {row.model} twice with the same numbers, or lamabench has it")
            seen.add(row)
    return Published(**both)


@cache
def _own() -> Published:
    return _read(FILE)


def _lists() -> dict[str, type]:
    return {one.name: one.metadata.get("row", PublishedRow) for one in fields(Published)}


def _read(path: Path) -> Published:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    lists = _lists()
    if not isinstance(content, Mapping):
        raise InputError(f"{path} has no lists of published rows; choices: {', '.join(lists)}")
    tables: dict[str, tuple[Any, ...]] = {}
    for name, rows in content.items():
        if name not in lists:
            raise InputError(f"{path}: {unknown('list', name, lists)}")
        if not isinstance(rows, list):
            raise InputError(f"{path}: {name} must be a list of rows")
        tables[name] = tuple(_row(lists[name], row, f"{path}: {name} row {at}") for at, row in enumerate(rows, start=1))
    return Published(**tables)


def _row(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"{where} must be a mapping such as {{model: NAME, source: WHERE, fid: 2.5}}")
    where += f" ({values['model']})" if isinstance(values.get("model"), str) else ""
    hints, given = get_type_hints(kind), {}
    names = {one.name.removesuffix("_"): one for one in fields(kind)}
    for name, value in values.items():
        if name not in names:
            raise InputError(f"{where}: {unknown('field', name, names)}")
        allowed = set(get_args(hints[names[name].name]) or (hints[names[name].name],))
        right = type(value) in allowed | ({int} if float in allowed else set())
        if not right or (isinstance(value, float) and not math.isfinite(value)) or value == "":
            kinds = " or ".join(WORDS[one] for one in allowed - {NoneType})
            raise InputError(f"{where}: {name} must be {kinds}, not {value!r}")
        if name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{where}: {unknown(name, value, CHOICES[name])}")
        given[names[name].name] = float(value) if isinstance(value, int) and float in allowed else value
    needed = [name for name, one in names.items() if one.default is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    return kind(**given)
