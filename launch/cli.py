"""The command `lamabench`. Bad input gives a one-line error and exit code 2."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from ..harness.parallel import Lost, everywhere, leave
from ..harness.signals import interrupting
from ..kernels.errors import InputError
from . import streams
from .texts import COMPARE, DATA, EPILOG, QUERY, REPORT, RUNS, SWEEP

ACTIONS = ("plan", "run", "submit", "status", "retry", "cancel", "collect", "prune")
# They save nothing, so that there is nothing to continue.
READERS = ("compare", "runs", "studies", "doctor", "models", "cost", "check")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose error messages have one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def _path(text: str) -> Path:
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"no path has a NUL: {text!r}")
    return Path(os.path.expanduser(text))


def parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    top = OneLineParser(
        prog="lamabench",
        description="Compare diffusion backbones under one protocol: train, sample, score, count and time "
        "LaMamba-Diff,\nDiT and the ADM U-Net.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"lamabench {metadata.version('lamabench')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, example: str, words: str | None = None, word_help: str = "") -> OneLineParser:
        heading = "examples" if "\n" in example else "example"
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"{heading}\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if words:
            sub.add_argument("words", nargs="*", metavar=words, help=word_help)
        assert isinstance(sub, OneLineParser)
        return sub

    settings = "settings (lamabench train --defaults lists them)"
    models = add(
        "models",
        "list every model with its parameters and MACs",
        "lamabench models --json",
        "plugins=[FILE.py,…]",
        "files or modules with models of your own",
    )
    cost = add(
        "cost",
        "count parameters, MACs and FLOPs by part, and the sum that the model's paper would print",
        "lamabench cost lamamba_xl dit_xl_2 input_size=64",
        "MODEL|key=value",
        "models or runs, fields of their configuration, such as input_size=64 or window_size=4, and objective.kind=…",
    )
    help_text = "add what fvcore counts, as papers do, and what it skips; it runs the network, for up to a minute"
    cost.add_argument("--fvcore", action="store_true", help=help_text)
    check = add(
        "check",
        "check a model of your own as the tests check every registered model",
        "lamabench check model=lamamba_nano mixers=[ssm,pool] plugins=[my_mixer.py]",
        "MODEL|key=value",
        "a model, fields of its configuration, and plugins=[FILE.py,…]",
    )
    data = add("data", "check a set of images: count, decode and name what cannot be read", DATA)
    data.add_argument("action", choices=("check",), help="check decodes every image once; the next check is quick")
    data.add_argument("words", nargs="*", metavar="key=value", help="data=NAME, data.path=… and other settings of data")
    convert = add(
        "convert",
        "make a run of released weights: DiT's, guided-diffusion's, LaMamba-Diff's, or a DiT of diffusers",
        "lamabench convert DiT-XL-2-256x256.pt --to DiT-XL-2-256\n"
        "  lamabench convert 0400000.pt --config LaMamba-Diff-XL.yaml\n"
        "  lamabench convert FOLDER-of-diffusers encoder=CACHE",
        "FILE|FOLDER|key=value",
        "the weights, model=NAME or model.FIELD=… for what they do not tell, and settings of data, encoder, run …",
    )
    help_text = "the YAML file of their training (LaMamba-Diff); without it, the only one beside the weights"
    convert.add_argument("--config", type=_path, metavar="YAML", help=help_text)
    help_text = "the name of the run, which lies in run.root/weights/NAME-KEY (default: that of the file)"
    convert.add_argument("--to", metavar="NAME", help=help_text)
    encode = add(
        "encode",
        "encode a set of images by an autoencoder, once, into a cache of latents that trainings read",
        "lamabench encode data=folder data.path=imagenet/train data.size=256 encoder=stabilityai/sd-vae-ft-ema --to "
        "latents\n"
        "  torchrun --standalone --nproc-per-node 8 --no-python lamabench encode …    on eight GPUs",
        "key=value",
        "data=NAME, encoder=FOLDER or OWNER/NAME of the hub, and settings of the sections data and run; with "
        "data.flip, mirrored images are encoded too",
    )
    encode.add_argument(
        "--to", type=_path, metavar="FOLDER", help="the folder of the cache; of data.split=test: CACHE/test"
    )
    help_text = (
        "the type of the latents on disk (default: float32; float16 takes half, and rounds by more than the narrow "
        "posteriors of published autoencoders vary)"
    )
    encode.add_argument("--dtype", choices=("float32", "float16"), default="float32", help=help_text)
    help_text = "fetch the autoencoder from the Hugging Face hub if it is not in its cache"
    encode.add_argument("--download", action="store_true", help=help_text)
    help_text = "of a complete cache: read every shard, and write those again whose checksum is another one"
    encode.add_argument("--verify", action="store_true", help=help_text)
    train = add(
        "train",
        "train one model, or continue its training",
        "lamabench train model=lamamba_nano data=digits train.steps=200\n"
        "  torchrun --standalone --nproc-per-node 4 --no-python lamabench train model=dit_s_2 …    on four GPUs",
        "key=value",
        "model=NAME, data=NAME or encoder=FOLDER (latents of lamabench encode, which name their data), seed=N, and "
        "settings of the sections model, data, encoder, objective, train, backend, run",
    )
    train.set_defaults(parser=train)
    train.add_argument("--defaults", action="store_true", help="print every setting with its value, and train nothing")
    sample = add(
        "sample",
        "draw images from a trained run; other settings add another set of samples to the run",
        "lamabench sample runs/train/NAME-KEY sample.count=160 sample.steps=25 sample.method=ddim --to images.npz",
        "RUN|key=value",
        f"a run folder, and {settings} of the sections sample, evaluate, backend, run",
    )
    help_text = (
        "write the images to an .npz too (arr_0 and labels arr_1, as ADM's evaluator reads them), or to a folder"
    )
    sample.add_argument("--to", type=_path, metavar="FILE.npz|FOLDER", help=f"{help_text} of PNG files")
    evaluate = add(
        "evaluate",
        "score the samples of a run, an .npz or a folder of images against the data",
        "lamabench evaluate runs/train/NAME-KEY\n"
        "  lamabench evaluate edm.npz --as edm --study demo --generation 'sampler=heun,steps=18' data=digits",
        "RUN|FILE.npz|FOLDER|key=value",
        f"a run folder, an .npz with `images` or `arr_0` uint8 [N, H, W, C], or with --as a folder of images, and "
        f"{settings}; of a run, those of the sections sample, evaluate, run",
    )
    help_text = "record the scores of other people's samples below run.root, as a row NAME of reports"
    evaluate.add_argument("--as", dest="name", metavar="NAME", help=help_text)
    help_text = "how they were drawn: fields of a score's `generation`, or a phrase; without it: unknown"
    evaluate.add_argument("--generation", metavar="'key=value,…'", help=help_text)
    evaluate.add_argument("--study", metavar="STUDY", help="show them in the tables of this study below run.root too")
    help_text = (
        "in place of scores: the nearest training images of the first N samples (64), in pixels and in features, as "
        "pictures beside the samples, and their distances beside those of test images"
    )
    evaluate.add_argument("--neighbours", type=_positive, nargs="?", const=64, metavar="N", help=help_text)
    reference = add(
        "reference",
        "compute the moments of a set of images, for scores against it: in one pass, kept, and written as ADM's",
        "lamabench reference data=cifar10 data.path=FOLDER --out cifar10-50000.npz",
        "key=value",
        "data=NAME, and settings of the sections data, evaluate, run",
    )
    help_text = "write the moments (mu, sigma …) to a file that evaluate.reference takes"
    reference.add_argument("--out", type=_path, metavar="FILE.npz", help=help_text)
    export = add(
        "export",
        "write a trained run as a folder for other people: weights, config.json and a model card with scores",
        "lamabench export runs/train/NAME-KEY --to my-model\n"
        "  lamabench export runs/train/NAME-KEY --to hf:owner/name    needs huggingface-hub and its login",
        "RUN|key=value",
        "a run folder; sample.at=[STEP] and sample.weights=NAME choose other weights than the last averaged ones",
    )
    help_text = "the folder to write, or hf:owner/name: a repository of the Hugging Face hub, private if it is new"
    export.add_argument("--to", metavar="FOLDER|hf:OWNER/NAME", help=help_text)
    bench = add(
        "bench",
        "measure throughput and peak memory of forward passes and training steps, after checking outputs and gradients",
        "lamabench bench lamamba_xl dit_xl_2 bench.batch_size=auto bench.compile=[eager,compile] "
        "bench.input_sizes=[32,64]",
        "MODEL|key=value",
        "models or runs, fields of their configuration, and settings of the sections bench, backend, objective, run",
    )
    operators = add(
        "bench-kernels",
        "measure every backend of the operators that models call, at the models' shapes, after checking every gradient",
        "lamabench bench-kernels lamamba_xl bench.batch_size=64\n"
        "  lamabench bench-kernels lamamba_xl --operator gated_norm backend.gated_norm=triton    one backend",
        "MODEL|key=value",
        "models or runs, fields of their configuration, and settings of the sections bench, backend, run",
    )
    help_text = "measure this operator alone; repeat it for several"
    operators.add_argument("--operator", action="append", metavar="NAME", help=help_text)
    ways = bench.add_mutually_exclusive_group()
    ways.add_argument("--again", action="store_true", help="repeat measurements that are on record")
    help_text = "list the kernels of one call, by class and time, in place of measuring; records nothing"
    ways.add_argument("--profile", action="store_true", help=help_text)
    help_text = "compile and check what would be measured, for several models at a time; times and records nothing"
    ways.add_argument("--ahead", action="store_true", help=help_text)
    sweep = add("sweep", "run a study on this machine or on SLURM", SWEEP)
    help_text = "run works on this machine; submit, retry and cancel use SLURM; the others serve both"
    sweep.add_argument("action", choices=ACTIONS, help=help_text)
    sweep.add_argument("study", metavar="STUDY", help="the name of a study, or a path to its .yaml file")
    help_text = (
        "settings of every run; cluster=NAME or cluster=FILE.yaml, cluster.KEY=… for what a job gets, and "
        "cluster.stage.STAGE.KEY=… for the job of a stage, such as cluster.stage.evaluate.gpus=0 (on SLURM: run gives "
        "each job a GPU of this machine)"
    )
    sweep.add_argument("words", nargs="*", metavar="key=value", help=help_text)
    help_text = "take the study's debug size, called NAME-debug, whose runs need seconds each on a CPU"
    sweep.add_argument("--debug", action="store_true", help=help_text)
    help_text = (
        "jobs at a time (default here: one per GPU, else one per core; on SLURM, per array: cluster.parallel or 256)"
    )
    sweep.add_argument("--parallel", type=_positive, metavar="N", help=help_text)
    help_text = "run only these stages, e.g. bench, so that plan can estimate training time"
    sweep.add_argument("--stages", metavar="STAGE,…", help=help_text)
    help_text = "only the runs of these variants, such as 'window*,ssm', or runs by name"
    sweep.add_argument("--only", metavar="VARIANT,…", help=help_text)
    help_text = "submit, retry: accept uncommitted changes, and keep their diff"
    sweep.add_argument("--dirty", action="store_true", help=help_text)
    sweep.add_argument("--watch", action="store_true", help="status: refresh while a run is queued or running")
    help_text = "prune: delete full checkpoints of finished runs; their weights stay, but training cannot continue"
    sweep.add_argument("--checkpoints", action="store_true", help=help_text)
    sweep.add_argument("--yes", action="store_true", help="prune: delete without asking")
    help_text = "collect: the file to write (default: ROOT/STUDY/records.jsonl)"
    sweep.add_argument("--out", type=_path, metavar="FILE", help=help_text)
    report = add("report", "make tables and figures from records", REPORT)
    report.add_argument(
        "paths", nargs="+", type=_path, metavar="RUNS", help="folders of runs or studies, or root folders"
    )
    report.add_argument("--out", type=_path, metavar="DIR", help="the folder to write")
    help_text = "print this table of the report and write nothing; a wrong name lists them all"
    report.add_argument("--table", metavar="NAME", help=help_text)
    forms = ("terminal", "markdown", "csv", "latex", "html")
    report.add_argument("--format", choices=forms, default=forms[0], help="the format of --table (default: terminal)")
    help_text = "with --out: write the report again when records have changed, until Ctrl-C"
    report.add_argument("--watch", action="store_true", help=help_text)
    help_text = "the model whose speed the others are compared with (default: dit_xl_2 if it was measured)"
    report.add_argument("--baseline", metavar="MODEL", help=help_text)
    help_text = "a YAML file of published numbers that join those of the suite (reports/published.py has its format)"
    report.add_argument("--published", type=_path, metavar="FILE", help=help_text)
    differ = add("compare", "say whether scores differ by more than seeds do, and what else differs", COMPARE)
    help_text = (
        "A and B: folders of runs or studies, root folders, or ROOT/STUDY/VARIANT (all its seeds). B is compared with "
        "A. A study alone: its variants with the first one"
    )
    differ.add_argument("paths", nargs="+", type=_path, metavar="A|B", help=help_text)
    differ.add_argument("--metric", metavar="NAME", help="only this score, by its name in tables")
    runs = add("runs", "list runs of all studies", RUNS, "QUERY|FOLDER", QUERY)
    text = "list the studies below a root, with how many runs are done, and those of the suite that were not run"
    studies = add("studies", text, "lamabench studies run.root=FOLDER", "FOLDER", "roots (default: run.root=runs)")
    doctor = add("doctor", "show what is installed, which backends run and why others do not", "lamabench doctor")
    for sub in (
        models,
        cost,
        check,
        data,
        convert,
        encode,
        evaluate,
        reference,
        bench,
        operators,
        sweep,
        report,
        differ,
        runs,
        studies,
        doctor,
    ):
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return top


def _run(args: argparse.Namespace) -> int:
    """Run a subcommand. Only its own module is imported, because reports need no torch."""
    os.environ["MPLBACKEND"] = "agg"  # figures become files, and a notebook's backend may not be installed here
    try:
        module = importlib.import_module(f".commands.{args.command.replace('-', '_')}", __package__)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("lamabench"):
            raise
        others = "report, compare, runs and studies need only the extra reports"
        raise InputError(f"{args.command} needs {error.name}: install lamabench without --no-deps; {others}") from None
    if args.command in (*READERS, "report", "data"):
        return module.run(args)
    from ..harness.measure.timing import first_line, out_of_memory
    from .ends import STOPPED

    try:
        return module.run(args)
    except STOPPED as error:
        print(f"lamabench {args.command}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not out_of_memory(error):
            raise
        print(f"lamabench {args.command}: out of memory: {first_line(error)}", file=sys.stderr)
        return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Exit codes: 0 done, 1 a run failed or a disk is full, 2 bad input, 128 + N ended by signal N
    (130: Ctrl-C), 141 output not read.

    Of several processes (torchrun), the first one runs it, and the others help it to train and to sample."""
    streams.prepare()
    try:
        return leave(everywhere(lambda: _main(argv)) or 0)
    except (InputError, Lost) as error:  # of the environment, or of a process that did not come
        print(f"lamabench: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _refuse(top: argparse.ArgumentParser, command: str, words: Sequence[str]) -> NoReturn:
    """Name words that a command does not take, and its option that an option among them is a slip for."""
    groups = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    sub = groups.choices[command]
    assert isinstance(sub, OneLineParser)
    options = [name[2:] for action in sub._actions for name in action.option_strings if name.startswith("--")]
    slips = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    near = [close for word in slips for close in get_close_matches(word, options, 1)]
    hint = f" (did you mean --{near[0]}?)" if near else f"; choices: --{', --'.join(options)}" if slips else ""
    sub.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def _main(argv: Sequence[str] | None) -> int:
    top = parser()
    if any("\0" in word for word in (sys.argv[1:] if argv is None else argv)):
        top.error("a word contains the character NUL, which no file name has")
    args, rest = top.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(args, "words")):
        _refuse(top, args.command, rest)
    if rest:  # settings after an option
        args.words += rest
    restarts = args.command in (*READERS, "bench-kernels") or (args.command == "bench" and args.profile)
    try:
        with interrupting():
            code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not streams.unread():
            raise
        return 141
    except OSError as error:
        if (refusal := streams.refusal(error)) is None:
            raise
        print(f"lamabench {args.command}: error: {refusal[0]}", file=sys.stderr)
        return refusal[1]
    except InputError as error:
        print(f"lamabench {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        numbers = [one for one in error.args if isinstance(one, int)]
        number = signal.Signals(numbers[0] if numbers else signal.SIGINT)
        word = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        with suppress(OSError):  # the terminal was closed
            texts = [one for one in error.args if isinstance(one, str) and one]
            next_time = texts[0] if texts else f"the same command {'begins again' if restarts else 'continues'}"
            print(f"lamabench {args.command}: {word}; {next_time}", file=sys.stderr)
        return 128 + number
