"""Records of what was done in a folder. They are JSON lines and need only plain Python, so that reports need no torch.

A line of `record.jsonl` is one of the rows below, whose fields RECORDS.md lists. The newest of a key (keys.py) counts.
"""

import types
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from ..kernels.errors import InputError
from .disk import read_lines
from .lines import check_entries

SCHEMA = 2
# The stage that writes each kind of line, in the order in which the stages run.
STAGE_OF = {"convert": "convert", "cost": "cost", "train": "train", "sample": "sample", "score": "evaluate"}
STAGE_OF |= {"speed": "bench", "operator_speed": "bench"}
STATES = ("done", "failed", "oom", "diverged", "wrong")


def about(text: str, default: Any = None, name: str = "") -> Any:
    """A field of a row with its meaning and unit. `name` is its name in the file if Python cannot have that name."""
    return field(default=default, metadata={"about": text, "name": name})


@dataclass(frozen=True, kw_only=True)
class Row:
    """The fields of every line. A field is null if it does not apply, or if a line that is not `done` has no value."""

    kind: ClassVar[str] = ""
    needed: ClassVar[tuple[str, ...]] = ()  # fields that a line with state `done` must have

    key: str = about("12 hex digits: the hash of the request", "")
    state: str = about("done, failed, oom (out of memory), diverged (loss not finite) or wrong (check failed)", "done")
    time: str = about("when the line was written, UTC, ISO 8601", "")
    error: str | None = about("the reason in one line, if the state is not done")
    provenance: dict[str, Any] | None = about("commit, dirty, host, device, driver, versions")

    def as_dict(self) -> dict[str, Any]:
        """The line as written to the file, without null fields."""
        return {"schema": SCHEMA} | {name: value for name, value in self.flat().items() if value is not None}

    def flat(self) -> dict[str, Any]:
        """Every field by its name in the file, including null ones, and `kind`."""
        return {"kind": self.kind} | {field_name(f): getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class ConvertRow(Row):
    """Released weights that were converted."""

    kind = "convert"
    needed = ("source", "file", "sha256", "tensors")
    source: str | None = about("whose weights: DiT, guided-diffusion, LaMamba-Diff or diffusers' DiT")
    file: str | None = about("name of the file or folder")
    sha256: str | None = about("SHA-256 of the file; of a folder, of the names and contents of its files")
    tensors: str | None = about("SHA-256 of the tensors as they are here: names, shapes, types, bytes")
    weights: str | None = about("ema (averaged, of a training file) or model (a bare state dict)")
    notes: list[str] | None = about("what must be known of them")


@dataclass(frozen=True, kw_only=True)
class CostRow(Row):
    """The cost of one forward pass of one image."""

    kind = "cost"
    needed = ("params", "macs", "flops", "parts")
    params: int | None = about("parameters, trained or fixed")
    macs: int | None = about("multiply-adds of matrix products and convolutions")
    flops: int | None = about("2 · macs plus the operations of norms and scans")
    paper_gflops: float | None = about("cost by the rule of the family's paper, in 1e9")
    parts: dict[str, Any] | None = about("params, macs and flops by part")
    fvcore: int | None = about("what fvcore counts; null: it was not asked (run.fvcore)")
    fvcore_skips: str | None = about("the operators with work that fvcore skips, and how often, or nothing")


@dataclass(frozen=True, kw_only=True)
class TrainRow(Row):
    """A training that reached the end of a request."""

    kind = "train"
    needed = ("steps", "images", "seconds", "final_loss", "batch_size")
    steps: int | None = about("steps since the start")
    images: int | None = about("images seen")
    seconds: float | None = about("seconds of training, over all stretches, with what the first steps compile")
    process_seconds: float | None = about("these seconds times the processes of each stretch: with GPUs, GPU-seconds")
    images_per_s: float | None = about("images over these seconds; metrics.jsonl has the rate without compilation")
    waiting_share: float | None = about("share of the seconds in which the device waited for data; null: unknown")
    final_loss: float | None = about("mean loss of the last logged window")
    training_flops: float | None = about("FLOPs of all steps: three forward passes for each image")
    backend: dict[str, Any] | None = about("implementation by operator")
    precision: str | None = about("float32 or bfloat16 (autocast)")
    compile: str | None = about("eager, a mode of torch.compile, or whole-step")
    checkpointing: bool | None = about("whether blocks were recomputed in the backward pass")
    batch_size: int | None = about("images per step")
    micro_batch: int | None = about("images in one pass of a step, of each process")
    processes: int | None = about("processes of the last stretch, each with a GPU or a share of the cores")
    data_fingerprint: str | None = about("SHA-256 of the data, 16 hex digits")
    moments: list[int] | None = about("steps whose weights are kept")
    stretches: list[dict[str, Any]] | None = about(
        "each stretch of steps: first step, backends, torch, commit, device, host; of several processes also "
        "processes (their number), parallel (ddp or fsdp), hosts, and from_seconds (of training before the stretch)"
    )


@dataclass(frozen=True, kw_only=True)
class _OfWeights(Row):
    checkpoint_step: int | None = about("the step of the weights")
    weights: str | None = about("ema, ema@DECAY, power@WIDTH or live")
    weights_error: float | None = about("of weights power@WIDTH from others: the relative error of their profile (L2)")
    images_seen: int | None = about("images that the weights saw")
    training_flops: float | None = about("FLOPs of the training up to this step")
    training_seconds: float | None = about("seconds of the training up to this step")


@dataclass(frozen=True, kw_only=True)
class SampleRow(_OfWeights):
    """Images drawn from one moment of a training."""

    kind = "sample"
    needed = ("count", "method", "steps", "guidance")
    count: int | None = about("images")
    method: str | None = about("ancestral, ddim, euler, heun or dpmpp_2m")
    steps: int | None = about("steps of the sampler")
    guidance: float | None = about("scale of guidance; 1: none")
    guidance_channels: int | None = about("number of first channels that are guided; null: all")
    guidance_interval: str | None = about("noise-to-signal ratios (low, high] at which guidance applies; null: all")
    guide: str | None = about("training that guides (autoguidance), but for its seed; null: the null class")
    guide_key: str | None = about("key of the training that guides")
    passes: int | None = about("forward passes of the network for one image")
    guide_passes: int | None = about("forward passes of the guide for one image")
    sampling_flops: float | None = about("FLOPs of all passes for one image, those of the guide too")
    clip: bool | None = about("whether predicted images were clamped to [-1, 1]")
    labels: str | None = about("classes of the images: cyclic (index modulo classes), spread (over all) or random")
    timesteps: str | None = about("even, or ddim: multiples of a whole stride")
    seed: int | None = about("seed of the noise")
    seconds: float | None = about("seconds in which at least one process drew, over all calls")
    images_per_s: float | None = about("images of the set over these seconds, by all its processes together")
    processes: int | None = about("processes that drew images of the set")
    process_seconds: float | None = about("seconds of drawing, added up over the processes")
    precision: str | None = about("float32 or bfloat16 (autocast)")
    compile: str | None = about("eager or a mode of torch.compile")
    batch_size: int | None = about("images per batch")
    backend: dict[str, Any] | None = about("implementation by operator")
    shards: str | None = about("folder of the images in shards/; null: they are in samples.npz")
    features: str | None = about("the network whose features are kept in place of the images; null: images are kept")


@dataclass(frozen=True, kw_only=True)
class ScoreRow(_OfWeights):
    """One score of one set of samples."""

    kind = "score"
    needed = ("metric", "value", "count", "protocol")
    metric: str | None = about("the metric's name, with network and count unless it is the published one")
    value: float | None = about("the number")
    std: float | None = about("standard deviation over the metric's own subsets or splits")
    count: int | None = about("samples")
    reference: str | None = about("the data that the samples are compared with")
    reference_count: int | None = about("reference images")
    data_fingerprint: str | None = about(
        "SHA-256 of the data that the reference is of, or of a file of moments that does not say that, 16 digits"
    )
    features: str | None = about("the network of the features")
    protocol: str | None = about("8 hex digits, equal if and only if `evaluation` is: how the samples were scored")
    samples: str | None = about("key of the samples; of foreign ones, SHA-256 of the .npz, or 16 digits of a folder's")
    evaluation: dict[str, Any] | None = about("network, its weights, layer, metric, counts and reference")
    generation: dict[str, Any] | None = about("how the samples were drawn (scoring/protocol.py); null: not on record")
    generation_protocol: str | None = about("8 hex digits, equal if and only if `generation` is; null: unknown")
    seconds: float | None = about("seconds of scoring the samples up to this number, for all metrics of the call")
    floor: float | None = about("the same metric between images of the reference, at most half of it, and its others")
    note: str | None = about("what must be known to read the value: that bias dominates, the images of the floor")
    by_timestep: dict[str, Any] | None = about("of the held-out loss: the loss at each timestep")
    sampling_error: float | None = about("standard error of the value from the choice of images alone; recall has none")


@dataclass(frozen=True, kw_only=True)
class _Timed(Row):
    input_size: int | None = about("side of the input")
    batch_size: int | None = about("images per call")
    precision: str | None = about("float32 or bfloat16 (autocast)")
    threads: int | None = about("CPU threads of torch")
    backend: dict[str, Any] | None = about("implementation by operator")
    p20_ms: float | None = about("20th percentile of a call, ms")
    p25_ms: float | None = about("25th percentile of a call, ms")
    p50_ms: float | None = about("median of a call, ms")
    p75_ms: float | None = about("75th percentile of a call, ms")
    p80_ms: float | None = about("80th percentile of a call, ms")
    repeats: int | None = about("calls measured")
    peak_memory_gib: float | None = about("peak memory that torch held in the measured calls, GiB")
    disturbed: str | None = about("what else kept the host busy")
    clock_mhz: float | None = about(
        "median clock of the GPU's multiprocessors in the measured calls, MHz; null: unknown"
    )
    power_w: float | None = about("median power of the GPU then, W, which recent drivers average over a second")
    throttled: str | None = about("why the GPU held its clock down then, empty: for no reason; null: unknown")
    timed_error: float | None = about(
        "relative RMS error of what the last timed call returned: the largest of all outputs and gradients; of a "
        "training step, of its gradients against the same step run without a CUDA graph; null: not compared"
    )
    began: str | None = about(
        "when the command that measured began, UTC, ISO 8601; equal for all rows of one call of it"
    )


@dataclass(frozen=True, kw_only=True)
class SpeedRow(_Timed):
    """One measurement of a whole model."""

    kind = "speed"
    needed = ("input_size", "mode", "batch_size", "images_per_s")
    mode: str | None = about("forward or train (a step: forward, backward, AdamW, EMA)")
    checkpointing: bool | None = about("whether blocks were recomputed in the backward pass")
    compile: str | None = about("eager, a mode of torch.compile, or whole-step")
    asked: dict[str, Any] | None = about("implementations that were requested by name; null: all were auto")
    processes: int | None = about("processes that shared the batch, each with a GPU; null: one")
    macs: int | None = about("multiply-adds of one forward pass of one image")
    flops: int | None = about("FLOPs of one forward pass of one image")
    checked_against: dict[str, Any] | None = about("backends of the reference")
    operator_error: float | None = about("largest relative RMS error of an operator in isolation")
    output_error: float | None = about("relative RMS error of the output against float32")
    gradient_error: float | None = about("relative RMS error of all gradients against float32")
    check_s: float | None = about("seconds of the check, with compilation")
    images_per_s: float | None = about("images per second at the median")
    mfu: float | None = about("model FLOPs over the device's peak (PaLM, appendix B); reports derive it")


@dataclass(frozen=True, kw_only=True)
class OperatorSpeedRow(_Timed):
    """One measurement of one operator at a shape of a model."""

    kind = "operator_speed"
    needed = ("operator", "shape", "pass_", "p50_ms")
    operator: str | None = about("the operator")
    shape: str | None = about("shapes of its inputs")
    pass_: str | None = about("forward or forward+backward", name="pass")
    relative_error: float | None = about("largest relative RMS error against float64")
    error_of: str | None = about("the output or gradient that has it")
    call_bytes: int | None = about("bytes of inputs and outputs, once through memory in each pass")
    call_exponentials: int | None = about("exponentials of the call")
    call_flops: int | None = about("FLOPs of matrix products and convolutions of the call")
    bytes_per_s: float | None = about("bytes per second of a large copy, measured by the same command")
    exponentials_per_s: float | None = about("exponentials per second of the device")
    flops_per_s: float | None = about("peak FLOPs per second of the device")
    bytes_floor_ms: float | None = about("least time by memory, ms; reports derive it and the next five")
    exponentials_floor_ms: float | None = about("least time by exponentials, ms")
    flops_floor_ms: float | None = about("least time by matrix products, ms")
    floor: str | None = about("name of the largest of the three floors")
    floor_ms: float | None = about("the largest floor, ms")
    times_floor: float | None = about("median over floor")


ROWS: dict[str, type[Row]] = {
    row.kind: row for row in (ConvertRow, CostRow, TrainRow, SampleRow, ScoreRow, SpeedRow, OperatorSpeedRow)
}


def field_name(f: Any) -> str:
    """The name of a dataclass's field in the file."""
    return f.metadata.get("name") or f.name


@cache
def field_types(row: type[Row]) -> dict[str, tuple[str, tuple[type, ...]]]:
    """The fields of a kind of row: {name in the file: (attribute, types)}. A float field accepts an int."""
    hints = get_type_hints(row)
    types_by_name = {}
    for f in fields(row):
        hint = hints[f.name]
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        plain = tuple(get_origin(option) or option for option in options)
        types_by_name[field_name(f)] = f.name, (*plain, int) if float in plain else plain
    return types_by_name


def row(kind: str, **values: Any) -> Row:
    """A row of `kind` from values by their names in the file. `time` defaults to now.

    Raises InputError, with the name of the field, for a field that the kind does not have, a value of another type, or
    a missing value if the state is done.
    """
    if kind not in ROWS:
        raise InputError(f"no such kind of record: {kind!r}; choices: {', '.join(ROWS)}")
    types_by_name, attributes = field_types(ROWS[kind]), {}
    for name, value in values.items():
        if name not in types_by_name:
            raise InputError(f"a record of kind {kind} has no field {name!r}; it has {', '.join(types_by_name)}")
        attribute, allowed = types_by_name[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise InputError(f"field {name!r} of a {kind} record is {value!r}, of type {type(value).__name__}")
        attributes[attribute] = value
    check_entries(kind, attributes)
    attributes.setdefault("time", datetime.now(timezone.utc).isoformat(timespec="seconds"))
    result = ROWS[kind](**attributes)
    if result.state not in STATES:
        raise InputError(f"unknown state {result.state!r} of a {kind} record; choices: {', '.join(STATES)}")
    missing = [name for name in result.needed if getattr(result, name) is None] if result.state == "done" else []
    if missing:
        raise InputError(f"a {kind} record that is done lacks {', '.join(missing)}")
    return result


def read_row(line: Any, where: str) -> Row:
    """The row of a line of `record.jsonl`. Raises InputError, beginning with `where`, like `row`, or for its schema."""
    if not isinstance(line, dict) or "schema" not in line or "kind" not in line:
        raise InputError(f"{where} is not a record of lamabench")
    values = dict(line)
    schema, kind = values.pop("schema"), values.pop("kind")
    if schema != SCHEMA:
        age = "a newer" if isinstance(schema, int) and schema > SCHEMA else "an older"
        raise InputError(f"{where} has schema {schema}, of {age} version of lamabench; this one reads {SCHEMA}")
    try:
        return row(str(kind), **values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def read_records(path: Path) -> list[Row]:
    """The rows of a `record.jsonl`, oldest first. Empty if there is no such file."""
    return [read_row(line, f"{path} line {number}") for number, line in enumerate(read_lines(path), start=1)]


def newest(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """The newest row of each key, and of each metric of a score, as {(key, metric or ""): row}."""
    return {(one.key, getattr(one, "metric", None) or ""): one for one in rows}
