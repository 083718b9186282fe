"""Runs of several processes on the CPU, as torchrun starts them, but soon: one process forks those of all runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

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
import json, os, sys, traceback
import sklearn.datasets, torch._dynamo, torch._inductor.standalone_compile, torch.nn.parallel
import torch.distributed.fsdp, torch.distributed.tensor
import lamabench.harness.training.loop, lamabench.launch.commands.train
from lamabench.harness.data.images import load
from lamabench.launch.cli import main
from lamabench.launch.compose import compose
config, _ = compose(["model=dit_nano", "data=digits"])
load(config.data, print)
with torch.device("meta"):
    torch.empty(2).normal_()
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in request["wait"]]
        print(json.dumps(codes), flush=True)
        continue
    if request["words"][0] == "encode":
        import diffusers.models.autoencoders.autoencoder_kl
    pids = []
    for rank, environment in enumerate(request["environments"]):
        if not (pid := os.fork()):
            os.chdir(request["folder"])
            os.environ.update(environment)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            code = 1
            try:
                code = main(request["words"])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
"""


class Processes:
    """The processes of one run, started in `folder`. `codes` waits for their ends."""

    def __init__(self, ask, folder, words, count):
        self.ask, self.folder = ask, folder
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
        sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        environments = [{**place, **sizes, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]
        self.pids = ask({"folder": str(folder), "words": words, "environments": environments})

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

    def run(folder, *words, model=MODEL, count=1, command=None):
        return Processes(ask, folder, command or ["train", *model, *SMALL, *words], count)

    yield run
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
