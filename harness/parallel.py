"""Several processes of one run, each with a GPU or a share of the cores.

torchrun or SLURM starts the processes and exports RANK, WORLD_SIZE and LOCAL_RANK. The first process (rank 0) does what
a single process does: it reads settings, holds locks, and writes files and messages. The others wait until it calls
them, to train, to draw or to measure, and end with its exit code. A single process has no process group, and everything
here leaves its numbers as they are.

What the processes say to each other goes through torch's TCPStore and gloo. Gradients on GPUs go through NCCL.
"""

import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..kernels.errors import InputError
from . import signals
from .launcher import check_address, gone, identity, rank, size

if TYPE_CHECKING:
    from torch import Tensor

START_S = 600.0  # how long the processes wait for each other at the start
TIMEOUT = timedelta(minutes=30)  # of a collective call: what takes longer hangs
LOOK_S = 0.1  # seconds between two looks for a message
LOST_S = 2.0  # how long the first process waits for the others to end, if one of them is gone
LEAVE_S = 5.0  # how long a process that works may take to end by itself after the first one has ended
GONE = "is gone without a word"
WORDS_S = 3.0  # how long to wait for the last words of a process that was lost

_store: Any = None  # torch's TCPStore, of all processes
_sent = 0
_lost = False  # whether a process is gone, so that the group cannot be left in order
_ending = threading.Lock()


class Lost(RuntimeError):
    """Another process of the run failed or is gone."""


class Agreed(InputError):
    """Bad input that all processes know of: one of them met it, and all raise it at the same point."""


