"""A study: one question as data. `study.py` reads one YAML file and expands it into variants; it knows no models."""

import difflib
import itertools
import re
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
    """One run of a study: the variant's name, its axis values, all its settings {key: value}, and its seed."""

    name: str
    values: dict[str, Any]
    settings: dict[str, Any]
    seed: int

    @property
    def overrides(self) -> tuple[str, ...]:
        """The settings and the seed as overrides `key=value`."""
        return tuple(f"{key}={literal(value)}" for key, value in {**self.settings, "seed": self.seed}.items())


@dataclass(frozen=True)
class Study:
    """What a YAML file says.

    question, claim   the question and what the paper or we say about it
    extends           another file whose settings it takes over: a name in its folder or ours, or a path from its folder
    base              settings of every run, {key: value}
    axes              {key: [values]}: every combination is a variant …
    variants          … or named variants, {name: {key: value}}; not both
    seeds             one run each
    stages            what a run does, of `STAGES`
    debug             the same study in seconds on a CPU: settings over `DEBUG`; an axis takes other values
    plugins           Python files, from the folder of the file, or modules, that every job imports
    file              where it stands: an absolute path, `lamabench:NAME`, or None where it was made in Python
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
    plugins: list[str] = field(default_factory=list)
    file: str | None = None

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
        """Every run of the study, in the order of the file. Raises StudyError for values that are named alike."""
        named = self.variants or self._combinations()
        return [
            Variant(name, {"variant": name} if self.variants else values, {**self.base, **values}, seed)
            for name, values in named.items()
            for seed in self.seeds
        ]

    def run_name(self, variant: Variant) -> str:
        """The name of a run: its variant's, and its seed where there are several."""
        return f"{variant.name}-s{variant.seed}" if len(self.seeds) > 1 else variant.name

    def _combinations(self) -> dict[str, dict[str, Any]]:
        for key, values in self.axes.items():
            known: dict[str, Any] = {}
            for value in values:
                word = _word(value)
                if word in known:
                    raise StudyError(
                        f"study {self.name}: the values {known[word]!r} and {value!r} of axis {key} would both be "
                        f"called {word!r}: leave one out, or write variants with names of their own"
                    )
                known[word] = value
        return {
            "-".join(_word(value) for value in values): dict(zip(self.axes, values, strict=True))
            for values in itertools.product(*self.axes.values())
        }


def names() -> list[str]:
    """The studies that come with lamabench; files that begin with `_` are for `extends`."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def load(name: str) -> Study:
    """A study by name, or from a path that ends in .yaml.

    Raises StudyError for an unknown name, or for a file that is not a study.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file() or (path == FOLDER / f"{name}.yaml" and name.startswith("_")):
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise StudyError(f"unknown study {name!r}{hint}; choices: {', '.join(names())}, or a path to a .yaml file")
    data = _extended(path, _read(path), ())
    if not data.get("question"):
        raise StudyError(f"{path}: a study states its question")
    if bool(data.get("axes")) == bool(data.get("variants")):
        raise StudyError(f"{path}: a study has axes or variants, one of the two")
    ours = path.resolve().parent == FOLDER.resolve()
    return Study(name=path.stem, file=f"lamabench:{path.stem}" if ours else str(path.resolve()), **data)


_TYPES = {"question": str, "claim": str, "extends": str, "base": dict, "axes": dict, "variants": dict, "seeds": list}
_TYPES |= {"stages": list, "debug": dict, "plugins": list}
_MERGED = ("base", "debug")


