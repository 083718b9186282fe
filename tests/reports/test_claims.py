"""Verdicts on the claims of studies, against intervals that were computed by hand."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from lamabench.harness.run import STUDY
from lamabench.kernels.errors import InputError
from lamabench.reports.claims import Claim, claims, verdicts
from lamabench.reports.page import page
from lamabench.reports.report import _readme, build, evidence_of, table_text
from run_folders import H100, Line, cost, line, made, markdown, parsed, scored, trained, write
from test_page import EVIL, Parsed

END, CURVE, KID = "FD-EffNetLite0-10k", "FD-EffNetLite0-2k", "KD-EffNetLite0-2k"
# Of three differences with the sample standard deviation s, half the interval is t(0.975, 2) · s / √3; t is 4.3027.
HALF = 2.4841
DIT = [24.0, 24.0, 24.0]
BETTER = [20.0, 21.0, 19.0]  # -4, -3 and -5: s = 1
CLOSE = [23.0, 25.0, 21.0]  # -1, 1 and -3: s = 2
TITLES = {"lamamba": "LaMamba-T", "dit": "DiT-T", "unet": "U-Net-T"}


def put(
    root: Path,
    name: str,
    ends: list[float],
    flops: float = 1.0,
    metric: str = END,
    study: str = "s",
    kid: Sequence[float] = (),
    **about: Line,
) -> None:
    """The trainings of a model, a seed each, that took so many FLOPs and one second for a step. A set of 2,000 samples
    has twice the last score in the middle; that of 10,000 at the end is lower by 2. `kid` has last scores of another
    metric."""
    for seed, end in enumerate(ends):
        for step, factor in ((300, 2), (600, 1)):
            at = {"training_flops": 64e9 * flops * step, "training_seconds": 1.0 * step}
            sets = [made(scored(factor * end, "p2", CURVE)) | at]
            sets += [made(scored(factor * kid[seed], "p3", KID)) | at] if kid else []
            sets = [made(scored(end - 2, "p1", metric)) | at, *sets] if step == 600 else sets
            lines = [cost(), trained() | about, *sets]
            who = {"family": name, "title": TITLES[name], "variant": {"model": name}, "seed": seed, "study": study}
            write(root, f"{name}-s{seed}", lines if step == 600 else sets, step=step, **who)


def judge(root: Path, found: dict[str, list[tuple[str, str]]], study: str = "s") -> list[Claim]:
    """Write the verdicts into the listing of a study, and read its claims."""
    path = root / study / STUDY
    listing = json.loads(path.read_text())
    facts = {"question": "Which?", "claim": "c", "answer": "a", "budget": "b", "axes": {"model": ["lamamba", "dit"]}}
    sides = {
        words: [{"better": {"model": one}, "worse": {"model": other}} for one, other in pairs]
        for words, pairs in found.items()
    }
    path.write_text(json.dumps({**listing, "about": {**facts, "verdicts": sides}}))
    return claims(evidence_of([root]))


WINS, LOSES = {"It wins.": [("lamamba", "dit")]}, {"It loses": [("dit", "lamamba")]}
NAME = "`LaMamba-T` against `DiT-T`"


def test_a_claim_that_holds(tmp_path: Path) -> None:
    put(tmp_path, "lamamba", BETTER)
    put(tmp_path, "dit", DIT)
    (claim,) = judge(tmp_path, WINS)
    assert claim.verdict == "holds here" and (claim.metric, claim.curve) == (END, CURVE)
    assert claim.text == (
        f"It wins (s: {END}, {NAME}: -4.0 ± 2.5 over 3 seeds). At equal training FLOPs it holds too ({CURVE}). "
        f"At equal GPU-hours it holds too ({CURVE})."
    )
    (row,) = parsed(table_text(evidence_of([tmp_path]), "verdicts", "csv"))
    words = {"study": "s", "claim": "It wins.", "variant": "LaMamba-T", "against": "DiT-T", "metric": END, "n": "3"}
    assert row.items() >= {**words, "claim_verdict": "holds here", "verdict": "holds here"}.items()
    assert float(row["difference"]) == -4 and float(row["difference_ci95"]) == pytest.approx(HALF, abs=1e-4)
    assert float(row["hours_difference"]) == pytest.approx(-4) and float(row["hours_amount"]) == 600 / 3600
    assert "reason" not in row and row["curve_metric"] == CURVE


def test_a_sign_that_is_reversed_at_equal_flops(tmp_path: Path) -> None:
    """With half again as many FLOPs a step, those of 600 steps are spent at 400. In logarithms the score is then
    2 · (1/2)^(log2 4/3) = 1.5 times the last one: 30, 31.5 and 28.5, or +6, +7.5 and +4.5 with s = 1.5."""
    put(tmp_path, "lamamba", BETTER, flops=1.5)
    put(tmp_path, "dit", DIT)
    won, lost = judge(tmp_path, WINS | LOSES)
    assert (won.verdict, lost.verdict) == ("holds here", "does not hold here")
    assert won.text == (
        f"It wins (s: {END}, {NAME}: -4.0 ± 2.5 over 3 seeds). At equal training FLOPs the sign is reversed "
        f"({CURVE}, {NAME}: +6.0 ± 3.7 over 3 seeds). At equal GPU-hours it holds too ({CURVE})."
    )
    other = "`DiT-T` against `LaMamba-T`"
    assert lost.text == (
        f"It loses (s: {END}, {other}: +4.0 ± 2.5 over 3 seeds). At equal training FLOPs the sign is reversed "
        f"({CURVE}, {other}: -6.0 ± 3.7 over 3 seeds)."
    )
    table = verdicts(evidence_of([tmp_path]))
    row = table.rows[0]
    assert row["flops_difference"] == pytest.approx(6) and row["flops_amount"] == 64e9 * 600
    assert row["flops_difference_ci95"] == pytest.approx(1.5 * HALF, abs=1e-3)
    shown = markdown(table.markdown())
    assert [shown[0][f"Δ at equal {what}"] for what in ("images", "training FLOPs", "GPU-hours")] == [
        "-4.0 ± 2.5", "+6.0 ± 3.7", "-4.0 ± 2.5",
    ]  # fmt: skip
    assert any(f"Δ is of {CURVE}, at the largest amount" in note for note in table.notes)


def test_a_claim_that_is_inconclusive_says_why(tmp_path: Path) -> None:
    put(tmp_path, "lamamba", CLOSE)
    put(tmp_path, "dit", DIT)
    put(tmp_path, "unet", [30.0, 30.0])
    found = {
        "Interval": [("lamamba", "dit")],
        "Seeds": [("lamamba", "unet"), ("dit", "unet")],
        "Nobody": [("lamamba", "mamba"), ("lamamba", "dit")],
    }
    interval, seeds, nobody = judge(tmp_path, found)
    assert {one.verdict for one in (interval, seeds, nobody)} == {"inconclusive"}
    zero = f"{NAME}: -1.0 ± 5.0 over 3 seeds, the interval includes 0"
    assert interval.text == f"Interval (s: {END}, {zero})."
    few = "`LaMamba-T` against `U-Net-T` and `DiT-T` against `U-Net-T`: 2 common seeds, and 3 are needed"
    assert seeds.text == f"Seeds (s: {END}, {few}; differences -6 ± 13 and -6.000 ± 0)."
    assert nobody.text == f"Nobody (s: {END}, `LaMamba-T` against `mamba`: mamba has no score; {zero})."
    assert [pair.result.n for pair in nobody.pairs] == [0, 3]


def test_one_pair_decides_a_claim(tmp_path: Path) -> None:
    """One that is the other way round, or else one that is inconclusive. Of the others, those that hold are named."""
    put(tmp_path, "lamamba", BETTER)
    put(tmp_path, "dit", DIT)
    put(tmp_path, "unet", CLOSE)
    (claim,) = judge(tmp_path, {"First": [("lamamba", "dit"), ("unet", "dit"), ("dit", "lamamba")]})
    assert claim.verdict == "does not hold here" and "U-Net" not in claim.text
    assert claim.text.startswith(f"First (s: {END}, `DiT-T` against `LaMamba-T`: +4.0 ± 2.5 over 3 seeds).")
    (claim,) = judge(tmp_path, {"First": [("lamamba", "dit"), ("unet", "dit")]})
    zero = "`U-Net-T` against `DiT-T`: -1.0 ± 5.0 over 3 seeds, the interval includes 0"
    holds = f"it holds for {NAME}: -4.0 ± 2.5 over 3 seeds"
    more = f"At equal training FLOPs {holds} ({CURVE}). At equal GPU-hours {holds} ({CURVE})."
    assert claim.verdict == "inconclusive"
    assert claim.text == f"First (s: {END}, {zero}). At equal images {holds}. {more}"


def test_an_inconclusive_claim_says_what_another_budget_decides(tmp_path: Path) -> None:
    """After two thirds of the steps a score is half again as large, because scores fall as 1 / steps: 10.5, 13.5 and
    7.5 above DiT's (s = 3) with half again as many FLOPs a step. At equal hours nothing changes."""
    put(tmp_path, "lamamba", CLOSE, flops=1.5)
    put(tmp_path, "dit", DIT)
    (claim,) = judge(tmp_path, {"Close": [("lamamba", "dit")]})
    reversed_ = f"At equal training FLOPs the sign is reversed for {NAME}: +10.5 ± 7.5 over 3 seeds ({CURVE})."
    assert claim.text == f"Close (s: {END}, {NAME}: -1.0 ± 5.0 over 3 seeds, the interval includes 0). {reversed_}"


