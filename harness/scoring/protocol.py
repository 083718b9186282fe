"""How samples were drawn, as plain data: the generation protocol of a score. Reports read it, so it needs no torch.

`generation` has these fields, of which null does not count:

    objective, schedule   what the network learned (ddpm, v or flow), and the noise schedule; null: flow has none
    sampler, steps, timesteps   the method, its number of steps, and which timesteps they are
    guidance, guidance_channels   the scale (1: none), and how many of the first channels it guides; null: all
    guidance_interval     the noise-to-signal ratios at which it applies, "0.28 to 2.9" or "0.28 to inf"; null: all
    guide                 the training that it guides away from (autoguidance); null: the null class
    clip                  whether predicted images were clamped to [-1, 1]
    labels                balanced (over all classes), random, cyclic (fewer images than classes, so that the last
                          classes have none), or none (no classes)
    weights, precision, encoder   which weights, the arithmetic, and what turned the network's output into images

Neither the number of images nor the seed is among them, so that sets that differ in these alone have one protocol.
Other people's samples have what their user states: these fields, or `words`. Else `source` is unknown.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...kernels.errors import InputError, unknown
from ..record import read_records
from ..run import read_info

Generation = dict[str, Any]
EVERYWHERE = "0 to inf"
UNKNOWN: Generation = {"source": "unknown"}
FIELDS: dict[str, type] = {
    "objective": str, "schedule": str, "sampler": str, "steps": int, "timesteps": str, "guidance": float,
    "guidance_channels": int, "guidance_interval": str, "guide": str, "clip": bool, "labels": str, "weights": str,
    "precision": str, "encoder": str,
}  # fmt: skip

OBJECTIVES = {"ddpm": None, "v": "v-prediction", "flow": "flow matching"}  # in words


def generation(config: Mapping[str, Any], row: Mapping[str, Any]) -> Generation:
    """How a set of samples was drawn: from its record `row` (of kind `sample`), and from the configuration in its
    config.json what a record does not have. Settings without an effect are left out, so that sets that were drawn alike
    have equal protocols."""
    model, goal, interval = config["model"], config.get("objective", {}), row.get("guidance_interval")
    guidance = 1.0 if interval and is_empty(interval) else float(row["guidance"])
    classes, channels = model.get("num_classes") or 0, row.get("guidance_channels")
    all_guided = guidance == 1 or channels is None or channels >= model.get("in_channels", math.inf)
    labels = row.get("labels") or "cyclic"  # the only rule of earlier versions
    if labels == "spread" or (labels == "cyclic" and row["count"] >= classes):
        labels = "balanced"
    further = {"guidance_interval": None if interval == EVERYWHERE else interval, "guide": row.get("guide")}
    further = {name: value for name, value in further.items() if value is not None and guidance != 1}
    return {
        **further,
        "objective": goal.get("kind", "ddpm"),
        "schedule": None if goal.get("kind") == "flow" else goal.get("schedule", "linear"),
        "sampler": row["method"],
        "steps": row["steps"],
        "timesteps": row.get("timesteps") or "even",
        "guidance": guidance,
        "guidance_channels": None if all_guided else channels,
        "clip": bool(row.get("clip")),
        "labels": labels if classes > 1 else "none",
        "weights": row.get("weights"),
        "precision": row.get("precision"),
        "encoder": encoder_name(config.get("encoder", {})),
    }


def interval_words(interval: Sequence[float | None] | None) -> str | None:
    """An interval of noise-to-signal ratios as records have it: "0.28 to 2.9"."""
    if interval is None:
        return None
    return " to ".join("inf" if end is None else str(float(end)).removesuffix(".0") for end in interval)


def is_empty(interval: str) -> bool:
    """Whether `interval_words` names an interval (low, high] that contains nothing."""
    low, _, high = interval.partition(" to ")
    return low == high


def encoder_name(section: Mapping[str, Any]) -> str:
    """The name of an encoder, given its section of a configuration: `pixels`, or `latents IDENTITY`."""
    return " ".join(str(section[name]) for name in ("kind", "identity") if section.get(name)) or "pixels"


def target_of(config: Mapping[str, Any]) -> str:
    """What a network learns to predict and of what, in words, given its configuration: "ddpm, cosine schedule" or "flow
    matching, latents IDENTITY". Losses of different targets do not compare."""
    goal, encoder = config.get("objective") or {}, encoder_name(config.get("encoder") or {})
    kind, schedule = goal.get("kind", "ddpm"), goal.get("schedule", "linear")
    words = [OBJECTIVES.get(kind) or kind]
    words += [f"{schedule} schedule"] if kind != "flow" and schedule != "linear" else []
    return ", ".join(words + ([] if encoder == "pixels" else [encoder]))


