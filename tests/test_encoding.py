"""Text files are UTF-8 whatever the locale: every call that reads or writes text names its encoding."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("ablations", "baselines", "harness", "kernels", "launch", "models", "reports")


def calls_without(source: str) -> Iterator[int]:
    """The lines of `read_text`, `write_text`, `open` for text and `text=True` that name no encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        text = any(word.arg in ("text", "universal_newlines") for word in node.keywords)
        if name == "open" and isinstance(node.func, ast.Name):  # not that of Image, os or an archive
            modes = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
            text |= not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        if text or name in ("read_text", "write_text"):
            yield node.lineno


def test_every_call_names_its_encoding():
    files = [path for house in HOUSES for path in (ROOT / house).rglob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}" for path in files for line in calls_without(path.read_text(encoding="utf-8"))
    ]
    assert len(files) > 50 and wrong == []


def test_the_walker_sees_what_is_missing():
    wrong = ["path.read_text()", "path.write_text('a')", "open(path)", "open(path, 'w')", "run(words, text=True)"]
    right = ["path.read_text(encoding='utf-8')", "open(path, 'rb')", "open(path, mode='ab')", "Image.open(path)"]
    assert [len([*calls_without(line)]) for line in [*wrong, *right]] == [1] * 5 + [0] * 4
    assert [*calls_without("open(path, encoding='utf-8')\nrun(words, capture_output=True)")] == []
