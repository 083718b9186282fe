"""Standard output and standard error of the command, which may be closed, full, or in another encoding than UTF-8."""

import errno
import io
import os
import select
import sys

# Errors of the file system that end a command with one line. Those of a file are bad input: the user named it.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)


class _Unfailing(io.FileIO):
    """A file for messages. A write that fails ends nothing, such as one to a terminal that was closed."""

    def write(self, data, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def prepare() -> None:
    """Make standard output and standard error fit to be written to.

    What is closed goes to the null device: otherwise the next file that is opened, such as a record, would be standard
    output. Letters that the encoding does not have are escaped. A message that cannot be written is left out.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        messages = _Unfailing(sys.stderr.fileno(), "w", closefd=False)
        # As Python itself does for `python -u`, without a buffer between the two.
        sys.stderr = io.TextIOWrapper(messages, sys.stderr.encoding, "backslashreplace", write_through=True)  # pyright: ignore[reportArgumentType]


def unread() -> bool:
    """Whether the reader of our output is gone, as with `| head -1`. If so, the rest of the output is discarded."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if closed := any(event & select.POLLERR for _, event in poll.poll(0)):
        _discard()
    return closed


def refusal(error: OSError) -> tuple[str, int] | None:
    """An error of the file system in one line, and the exit code that it means: 2 for a file that cannot be read or
    written, 1 for a full disk or a full standard output. None for any other error."""
    try:
        sys.stdout.flush()
    except OSError as again:
        _discard()
        return f"cannot write to standard output: {again.strerror}", 1
    if error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        return f"{error.strerror}: {name if len(name) <= 300 else name[:299] + '…'}", 2
    return (f"cannot write: {error.strerror}", 1) if error.errno in FULL else None


def _discard() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
