"""Names of groups of runs as people write them: "LaMamba-Diff-S, window 8", or "window 8" where all are one model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import yaml

from .runs import SEEDS, Run

MOST = 5  # names in a list

# Settings in words; {} is the value. Without a value (no, none, an empty list) the rest of the words stands after "no".
# A setting that is not listed is called by its last word: `model.my_setting` 3 is "my setting 3".
WORDS = {
    "data": "{}", "data.kind": "{}", "data.name": "{}", "data.size": "{} px", "data.channels": "{} channels",
    "data.num_classes": "{} classes", "data.flip": "flips {}", "data.split": "{} split",
    "encoder": "{}", "encoder.kind": "{}", "objective": "{}", "objective.kind": "{}",
    "objective.schedule": "{} schedule", "objective.times": "{} t", "variant": "{}", "recipe": "{} recipe",
    "model.window_size": "window {}", "model.mixers": "{}", "model.scan": "{} scan", "model.layout": "{}",
    "model.bottleneck_depth": "bottleneck {}", "model.num_heads": "{} heads", "model.d_state": "d_state {}",
    "model.mlp_ratio": "MLP ratio {}", "model.patch_size": "patch {}", "model.hidden_size": "width {}",
    "model.model_channels": "width {}", "model.num_res_blocks": "{} blocks a level",
    "train.steps": "{} steps", "train.batch_size": "batch {}", "train.ema_decay": "EMA {}",
    "train.ema_rampup": "EMA ramp-up {}", "train.clip": "gradient clip {}", "train.class_dropout": "label dropout {}",
    "train.precision": "{}", "train.compile": "{} training", "train.noise": "{} noise",
    "sample.count": "{} samples", "sample.curve_count": "{} samples at each moment",
    "sample.steps": "{} sampling steps", "sample.method": "{}",
    "sample.guidance_channels": "{} guided channels", "sample.guidance_interval": "guidance at sigma {}",
    "sample.guide": "guide {}", "sample.guide_at": "guide at step {}",
    "sample.weights": "{} weights", "sample.labels": "{} labels",
    "sample.timesteps": "{} timesteps", "sample.precision": "{} sampling", "sample.compile": "{} sampling",
    "evaluate.features": "{}",
}  # fmt: skip
MODERN = ("Modern DiT", "LightningDiT")
NOUNS = {"model.mixers": "mixers", "sample.clip": "clipping"}
SPECIAL = {
    ("objective.kind", "v"): "v-prediction", ("objective.kind", "flow"): "flow matching",
    ("model.parallel", "True"): "parallel", ("model.parallel", "False"): "in series",
    ("sample.guidance", "1"): "no guidance", ("sample.guidance_channels", "None"): "all channels guided",
    ("sample.guidance_interval", "None"): "guidance at every sigma", ("sample.guide", "None"): "no guide",
    ("train.warmup", "0"): "no warmup", ("model.dropout", "0"): "no dropout",
    ("train.weight_decay", "0"): "no weight decay", ("train.class_dropout", "0"): "no label dropout",
    ("model.bottleneck_depth", "0"): "no bottleneck",
}  # fmt: skip
PATHS = ("encoder", "encoder.path", "encoder.decoder", "sample.guide")  # their values may be folders


def labels(runs: list[Run]) -> dict[str, str]:
    """A label for each group, as `distinct` makes them. Labels that would be equal get the study, the name or the id in
    brackets. Released weights, which have the settings of no training, have their title."""
    first = _first(runs)
    trained = {group: run for group, run in first.items() if _is_known(run) and not is_released(run)}
    names = distinct({group: (run.info["title"], axis_values(run)) for group, run in trained.items()})
    result: dict[str, str] = {group: names.get(group) or run.info["title"] for group, run in first.items()}
    for key in ("study", "name", "id"):
        pairs = {(label, first[group].info[key]) for group, label in result.items()}
        apart = Counter(label for label, _ in pairs)
        for group, label in result.items():
            result[group] = f"{label} [{first[group].info[key]}]" if apart[label] > 1 else label
    return result


def distinct(entries: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """A label for each entry, which is the title of a model and its axis values: the title and the axes in which the
    entries differ, in words; those axes alone if all are one model and none would be without a word."""
    differ = _axes([values for _, values in entries.values()], alike=False)
    more = {key: words(values, differ) for key, (_, values) in entries.items()}
    short = len({title for title, _ in entries.values()}) == 1 and all(more.values())
    return {key: more[key] if short else ", ".join(filter(None, (entries[key][0], more[key]))) for key in entries}


def shared(runs: list[Run]) -> str:
    """What all groups share and `labels` leaves out, as the title of a figure or table: "LaMamba-Diff-S, lr 1e-4".
    Empty if the models differ and no axis has one value."""
    readable = [run for run in _first(runs).values() if _is_known(run)]
    if not readable:
        return ""
    titles, values = {run.info["title"] for run in readable}, [axis_values(run) for run in readable]
    same = words(values[0], _axes(values, alike=True))
    return ", ".join(filter(None, (titles.pop() if len(titles) == 1 else "", same)))


def words(values: Mapping[str, Any], axes: Iterable[str] | None = None) -> str:
    """Axis values in words, "window 8, conv + window": those of `axes`, or all. Seeds and models are left out."""
    return ", ".join(
        word for axis, value in values.items() if (axes is None or axis in axes) and (word := axis_word(axis, value))
    )


def axis_word(axis: str, value: Any) -> str:
    """The value of one axis in words: "window 8", "no shift", "lr 4e-3"; "" for a seed or a model."""
    if axis in (*SEEDS, "model"):
        return ""
    value = _plain(value)
    text = value_word(value)
    text = text.rstrip("/").rsplit("/", 1)[-1] if axis in PATHS else text
    if (special := SPECIAL.get((axis, str(value) if value is None or isinstance(value, bool) else text))) is not None:
        return special
    template = WORDS.get(axis, axis.rsplit(".", 1)[-1].replace("_", " ") + " {}")
    noun = NOUNS.get(axis) or template.replace("{}", "").strip() or axis.rsplit(".", 1)[-1].replace("_", " ")
    if value is True:
        return noun
    if value is None or value is False or value == [] or value == "none":
        return f"no {noun}"
    return template.format(text)


def axis_noun(axis: str) -> str:
    """An axis without its value, as the title of a scale: "window", "mixers", "lr"."""
    last = axis.rsplit(".", 1)[-1].replace("_", " ")
    return NOUNS.get(axis) or WORDS.get(axis, last).replace("{}", "").strip() or last


def value_word(value: Any) -> str:
    """A value alone, in words: 5e-05 is "5e-5", 400_000 "400K", ["conv", "window"] "conv + window"."""
    value = _plain(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, dict):
        own = [f"{key.replace('_', ' ')} {value_word(one)}" for key, one in value.items() if key != "kind"]
        return str(value.get("kind", "")) + (f" ({', '.join(own)})" if own else "")
    if isinstance(value, list | tuple):
        numbers = all(isinstance(one, int | float) for one in value)
        joint = "-" if numbers else " | " if any(isinstance(one, list | tuple) for one in value) else " + "
        return joint.join(map(value_word, value)) or "none"
    return "none" if value is None else str(value)


def _number(value: float) -> str:
    if abs(value) < 1e15 and value == int(value):
        whole = int(value)
        for size, letter in ((1_000_000, "M"), (1000, "K")):
            if abs(whole) >= max(size, 10_000) and whole % (size // 10) == 0:
                return f"{whole / size:,g}{letter}"
        return str(whole) if abs(whole) < 10_000 else f"{whole:,}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def axis_values(run: Run) -> Mapping[str, Any]:
    """The axis values of a run, less seeds, the model, and a name of a variant that is that of its model."""
    values = run.info.get("variant") or {}
    hidden = ("model", *SEEDS)
    return {axis: value for axis, value in values.items() if axis not in hidden and value != run.info["model"]}


def line_of(title: str, family: str) -> str:
    """What the sizes of one architecture have in common: "Modern DiT" of "Modern DiT-S/2"."""
    return title.rpartition("-")[0] or family


def kind_of(title: str, family: str) -> str:
    """What has a colour and a marker of its own: the family or, of a DiT with today's block, `dit_modern`."""
    return "dit_modern" if family == "dit" and line_of(title, family) in MODERN else family