def test_a_claim_holds_at_the_amounts_at_which_all_its_pairs_do(tmp_path: Path) -> None:
    """With half again as many FLOPs a step it is reversed at equal FLOPs."""
    put(tmp_path, "lamamba", BETTER, flops=1.5)
    put(tmp_path, "dit", DIT)
    put(tmp_path, "unet", DIT, flops=1.5)
    both, hours = judge(tmp_path, {"Both": [("lamamba", "unet")], "Hours": [("lamamba", "unet"), ("lamamba", "dit")]})
    assert (both.headline, hours.headline) == ("holds here", "holds here at equal images and GPU-hours")
    assert hours.title == "Holds here at equal images and GPU-hours"
    assert [row["claim_verdict"] for row in verdicts(evidence_of([tmp_path])).rows] == [
        both.headline, hours.headline, hours.headline,
    ]  # fmt: skip


def test_other_metrics_are_named_where_they_say_something_else(tmp_path: Path) -> None:
    """KD is worse by 1.0, 1.1 and 0.9 (s = 0.1) at the end, or by 0, 1 and -1; at equal FLOPs of a model that takes
    half again as many, FD is reversed too."""
    put(tmp_path / "worse", "lamamba", BETTER, kid=[3.0, 3.1, 2.9])
    put(tmp_path / "worse", "dit", DIT, kid=[2.0] * 3)
    (claim,) = judge(tmp_path / "worse", WINS)
    each = [f"at equal {what} reversed ({KID}, {NAME}: +1.00 ± 0.25 over 3 seeds)" for what in AMOUNTS]
    assert claim.text.endswith(f" Other metrics differ: {'; '.join(each)}.")
    put(tmp_path / "open", "lamamba", BETTER, kid=[2.0, 3.0, 1.0], flops=1.5)
    put(tmp_path / "open", "dit", DIT, kid=[2.0] * 3)
    (claim,) = judge(tmp_path / "open", WINS)
    each = [f"at equal {what} inconclusive ({KID})" for what in AMOUNTS]
    assert claim.text.endswith(f" Other metrics differ: {'; '.join(each)}.")
    put(tmp_path / "same", "lamamba", BETTER, kid=[1.0, 1.1, 0.9])
    put(tmp_path / "same", "dit", DIT, kid=[2.0] * 3)
    (claim,) = judge(tmp_path / "same", WINS)
    assert "Other metrics" not in claim.text and claim.headline == "holds here"


