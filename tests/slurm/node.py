#!/usr/bin/env python3
"""A real SLURM node for tests: `node.py up` sets it up, `node.py down` leaves nothing of it. `node.py start second`
starts a second node on the same machine, the other one of the partition `pair`.

All state (configuration, logs, database, key, sockets) is in one folder, `--state`. SLURM's own commands find the node
through that folder: `eval "$(tests/slurm/node.py env)"; sbatch …`. Needs root, on Debian or Ubuntu, but neither systemd
nor cgroups. The packages that `up` installs stay installed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from packages import PackagesError, install, last_line

PACKAGES = "slurm-wlm munge slurmdbd mariadb-server".split()
PROGRAMS = "munged mariadbd mariadb-install-db mariadb-admin slurmdbd slurmctld slurmd sbatch sacct sacctmgr".split()
DAEMONS = "munged mariadbd slurmdbd slurmctld slurmd".split()  # in the order in which each needs the one before
SECOND = "second"  # the slurmd of the second node, which only some tests need
HOST = socket.gethostname().split(".")[0]
CPUS = 16  # logical: SLURM is told so whatever the machine has, so that small jobs run side by side on two cores
STATE = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp", "lamabench-slurm")
MARK = "lamabench-slurm-node"  # a folder with this file in it is ours to delete
READY_S = 30.0  # how long a daemon may take until it answers
STOP_S = 10.0  # how long a daemon may take to stop before it is killed

SLURM_CONF = """\
ClusterName=lamabench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
# Jobs run as whoever submits them, which is root.
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also the time that a requeued job waits before it may start again (default 120 s).
AuthInfo=socket={state}/munge.socket,cred_expire=5
StateSaveLocation={state}/slurmctld
SlurmdSpoolDir={state}/slurmd-%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
# Containers have no cgroups to give away: follow processes by their parents, bind and limit nothing.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
# With munge this is no password: it is the socket that the commands use towards slurmdbd (AuthInfo is not).
AccountingStoragePass={state}/munge.socket
# The script of a job whose node was lost is queued again.
JobRequeue=1
# A node that was down is used again as soon as its slurmd is back.
ReturnToService=2
# A node whose slurmd is silent this long is down (default 300 s).
SlurmdTimeout=15
# A returning slurmd that does not know a job older than this plus MessageTimeout has lost it (default 10 s).
BatchStartTimeout=2
# From SIGTERM to SIGKILL at the time limit and on scancel (default 30 s).
KillWait=3
# What has ended is soon known to sacct only, as on a busy cluster (default 300 s).
MinJobAge=20
# How long a command waits for an answer; also bounds how long sbatch tries while slurmctld is away (default 10 s).
MessageTimeout=5
SchedulerType=sched/backfill
# Start jobs at once; the defaults wait seconds to save work on large clusters.
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
# CPUs and memory are what jobs share out. Without a default memory the first job would take all of it.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={mem_per_cpu}
# Believe CPUs= below; otherwise a node with fewer real ones is drained.
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory}
NodeName={host}-second NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs={cpus} RealMemory={memory}
# A job of the partition `urgent` takes the place of others: they are told so, and queued again after GraceTime at most.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes={host} Default=YES DefaultTime=5 MaxTime=1-0 GraceTime=15 State=UP
PartitionName=urgent Nodes={host} PriorityTier=2 DefaultTime=5 MaxTime=1-0 State=UP
PartitionName=pair Nodes={host},{host}-second DefaultTime=5 MaxTime=1-0 State=UP
"""

SLURMDBD_CONF = """\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
PidFile={state}/slurmdbd.pid
# No StorageHost or password: the database has a socket only (MYSQL_UNIX_PORT), and that lets root in as root.
StorageType=accounting_storage/mysql
StorageUser=root
StorageLoc=slurm_acct_db
"""


class NodeError(Exception):
    """What went wrong, in one line."""


def commands(state: Path) -> dict[str, list[str]]:
    """How each daemon is started, in the foreground; all of them as root, all of their files in `state`."""
    return {
        "munged": ["munged", "--foreground", f"--key-file={state}/munge.key", f"--socket={state}/munge.socket",
                   f"--pid-file={state}/munged.pid", f"--seed-file={state}/munge.seed",
                   f"--log-file={state}/log/munged.log"],
        # --no-defaults comes first or is refused. Not flushing each commit is safe here: the data dies with the node.
        "mariadbd": ["mariadbd", "--no-defaults", "--user=root", f"--datadir={state}/mariadb", "--skip-networking",
                     f"--socket={state}/mariadb.socket", f"--pid-file={state}/mariadbd.pid",
                     "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"],
        "slurmdbd": ["slurmdbd", "-D"],
        "slurmctld": ["slurmctld", "-D", "-f", f"{state}/slurm.conf"],
        "slurmd": ["slurmd", "-D", "-N", HOST, "-f", f"{state}/slurm.conf"],
        SECOND: ["slurmd", "-D", "-N", f"{HOST}-second", "-f", f"{state}/slurm.conf"],
    }  # fmt: skip


def environment(state: Path) -> dict[str, str]:
    """The environment of the daemons and of SLURM's commands; slurmdbd looks for its file beside SLURM_CONF."""
    return {**os.environ, "SLURM_CONF": f"{state}/slurm.conf", "MYSQL_UNIX_PORT": f"{state}/mariadb.socket"}


