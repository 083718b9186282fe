"""From overrides to a typed configuration, through Hydra. A mistake becomes one line that lists the choices.

An override is a `Setting`, whose value is data (those of studies), or a word `key=value` of a command line. Where the
key takes a text, all that follows the first `=` is that text, unless it is `null` or in quotes. The value of any other
key is read as Hydra reads it. `${key}` in a word stands for the value of another key.
"""

import os
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as Parsed
from hydra.errors import HydraException
from omegaconf import DictConfig, IntegerNode, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from ..ablations.study import Setting
from ..ablations.yaml_file import is_text
from ..harness.config import Config
from ..harness.data.latents import Index, check_declared, check_encoder, read_index
from ..harness.diffusion.objective import READERS
from ..harness.sections import DataConfig, EncoderConfig
from ..kernels.errors import InputError, unknown
from ..models import plugins
from ..models.registry import Preset, presets, revision
from .named import named, with_head

GROUPS = ("model", "data", "recipe")
Groups = tuple[str | None, ...]  # the choice of each, None for the default
# Settings in which `~` is the home folder.
PATHS = ("run.root", "data.path", "encoder.path", "encoder.decoder", "evaluate.features_path", "evaluate.reference")
Override = str | Setting
Word = TypeVar("Word", bound=Override)
_stored: dict[str, Preset] = {}  # in Hydra's store, where a preset takes milliseconds


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="_schema", node=Config)
    store.store(group="data", name="_schema", node=DataConfig)
    for name, entry in presets().items():
        if _stored.get(name) is not entry:
            store.store(group="model", name=name, node=entry.config)
            _stored[name] = entry


def choices(group: str) -> list[str]:
    """The choices of `model=`, `data=` or `recipe=`."""
    return list(presets()) if group == "model" else list(_options(group))


@cache
def _options(group: str) -> tuple[str, ...]:
    with _hydra():
        options = GlobalHydra.instance().config_loader().get_group_options(group)
    return tuple(name for name in options if not name.startswith("_"))


def plugin_names(overrides: Sequence[Override]) -> list[str]:
    """The plug-ins that overrides name with `plugins=[FILE.py, MODULE]`, files with absolute paths."""
    values: list[Any] = [_plugins(word) for word in overrides if _key(word) == "plugins"]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    files = [isinstance(name, str) and plugins.is_file(name) for name in names]
    return [
        os.path.abspath(os.path.expanduser(name)) if file else name for name, file in zip(names, files, strict=True)
    ]


def _plugins(word: Override) -> Any:
    """The value of an override `plugins=…`: one name, or a list of names. A name with a comma needs quotes."""
    if isinstance(word, Setting):
        return word.value
    text = word.removeprefix("plugins=")
    if not text.startswith("[") or not text.endswith("]"):
        return text_of(word)
    if "'" in text or '"' in text:
        return _parse(word).value()
    return [name.strip() for name in text[1:-1].split(",") if name.strip()]


def load_plugins(overrides: Sequence[Word]) -> list[Word]:
    """Import the plug-ins of installed packages, and those that `plugins=[FILE.py, MODULE]` names.

    Returns the other overrides. Raises InputError as `plugins.load` does.
    """
    plugins.entry_points()
    plugins.load(plugin_names(overrides))
    if _revision != [revision()]:  # a preset may have been replaced since its configuration was composed
        for cached in (_base, _section, _base_setting):
            cached.cache_clear()
        _revision[:] = [revision()]
    return [word for word in overrides if _key(word) != "plugins"]


_revision: list[int] = []


def _hydra() -> Any:
    _register()
    return initialize_config_module("lamabench.launch.conf", version_base="1.3")


