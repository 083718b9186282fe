"""The committed records: their folders and keys are those that the code makes today."""

import json
from pathlib import Path

import lamabench.reports as reports
import pytest
from lamabench.ablations.study import load
from lamabench.harness.keys import model_key, operator_speed_key, speed_key
from lamabench.harness.measure.gpus import derived
from lamabench.harness.run import read_run
from lamabench.harness.sections import BackendConfig
from lamabench.models.registry import from_dict

ROOT = Path(reports.__file__).parent / "records"
SIZES = [("bench", 3, 69), ("bench-gpus", 5, 18), ("bench-h200", 6, 71), ("bench-kernels", 2, 148), ("costs", 37, 43),
         ("demo", 3, 3)]  # fmt: skip


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*/.study.json")), ids=lambda path: path.parent.name)
def test_listings_say_what_their_studies_say(path: Path) -> None:
    listing = json.loads(path.read_text(encoding="utf-8"))
    assert listing["about"] == load(listing["study"]).about()


@pytest.mark.parametrize(("root", "folders", "lines"), SIZES)
def test_keys_are_those_of_today(root: str, folders: int, lines: int) -> None:
    runs = [read_run(config.parent) for config in sorted((ROOT / root).glob("models/*/config.json"))]
    assert (len(runs), sum(len(run.records) for run in runs)) == (folders, lines)
    for run in runs:
        model = from_dict(run.info["config"]["model"])
        assert run.path.name == f"{run.info['family']}-{model_key(model)}" and run.info["key"] == model_key(model)
        for row in run.records:
            line, device = row.flat(), (row.provenance or {})["device"]
            if row.kind == "cost":
                assert row.key == model_key(model)
            elif row.kind == "speed":
                assert row.key == speed_key(model, line, BackendConfig(**(line["asked"] or {})), device)
                recorded = line["mfu"]  # by earlier versions; later records are of H200, whose peak is 989e12
                if recorded is None and line["images_per_s"] and line["macs"]:
                    passes, gpus = {"forward": 2, "train": 6}[line["mode"]], line.get("processes") or 1
                    recorded = passes * line["macs"] * line["images_per_s"] / gpus / 989e12
                assert derived(line) == ({} if recorded is None else {"mfu": pytest.approx(recorded)})
            else:
                assert row.key == operator_speed_key(model, line, device)
