"""A study is one question as data. This module reads its YAML file and expands it into variants; it knows no models."""

import itertools
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError, unknown
from .words import literal, word
from .yaml_file import read_yaml

FOLDER = Path(__file__).parent
MOST = 100_000  # runs of a study
STAGES = ("cost", "train", "sample", "evaluate", "bench")
NOISE = "sample.seed"  # an axis along which nothing differs but the noise of samples: it makes no variants
# The settings of every study's debug size. It takes seconds on a CPU, and its results mean nothing.
DEBUG: dict[str, Any] = {
    "data": "digits",
    "data.size": 8,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.precision": "float32",
    "train.compile": "eager",
    "train.snapshots": [],
    "run.heldout_every": 0,  # digits have a test split only if it is asked for
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


@dataclass(frozen=True, eq=False)
class Setting:
    """A key and its value as data. `str` shows it as an override `key=value`, from which Hydra reads the same value."""

    key: str
    value: Any

    def __str__(self) -> str:
        return f"{self.key}={literal(self.value)}"

    def __eq__(self, other: object) -> bool:  # as text, in which 1, 1.0, true and '1' differ
        return isinstance(other, Setting) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True)
class Variant:
    """One run of a study: the variant's name, its axis values, all its settings {key: value}, and its seed."""

    name: str
    values: dict[str, Any]
    settings: dict[str, Any]
    seed: int

    @property
    def overrides(self) -> tuple[Setting, ...]:
        """The settings and the seed."""
        return tuple(Setting(key, value) for key, value in {**self.settings, "seed": self.seed}.items())