def quiet() -> None:
    """Before torch is imported: let it not warn, with C++ tracebacks, of a process that is gone, nor of a network
    without unused parameters."""
    if size() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def everywhere(work: Callable[[], int | None], port: Path | None = None) -> int | None:
    """Do `work` in the first process, while the others do what it calls for. Returns its exit code in every process.

    `port` is a file on a shared file system in which the first process writes the port that it listens on; None: the
    environment names a port (torchrun). Raises Stopped if a signal came before all processes were there.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's
        signals.end_with_parent(signal.SIGTERM)
    own = rank()
    if size() == 1:
        return work()
    quiet()
    if port is None:
        check_address()
    try:
        _join(port)
    finally:
        if port is not None and own == 0:
            port.unlink(missing_ok=True)
    code = _lead(work) if own == 0 else _follow()
    if not _lost:
        import torch.distributed as dist

        dist.destroy_process_group()
    return code


def leave(code: int) -> int:
    """The exit code, if the interpreter can end in order. After the loss of another process, this ends the process at
    once: the end of the interpreter would free the CUDA graph of a step, whose call of NCCL never returns."""
    if _lost:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _join(port: Path | None) -> None:
    global _store, _sent
    import torch
    import torch.distributed as dist
    from torch.distributed import (
        PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
        TCPStore,  # pyright: ignore[reportPrivateImportUsage]
        rendezvous,  # pyright: ignore[reportPrivateImportUsage]
    )

    _sent, limit = 0, timedelta(seconds=START_S)
    if port is None:
        _store = next(rendezvous("env://", timeout=limit))[0]
    elif rank() == 0:  # the system chooses a free port
        _store = TCPStore("0.0.0.0", 0, is_master=True, timeout=limit, wait_for_workers=False)
        temporary = port.with_name(f".{port.name}.tmp")
        temporary.write_text(f"{_store.port}\n", encoding="utf-8")
        os.replace(temporary, port)
    else:
        _until(port.exists, "the first process")
        number = int(port.read_text(encoding="utf-8"))
        _store = TCPStore(os.environ["MASTER_ADDR"], number, is_master=False, timeout=limit)
    _store.set(f"process/{rank()}", identity())
    _store.add("joined", 1)
    _until(lambda: _store.add("joined", 0) >= size(), f"all {size()} processes")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    store = PrefixStore("group", _store)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=size(), timeout=TIMEOUT)


def _until(condition: Callable[[], bool], what: str) -> None:
    """Wait in Python, which signals interrupt. Raises Lost after START_S seconds."""
    end = time.monotonic() + START_S
    while not condition():
        signals.check()
        if time.monotonic() > end:
            raise Lost(f"process {rank()} waited {START_S:g} s for {what} of the run")
        time.sleep(LOOK_S)


def _send(message: dict[str, Any]) -> None:
    global _sent
    _store.set(f"message/{_sent}", json.dumps(message))
    _sent += 1


# Where the function `join` of each kind of work is.
JOIN = {"train": ".training.loop", "sample": ".sampling", "bench": ".measure.models", "encode": ".encoding"}
TOGETHER = ("train", "bench")  # work in which all processes wait for each other at every step


def call(work: str, **values: Any) -> None:
    """In the first process: have the others call `join` of a kind of work (JOIN) with these arguments, plain data."""
    if size() > 1:
        _send({"work": work, "values": values})


def end(code: int | None) -> None:
    """In the first process: tell the others to end with an exit code, and wait for a moment until those that still run
    know. A second call does nothing."""
    if size() == 1 or _store is None or not _ending.acquire(blocking=False):
        return
    with suppress(RuntimeError):  # of a launcher that is gone
        _send({"end": code})
        limit, others = time.monotonic() + (LOST_S if _lost else 2 * LEAVE_S), range(1, size())
        while others and time.monotonic() < limit:
            time.sleep(LOOK_S)
            others = [one for one in others if not (_store.check([f"heard/{one}"]) or _ended(one))]


def _ended(number: int) -> bool:
    """Whether a process of the run ended on this machine."""
    return gone(_store.get(f"process/{number}").decode())


def _lead(work: Callable[[], int | None]) -> int | None:
    code: int | None = 1
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1 if error.code else 0
        raise
    finally:
        end(code)
    return code


def _follow() -> int | None:
    """Do what the first process calls for, and return its exit code: 1 if it is gone or if this process failed."""
    global _lost
    signals.listen()
    number = 0
    try:
        while True:
            while not _store.check([f"message/{number}"]):
                if _ended(0):  # which torchrun's store outlives
                    raise Lost(f"the first process {GONE}")
                time.sleep(LOOK_S)
            message = json.loads(_store.get(f"message/{number}"))
            number += 1
            if "end" in message:
                _store.set(f"heard/{rank()}", "")
                return message["end"]
            done, watched = threading.Event(), _others() if message["work"] in TOGETHER else _others()[:1]
            threading.Thread(target=_leave, args=(done, watched, number), daemon=True).start()
            try:
                import_module(JOIN[message["work"]], __package__).join(**message["values"])
            except (Agreed, signals.Stopped):
                pass
            finally:
                done.set()
    except Exception as error:
        from .measure.timing import out_of_memory

        _lost = True
        if not (broken(error) or isinstance(error, Lost | InputError) or out_of_memory(error)):
            traceback.print_exc()  # a fault of the program, of which the first process writes one line only
        return 1


def _leave(done: threading.Event, others: list[str], number: int | None = None) -> None:
    """End this process if one of `others` has ended while this one still works, perhaps in a call of NCCL that never
    returns. `number`: the message in which the first process may say that it ends; None in the first process."""
    told = False
    while not done.wait(LOOK_S * 5):
        with suppress(RuntimeError):  # of a store that ended with the first process
            told = number is not None and _store.check([f"message/{number}"])
        if not told and not any(gone(one) for one in others):
            continue
        if done.wait(LEAVE_S):
            return
        if number is None:
            print(f"lamabench: {_last_words()}", file=sys.stderr, flush=True)
        code = json.loads(_store.get(f"message/{number}"))["end"] if told else 1
        if told:
            _store.set(f"heard/{rank()}", "")
        os._exit(code or 0)


def _others() -> list[str]:
    """The identities of the other processes."""
    return [_store.get(f"process/{one}").decode() for one in range(size()) if one != rank()]


def most(number: int) -> int:
    """The largest of the numbers of all processes."""
    if size() == 1:
        return number
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def stopping() -> bool:
    """Whether a signal came to any of the processes. All note it, so that all end alike."""
    own = signals.asked()
    if (number := most(own or 0)) and own is None:
        signals.take(number)
    return number > 0


def heed() -> None:
    """Between two parts of work that each process does by itself: raise Stopped if a signal came to any of them, and
    Lost, with its words, if one failed."""
    if size() > 1 and _store is not None:
        if _store.check(["stop"]):
            signals.take(int(_store.get("stop")))
        if _store.check(["failure"]):
            raise Lost(_store.get("failure").decode())
    signals.check()


def gather(value: Any) -> list[Any]:
    """The values, plain data, of all processes, in their order."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def mean_(tensor: "Tensor") -> None:
    """Replace a tensor by its mean over all processes."""
    if size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
        tensor /= size()