AMOUNTS = ("images", "training FLOPs", "GPU-hours")


def test_a_run_that_failed_is_marked(tmp_path: Path) -> None:
    put(tmp_path, "lamamba", BETTER)
    put(tmp_path, "dit", DIT)
    failed = line("train", "oom", error="tried 3 GiB")
    write(tmp_path, "dit-s0", [failed], title="DiT-T", variant={"model": "dit"}, study="s")
    (claim,) = judge(tmp_path, WINS)
    (row,) = markdown(verdicts(evidence_of([tmp_path])).markdown())
    assert claim.verdict == "holds here" and row["Δ at equal images"] == "-4.0 ± 2.5 (1 oom)"


def test_a_metric_of_which_more_is_better(tmp_path: Path) -> None:
    for name, values in (("lamamba", BETTER), ("dit", DIT)):
        for seed, value in enumerate(values):
            who = {"family": name, "title": TITLES[name], "variant": {"model": name}, "seed": seed, "study": "s"}
            write(tmp_path, f"{name}-s{seed}", [cost(), made(scored(value, metric="recall"))], **who)
    won, lost = judge(tmp_path, WINS | LOSES)
    assert (won.verdict, lost.verdict) == ("does not hold here", "holds here") and lost.curve == ""
    nothing = "`DiT-T` against `LaMamba-T`: no scored moments at equal"
    assert lost.text == (
        "It loses (s: recall, `DiT-T` against `LaMamba-T`: +4.0 ± 2.5 over 3 seeds). At equal training FLOPs it is "
        f"inconclusive ({nothing} training FLOPs). At equal GPU-hours it is inconclusive ({nothing} GPU-hours)."
    )


