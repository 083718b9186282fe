"""Splits of a set of images: what a training learns from, and what is held out from it.

digits          train (all 1,797 images), or most (seven of eight) and test (every eighth)
cifar10         train (50,000) and test (10,000)
synthetic       train, and as many other images of the same classes as test
folder, npz     train is data.path; test is the folder or file `test`, or else `val`, beside a data.path `train`
webdataset      shards with `train`, and with `test` (or else `val`, `validation`), in their names; or as of folder
hf              `train` and `test` (or else `val`, `validation`) of a DatasetDict or in names of files; or as of folder
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...kernels.errors import InputError
from ..sections import DataConfig

SPLITS = {"digits": ("train", "most", "test")}  # of every other kind: train and test
TEST_NAMES = ("test", "val")
TEST_WORDS = ("test", "val", "validation")
_WORD = re.compile(r"(?:^|[^a-z])(train|test|val|validation)(?![a-z])")
EIGHTH = 8  # of the digits, images 0, 8, 16 … are the test split


def splits_of(kind: str) -> tuple[str, ...]:
    """The names that `data.split` of a kind may have."""
    return SPLITS.get(kind, ("train", "test"))


def held_out(config: DataConfig) -> DataConfig:
    """The images that a training on the data of `config` has never seen: their test split. Reads nothing.

    Raises InputError if all images are trained on, or if there is no place for others.
    """
    if config.split == "test":
        raise InputError("data.split=test is the test split itself, of which nothing is held out: data.split=train")
    if (config.kind, config.split) == ("digits", "train"):
        raise InputError(
            "data.split=train of 'digits' is all of its images, so that no test split is left: data.split=most leaves "
            "every eighth image to it"
        )
    if config.kind in ("folder", "npz") and config.path is not None and Path(config.path).stem != "train":
        raise _not_beside(config)
    return replace(config, split="test")


def of_split(names: Sequence[str], split: str) -> list[list[str]]:
    """Those of `names` that belong to `split`, by a word in them: groups, the best first, none if there are none.

    Of train are the names with `train`, such as `x-train-0001.tar`, or else those without a word, or else all. Of test
    are those with `test`, with `val` or with `validation`, unless train has all.
    """
    words = [match[1] if (match := _WORD.search(name.lower())) else "" for name in names]
    learned = next((word for word in ("train", "") if word in words), None)
    if split == "train":
        wanted = [words if learned is None else [learned]]
    else:
        wanted = [[word] for word in TEST_WORDS if learned is not None]
    groups = [[name for name, word in zip(names, words, strict=True) if word in some] for some in wanted]
    return [group for group in groups if group]


def beside(config: DataConfig) -> Path:
    """The path of a test split that lies beside the training's. Raises InputError if there is none."""
    path = Path(config.path or "")
    others = [path.with_name(f"{name}{path.suffix}") for name in _names(config)]
    there = [other for other in others if other.exists()]
    if path.stem != "train" or not there:
        raise _not_beside(config)
    return there[0]


def _names(config: DataConfig) -> tuple[str, ...]:
    return TEST_NAMES if config.kind in ("folder", "npz") else TEST_WORDS


def _not_beside(config: DataConfig) -> InputError:
    suffix = Path(config.path or "").suffix
    names = " or ".join(f"{name}{suffix}" for name in _names(config))
    if config.kind not in ("folder", "npz"):
        names = f"files with {names} in their names, or such a folder"
    return InputError(
        f"the test split of data {config.kind!r} is {names} beside data.path=…/train{suffix}, "
        f"and {config.path} has none"
    )
