"""`lamabench doctor`: what is installed, what each optional library is for, and which weights are missing."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

from lamabench.launch.cli import main


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "selective_scan=torch" in out and "torchvision" in out
    _, out, _ = run(capsys, "doctor", "--json")
    assert json.loads(out)["backends"]["attention"]["sdpa"] == []


def test_doctor_says_what_each_optional_library_is_for(capsys):
    """Those are the libraries of the extras: each has its line, with words behind the version."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    lines = {words[0]: words[1:] for line in run(capsys, "doctor")[1].splitlines() if (words := line.split())}
    for extra in ("cuda", "hf", "latents", "logs"):
        (libraries,) = re.findall(rf"^{extra} = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
        for library in re.findall(r'"([a-z-]+)[>=]', libraries):
            purpose = " ".join(lines[library]).removeprefix("not installed")
            assert len(purpose.split()) > 2 and (extra == "cuda" or purpose.endswith(f"extra {extra}"))


def test_doctor_says_which_weights_are_missing_and_what_fetches_them(capsys, monkeypatch):
    networks, command = "lamabench.harness.scoring.networks", "curl -fLO https://example.org/x.pth"
    for missing in ([("inception_v3", Path("/cache/x.pth"), command)], []):
        module = SimpleNamespace(missing_weights=lambda missing=missing: missing)
        monkeypatch.setitem(sys.modules, networks, module)
        assert run(capsys, "doctor")[0] == 0
        _, out, _ = run(capsys, "doctor")
        text = out.partition("\nWeights of the networks that score images\n")[2].partition("\n\n")[0]
        lines = [line.split() for line in text.splitlines()]
        assert lines == (
            [
                ["inception_v3", "missing:", "/cache/x.pth"],
                ["fetch", "it", "where", "there", "is", "internet:", *command.split()],
                "then put it there, or give evaluate.features_path=FILE".split(),
            ]
            if missing
            else [["none", "is", "missing"]]
        )
        _, out, _ = run(capsys, "doctor", "--json")
        assert json.loads(out)["missing_weights"] == [
            {"name": name, "path": str(path), "command": command} for name, path, command in missing
        ]
