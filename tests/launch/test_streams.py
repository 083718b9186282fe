"""Standard output and standard error that are closed, full, unread, or not in UTF-8; the backend of a notebook."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest
from bad_inputs import STUDY
from lamabench.launch import streams
from lamabench.launch.cli import main

SCRIPT = "import sys; from lamabench.launch.cli import main; sys.exit(main(sys.argv[1:]))"
TRAIN = [
    "train", "model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2", "data=digits",
    "data.size=8", "train.steps=40", "train.batch_size=2", "train.precision=float32", "run.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def shell(line, **environment):
    """Run a line of sh in which "$@" is lamabench."""
    words = ["sh", "-c", line, "sh", sys.executable, "-c", SCRIPT]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def test_output_that_is_full_is_one_line(capsys, monkeypatch):
    for buffering in (-1, 0):  # a buffer that is full at the end, and every write at once
        with open("/dev/full", "wb", buffering) as full:
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=not buffering))
            assert main(["cost", "dit_nano"]) == 1
            sys.stdout.flush()  # as Python does at its end
        err = capsys.readouterr().err
        assert err.startswith("lamabench cost: error: cannot write") and "No space left" in err and err.count("\n") == 1


def test_output_that_is_closed_is_no_error(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["cost", "dit_nano"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("encoding", "arrow"), [("ascii", b"\\u2192"), ("latin-1", b"\\u2192"), ("utf-8", "→".encode())]
)
def test_letters_that_the_encoding_lacks_are_escaped(tmp_path, monkeypatch, encoding, arrow):
    (tmp_path / "st.yaml").write_text(STUDY.replace("question: q", "question: a → b"), encoding="utf-8")
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding))
    assert main(["sweep", "plan", "st.yaml"]) == 0
    assert b"st: a " + arrow + b" b" in output.getvalue()


@pytest.mark.parametrize(
    "redirect", [*(pytest.param(one, marks=pytest.mark.soak) for one in (">&-", "2>&-")), ">&- 2>&- <&-"]
)
def test_closed_streams_change_no_record(tmp_path, redirect):
    done = shell(f'"$@" {" ".join(TRAIN)} {redirect}')
    assert done.returncode == 0 and "Traceback" not in done.stderr
    (record,) = tmp_path.glob("runs/trainings/*/record.jsonl")
    (line,) = record.read_text().splitlines()
    assert json.loads(line)["state"] == "done"


def test_messages_that_nobody_reads_end_no_work(tmp_path):
    done = shell(f'{{ "$@" {" ".join(TRAIN)}; echo $? >code; }} 2>&1 | head -n 1')
    assert done.stdout == "train 0/40\n"
    assert (tmp_path / "code").read_text() == "141\n"  # the last line was for standard output
    (folder,) = tmp_path.glob("runs/trainings/*")
    assert [json.loads(line)["state"] for line in (folder / "record.jsonl").open()] == ["done"]
    assert not (folder / "error.log").exists()


def test_a_report_needs_no_backend_of_a_notebook(tmp_path):
    folder = tmp_path / "models" / "dit-1"
    folder.mkdir(parents=True)
    about = dict.fromkeys(("study", "name", "model", "family", "title"), "dit")
    info = {"layout": 2, "kind": "model", "key": "1", **about, "config": {}}
    (folder / "config.json").write_text(json.dumps(info))
    done = shell('"$@" report models --out out', MPLBACKEND="module://no_such.backend")
    assert (done.returncode, done.stderr) == (0, "") and "files in out" in done.stdout


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), ("Permission denied: a/b", 2)),
        (FileExistsError(errno.EEXIST, "File exists", b"a"), ("File exists: a", 2)),
        (OSError(errno.ENOSPC, "No space left on device"), ("cannot write: No space left on device", 1)),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 999), (f"File name too long: {'x' * 299}…", 2)),
        (ConnectionError("of a library"), None),
        (OSError("of a library"), None),
    ],
)
def test_errors_of_the_file_system(error, answer):
    assert streams.refusal(error) == answer


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    def refuse(*_, **options):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/models/dit")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert main(["bench", "dit_nano"]) == 2
    assert "Permission denied" in (err := capsys.readouterr().err) and err.count("\n") == 1