@dataclass(frozen=True)
class Study:
    """The contents of a YAML file.

    question, claim   the question, and what the paper or we claim about it
    answer            what would count as an answer: which difference, over how many seeds
    budget            what the study takes: trainings, images, FLOPs, hours
    verdicts          {a claim in a short sentence: the pairs [better, worse] that it says}; a side is the name of a
                      variant, a value of the only axis, or a value of each axis {axis: value}
    extends           another file whose settings apply unless this file sets them: a name (looked up in the folder of
                      this file, then among our studies) or a path relative to that folder
    base              the settings of every run, {key: value}
    axes              {key: [values]}; every combination is a variant
    per               {axis: {value as in names of runs: {key: value}}}: more settings of these runs, such as a rate per
                      model
    variants          {name: {key: value}}; a study has axes or variants, not both
    seeds             every variant is run once with each seed
    stages            what a run does, a list of `STAGES`
    debug             settings that shrink the study to seconds on a CPU; they override `DEBUG`, and a list replaces
                      the values of an axis
    plugins           modules, or Python files relative to the folder of this file; every job imports them
    file              an absolute path, `lamabench:NAME`, or None for a study that was built in Python
    """

    name: str
    question: str
    claim: str = ""
    answer: str = ""
    budget: str = ""
    verdicts: dict[str, list[list[Any]]] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    per: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    debug: dict[str, Any] = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)
    file: str | None = None

    def debug_size(self) -> "Study":
        """The study at its debug size, called `NAME-debug`, without the verdicts on variants that it lacks. Raises
        InputError if the file has no section debug."""
        if not self.debug:
            raise InputError(f"study {self.name} has no debug size: its file has no section debug")
        fixed = {key: value for key, value in {**DEBUG, **self.debug}.items() if key not in self.axes}

        def smaller(several: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
            return {name: {key: fixed.get(key, value) for key, value in one.items()} for name, one in several.items()}

        axes = {key: self.debug.get(key, values) for key, values in self.axes.items()}
        small = replace(
            self,
            name=f"{self.name}-debug",
            base={**self.base, **fixed},
            axes=axes,
            per={axis: smaller(more) for axis, more in self.per.items() if axis not in self.debug},
            variants=smaller(self.variants),
            seeds=self.seeds[:1],
        )
        verdicts = {
            claim: pairs
            for claim, pairs in self.verdicts.items()
            if all(small._has(side) for one in pairs for side in one)
        }
        return replace(small, verdicts=verdicts)

    def expand(self) -> list[Variant]:
        """Every run of the study, in the order of the file. Raises InputError if two variants get the same name, if a
        name cannot be that of a link, if `per` names what is no value of an axis, or if there are more runs than
        `MOST`."""
        count = (len(self.variants) or math.prod(map(len, self.axes.values()))) * len(self.seeds)
        if count > MOST:
            raise InputError(f"study {self.name} would have {count:,} runs; at most {MOST:,} are allowed")
        _check_per(f"study {self.name}", self)  # of a study that was built in Python
        settings = self.variants or self._combinations()
        for name in settings:
            _check_name(f"study {self.name}", name)
        return [
            Variant(name, {"variant": name} if self.variants else values, self._settings(values), seed)
            for name, values in settings.items()
            for seed in self.seeds
        ]

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """The settings of a run with these axis values, or with these settings of a variant."""
        settings = {**self.base, **values}
        for axis, more in self.per.items():
            for value, others in more.items():
                settings |= others if value == word(values[axis]) else {}
        return settings

    def about(self) -> dict[str, Any]:
        """What the study is about, as .study.json holds it. The variants of a study without axes are the values of an
        axis `variant`. Raises InputError as `pairs` does."""
        axes = {"variant": list(self.variants)} if self.variants else self.axes
        texts = {"question": self.question, "claim": self.claim, "answer": self.answer, "budget": self.budget}
        more = {"per": self.exceptions()} if self.per else {}
        return {**texts, "axes": axes, **more, **({"verdicts": self.pairs()} if self.verdicts else {})}

    def exceptions(self) -> str:
        """The settings of `per` in words: `model unet_s: train.lr=0.0002`."""
        return "; ".join(
            f"{axis} {value}: {', '.join(f'{key}={literal(setting)}' for key, setting in settings.items())}"
            for axis, more in self.per.items()
            for value, settings in more.items()
        )

    def pairs(self) -> dict[str, list[dict[str, dict[str, Any]]]]:
        """The verdicts with variants as axis values: {claim: [{"better": {axis: value}, "worse": {axis: value}}]}.

        Raises InputError for a side that is no variant, and for a variant beside itself.
        """
        result: dict[str, list[dict[str, dict[str, Any]]]] = {}
        for claim, pairs in self.verdicts.items():
            result[claim] = []
            for better, worse in pairs:
                sides = {"better": self._side(better), "worse": self._side(worse)}
                if literal(sides["better"]) == literal(sides["worse"]):
                    raise InputError(f"{self._verdicts}: {better!r:.200} is beside itself in {claim!r}")
                result[claim].append(sides)
        return result

    @property
    def _verdicts(self) -> str:
        return f"verdicts of {self.file or self.name}"

    def _side(self, side: Any) -> dict[str, Any]:
        """The axis values of a side of a pair, in the order of the axes."""
        axes = {"variant": list(self.variants)} if self.variants else {**self.axes}
        axes.pop(NOISE, None)
        if isinstance(side, dict) and side.keys() == axes.keys():
            values = {axis: side[axis] for axis in axes}
        elif len(axes) == 1:
            values = dict.fromkeys(axes, side)
        else:
            example = ", ".join(f"{axis}: {literal(choices[0])}" for axis, choices in axes.items())
            raise InputError(
                f"{self._verdicts}: {side!r:.200} is no variant; give a value of each axis, such as {{{example}}}"
            )
        for axis, value in values.items():
            if literal(value) not in map(literal, axes[axis]):
                raise unknown(f"{axis} in {self._verdicts}", value, axes[axis])
        return values

    def _has(self, side: Any) -> bool:
        with suppress(InputError):
            return bool(self._side(side))
        return False

    def run_name(self, variant: Variant) -> str:
        """The name of a run: the name of its variant, with the seed if the study has several."""
        return f"{variant.name}-s{variant.seed}" if len(self.seeds) > 1 else variant.name

    def _combinations(self) -> dict[str, dict[str, Any]]:
        for key, values in self.axes.items():
            values_by_word: dict[str, Any] = {}
            for value in values:
                name = word(value)
                if name in values_by_word:
                    raise InputError(
                        f"study {self.name}: the values {values_by_word[name]!r} and {value!r} of axis {key} would "
                        f"both be called {name!r}; remove one, or write variants and name them"
                    )
                values_by_word[name] = value
        return {
            "-".join(word(value) for value in values): dict(zip(self.axes, values, strict=True))
            for values in itertools.product(*self.axes.values())
        }


def names() -> list[str]:
    """The studies that come with lamabench. Files whose name begins with `_` are no studies; studies extend them."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def load(name: str) -> Study:
    """A study by its name, or by a path that ends in .yaml or .yml.

    Raises InputError for an unknown name, and for a file that is not a study.
    """
    by_path = name.endswith((".yaml", ".yml"))
    path = Path(os.path.expanduser(name)) if by_path else FOLDER / f"{name}.yaml"
    error = unknown("study", name, [*names(), "a path to a .yaml file"])
    if not by_path and name not in names():
        raise error
    if not path.stem.isprintable():
        raise InputError(f"the name of a study is that of a folder: it must be printable, not {path.stem!r}")
    try:
        data = _read(path)
    except FileNotFoundError:
        raise error from None
    data = _extended(path, data, ())
    if not data.get("question"):
        raise InputError(f"{path}: a study needs a question")
    if bool(data.get("axes")) == bool(data.get("variants")):
        raise InputError(f"{path}: a study needs either axes or variants, not both")
    builtin = path.resolve().parent == FOLDER.resolve()
    study = Study(name=path.stem, file=f"lamabench:{path.stem}" if builtin else str(path.resolve()), **data)
    study.pairs()
    _check_per(path, study)
    return study


_TYPES = {"question": str, "claim": str, "answer": str, "budget": str, "extends": str, "base": dict, "axes": dict}
_TYPES |= {"variants": dict, "seeds": list, "stages": list, "debug": dict, "plugins": list, "verdicts": dict}
_TYPES |= {"per": dict}
_MERGED = ("base", "debug")


def _read(path: Path) -> dict[str, Any]:
    """The checked contents of a file, with absolute paths of its plug-ins. Raises FileNotFoundError without a file."""
    data = read_yaml(path)
    _check(path, data)
    if "plugins" in data:
        folder = path.resolve().parent
        data["plugins"] = [
            str(folder / os.path.expanduser(name)) if name.endswith(".py") else name for name in data["plugins"]
        ]
    return data


def _extended(path: Path, data: dict[str, Any], extending: tuple[Path, ...]) -> dict[str, Any]:
    """`data` merged over the contents of the file that it extends; `extending` are the files that led to this one."""
    if (name := data.pop("extends", None)) is None:
        return data
    plain, name = not name.endswith((".yaml", ".yml")), os.path.expanduser(name)
    places = [folder / (f"{name}.yaml" if plain else name) for folder in (path.parent, *([FOLDER] if plain else []))]
    other = next((place for place in places if os.path.isfile(place)), None)
    if other is None:
        raise InputError(f"{path}: extends {name!r}, but there is no file {places[0]}")
    extending = (*extending, path.resolve())
    if other.resolve() in extending:
        raise InputError(f"{path}: extends {name!r}, which extends it in turn")
    below = _extended(other, _read(other), extending)
    merged = {key: {**below.get(key, {}), **data.get(key, {})} for key in _MERGED}
    if "axes" in data or "variants" in data:  # they replace those of the other file, with what is about them
        below = {key: value for key, value in below.items() if key not in ("axes", "per", "variants", "verdicts")}
    return {**below, **data, **merged}


def _check(path: Path, data: Any) -> None:
    if not isinstance(data, dict):
        raise InputError(f"{path}: a study is a mapping with the keys {', '.join(_TYPES)}")
    for key, value in data.items():
        if key not in _TYPES:
            raise unknown(f"key in {path}", key, _TYPES)
        if not isinstance(value, _TYPES[key]):
            raise InputError(f"{path}: {key} must be a {_TYPES[key].__name__}, not {value!r:.200}")
    for key, values in data.get("axes", {}).items():
        for listing in (values, data.get("debug", {}).get(key, values)):
            if not isinstance(listing, list) or not listing:
                raise InputError(f"{path}: axis {key} must be a list of values, not {listing!r:.200}")
    for key, values in data.get("variants", {}).items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: variant {key} must map keys to values, not {values!r:.200}")
        _check_name(str(path), key)
    for claim, pairs in data.get("verdicts", {}).items():
        if not claim.strip() or not claim.isprintable():
            raise InputError(f"{path}: a key of verdicts must be a claim in a line, not {claim!r:.200}")
        for pair in pairs if isinstance(pairs, list) and pairs else [None]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise InputError(f"{path}: {claim!r} must be a list of pairs [better, worse], not {pairs!r:.200}")
    for axis, more in data.get("per", {}).items():
        if not isinstance(more, dict) or not all(isinstance(settings, dict) for settings in more.values()):
            raise InputError(f"{path}: {axis} in per must map values to settings, not {more!r:.200}")
    settings = [data.get(key, {}) for key in ("base", "axes", "debug")]
    settings += [place for more in data.get("per", {}).values() for place in more.values()]
    for place in (*settings, *data.get("variants", {}).values()):
        if "seed" in place:
            raise InputError(f"{path}: seed is not a setting of runs; list the seeds, such as seeds: [0, 1]")
    for seed in data.get("seeds", []):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise InputError(f"{path}: seeds must be whole numbers, not {seed!r:.200}")
    if not data.get("seeds", [0]):
        raise InputError(f"{path}: seeds must list at least one seed")
    if len({*data.get("seeds", [])}) < len(data.get("seeds", [])):
        raise InputError(f"{path}: seeds lists a seed twice: {data['seeds']!r:.200}")
    for stage in data.get("stages", []):
        if stage not in STAGES:
            raise unknown(f"stage in {path}", stage, STAGES)
    for name in data.get("plugins", []):
        if not isinstance(name, str):
            raise InputError(f"{path}: plugins must be Python files or modules, not {name!r:.200}")


def _check_per(path: Path | str, study: Study) -> None:
    """Raise InputError for an axis or a value that the study lacks, and for the setting of an axis."""
    for axis, more in study.per.items():
        if axis not in study.axes:
            raise unknown(f"axis in per in {path}", axis, study.axes)
        for value, settings in more.items():
            if value not in map(word, study.axes[axis]):
                raise unknown(f"value of {axis} in per in {path}", value, map(word, study.axes[axis]))
            for key in settings.keys() & study.axes.keys():
                raise InputError(f"{path}: per gives {key}, which is an axis")


def _check_name(where: str, name: str) -> None:
    """Raise InputError for a name of a variant that cannot be the name of a link."""
    if not name or "/" in name or name.startswith("."):
        raise InputError(
            f"{where}: the name of a variant becomes a link: it must be a text without / that does not begin with "
            f"a dot, not {name!r}"
        )
    if not name.isprintable():  # a line break, NUL, or half a character
        raise InputError(f"{where}: the name of a variant stands in tables: it must be printable, not {name!r}")
    if len(name.encode()) > 200:
        raise InputError(f"{where}: the name of a variant becomes a link: at most 200 bytes, not {name[:40]!r}…")
