"""The files and commands of models/README.md work as written."""

import re
import shlex
import sys
from pathlib import Path

from lamabench import models
from lamabench.launch.cli import main
from lamabench.models import registry

PAGE = (Path(models.__file__).parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FILES = re.findall(r"Write `(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^    lamabench (.*)$", PAGE, re.MULTILINE)


def test_files_and_commands_work_as_written(tmp_path, monkeypatch, capsys, registered):
    monkeypatch.chdir(tmp_path)
    for name, source in FILES:
        Path(name).write_text(source)
    for command in COMMANDS:
        assert main(shlex.split(command)) == 0, f"lamabench {command}: {capsys.readouterr()}"
    (mixer_run,) = tmp_path.glob("runs/*/lamamba_nano-*/record.jsonl")
    (backbone_run,) = tmp_path.glob("runs/*/stack_nano-*/record.jsonl")
    assert mixer_run.stat().st_size and backbone_run.stat().st_size
    output = capsys.readouterr().out
    assert output.count("all 9 checks passed") == 2 and "WRONG" not in output


def test_the_python_code_runs(tmp_path, monkeypatch, registered):
    (tmp_path / "my_backbone.py").write_text(dict(FILES)["my_backbone.py"])
    monkeypatch.syspath_prepend(tmp_path)
    (code,) = [source for source in PYTHON if source not in dict(FILES).values()]
    try:
        scope = {}
        exec(code, scope)
    finally:
        sys.modules.pop("my_backbone", None)
    assert len(scope["net"].blocks) == 1


def test_the_page_is_complete():
    assert [name for name, _ in FILES] == ["my_mixer.py", "my_backbone.py"]
    words = {command.split()[0] for command in COMMANDS}
    assert words == {"cost", "check", "train"}
    for name in set(re.findall(r"`(kernels/[\w/.]+)`", PAGE)):
        assert (Path(models.__file__).parents[1] / name).exists(), name
    assert all(f"`{name}`" in PAGE for name in registry.SHAPE)