def call(state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one command, at most 20 s; its exit status and output are the caller's to judge."""
    try:
        return subprocess.run(words, env=environment(state), capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", "no answer within 20 s")


def free_ports(count: int) -> list[int]:
    """Neighbouring free TCP ports below those that the kernel gives away: a daemon must find its port free again."""
    for base in range(26817, 32000, 10):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("0.0.0.0", base + offset))
            return list(range(base, base + count))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise NodeError("no free TCP ports between 26817 and 32000")


def write_state(state: Path) -> None:
    """Configuration, key and empty database. slurm.conf comes last: where it is, the rest is complete."""
    if (state / "slurm.conf").exists():
        return
    if state.exists() and any(state.iterdir()):
        down(state)  # ours but half written, or an error
    if len(f"{state}/mariadb.socket") > 100:
        raise NodeError(f"{state} is too long for a socket (100 characters); name another folder with --state")
    state.mkdir(mode=0o755, parents=True, exist_ok=True)
    (state / MARK).touch()
    for name in ("log", "pid", "slurmctld", f"slurmd-{HOST}", f"slurmd-{HOST}-second"):
        (state / name).mkdir(mode=0o755)
    key = state / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    done = call(
        state, "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={state}/mariadb", "--skip-test-db",
        "--auth-root-authentication-method=socket",
    )  # fmt: skip
    if done.returncode:
        (state / "log/mariadbd.log").write_text(done.stdout + done.stderr)
        raise NodeError(f"no database: {last_line(done.stderr)} (log: {state}/log/mariadbd.log)")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20  # MiB, as SLURM counts
    ports = dict(zip(("dbd_port", "ctld_port", "slurmd_port", "second_port"), free_ports(4), strict=True))
    facts = {
        "state": state, "host": HOST, "cpus": CPUS, "memory": memory, "mem_per_cpu": memory // CPUS, **ports,
    }  # fmt: skip
    private = state / "slurmdbd.conf"
    private.touch(mode=0o600)  # slurmdbd refuses a file that others can read
    private.write_text(SLURMDBD_CONF.format(**facts))
    (state / "slurm.conf").write_text(SLURM_CONF.format(**facts))


def alive(pid: int, name: str) -> bool:
    """Is process `pid` running, and still this program? A dead one that nobody has waited for counts as stopped."""
    try:
        comm, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        return False
    return comm == ("slurmd" if name == SECOND else name) and rest.split()[0] not in "ZX"


def pid_of(state: Path, name: str) -> int | None:
    try:
        pid = int((state / "pid" / name).read_text())
    except (OSError, ValueError):
        return None
    return pid if alive(pid, name) else None


def wait_for(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def ask(state: Path, name: str) -> str:
    """Ask the daemon something through its own client: empty if it does its work, else what the client says."""
    words = {
        "munged": ["munge", "--no-input", f"--socket={state}/munge.socket"],
        "mariadbd": ["mariadb-admin", "--no-defaults", f"--socket={state}/mariadb.socket", "ping"],
        "slurmdbd": ["sacctmgr", "--noheader", "list", "cluster"],
        "slurmctld": ["scontrol", "ping"],
        "slurmd": ["sinfo", "--noheader", "--format=%T", "--partition=test"],
        SECOND: ["sinfo", "--noheader", "--format=%T", f"--nodes={HOST}-second"],
    }[name]
    done = call(state, *words)
    if done.returncode:
        return last_line(done.stderr or done.stdout)
    if name in ("slurmd", SECOND) and done.stdout.strip() not in ("idle", "mixed", "allocated"):
        return f"sinfo calls the node {done.stdout.strip()}"  # a trailing * means that slurmd is silent
    return ""


def start(state: Path, name: str) -> None:
    """Start a daemon unless it runs; return when it answers. Raises NodeError with the log's last line."""
    log = state / "log" / f"{name}.log"
    if pid_of(state, name) is None:
        with log.open("ab") as out:
            process = subprocess.Popen(
                commands(state)[name], env=environment(state), cwd=state, stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True,
            )  # fmt: skip
        (state / "pid" / name).write_text(str(process.pid))
    if wait_for(READY_S, lambda: pid_of(state, name) is None or not ask(state, name)) and pid_of(state, name):
        return
    if pid_of(state, name):
        raise NodeError(f"{name} does not answer: {ask(state, name)} (log: {log})")
    raise NodeError(f"{name} stopped: {last_line(log.read_text(errors='replace'))} (log: {log})")


def stop(state: Path, name: str, with_signal: signal.Signals = signal.SIGTERM) -> None:
    """Stop a daemon and return when it is gone; jobs run on without it."""
    pid = pid_of(state, name)
    if pid is None:
        return
    os.kill(pid, with_signal)
    if not wait_for(STOP_S, lambda: not alive(pid, name)):
        os.kill(pid, signal.SIGKILL)
        wait_for(STOP_S, lambda: not alive(pid, name))


def job_processes(state: Path) -> Iterator[int]:
    """This node's slurmstepd processes (one a job step), what carries a job's environment, and all below them."""
    children: dict[int, list[int]] = {}
    pids: list[int] = []
    mark = f"SLURM_CONF={state}/slurm.conf".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                comm, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
                children.setdefault(int(rest.split()[1]), []).append(int(entry.name))
                variables = (entry / "environ").read_bytes().split(b"\0")
                in_job = comm == "slurmstepd" or any(one.startswith(b"SLURM_JOB_ID=") for one in variables)
                if in_job and mark in variables:
                    pids.append(int(entry.name))
            except OSError:
                continue
    while pids:
        pid = pids.pop()
        pids += children.get(pid, [])
        yield pid


def crash(state: Path) -> None:
    """Kill slurmd and every job at once, as when the machine loses power; `start slurmd` is the power coming back."""
    stop(state, "slurmd", signal.SIGKILL)
    pids = list(job_processes(state))
    for with_signal in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, nobody sees and reports the end of another
        for pid in pids:
            try:
                os.kill(pid, with_signal)
            except ProcessLookupError:
                continue


def up(state: Path) -> None:
    """Everything from packages to an idle node; what already runs is left as it is."""
    install(PACKAGES, PROGRAMS)
    write_state(state)
    for name in DAEMONS:
        start(state, name)
        if name == "slurmdbd":
            # Says "already exists" the second time; whether it worked shows in sacct below.
            call(state, "sacctmgr", "--immediate", "add", "cluster", "lamabench")
    if not wait_for(READY_S, lambda: call(state, "sacct", "--noheader").returncode == 0):
        raise NodeError(
            f"sacct does not answer: {last_line(call(state, 'sacct').stderr)} (log: {state}/log/slurmdbd.log)"
        )


def down(state: Path) -> None:
    """Stop jobs and daemons, delete the folder."""
    if not state.exists():
        return
    if not (state / MARK).exists():
        raise NodeError(f"{state} is no folder of a test node; name another with --state (nothing was touched)")
    crash(state)
    for name in (SECOND, *reversed(DAEMONS)):
        stop(state, name)
    shutil.rmtree(state)


def status(state: Path) -> bool:
    """Print a line for each daemon; True if the node is up."""
    running = [name for name in DAEMONS if pid_of(state, name)]
    for name in DAEMONS:
        print(f"{name:10} {f'process {pid_of(state, name)}' if name in running else 'not running'}")
    trouble = ask(state, "slurmd") if running == DAEMONS else "not all daemons run"
    print(f"{'node':10} {trouble or 'ready'}")
    print(f"{'folder':10} {state}{'' if state.exists() else ' (none)'}")
    return not trouble


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=STATE, help=f"folder for everything (default: {STATE})")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("up", help="set up and start; returns when the node is idle and sacct answers")
    actions.add_parser("down", help="kill jobs, stop the daemons, delete the folder")
    actions.add_parser("status", help="a line for each daemon; exit status 0 if all is up, 1 otherwise")
    actions.add_parser("env", help='print what SLURM\'s commands need: eval "$(…/node.py env)"')
    actions.add_parser("crash", help="kill slurmd and every job at once, as a power cut does")
    for action, text in (("start", "start"), ("stop", "stop (SIGTERM)"), ("kill", "kill (SIGKILL)")):
        actions.add_parser(action, help=f"{text} one daemon").add_argument("daemon", choices=[*DAEMONS, SECOND])
    args = parser.parse_args()
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # where daemons are, for root by `su`
    state = args.state.resolve()
    if args.action == "env":
        print(f"export SLURM_CONF={state}/slurm.conf")
        return 0
    try:
        if os.geteuid():
            raise NodeError("needs root: munge, SLURM and the database run as one user who may switch to others")
        if args.action == "status":
            return 0 if status(state) else 1
        if args.action not in ("up", "down") and not (state / "slurm.conf").exists():
            raise NodeError(f"no node in {state}; set one up: {sys.argv[0]} up")
        whole = {"up": up, "down": down, "crash": crash}
        if args.action in whole:
            whole[args.action](state)
        elif args.action == "start":
            start(state, args.daemon)
        else:
            stop(state, args.daemon, signal.SIGKILL if args.action == "kill" else signal.SIGTERM)
    except (NodeError, PackagesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