def test_what_does_not_compare_is_inconclusive(tmp_path: Path) -> None:
    """Hours of two devices, scores of different steps, samples that were drawn in several ways, and no score at all."""
    put(tmp_path / "devices", "lamamba", BETTER, provenance=H100)
    put(tmp_path / "devices", "dit", DIT)
    (claim,) = judge(tmp_path / "devices", WINS)
    assert claim.verdict == "holds here"
    assert claim.text.endswith(f"inconclusive ({CURVE}, {NAME}: no scored moments at equal GPU-hours).")
    who = {"title": "DiT-T", "variant": {"model": "dit"}, "seed": 0, "study": "s"}
    write(tmp_path / "devices", "dit-s0", [made(scored(22.0, "p1", END))], step=900, **who)
    (claim,) = judge(tmp_path / "devices", WINS)
    assert claim.verdict == "inconclusive" and "seeds of one variant have weights of different steps" in claim.text
    assert claim.curve == CURVE
    put(tmp_path / "ways", "lamamba", BETTER)
    put(tmp_path / "ways", "dit", DIT)
    write(tmp_path / "ways", "dit-s0", [made(scored(9.0, "p1", END), steps=2)], steps=2, **who)
    (claim,) = judge(tmp_path / "ways", WINS)
    assert claim.text == f"It wins (s: {END}, `LaMamba-T` against `dit`: dit was trained or drawn in several ways)."
    for name in ("lamamba", "dit"):
        more = {"family": name, "title": TITLES[name], "variant": {"model": name}, "study": "s"}
        write(tmp_path / "none", name, [cost()], **more)
    (claim,) = judge(tmp_path / "none", WINS)
    assert claim.text == f"It wins (s: {NAME}: LaMamba-T and DiT-T have no score)."
    assert claim.verdict == "not run yet"
    assert verdicts(evidence_of([tmp_path / "none"])).rows[0]["verdict"] == "not run yet"


def test_claims_stand_at_the_head_of_a_report(tmp_path: Path) -> None:
    for study in ("one", "two"):
        put(tmp_path / "runs", "lamamba", BETTER, study=study)
        put(tmp_path / "runs", "dit", DIT, study=study)
    judge(tmp_path / "runs", WINS, "one")
    judge(tmp_path / "runs", LOSES | {EVIL: [("lamamba", "dit")]}, "two")
    build([tmp_path / "runs"], tmp_path / "out")
    readme = (tmp_path / "out/README.md").read_text().split("\n## ")
    assert [part.splitlines()[0] for part in readme[1:4]] == ["Verdicts", "Study one", "Study two"]
    lines = [text for text in readme[1].splitlines() if text.startswith("- ")]
    assert [text[: text.index(" (")] for text in lines[:2]] == [
        "- **Holds here**: It wins", "- **Does not hold here**: It loses",
    ]  # fmt: skip
    assert lines[0] in readme[2] and lines[1] in readme[3] and lines[1] not in readme[2]
    html = Parsed((tmp_path / "out/index.html").read_text())
    assert [text for _, text in html.all("h2")][:4] == ["Verdicts", "What was read", "Study: one", "Study: two"]
    bold = [text.partition(" (")[0] for _, text in html.all("b") if "It " in text or EVIL in text]
    assert bold[:3] == ["Holds here: It wins", "Does not hold here: It loses", f"Holds here: {EVIL}".partition(" (")[0]]
    assert bold[3:] == bold[:3]
    assert not any("onerror" in attributes or "alert" in text for attributes, text in html.all("img"))
    assert len([text for _, text in html.all("span") if text.startswith("Statements of studies, and whether")]) == 1
    rows = parsed((tmp_path / "out/verdicts.csv").read_text())
    assert [row["study"] for row in rows] == ["one", "two", "two"]


def test_a_listing_without_verdicts_has_no_claims(tmp_path: Path) -> None:
    put(tmp_path, "lamamba", BETTER)
    put(tmp_path, "dit", DIT)
    evidence = evidence_of([tmp_path])  # as earlier versions wrote it
    assert claims(evidence) == [] and "## Verdicts" not in _readme(evidence, {}, {})
    assert "Verdicts" not in [text for _, text in Parsed(page(evidence, [], {}, {})).all("h2")]
    with pytest.raises(InputError, match="the table verdicts has no rows: no study names pairs"):
        table_text(evidence, "verdicts")
