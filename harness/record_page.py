"""The page RECORDS.md, which lists every kind of record."""

from dataclasses import fields

from .lines import METRICS
from .record import ROWS, SCHEMA, Row, field_name, field_types


def page() -> str:
    """RECORDS.md: every kind of record and its fields."""
    text = [
        "# Records\n\n`python -m lamabench.harness.record_page` prints this page from the dataclasses in `record.py`.",
        f"A line of a `record.jsonl` is a JSON object: `schema` ({SCHEMA}), `kind` and its fields without null ones.\n",
    ]
    shared = {field_name(f) for f in fields(Row)}
    for heading, kind in (("Every line", Row), *((f"`{name}`", kind) for name, kind in ROWS.items())):
        summary = " ".join((kind.__doc__ or "").split())
        text += [f"## {heading}", "", summary, "", "| field | type | meaning |", "|---|---|---|"]
        for f in fields(kind):
            if kind is Row or field_name(f) not in shared:
                kinds = " or ".join(t.__name__ for t in field_types(kind)[field_name(f)][1] if t is not type(None))
                kinds = kinds.replace("float or int", "float")
                needed = "" if f.name not in kind.needed else " (always, if done)"
                text.append(f"| `{field_name(f)}` | {kinds} | {f.metadata['about']}{needed} |")
        text.append("")
    text += ["## Lines of `metrics.jsonl`", "", "The log of a training.", "", "| field | meaning |", "|---|---|"]
    text += [f"| `{name}` | {meaning} |" for name, (_, meaning) in METRICS.items()]
    return "\n".join([*text, ""])


if __name__ == "__main__":
    print(page(), end="")
