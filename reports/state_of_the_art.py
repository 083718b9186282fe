"""The tables of published models of ImageNet, with models of these runs that were scored like them."""

from collections.abc import Iterable

from ..harness.scoring.protocol import guidance_words, words
from .differences import by_seed, count_of, mean_of, seed_of
from .evidence import Evidence
from .names import labels
from .protocols import UNKNOWN, generation_of, notes
from .published import PublishedRow
from .queries import state_of
from .runs import Line, Run
from .speed import pixels
from .table import BAD, Column, Table

CLASSES = 1000
# A score of ours, its key in the table, and its name if it is that of 50,000 samples.
METRICS = {
    "fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision-Inception-50k",
    "recall": "recall-Inception-50k",
}  # fmt: skip
CONVENTIONS = {
    "macs": "MACs", "macs+norms": "MACs, norms", "macs+norms+scans": "MACs, norms, scans", "printed": "not stated",
}  # fmt: skip
# The rule of a family's paper. U-ViT's does not state one; ours for it is that of ADM.
FAMILIES = {"adm": "macs", "dit": "macs+norms", "lamamba": "macs+norms+scans", "uvit": "macs"}
PRINTED = (
    "Printed: what the paper prints as Gflops, or what it would print for a model of these runs: multiply-adds of one "
    "forward pass of one image, and by some papers other operations. MACs: multiply-adds and nothing else."
)
UNRANKED = "No row is bold, because trainings of different length and samples of different guidance are no ranking."


def state_of_the_art(evidence: Evidence, side: int) -> list[Table]:
    """Published models of ImageNet at `side` pixels and, between them, those of `evidence` with a FID of 50,000 samples
    against ImageNet. Models that do not know the class have a table of their own. Empty unless a model of `evidence` is
    one for ImageNet at that size, or has such a score."""
    printed = {256: evidence.published.imagenet_256, 512: evidence.published.imagenet_512}[side]
    lines = {
        run: row for rows in evidence.scores.values() for run, row in rows.items() if is_fid_of_imagenet(row, side)
    }
    name = f"state_of_the_art_{side}"
    if not lines and not any(_is_for(run, side) for run in evidence.runs):
        return [Table(name, "", [], [])]
    tables = [_table(name, lines, [row for row in printed if row.conditional], evidence.runs, side, True)]
    other = _table(
        f"{name}_unconditional", lines, [row for row in printed if not row.conditional], evidence.runs, side, False
    )
    return tables + ([other] if other.rows else [])


def is_fid_of_imagenet(row: Line, side: int) -> bool:
    """Whether a score is the FID of 50,000 images of `side` pixels against a reference that is named after ImageNet."""
    images = (row.get("evaluation") or {}).get("images")
    return row["metric"] == "FID" and "imagenet" in str(row.get("reference")).lower() and images == [side, side, 3]


def source_words(row: PublishedRow) -> str:
    return row.source + ("" if row.checked else " *")


def unchecked(rows: Iterable[PublishedRow]) -> list[str]:
    """What the star of `source_words` means, if a row has it."""
    if all(row.checked for row in rows):
        return []
    return ["*: reported to us, in whole or in part, and not compared with the source."]


def remarks(rows: Iterable[PublishedRow]) -> list[str]:
    """What must be known to read published rows."""
    rows = list(rows)
    text = [PRINTED, *unchecked(rows)]
    return text + [
        f"{row.model}: its paper prints {row.macs_vs_dit_xl2_percent:+g} % of DiT-XL/2's Gflops."
        for row in rows
        if row.macs_vs_dit_xl2_percent is not None
    ]


def _is_for(run: Run, side: int) -> bool:
    model = run.info["config"].get("model") or {}
    return model.get("num_classes") == CLASSES and pixels(model, model.get("input_size") or 0) == side


