"""Ctrl-C, SIGTERM and a closed terminal: single commands save at their next step, and end with one line."""

import os
import signal
import time

import pytest
from lamabench.harness import signals
from lamabench.harness.disk import read_lines
from lamabench.launch import cli

SMALL = ["model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2", "data=digits", "data.size=8",
         "train.batch_size=4", "train.precision=float32", "run.device=cpu", "run.checkpoint_every=100000"]  # fmt: skip
CONTINUES = "the same command continues"


def ended(command):
    """The exit code of a command, and its messages."""
    (code,) = command.codes
    return code, command.text("err")


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """A command in this process, which starts sooner than one of its own."""

    def run(*words):
        monkeypatch.chdir(tmp_path)
        return cli.main([*words]), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("number", "everyone", "workers", "code", "last"),
    [
        (signal.SIGINT, True, 2, 130, "interrupted"),
        (signal.SIGTERM, False, 0, 143, "ended by SIGTERM"),
        pytest.param(signal.SIGHUP, True, 0, 129, "ended by SIGHUP", marks=pytest.mark.soak),
    ],
)
def test_a_training_saves_at_its_next_step(number, everyone, workers, code, last, tmp_path, terminal, here):
    command = terminal(tmp_path, "train", *SMALL, "train.steps=200000", f"run.workers={workers}")
    command.until(lambda: list(tmp_path.glob("runs/trainings/*/progress.json")))
    (os.killpg if everyone else os.kill)(command.pids[0], number)
    status, err = ended(command)
    assert status == code, err
    assert err.splitlines()[-1] == f"lamabench train: {last}; {CONTINUES}" and "Traceback" not in err
    (saved,) = tmp_path.glob("runs/trainings/*/checkpoints/step-*")
    step = int(saved.stem[5:])
    assert 0 < step < 200000 and f"saved at step {step} of 200000" in err
    assert not list(tmp_path.glob("runs/trainings/*/record.jsonl"))

    code, out, err = here("train", *SMALL, f"train.steps={step + 2}")
    assert code == 0 and f"continuing at step {step} of {step + 2}" in err, err
    (record,) = read_lines(saved.parents[1] / "record.jsonl")
    assert record["state"] == "done" and f"{step + 2} steps" in out


def test_samples_keep_the_batches_that_are_drawn(tmp_path, terminal, here):
    assert here("train", *SMALL, "train.steps=2")[0] == 0
    (run,) = tmp_path.glob("runs/train/dit_nano-*")
    words = ["sample.count=2000", "sample.batch_size=1", "sample.method=ddim", "sample.steps=5"]
    command = terminal(tmp_path, "sample", str(run), *words)
    command.until(lambda: list(run.glob("samples/*/shards/*/*.npy")))
    command.kill(signal.SIGTERM, 0)
    code, err = ended(command)
    assert code == 143 and err.splitlines()[-1] == f"lamabench sample: ended by SIGTERM; {CONTINUES}"
    assert 0 < len(list(run.glob("samples/*/shards/*/*.npy"))) < 2000 and "Traceback" not in err
    assert not list(run.glob("samples/*/record.jsonl"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.soak)])
def test_a_command_that_does_not_save_ends_with_one_line(number, tmp_path, terminal):
    command = terminal(tmp_path, "bench", "dit_nano", "bench.seconds=60", "run.device=cpu")
    command.until(lambda: list(tmp_path.glob("runs/models/*/.lock")))
    command.kill(number, 0)
    code, err = ended(command)
    assert code == 128 + number and "Traceback" not in err
    assert err.splitlines()[-1] == f"lamabench bench: ended by {number.name}; {CONTINUES}"


@pytest.mark.parametrize(
    "command", ["compare", "runs", "studies", "doctor", "models", "cost", "check", "bench-kernels", "bench --profile"]
)
def test_a_command_that_keeps_nothing_for_the_next_has_nothing_to_continue(command, monkeypatch, capsys):
    command, *words = command.split()

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    words += {"compare": ["runs"]}.get(command, [])
    assert cli.main([command, *words]) == 130
    assert capsys.readouterr().err == f"lamabench {command}: interrupted; the same command begins again\n"


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal, even if the tests run in the background."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_ends_at_once_and_what_is_ignored_stays_so():
    with pytest.raises(KeyboardInterrupt), signals.noted():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("the second one was only noted")
    assert signals.asked() is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals.noted(), signals.interrupting():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked() is None
    finally:
        signal.signal(signal.SIGHUP, earlier)
