"""The command `lamabench`. Bad input is one line and exit code 2."""

import argparse
import importlib
import os
import select
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from ..ablations.study import StudyError
from ..kernels.errors import InputError

EPILOG = """examples
  lamabench models                                       every model, with parameters and MACs
  lamabench cost lamamba_xl dit_xl_2 input_size=64       where the multiply-adds go, at 512 px
  lamabench train model=lamamba_nano data=digits train.steps=200 train.batch_size=32
  lamabench sample runs/train/lamamba_nano-digits-ID sample.count=64 sample.method=ddim sample.steps=25
  lamabench evaluate runs/train/lamamba_nano-digits-ID
  lamabench bench dit_nano lamamba_nano bench.batch_size=8
  lamabench bench-kernels lamamba_xl bench.batch_size=64 every backend of the scan, the attention and so on
  lamabench sweep run demo                               three backbones from training to a report
  lamabench report runs/demo --out out/demo

A setting is key=value, as in Hydra: model=NAME and data=NAME choose, train.lr=1e-3 sets. Started again, the same
command continues where it stopped."""

QUEUED = ("submit", "status", "retry", "cancel", "collect", "prune")
SWEEP = """lamabench sweep plan demo                               the runs, nothing is written
  lamabench sweep run demo                                do what is missing, on this machine
  lamabench sweep submit demo cluster=slurm --parallel 8  … as job arrays, 8 runs at a time; returns at once
  lamabench sweep status demo --watch                     how every run stands, here or there
  lamabench sweep retry demo cluster.mem_gb=64            what failed, with more memory
  lamabench sweep cancel demo                             end the jobs; what runs saves first
  lamabench sweep collect demo                            all records of the study's runs in one file
  lamabench sweep prune demo                              delete what no study names any more"""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    top = OneLineParser(
        prog="lamabench",
        description="What does a diffusion backbone buy for its compute? Train, score, cost and time LaMamba-Diff, "
        "DiT and the ADM U-Net under one protocol.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"lamabench {metadata.version('lamabench')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, example: str, words: str | None = None, word_help: str = "") -> OneLineParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if words:
            sub.add_argument("words", nargs="*", metavar=words, help=word_help)
        assert isinstance(sub, OneLineParser)
        return sub

    settings = "settings, key=value (lamabench train --help lists the sections)"
    models = add(
        "models",
        "list every model with its parameters and MACs",
        "lamabench models --json",
        "plugins=[FILE.py,…]",
        "files or modules with models of your own",
    )
    cost = add(
        "cost",
        "count parameters, MACs, FLOPs and the paper's own sum, split by part",
        "lamabench cost lamamba_xl dit_xl_2 input_size=64",
        "MODEL|key=value",
        "models, and fields of their configuration such as input_size=64 or window_size=4",
    )
    check = add(
        "check",
        "ask of a model of your own what the tests ask of every registered one",
        "lamabench check model=lamamba_nano mixers=[ssm,pool] plugins=[my_mixer.py]",
        "MODEL|key=value",
        "a model, fields of its configuration, and plugins=[FILE.py,…]",
    )
    train = add(
        "train",
        "train one model; started again, it continues",
        "lamabench train model=lamamba_nano data=digits train.steps=200",
        "key=value",
        "model=NAME, data=NAME, and settings of the sections model, data, train, backend, run; seed=N",
    )
    train.set_defaults(parser=train)
    train.add_argument("--defaults", action="store_true", help="print every setting with its default and stop")
    add(
        "sample",
        "draw images from a trained run; with settings, into a run of its own",
        "lamabench sample runs/train/NAME-ID sample.count=64 sample.steps=25 sample.method=ddim",
        "RUN|key=value",
        f"a run folder, and {settings}",
    )
    evaluate = add(
        "evaluate",
        "score the samples of a run, or an .npz of images, against the data",
        "lamabench evaluate runs/train/NAME-ID",
        "RUN|FILE.npz|key=value",
        f"a run folder or an .npz with `images` uint8 [N, H, W, C], and {settings}",
    )
    bench = add(
        "bench",
        "measure throughput and peak memory of forward passes and training steps, after checking outputs and gradients",
        "lamabench bench lamamba_xl dit_xl_2 bench.batch_size=auto bench.compile=[eager,compile] "
        "bench.input_sizes=[32,64]",
        "MODEL|key=value",
        "models, fields of their configuration, and settings of the sections bench, backend, run",
    )
    operators = add(
        "bench-kernels",
        "measure every backend of the operators that models call, at their shapes, after checking every gradient",
        "lamabench bench-kernels lamamba_xl bench.batch_size=64",
        "MODEL|key=value",
        "models, fields of their configuration, and settings of the sections bench, run",
    )
    bench.add_argument("--again", action="store_true", help="measure anew what the records hold already")
    sweep = add("sweep", "do a study, all its runs, here or on SLURM", SWEEP)
    sweep.add_argument("action", choices=["plan", "run", *QUEUED], help="plan and run: here; the others: on SLURM")
    sweep.add_argument("study", metavar="STUDY", help="a study's name, or a path to its .yaml file")
    help_text = "settings for every run; cluster=NAME or cluster=FILE.yaml, and cluster.KEY=… for what a job asks for"
    sweep.add_argument("words", nargs="*", metavar="key=value", help=help_text)
    sweep.add_argument("--debug", action="store_true", help="the study's debug size: seconds on a CPU, NAME-debug")
    help_text = "runs at a time (default: here a core each, one on a GPU; on SLURM what the cluster says, or all)"
    sweep.add_argument("--parallel", type=_positive, metavar="N", help=help_text)
    help_text = "of the study's stages only these: bench, say, for plan to know what training costs on this GPU"
    sweep.add_argument("--stages", metavar="STAGE,…", help=help_text)
    help_text = "only the runs of these variants, such as 'window*,ssm'"
    sweep.add_argument("--only", metavar="VARIANT,…", help=help_text)
    sweep.add_argument("--dirty", action="store_true", help="submit a tree with changes, and keep their diff")
    sweep.add_argument("--watch", action="store_true", help="status: look again and again while something runs")
    help_text = "prune: full checkpoints of finished runs, whose weights stay; they cannot be trained further then"
    sweep.add_argument("--checkpoints", action="store_true", help=help_text)
    sweep.add_argument("--yes", action="store_true", help="prune: do not ask")
    sweep.add_argument("--out", type=Path, metavar="FILE", help="collect: the file to write (RUNS/STUDY/records.jsonl)")
    report = add("report", "make tables and figures from records", "lamabench report runs/demo --out out/demo")
    report.add_argument("paths", nargs="+", type=Path, metavar="RUNS", help="run, study or root folders")
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    help_text = "whose speed the others' is compared with (default: dit_xl_2 where it was measured)"
    report.add_argument("--baseline", metavar="MODEL", help=help_text)
    doctor = add("doctor", "say what is installed, which backends run and why others do not", "lamabench doctor")
    for sub in (models, cost, check, evaluate, bench, operators, sweep, report, doctor):
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return top


def _run(args: argparse.Namespace) -> int:
    """Run a subcommand. Only its own module is imported: reports need no torch."""
    module = importlib.import_module(f".commands.{args.command.replace('-', '_')}", __package__)
    if args.command in ("report", "doctor", "models", "cost", "check"):
        return module.run(args)
    from .ends import STOPPED

    try:
        return module.run(args)
    except STOPPED as error:
        print(f"lamabench {args.command}: {error}", file=sys.stderr)
        return 1


def _unread() -> bool:
    """Whether nobody reads our output any more, as below `| head -1`; what is left of it goes nowhere then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if closed := any(event & select.POLLERR for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit code: 0 done, 1 a run failed, 2 bad input, 130 interrupted, 141 unread."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(args, "words")):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings after an option
        args.words += rest
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _unread():
            raise
        return 141
    except (InputError, StudyError) as error:
        print(f"lamabench {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lamabench {args.command}: interrupted; the same command continues", file=sys.stderr)
        return 130