def generation_of(folder: Path) -> Generation | None:
    """How the samples in a folder were drawn; None if no samples are on record there."""
    rows = [one for one in read_records(folder / "record.jsonl") if one.kind == "sample" and one.state == "done"]
    return generation(read_info(folder)["config"], rows[-1].flat()) if rows else None


def fields_of(drawn: Generation | None) -> dict[str, Any]:
    """The fields of a score that say how its samples were drawn; none if that is not on record. What is unknown has no
    hash, because two unknown ways are not equal."""
    known = {} if drawn is None else {"generation": drawn}
    return known if drawn in (None, UNKNOWN) else known | {"generation_protocol": protocol_hash(drawn)}


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """8 hex digits, equal if and only if two protocols are. A field that is null does not count."""
    plain = {name: value for name, value in protocol.items() if value is not None}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:8]


def words(drawn: Mapping[str, Any] | None) -> str:
    """A generation protocol in one phrase: "250 ancestral steps, guidance 1.5 on 3 channels, clipped, balanced labels,
    EMA, bfloat16". What is usual (ddpm, its linear schedule, even timesteps, pixels) is left out; two protocols that
    `generation` yields have the same words only if they are equal."""
    if not drawn or "source" in drawn:
        return "unknown"
    if "words" in drawn:
        return str(drawn["words"])
    given = {name: drawn.get(name) for name in FIELDS}
    sampler, steps = given["sampler"], given["steps"]
    scale = None if given["guidance"] is None else guidance_words(given)
    texts = [
        OBJECTIVES.get(str(given["objective"]), given["objective"]),
        None if given["schedule"] in (None, "linear") else f"{given['schedule']} schedule",
        " ".join(str(one) for one in (steps, sampler, steps and ("step" if steps == 1 else "steps")) if one),
        None if given["timesteps"] in (None, "even") else f"timesteps as {given['timesteps']}",
        "no guidance" if given["guidance"] == 1 else scale,
        "clipped" if given["clip"] else None,
        given["labels"] and f"{'no' if given['labels'] == 'none' else given['labels']} labels",
        "EMA" if given["weights"] == "ema" else given["weights"] and f"{given['weights']} weights",
        given["precision"],
        None if given["encoder"] == "pixels" else given["encoder"],
    ]
    return ", ".join(text for text in texts if text) or "unknown"


def guidance_words(given: Mapping[str, Any]) -> str:
    """The guidance of a protocol in words: "guidance 1.5 on 3 channels at sigma 0.28 to 2.9", or "autoguidance 2 by
    dit_nano 0123abcd at step 400". Sigma is noise over signal."""
    scale, guide, interval = (
        str(given["guidance"]).removesuffix(".0"),
        given.get("guide"),
        given.get("guidance_interval"),
    )
    text = f"autoguidance {scale} by {guide}" if guide else f"guidance {scale}"
    text += f" on {given['guidance_channels']} channels" if given.get("guidance_channels") else ""
    return text + (f" at sigma {interval}" if interval else "")


def stated(text: str) -> Generation:
    """A generation protocol from what a user states: fields `steps=25,sampler=ddim,…`, or else words.

    Raises InputError for an empty text, and for a field that `generation` does not have or a value of another type.
    """
    pieces = [piece.strip() for piece in text.split(",")]
    if not text.strip() or not text.isprintable():
        raise InputError("--generation is empty or no line of text: say in words how the samples were drawn")
    if not all("=" in piece for piece in pieces):
        return {"words": text.strip()}
    given: Generation = {}
    for piece in pieces:
        name, _, value = (part.strip() for part in piece.partition("="))
        if name not in FIELDS:
            raise unknown("field of --generation", name, FIELDS)
        given[name] = _value(name, value)
    return given


def _value(name: str, text: str) -> Any:
    kind = FIELDS[name]
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if not text or (kind is float and not math.isfinite(value)) or (kind is int and value < 1):
            raise ValueError
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "a whole number above 0", float: "a number", str: "a word"}[kind]
        raise InputError(f"--generation: {name} must be {wanted}, not {text!r}") from None
    return value