def compose(overrides: Sequence[Override]) -> tuple[Config, dict[str, str]]:
    """The configuration after overrides such as `model=dit_s_2 train.steps=200`, and the choice of `model` and `data`.

    Hydra composes each combination of a model, a data set and a recipe only once. Overrides are then merged into its
    result section by section, and sections are cached, so that a study of a thousand runs is planned in seconds.
    Plug-ins are imported first. Raises InputError, one line, for an unknown key or choice and for a value of the wrong
    type or out of range.
    """
    overrides, cache = encoded(load_plugins(overrides))
    choice_of = {_key(word): str(_choice(word)) for word in overrides if _key(word) in GROUPS}
    for group, choice in choice_of.items():
        if choice not in choices(group):
            raise unknown(group, choice, choices(group))
    groups = tuple(choice_of.get(group) for group in GROUPS)
    by_section: dict[str, list[Setting]] = {}
    for word in overrides:
        if _key(word) not in GROUPS:
            setting = _base_setting(groups, word)
            by_section.setdefault(setting.key.split(".")[0], []).append(setting)
    sections = {}
    tied = any("${" in str(word) for word in overrides)
    for field in fields(Config):
        # The shape of the model follows from the data. An interpolation that a person writes may refer to any section.
        sources = ("data", "model") if field.name == "model" else (field.name,)
        settings = [one for name in (by_section if tied else sources) for one in by_section.get(name, ())]
        with _one_line():
            sections[field.name] = pickle.loads(_section(field.name, groups, tuple(settings)))
    if any(vars(sections["released"]).values()):
        raise InputError("released.name and released.tensors are no settings: lamabench convert writes them")
    sections["model"] = with_head(sections["model"], sections["objective"])
    chosen = dict(_base(groups).choices)
    needed, schedule = presets()[chosen["model"]].schedule, sections["objective"].schedule
    if needed not in (None, schedule) and sections["objective"].kind in READERS["schedule"]:
        raise InputError(
            f"model {chosen['model']} is trained with the {needed} noise schedule, not {schedule}: "
            f"set objective.schedule={needed}"
        )
    if cache is not None:
        check_encoder(*cache, sections["encoder"])
        check_declared(*cache, sections["data"])
    return Config(**sections), chosen


def encoded(overrides: Sequence[Override]) -> tuple[list[Override], tuple[Path, Index] | None]:
    """Overrides in which the last `encoder=FOLDER` (or `encoder.path=FOLDER`) became settings from the index of that
    cache of latents, before all others: those of the encoder, of the data, and the shape of the model. Returns also the
    folder and its index; None for `encoder=pixels` and without an encoder.

    Raises InputError for a folder that is no cache, and if `data=` names another kind of data.
    """
    words = [word for word in overrides if _key(word) in ("encoder", "encoder.path")]
    others = [word for word in overrides if word not in words]
    value = _choice(words[-1]) if words else None
    if not words or value in ("pixels", None):
        return others, None
    folder = Path(os.path.abspath(os.path.expanduser(str(value))))
    if not folder.is_dir():
        raise unknown("encoder", value, ("pixels", "the folder of a cache, which lamabench encode writes"))
    index = read_index(folder)
    facts = {**asdict(index.encoder), "kind": "latents", "path": str(folder)}
    of_data = {one.name: one.metadata["since"] for one in fields(DataConfig) if "since" in one.metadata} | index.data
    of_data |= {"path": index.path}
    kind = of_data.pop("kind")
    kinds = [str(_choice(word)) for word in others if _key(word) == "data"]
    if kinds and kinds[-1] in choices("data") and (other := _base((None, kinds[-1], None)).node.data.kind) != kind:
        raise InputError(
            f"data={kinds[-1]} is of kind {other!r}, but the latents in {folder} are of {kind!r}: data={kind}, or "
            "leave it out"
        )
    settings = [Setting(f"data.{name}", value) for name, value in of_data.items()]
    settings += [Setting(f"encoder.{one.name}", facts[one.name]) for one in fields(EncoderConfig) if one.name in facts]
    settings += [Setting("model.input_size", facts["side"]), Setting("model.in_channels", facts["channels"])]
    return [*([] if kinds else [Setting("data", kind)]), *settings, *others], (folder, index)


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn the errors of Hydra and OmegaConf into an InputError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(plain_error(error)) from None
    except RecursionError:
        raise InputError("a value has too many lists in lists, or `${…}` that refer to each other") from None