def _table(
    name: str, lines: dict[Run, Line], printed: list[PublishedRow], runs: list[Run], side: int, conditional: bool
) -> Table:
    own = {
        run: row for run, row in lines.items() if ((row.get("generation") or {}).get("labels") != "none") == conditional
    }
    rows = [_of_paper(row) for row in printed]
    names = labels(runs)
    together: dict[tuple[str, str, str], dict[int, dict[Run, Line]]] = {}  # by the step of the weights, never averaged
    for run, row in own.items():
        key = run.group, str(row["protocol"]), generation_of(row)
        together.setdefault(key, {}).setdefault(row["checkpoint_step"] or 0, {})[run] = row
    for (group, *_), by_step in together.items():
        for step, each in by_step.items():
            title = next(iter(each)).info["title"]
            label = names[group] if names[group].startswith(title) else f"{title}, {names[group]}"
            rows.append(_of_runs(each, label + (f", step {step:,}" if len(by_step) > 1 else "")))
    rows.sort(key=lambda row: (row["guidance"] != "none", -row["fid"], row["label"], row["origin"]))
    columns = [
        Column("label", "Model"),
        Column("origin", "From", rank=8, tex=False),
        Column("params", "Params (M)", 1e6, 3),
        Column("macs", "MACs (G)", 1e9, 4, rank=7),
        Column("printed", "Printed (G)", 1.0, 5),
        Column("convention", "What is printed", rank=9, tex=False),
        Column("fid", "FID", 1.0, 6, "fid_ci95", mark="mark", places=2),
        Column("fid_ci95"),
        Column("n", "Seeds", digits=0, rank=6),
        Column("sfid", "sFID", 1.0, 6, "sfid_ci95", rank=4, places=2),
        Column("is", "IS", 1.0, 6, "is_ci95", rank=3, places=2),
        Column("precision", "Precision", 1.0, 2, "precision_ci95", rank=5),
        Column("recall", "Recall", 1.0, 2, "recall_ci95", rank=5),
        Column("guidance", "Guidance", rank=1),
        Column("source", "Source", rank=2),
    ]
    kind = "Class-conditional" if conditional else "Unconditional"
    caption = f"{kind} models of ImageNet at {side} px: scores of 50,000 samples, as papers print them"
    caption += " and of these runs." if own else ". None of these runs has a FID of that kind."
    below = [
        *remarks(printed),
        UNRANKED,
        *([f"{BAD.strip()}: of a run that is not done."] if any(row.get("mark") for row in rows) else []),
    ]
    return Table(name, caption, columns, rows, below + notes(runs, {"FID": own} if own else {}))


def _of_paper(row: PublishedRow) -> Line:
    guidance = row.guidance + (f", {row.guidance_scale:g}" if row.guidance_scale else "")
    return {
        "label": row.model, "origin": "paper", "params": row.params_m and 1e6 * row.params_m, "printed": row.macs_g,
        "macs": 1e9 * row.macs_g if row.convention == "macs" and row.macs_g else None,
        "convention": CONVENTIONS[row.convention] if row.macs_g else None, "fid": row.fid, "sfid": row.sfid,
        "is": row.is_, "precision": row.precision, "recall": row.recall, "guidance": guidance,
        "source": source_words(row),
    }  # fmt: skip


def _of_runs(lines: dict[Run, Line], label: str) -> Line:
    """The row of one model: means over the seeds of its training."""
    run = next(iter(lines))
    cost = run.last("cost", state="done") or {}
    result: Line = {"label": label, "origin": "these runs", "source": f"study {run.info['study']}"}
    result |= {"params": cost.get("params"), "macs": cost.get("macs"), "printed": cost.get("paper_gflops")}
    result["convention"] = CONVENTIONS[FAMILIES.get(run.info["family"], "printed")] if cost else None
    result |= {"guidance": _guidance_words(lines[run]), "records": {"params": cost, "macs": cost, "printed": cost}}
    result["mark"] = BAD if any(state_of(run)[0] != "done" for run in lines) else ""
    for key, metric in METRICS.items():
        pairs = [
            (seed_of(run), row["value"])
            for run, fid in lines.items()
            for row in run.rows
            if _is_of_same_samples(row, fid, metric)
        ]
        if pairs:
            seeds = by_seed(pairs)
            mean = mean_of(seeds.values())
            result |= {key: mean.value, f"{key}_ci95": mean.half}
            result["records"][key] = lines[run]
            result.setdefault("n", count_of(seeds))
    return result


def _is_of_same_samples(row: Line, fid: Line, metric: str) -> bool:
    """Whether a row is a score of the samples of a FID, against the same reference if it has one."""
    alike = row["kind"] == "score" and row["state"] == "done" and row["metric"] == metric
    return alike and row["samples"] == fid["samples"] and row.get("reference") in (None, fid["reference"])


def _guidance_words(row: Line) -> str:
    drawn = row.get("generation") or {}
    if generation_of(row) == UNKNOWN or "guidance" not in drawn:
        return words(drawn)
    if drawn["guidance"] == 1:
        return "none"
    text = guidance_words(drawn)
    return text if drawn.get("guide") else text.replace("guidance ", "classifier-free, ", 1)