def is_released(run: Run) -> bool:
    """Whether a run has released weights in place of a training."""
    return bool((run.info["config"].get("released") or {}).get("tensors"))


def _plain(value: Any) -> Any:
    """An axis value as data: an earlier version recorded lists and truths as the text of an override, such as
    "[ssm,window]"."""
    if isinstance(value, str) and (value.startswith("[") or value in ("true", "false")):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(value)
    return value


def _first(runs: list[Run]) -> dict[str, Run]:
    """The first run of each group, groups in the order of their last runs."""
    return {run.group: run for run in reversed(runs)}


def _is_known(run: Run) -> bool:
    """Whether it is known what a run is: of a damaged folder, only the listing of its study may say that."""
    return not run.damage or bool(run.info["variant"])


def _axes(entries: list[Mapping[str, Any]], alike: bool) -> set[str]:
    """The axes in which entries differ, or those in which they are alike. An entry that lacks an axis differs in it."""
    values = [{axis: str(value) for axis, value in one.items()} for one in entries]
    return {axis for one in values for axis in one if (len({other.get(axis) for other in values}) == 1) == alike}


def few(words: Sequence[str]) -> list[str]:
    """The words, or of many the first ones and "4 more"."""
    return [*words] if len(words) <= MOST else [*words[: MOST - 1], f"{len(words) - MOST + 1} more"]


def joined(words: Sequence[str]) -> str:
    """Such as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def listed(words: Sequence[str]) -> str:
    """Such as "a, b and c", or "a, b, c, d and 4 more"."""
    return joined(few(words))