class _Loader(yaml.SafeLoader):
    """YAML without keys that are there twice, of which the first would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for place, key in enumerate(keys) if key in keys[:place] and key != "<<"), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    """What a file says, checked, with the places of its plug-ins."""
    try:
        data = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise StudyError(f"cannot read {path}: {error.strerror}") from None
    _check(path, data)
    if "plugins" in data:
        folder = path.resolve().parent
        data["plugins"] = [str(folder / name) if name.endswith(".py") else name for name in data["plugins"]]
    return data


def _extended(path: Path, data: dict[str, Any], below: tuple[Path, ...]) -> dict[str, Any]:
    """`data` over what the file that it extends says."""
    if (name := data.pop("extends", None)) is None:
        return data
    plain = not name.endswith((".yaml", ".yml"))
    places = [folder / (f"{name}.yaml" if plain else name) for folder in (path.parent, *([FOLDER] if plain else []))]
    other = next((place for place in places if place.is_file()), None)
    if other is None:
        raise StudyError(f"{path}: extends {name!r}, and there is no such file: {places[0]}")
    below = (*below, path.resolve())
    if other.resolve() in below:
        raise StudyError(f"{path}: extends {name!r}, which extends it in turn")
    lower = _extended(other, _read(other), below)
    merged = {key: {**lower.get(key, {}), **data.get(key, {})} for key in _MERGED}
    kinds = ("axes", "variants")  # whichever the study has stands in the place of either
    kept = {key: value for key, value in lower.items() if key not in kinds or not any(kind in data for kind in kinds)}
    return {**kept, **data, **merged}


def _check(path: Path, data: Any) -> None:
    if not isinstance(data, dict):
        raise StudyError(f"{path}: a study is a mapping with the keys {', '.join(_TYPES)}")
    for key, value in data.items():
        if key not in _TYPES:
            raise StudyError(f"{path}: unknown key {key!r}; choices: {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[key]):
            raise StudyError(f"{path}: {key} must be a {_TYPES[key].__name__}, not {value!r}")
    for key, values in data.get("axes", {}).items():
        for wanted in (values, data.get("debug", {}).get(key, values)):
            if not isinstance(wanted, list) or not wanted:
                raise StudyError(f"{path}: axis {key} must list its values, not {wanted!r}")
    for key, values in data.get("variants", {}).items():
        if not isinstance(values, dict):
            raise StudyError(f"{path}: variant {key} must map keys to values, not {values!r}")
        if not isinstance(key, str) or not key or "/" in key or "\0" in key or key.startswith("."):
            raise StudyError(f"{path}: variant {key!r} names a link: a text without /, which does not begin with a dot")
        if len(key.encode()) > 200:
            raise StudyError(f"{path}: variant {key[:40]!r}… names a link: at most 200 bytes")
    settings = [data.get(key, {}) for key in ("base", "axes", "debug")]
    for place in (*settings, *data.get("variants", {}).values()):
        if "seed" in place:
            raise StudyError(f"{path}: seed is no setting of a study's runs: list it in seeds, such as seeds: [0, 1]")
    for seed in data.get("seeds", []):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise StudyError(f"{path}: seeds are whole numbers, not {seed!r}")
    if not data.get("seeds", [0]):
        raise StudyError(f"{path}: seeds must list at least one")
    if len({*data.get("seeds", [])}) < len(data.get("seeds", [])):
        raise StudyError(f"{path}: seeds lists one twice: {data['seeds']}")
    for stage in data.get("stages", []):
        if stage not in STAGES:
            raise StudyError(f"{path}: unknown stage {stage!r}; choices: {', '.join(STAGES)}")
    for name in data.get("plugins", []):
        if not isinstance(name, str):
            raise StudyError(f"{path}: plugins are Python files or modules, not {name!r}")


# What an override takes for a text without quotes; any other could be read as a number, a list, an expression.
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)
_READ_OTHERWISE = ("null", "true", "false", "nan", "inf")


def literal(value: Any) -> str:
    """A value as an override writes it, so that a text stays that text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(literal(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _READ_OTHERWISE:
        return text
    # Backslashes count before a quote alone; there each is written twice.
    escaped = re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), text)
    return f"'{escaped}'"


def _word(value: Any) -> str:
    """A value as part of a name."""
    text = _text(value)
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in text) or "none"


def _text(value: Any) -> str:
    if isinstance(value, list):
        lists = any(isinstance(item, list) for item in value)
        return ("_" if lists else "+").join(_text(item) for item in value)
    if isinstance(value, dict):
        return ".".join(str(item) if key == "kind" else f"{key}{_text(item)}" for key, item in value.items())
    return str(value)