class Base(NamedTuple):
    """Hydra's composition of a model, a data set and a recipe: a node to read, the same node pickled, and the choices
    of model and data."""

    node: DictConfig
    pickled: bytes
    choices: dict[str, str]


@cache
def _base(groups: Groups) -> Base:
    with _hydra(), _one_line():
        words = [f"{group}={choice}" for group, choice in zip(GROUPS, groups, strict=True) if choice is not None]
        node = hydra_compose("config", words, return_hydra_config=True)
    choice_of = {group: node.hydra.runtime.choices[group] for group in ("model", "data")}
    OmegaConf.set_struct(node, False)
    del node["hydra"]  # only the configuration of the run stays
    return Base(node, pickle.dumps(node), choice_of)  # unpickling is ten times faster than OmegaConf's own copies


@lru_cache(maxsize=4096)
def _section(name: str, groups: Groups, settings: tuple[Setting, ...]) -> bytes:
    """A section of the configuration, or `seed`, after settings. It is pickled, so that every run gets a copy."""
    node = pickle.loads(_base(groups).pickled)
    for setting in settings:
        OmegaConf.update(node, setting.key, setting.value, merge=True)
    value = node[name]
    return pickle.dumps(OmegaConf.to_object(value) if isinstance(value, DictConfig) else value)


@lru_cache(maxsize=4096)
def _base_setting(groups: Groups, word: Override) -> Setting:
    return setting_of(_base(groups).node, word)


def setting_of(base: DictConfig, word: Override, section: str = "", data: bool = False) -> Setting:
    """The key of an override, which exists in `base`, and its value in a form that the key takes.

    If the key takes only lists, a single value becomes a list of one. Where it takes whole numbers, 2.0 becomes 2. In
    paths `~` becomes the home folder. Messages call `base` the section `section`. Raises InputError as `compose` does.
    """
    node = _node(base, _key(word))
    if isinstance(word, Setting):
        key, value = word.key, word.value
        if isinstance(node, StringNode) and "${" in str(value) and not data:
            raise InputError(f"{word} has a ${{…}}, which would not stay a text: write out what it stands for")
    elif isinstance(node, StringNode):
        key, value = _key(word), text_of(word)
    else:
        parsed = _parse(word)
        key, value = parsed.key_or_group, parsed.value()
    _check_key(base, key, section)
    node = _node(base, key)
    if (name := f"{section}.{key}".removeprefix(".")) in PATHS and isinstance(value, str):
        if not value:  # as of a shell's variable that is not set
            raise InputError(f"{name} is empty; write . for the folder where the command runs")
        value = os.path.expanduser(value)
    if isinstance(node, IntegerNode) and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(node, ListConfig) and node._metadata.ref_type is not Any:
        single = isinstance(value, int | float | dict) or (isinstance(value, str) and (data or "${" not in value))
        value = [value] if single else value
        if isinstance(value, list) and node._metadata.element_type is int:
            value = [int(item) if isinstance(item, float) and item.is_integer() else item for item in value]
    return Setting(key, value)


def _key(word: Override) -> str:
    return word.key if isinstance(word, Setting) else word.partition("=")[0]


def _node(base: DictConfig, key: str) -> Any:
    """The node of a key, or None if there is none."""
    node: Any = base
    for word in key.split("."):
        node = node._get_node(word) if isinstance(node, DictConfig) and word in [str(key) for key in node] else None
    return node


def _choice(word: Override) -> Any:
    return word.value if isinstance(word, Setting) else text_of(word)


