"""What tests of studies on SLURM share: a small training, the command in a folder, and how far a run is."""

import io
import json
import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml
from lamabench.harness.disk import read_lines
from lamabench.harness.run import read_run
from lamabench.launch.cli import main
from safetensors.torch import load_file

STEPS = 8000  # of a training that is stopped before it ends: one core takes 300 a second, or 90 beside other work
BASE = {
    "model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
    "data.size": 8, "train.batch_size": 4, "train.precision": "float32", "run.device": "cpu",
    "run.checkpoint_every": STEPS // 2,
}  # fmt: skip
# A training that does not end between a start and the notice before a limit of a minute, 15 to 45 s later.
SLOW_STEPS = 1600
SLOW = {
    **{key: value for key, value in BASE.items() if not key.startswith("model")},
    "model": "lamamba_nano", "model.layout": "isotropic", "model.depths": [1], "model.dim": 16, "model.num_heads": 2,
    "model.mixers": ["sleep"], "run.checkpoint_every": SLOW_STEPS // 2,
}  # fmt: skip
PLUGIN = str(Path(__file__).with_name("slow.py"))
COMMAND = (sys.executable, "-c", "import sys; from lamabench.launch.cli import main; sys.exit(main())")
SLURM = ("cluster=slurm", "cluster.cpus=1", "cluster.mem_gb=1")


def write(path, **study):
    path.write_text(yaml.safe_dump({"question": "?", "base": BASE, "stages": ["train"], **study}, sort_keys=False))
    return str(path)


class Fork:
    """A command in a process of its own, forked from this one, which has imported torch."""

    def __init__(self, folder, *words, **environment):
        self.results, results = multiprocessing.Pipe(duplex=False)
        arguments = (results, folder, words, environment)
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=arguments)
        self.process.start()
        results.close()

    def _run(self, results, folder, words, environment):
        os.chdir(folder)
        os.environ.update(environment)
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = main([*words])
        results.send((code, out.getvalue(), err.getvalue()))

    def end(self):
        """Its exit code and what it wrote."""
        results = self.results.recv()
        self.process.join()
        return results


class Sweep:
    """The command in a folder, in this process: its output, and how runs stand by their names."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys

    def __call__(self, action, study, *words, code=0):
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            status = main(["sweep", action, str(study), *words])
        finally:
            os.chdir(here)
        out, err = self.capsys.readouterr()
        assert status == code, f"{out}\n{err}"
        self.err = err
        return out

    def submit(self, study, *words, action="submit", code=0):
        return [row["job"] for row in json.loads(self(action, study, *words, "--dirty", "--json", code=code))["arrays"]]

    def status(self, study, *words):
        return {row["run"]: row for row in json.loads(self("status", study, *words, "--json"))}

    def states(self, study, *words):
        return {name: row["state"] for name, row in self.status(study, *words).items()}

    def until(self, node, seconds, study, **wanted):
        node.wait(lambda: wanted.items() <= self.states(study).items(), str(wanted), seconds)


def run_folder(root, study, name):
    """The folder of a run's training, made by its first job, from the link that a submit makes."""
    assert Path(root, study, name).is_symlink()
    return Path(root, study, name).resolve()


def progress(folder):
    try:
        return json.loads((folder / "progress.json").read_text())["done"]
    except (OSError, ValueError):
        return 0


def trains(folder, start, steps=0):
    """Whether the run trains in its `start`-th start, more than `steps` steps so far. SLURM says "running" as soon as
    the batch script begins, and until the run begins its progress is of the start before."""
    starts = [line for line in read_lines(folder / "attempts.jsonl") if line["event"] == "start"]
    return len(starts) == start and progress(folder) > steps


def same(ours, theirs, step):
    """The checkpoints of a step hold the same bits, and the metrics before it are the same."""
    one, two = (load_file(folder / "checkpoints" / f"step-{step:08d}.safetensors") for folder in (ours, theirs))
    assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    lines = [
        [
            {**line, "seconds": 0, "images_per_s": 0, "waited": 0}
            for line in read_lines(folder / "metrics.jsonl")
            if line["step"] <= step
        ]
        for folder in (ours, theirs)
    ]
    assert lines[0] == lines[1] and lines[0][-1]["step"] == step


def done(folder, kind):
    """The records of a kind that are done."""
    return [row for row in read_run(folder).records if (row.kind, row.state) == (kind, "done")]


def trained_once(folder):
    return len(done(folder, "train")) == 1


def tasks(root, study, number=1):
    """What each array of a study's submission has to do: kind and folder of its tasks."""
    manifest = json.loads(Path(root, study, ".sweep", f"{number:04d}", "manifest.json").read_text())
    return [[(one["task"]["kind"], Path(one["folder"])) for one in array["tasks"]] for array in manifest["arrays"]]


def pids(folder):
    """The processes of a job by their ranks, as their working folder and environment tell."""
    processes = {}
    for entry in os.scandir("/proc"):
        try:
            with open(f"{entry.path}/environ", "rb") as file:
                variables = dict(item.split(b"=", 1) for item in file.read().split(b"\0") if b"=" in item)
            with open(f"{entry.path}/cmdline", "rb") as file:
                command = file.read()
        except OSError:
            continue
        ours = b"SLURM_PROCID" in variables and b"submitit" in command and os.fsencode(folder) in command
        if ours and b"bash" not in command.split(b"\0")[0]:
            processes[int(variables[b"SLURM_PROCID"])] = int(entry.name)
    return processes
