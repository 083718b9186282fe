"""Runs of several processes on the CPU, as torchrun starts them, and jobs of `sweep run`, as submitit starts them, but
soon: one process forks those of all runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from unittest.mock import patch

from lamabench.harness.disk import read_lines
from lamabench.harness.training.storage import read

STEPS = 80
MODEL = ["model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2"]
SMALL = [
    "data=digits", "data.size=8",
    "train.batch_size=8", "train.precision=float32", "train.lr=1e-3", "train.ema_decay=0.9", f"train.steps={STEPS}",
    "run.device=cpu", "run.log_every=7", "run.checkpoint_every=20",
]  # fmt: skip

# Imports once what each process needs, and forks the processes.
SERVER = """
import json, os, signal, sys, traceback
from types import SimpleNamespace
import sklearn.datasets, torch._dynamo, torch._inductor.standalone_compile, torch.nn.parallel
import torch.distributed.fsdp, torch.distributed.tensor
import lamabench.harness.stages, lamabench.harness.training.loop, lamabench.launch.commands.train
import lamabench.launch.worker, submitit.core.submission, submitit.local.local
from lamabench.harness.data.images import load
from lamabench.launch.cli import main
from lamabench.launch.compose import compose
config, _ = compose(["model=dit_nano", "data=digits"])
load(config.data, print)
with torch.device("meta"):
    torch.empty(2).normal_()

def end(work):
    code = 1
    try:
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

class Task:  # of a job: what its controller takes for the process of subprocess.Popen
    def __init__(self, words, env, stdout, stderr, **_):
        self.code = None
        if not (pid := os.fork()):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            for number, file in ((1, stdout), (2, stderr)):
                os.dup2(file.fileno(), number)
            sys.argv = words[-2:]
            end(submitit.core.submission.submitit_main)
        self.pid = pid

    def poll(self):
        if self.code is None:
            self.code = ended(self.pid)
        return self.code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

def ended(pid):
    pid, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None

def control(request):
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    submitit.local.local.subprocess = SimpleNamespace(Popen=Task)
    submitit.local.local.Controller(request["job"]).run()

for line in sys.stdin:
    request = json.loads(line)
    if "job" in request:
        if not (pid := os.fork()):
            end(lambda: control(request))
        print(json.dumps(pid), flush=True)
        continue
    if "poll" in request:
        print(json.dumps(ended(request["poll"])), flush=True)
        continue
    if "wait" in request:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
        print(json.dumps(codes), flush=True)
        continue
    if request["words"][0] == "encode":
        import diffusers.models.autoencoders.autoencoder_kl
    pids = []
    for rank, environment in enumerate(request["environments"]):
        if not (pid := os.fork()):
            if request["alone"]:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)
            os.chdir(request["folder"])
            os.environ.update(environment)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            end(lambda: main(request["words"]))
        pids.append(pid)
    print(json.dumps(pids), flush=True)
"""


class Start:
    """Starts runs of several processes. `ask` sends a request to the process that forks them."""

    def __init__(self, ask):
        self.ask = ask

    def __call__(self, folder, *words, model=MODEL, count=1, command=None):
        return Processes(self.ask, folder, command or ["train", *model, *SMALL, *words], count)

    def alone(self, folder, *words, **environment):
        """A command in a session of its own, as a terminal starts it: no signal is ignored."""
        return Processes(self.ask, folder, words, 1, environment)


class Processes:
    """The processes of one run, started in `folder`. `codes` waits for their ends."""

    def __init__(self, ask, folder, words, count, alone=None):
        self.ask, self.folder = ask, folder
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
        sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        environments = [{**place, **sizes, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]
        request = {"folder": str(folder), "words": words, "environments": environments, "alone": alone is not None}
        self.pids = ask(request if alone is None else {**request, "environments": [alone]})

    def kill(self, number, *ranks):
        for rank in ranks:
            os.kill(self.pids[rank], number)

    def until(self, condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, [self.text("err", rank) for rank in range(len(self.pids))]
            time.sleep(0.005)

    @property
    def codes(self):
        return self.ask({"wait": self.pids})

    def text(self, stream, rank=0):
        return (self.folder / f"{stream}-{rank}").read_text()


class Job:
    """The controller of a job: what submitit takes for the process of `subprocess.Popen`."""

    def __init__(self, ask, words, env):
        request = {"folder": os.getcwd(), "job": words[-1], "environment": env}
        self.ask, self.code = ask, None
        self.pid = ask({**request, "mask": [*map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))]})

    def poll(self):
        if self.code is None:
            self.code = self.ask({"poll": self.pid})
        return self.code


def forked_jobs(start):
    """A context: jobs of `sweep run` in this process are forks too. `start` is that of `starting`."""
    popen = SimpleNamespace(Popen=lambda words, shell, env: Job(start.ask, words, env))
    return patch("submitit.local.local.subprocess", popen)


@contextmanager
def starting():
    """Starts runs of several processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=environment, start_new_session=True)  # fmt: skip

    def ask(request):
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield Start(ask)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.communicate()


def training(folder):
    (path,) = folder.glob("runs/trainings/*")
    return path


def losses(folder):
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]


def saved(folder):
    return [int(path.stem[5:]) for path in sorted(folder.glob("runs/trainings/*/checkpoints/step-*"))]


def same(one, other, step=STEPS):
    """The same bits in the last checkpoint, the kept weights and all lines of metrics."""
    for name in ("checkpoints", "weights"):
        (ours,), (theirs,) = (list(folder.glob(f"{name}/step-{step:08d}*")) for folder in (one, other))
        ours, theirs = read(ours)[1], read(theirs)[1]
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    lines = [
        [{**line, "seconds": 0, "images_per_s": 0, "waited": 0} for line in read_lines(path / "metrics.jsonl")]
        for path in (one, other)
    ]
    assert lines[0] == lines[1]
