"""A study: one question as data. `study.py` reads one YAML file and expands it into variants; it knows no models."""

import difflib
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
STAGES = ("cost", "train", "sample", "evaluate", "bench")
# What every study's debug size has: seconds on a CPU, and results that mean nothing.
DEBUG: dict[str, Any] = {
    "data": "digits",
    "data.size": 8,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.precision": "float32",
    "train.compile": "eager",
    "sample.count": 12,
    "sample.method": "ddim",
    "sample.steps": 2,
    "sample.batch_size": 12,
    "evaluate.features": "efficientnet_lite0",
    "evaluate.metrics": ["prc"],
    "evaluate.reference_count": 12,
    "bench.batch_size": 1,
    "bench.modes": ["forward"],
    "bench.compile": ["eager"],
    "bench.precision": "float32",
    "bench.repeats": 1,
    "bench.warmup": 1,
    "bench.seconds": 0.01,
    "run.log_every": 1,
}


class StudyError(ValueError):
    """A study that does not exist or does not say what it must, in one line."""


@dataclass(frozen=True)
class Variant:
    """One run of a study: a short name, its axis values, and the overrides `key=value` that make it."""

    name: str
    values: dict[str, Any]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What a YAML file says.

    question, claim   the question and what the paper or we say about it
    base              overrides of every run, {key: value}
    axes              {key: [values]}: every combination is a variant …
    variants          … or named variants, {name: {key: value}}; not both
    seeds             one run each
    stages            what a run does, of `STAGES`
    debug             the same study in seconds on a CPU: settings over `DEBUG`; an axis takes other values
    """

    name: str
    question: str
    claim: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    debug: dict[str, Any] = field(default_factory=dict)

    def debug_size(self) -> "Study":
        """The study at its debug size, `NAME-debug`. Raises StudyError where the file gives none."""
        if not self.debug:
            raise StudyError(f"study {self.name} has no debug size: its file has no section debug")
        fixed = {key: value for key, value in {**DEBUG, **self.debug}.items() if key not in self.axes}
        variants = {
            name: {key: fixed.get(key, value) for key, value in values.items()}
            for name, values in self.variants.items()
        }
        axes = {key: self.debug.get(key, values) for key, values in self.axes.items()}
        base = {**self.base, **fixed}
        return replace(self, name=f"{self.name}-debug", base=base, axes=axes, variants=variants, seeds=self.seeds[:1])

    def expand(self) -> list[Variant]:
        """Every run of the study, in the order of the file."""
        named = self.variants or {
            "-".join(_word(value) for value in values): dict(zip(self.axes, values, strict=True))
            for values in itertools.product(*self.axes.values())
        }
        runs = []
        for name, values in named.items():
            for seed in self.seeds:
                suffix = f"-s{seed}" if len(self.seeds) > 1 else ""
                settings = {**self.base, **values, "seed": seed}
                overrides = tuple(f"{key}={_literal(value)}" for key, value in settings.items())
                runs.append(Variant(f"{name}{suffix}", {"variant": name} if self.variants else values, overrides))
        return runs


def names() -> list[str]:
    """The studies that come with lamabench."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Study:
    """A study by name, or from a path that ends in .yaml.

    Raises StudyError for an unknown name, or for a file that is not a study.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise StudyError(f"unknown study {name!r}{hint}; choices: {', '.join(names())}, or a path to a .yaml file")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise StudyError(f"cannot read {path}: {error.strerror}") from None
    return _study(path, data)


_TYPES = {"question": str, "claim": str, "base": dict, "axes": dict, "variants": dict, "seeds": list, "stages": list}
_TYPES |= {"debug": dict}


def _study(path: Path, data: Any) -> Study:
    if not isinstance(data, dict):
        raise StudyError(f"{path}: a study is a mapping with the keys {', '.join(_TYPES)}")
    for key, value in data.items():
        if key not in _TYPES:
            raise StudyError(f"{path}: unknown key {key!r}; choices: {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[key]):
            raise StudyError(f"{path}: {key} must be a {_TYPES[key].__name__}, not {value!r}")
    if not data.get("question"):
        raise StudyError(f"{path}: a study states its question")
    if bool(data.get("axes")) == bool(data.get("variants")):
        raise StudyError(f"{path}: a study has axes or variants, one of the two")
    for key, values in data.get("axes", {}).items():
        for wanted in (values, data.get("debug", {}).get(key, values)):
            if not isinstance(wanted, list) or not wanted:
                raise StudyError(f"{path}: axis {key} must list its values, not {wanted!r}")
    for key, values in data.get("variants", {}).items():
        if not isinstance(values, dict):
            raise StudyError(f"{path}: variant {key} must map keys to values, not {values!r}")
        if "/" in str(key):
            raise StudyError(f"{path}: variant {key!r} names a folder, and must have no / in it")
    settings = [data.get(key, {}) for key in ("base", "axes", "debug")]
    for place in (*settings, *data.get("variants", {}).values()):
        if "seed" in place:
            raise StudyError(f"{path}: seed is no setting of a study's runs: list it in seeds, such as seeds: [0, 1]")
    for seed in data.get("seeds", []):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise StudyError(f"{path}: seeds are whole numbers, not {seed!r}")
    if not data.get("seeds", [0]):
        raise StudyError(f"{path}: seeds must list at least one")
    for stage in data.get("stages", []):
        if stage not in STAGES:
            raise StudyError(f"{path}: unknown stage {stage!r}; choices: {', '.join(STAGES)}")
    return Study(name=path.stem, **data)


def _literal(value: Any) -> str:
    """A value as an override writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_literal(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_literal(item)}' for key, item in value.items())}}}"
    return str(value)


def _word(value: Any) -> str:
    """A value as part of a folder's name."""
    text = _text(value)
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in text) or "none"


def _text(value: Any) -> str:
    if isinstance(value, list):
        lists = any(isinstance(item, list) for item in value)
        return ("_" if lists else "+").join(_text(item) for item in value)
    if isinstance(value, dict):
        return ".".join(str(item) if key == "kind" else f"{key}{_text(item)}" for key, item in value.items())
    return str(value)