def text_of(word: str) -> str | None:
    """The text after the first `=` of a word, without quotes around it; None for `null`. Raises InputError if the word
    is not `key=value`, or is not UTF-8."""
    _check_word(word)
    text = word.partition("=")[2]
    if text.lower() == "null":
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            return str(_parse(f"text={text}").value())
        except InputError:  # not one quoted text, such as 'a' and 'b'
            return text
    return text


def _check_word(word: str) -> None:
    if "=" not in word:
        raise InputError(f"{word!r} is not an override; write key=value, such as train.steps=200")
    if not is_text(word):
        raise InputError(f"{word!r} is not text in UTF-8")


@lru_cache(maxsize=4096)
def _parse(word: str) -> Parsed:
    """A word as Hydra reads it. Raises InputError if it is no override of one value."""
    _check_word(word)
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except HydraException as error:
        raise InputError(
            f"cannot read the override {word!r}: {plain_error(error)} (a text in a list may need quotes: ['a(b)'])"
        ) from None
    except RecursionError:
        raise InputError(f"cannot read the override {word[:40]!r}…: it has too many lists in lists") from None
    if override.is_sweep_override():
        raise InputError(f"{word!r} gives several values: write a list as [a,b], or several runs as axes of a study")
    if override.is_add() or override.is_delete() or override.package is not None:
        raise InputError(f"{word!r} is not an override; write key=value, such as train.steps=200")
    return override


def _check_key(base: DictConfig, key: str, section: str = "") -> None:
    """Raise InputError for the first word of `key` that does not exist, with the keys that exist in its place."""
    node: Any = base
    path: list[str] = []
    for word in key.split("."):
        keys = [str(k) for k in node] if isinstance(node, DictConfig) else []
        if word not in keys:
            inside = ".".join([section, *path] if section else path)
            where = f"key in {inside}" if inside else "key"
            raise unknown(where, word, keys)
        path.append(word)
        node = node._get_node(word)
    if isinstance(node, DictConfig):
        raise InputError(f"{key} is a section; set one of its keys: {', '.join(str(k) for k in node)}")


def plain_error(error: Exception) -> str:
    """The first line of the cause of a Hydra or OmegaConf error, with the key if the error names one."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    key = re.search(r"full_key: (\S+)", text)
    first = text.strip().splitlines()[0]
    return f"{key[1]}: {first}" if key else first


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration after overrides such as `sample.steps=25` of its sections, other than the model.

    Raises InputError as `compose` does.
    """
    words: dict[str, list[str]] = {}
    for word in overrides:
        section, _, rest = word.partition(".")
        words.setdefault(section, []).append(rest)
    sections = {}
    for section, rest in words.items():
        now = getattr(config, section)
        node = OmegaConf.structured(replace(now, **{one.name: as_data(getattr(now, one.name)) for one in fields(now)}))
        apply(node, rest, section)
        with _one_line():
            sections[section] = OmegaConf.to_object(node)
    return replace(config, **sections)


def model_config(name: str, overrides: Sequence[str]) -> Any:
    """The configuration of a preset, or of a run's model, after overrides of its fields (`input_size=64` or
    `model.input_size=64`).

    Raises InputError as `compose` does.
    """
    words = [word.removeprefix("model.") for word in load_plugins(overrides)]
    node = OmegaConf.structured(named(name).config)
    apply(node, words)
    with _one_line():
        return OmegaConf.to_object(node)


def apply(node: DictConfig, overrides: Sequence[Override], section: str = "", data: bool = False) -> None:
    """Set keys of a typed node, which messages call `section`. With `data`, `${…}` is a text as any other. Raises
    InputError as `compose` does."""
    for word in overrides:
        setting = setting_of(node, word, section, data)
        with _one_line():
            OmegaConf.update(node, setting.key, as_data(setting.value) if data else setting.value)


def as_data(value: Any) -> Any:
    """A value that OmegaConf reads as `value`, because every `${` in it is escaped."""
    if isinstance(value, list):
        return [as_data(item) for item in value]
    if isinstance(value, dict):
        return {key: as_data(item) for key, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value)
    return value
