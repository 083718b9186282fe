"""The model card of an exported training: README.md with the front matter that the Hugging Face hub reads."""

import re
from typing import Any

import yaml

from ..models.exported import GRID, WEIGHTS
from .config import Config
from .keys import config_from_dict
from .measure.cost import cost
from .scoring.protocol import generation, words

Line = dict[str, Any]
TASK = "unconditional-image-generation"  # the hub has no task for images of a class
NOTE = (
    "s.e. is the standard error of a score from the choice of its images alone. It has no bias in it and says nothing "
    "about other trainings. Scores of different protocols (8 hex digits) or ways of drawing are not comparable."
)


def card(info: Line, scores: list[Line], row: Line | None, source: str, protocols: dict[str, str]) -> str:
    """The text of README.md. `info` is config.json, `scores` are rows of kind score, `row` is that of the samples in
    grid.png (None: there are none), `source` is what `create_model` takes as `pretrained`, and `protocols` are the
    words for each protocol of the scores."""
    config = config_from_dict(info["config"])
    front = yaml.safe_dump(front_matter(info, config, scores), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {info['title']} on {_data_name(config)}",
        _sentence(info, config),
        _table(["", ""], [[name, value] for name, value in _facts(info, config).items() if value]),
        _use(info, config, source),
        _scores(scores, protocols),
        _samples(info, row),
        "## Licence\n\nNone is stated. Whoever publishes the weights adds `license:` to the front matter.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(info: Line, config: Config, scores: list[Line]) -> Line:
    """The metadata of the hub, with the scores as its `model-index`."""
    kinds = [info["config"]["model"]["family"], config.objective.kind, config.encoder.kind]
    front: Line = {"library_name": "lamabench", "pipeline_tag": TASK, "tags": ["lamabench", "diffusion", *kinds]}
    if scores:
        name = _data_name(config)
        metrics = [
            {"type": _slug(row["metric"]), "name": row["metric"], "value": row["value"], **_args(row)} for row in scores
        ]
        results = {"task": {"type": TASK}, "dataset": {"type": _slug(name), "name": name}, "metrics": metrics}
        front["model-index"] = [{"name": info["title"], "results": [results]}]
    return front


def _args(row: Line) -> Line:
    args = {"protocol": row["protocol"], "generation_protocol": row.get("generation_protocol")}
    return {"args": {name: value for name, value in args.items() if value}}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def _data_name(config: Config) -> str:
    return config.data.name or config.data.kind


def _sentence(info: Line, config: Config) -> str:
    weights, source = info["weights"], info.get("source")
    trained = "" if source else f" after {_images(info, config)}"
    kind = {"ema": "averaged weights (EMA)", "live": "weights, not averaged,"}.get(weights["kind"], weights["kind"])
    classes = f"{config.data.num_classes} classes" if config.data.num_classes else "no classes"
    side = f"{config.data.size} × {config.data.size} pixels"
    return f"A diffusion model for images of {side} and {classes}: the {kind} of step {weights['step']:,}{trained}."


def _images(info: Line, config: Config) -> str:
    return f"{info['weights']['step'] * config.train.batch_size:,} images"


def _facts(info: Line, config: Config) -> dict[str, str]:
    model, data, train, trained = cost(config.model), config.data, config.train, info["training"]
    commit = f"{trained['commit']}{' with uncommitted changes' if trained.get('dirty') else ''}"
    objective = config.objective.kind + (f", {config.objective.schedule} schedule" if _chain(config) else "")
    channels = "1 channel" if data.channels == 1 else f"{data.channels} channels"
    data_words = f"{data.size} × {data.size} pixels, {channels}, {data.num_classes} classes"
    how = (
        f"{info['weights']['step']:,} steps of {train.batch_size} images, learning rate {train.lr:g}, {train.precision}"
    )
    facts = {
        "Model": f"{info['title']} (`{info['preset']}` of lamabench), family {info['config']['model']['family']}",
        "Parameters": f"{model.params / 1e6:.4g} M",
        "Multiply-adds of a pass": f"{model.macs / 1e9:.4g} G an image",
        "Data": f"{_data_name(config)}: {data_words}",
        "Fingerprint of the data": trained["data_fingerprint"] and f"`{trained['data_fingerprint']}`",
        "Objective": objective,
        "Encoder": config.encoder.kind if config.encoder.kind == "pixels" else _encoder(config),
        "Plug-ins": ", ".join(f"`{one['name']}` ({one['sha256'][:12]})" for one in info["plugins"]),
    }
    if info.get("source"):
        return facts | {"Origin": f"converted from {_source(info['source'])}", "lamabench": info["lamabench"]}
    return facts | {
        "Training": f"{how}, {_images(info, config)}, seed {config.seed}, key `{trained['key']}`",
        "Commit": commit if trained.get("commit") else "",
        "Software": ", ".join(f"{name} {info[name]}" for name in ("lamabench",)) + _torch(trained),
        "Device": str(trained.get("device") or ""),
    }


def _torch(trained: Line) -> str:
    return f", torch {trained['torch']}" if trained.get("torch") else ""


def _source(source: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in source.items()) if isinstance(source, dict) else str(source)


def _chain(config: Config) -> bool:
    return config.objective.kind != "flow"


def _encoder(config: Config) -> str:
    known = {name: value for name, value in vars(config.encoder).items() if value is not None and name != "kind"}
    return f"{config.encoder.kind}: {', '.join(f'{name} {value}' for name, value in known.items())}"


def _use(info: Line, config: Config, source: str) -> str:
    labels = list(range(min(4, max(config.data.num_classes, 1)))) if config.data.num_classes else [0] * 4
    plugins = "".join(f"import {one['name']}  # a plug-in\n" for one in info["plugins"])
    return f"""## Use

```python
{plugins}from lamabench.models import create_model
from lamabench.harness.release import config_of_export
from lamabench.harness.sampling import draw

net = create_model("{info["preset"]}", pretrained="{source}")  # net(x, t, y) -> out, float32, in eval mode
images = draw(net, config_of_export("{source}"), labels={labels}, seed=0)  # uint8 [N, H, W, C]
```

`{WEIGHTS}` has the tensors by their names in the network; `config.json` has the model, what it learned (objective),
what it sees of an image (encoder), and its training."""


def _scores(scores: list[Line], protocols: dict[str, str]) -> str:
    if not scores:
        return "## Scores\n\nNone are on record for these weights."
    head = ["Metric", "Value", "s.e.", "Samples", "Against", "Protocol", "Samples drawn"]
    rows = []
    for row in scores:
        error = "–" if row.get("sampling_error") is None else f"{row['sampling_error']:.2g}"
        against = f"{row['reference']} ({row['reference_count']:,})" if row.get("reference_count") else row["reference"]
        drawn = words(row["generation"]) if row.get("generation") else "–"
        value = f"{row['value']:.4g}"
        rows.append([row["metric"], value, error, f"{row['count']:,}", against or "–", f"`{row['protocol']}`", drawn])
    how = "\n".join(f"- Protocol `{name}`: {text}" for name, text in protocols.items() if text)
    return f"## Scores\n\n{_table(head, rows)}\n\n{NOTE}" + (f"\n\n{how}" if how else "")


def _samples(info: Line, row: Line | None) -> str:
    if row is None:
        return "## Samples\n\nNone were drawn with these weights."
    text = words(generation(info["config"], row))
    chosen = f"Of {row['count']:,} images, chosen by index alone"
    return f"## Samples\n\n![Samples]({GRID})\n\n{chosen}: {text}."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