def check(error: Exception | None) -> None:
    """Raise in each of several processes if there is an error in one of them: its own, or Agreed for bad input and in
    all but the first, or Lost."""
    if not most(error is not None):
        return
    texts = gather(None if error is None else [isinstance(error, InputError), _words(error)])
    bad, text = next(one for one in texts if one is not None)
    if bad or rank():
        raise Agreed(text) from None
    raise error if error is not None else Lost(text)


@contextmanager
def agreeing() -> Iterator[None]:
    """At the end of the block, every process raises if one of them did (`check`)."""
    if size() == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    check(error)


@contextmanager
def attending(work: str) -> Iterator[None]:
    """Around a kind of work (JOIN) of all processes. The others learn of an error of this process. An error that comes
    from the loss of another process becomes Lost, with the words of that process."""
    global _lost
    if size() == 1:
        yield
        return
    done = threading.Event()
    if rank() == 0 and work in TOGETHER:
        threading.Thread(target=_leave, args=(done, _others()), daemon=True).start()
    try:
        yield
    except (signals.Stopped, Agreed):
        if own := signals.asked():  # wherever this process noticed it; `heed` of the others looks for it
            _store.set("stop", str(int(own)))
        raise
    except Exception as error:
        _lost = True
        if not broken(error):
            with suppress(RuntimeError):
                _store.set("failure", _words(error))
            raise
        if signals.asked():
            raise signals.Stopped(f"{signals.asked()} during training: a process is gone") from error
        raise Lost(_last_words()) from error
    finally:
        done.set()


def broken(error: BaseException) -> bool:
    """Whether an error means that the connection to another process is gone."""
    import torch.distributed as dist

    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    plain = type(error) is RuntimeError and any(word in str(error).lower() for word in words)
    return plain or isinstance(error, dist.DistError)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    where = f"process {rank()} of {size()} on {platform.node()}: " if rank() else ""
    return f"{where}{kind}{text}"[:500]


def _last_words() -> str:
    end = time.monotonic() + WORDS_S
    with suppress(RuntimeError):
        while time.monotonic() < end:
            if _store.check(["failure"]):
                return _store.get("failure").decode()
            time.sleep(LOOK_S)
    return f"one of the {size()} processes of the run {GONE} (killed, perhaps for its memory)"


def facts(device: str, **values: Any) -> list[dict[str, Any]]:
    """What every process has: `host`, `device` (its name) and `values`, which must be the same in all of them.

    Raises Agreed, in all of them, for a value that differs and for two processes with one GPU.
    """
    import torch

    from .device import device_name, is_cuda

    gpu = str(torch.cuda.get_device_properties(device).uuid) if size() > 1 and is_cuda(device) else None
    everyone = gather({"host": platform.node(), "device": device_name(device), "gpu": gpu, **values})
    for number, other in enumerate(everyone):
        for name in values:
            if other[name] != everyone[0][name]:
                raise Agreed(
                    f"process {number} on {other['host']} has another {name} than the first on "
                    f"{everyone[0]['host']}: {other[name]}, not {everyone[0][name]}"
                )
        same = [one for one in everyone[:number] if other["gpu"] and one["gpu"] == other["gpu"]]
        if same:
            raise Agreed(f"process {number} on {other['host']} has the GPU of another process: start one for each GPU")
    return everyone
