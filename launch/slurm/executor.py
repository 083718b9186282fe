"""submitit's executor for SLURM, adapted to studies.

submitit's own executor makes a plain executor of itself for arrays, and makes no array of one task. It writes a pickle
for each task. It renames pickles and the batch file only after sbatch, when a task may already have started. It calls
sbatch once, and SBATCH_* variables override its batch file. It takes no lines of options as a person writes them, and
does not escape patterns (%j …) in the names of folders.
"""

import errno
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission
from submitit.slurm import slurm

from ...harness.disk import write_atomically
from ...kernels.errors import InputError
from ..worker import OTHER_CODE, OTHER_CODE_LINE, SETUP_FAILED, SETUP_LINE
from . import client
from .cluster import ClusterConfig

PARALLEL = 256  # tasks of an array at a time, if the cluster file does not say
# Signals would end a task that does not listen for them yet, and SLURM does not requeue a task that ended by itself.
PYTHON = f'bash -c \'trap "" USR2 TERM; exec "$@"\' task {shlex.quote(sys.executable)}'

# Ends the job at a line of cluster.setup that fails, but not at a command inside a function or in a file that it reads.
GUARD = (
    "trap 'code=$? line=$LINENO; [ ${#BASH_SOURCE[@]} -gt 1 ] || "
    f'{{ echo "{SETUP_LINE} $code: $(sed -n "${{line}}p" "$0")" >&2; exit {SETUP_FAILED}; }}\' ERR'
)


class SlurmExecutor(submitit.SlurmExecutor):
    """Queues an array of equal calls on a `cluster`. Each task reads its number from the environment.

    `stem` names its files: STEM.pkl is the call, and STEM.sh is what sbatch got. Logs and results lie beside them in
    logs/. They have submitit's names, so that `submitit.SlurmJob(logs, "JOB_TASK")` finds them. `name` is unique to
    the array, `code` is the folder of a snapshot to import, and the array starts after the jobs `after` have ended.
    Each task starts after the task of its number in the array `pair` is done; if that one fails, it is cancelled.

    Raises InputError for a folder or a setting that submitit or sbatch would read as something else.
    """

    def __init__(
        self,
        stem: Path,
        cluster: ClusterConfig,
        name: str,
        code: str | None = None,
        after: Sequence[str] = (),
        pair: str | None = None,
    ) -> None:
        check(stem)
        check(Path.cwd())
        super().__init__(stem.parent / "logs", python=PYTHON)
        self.stem, self.cluster, self.after, self.pair = stem.absolute(), cluster, after, pair
        memory = None if cluster.mem_gb is None else f"{round(1024 * cluster.mem_gb)}M"
        asked: dict[str, Any] = {
            "job_name": name,
            "partition": cluster.partition,
            "account": cluster.account,
            "qos": cluster.qos,
            "constraint": cluster.constraint,
            "time": cluster.time_min,
            "nodes": cluster.nodes,
            "ntasks_per_node": cluster.on_a_node,
            "cpus_per_task": cluster.cpus,
            "mem": memory,
            "gpus_per_node": cluster.gpus or None,
            "array_parallelism": cluster.parallel or PARALLEL,
        }
        more = {
            "requeue" if cluster.requeue else "no-requeue": True,
            "signal": f"USR2@{cluster.signal_s}",  # overrides SUBMITIT_PREEMPT_SIGNAL
            "chdir": os.getcwd(),
        }
        setup = [*self._environment(code), *self._link(), *self._snapshot(code)]
        setup += [GUARD, *cluster.setup, "trap - ERR"] if cluster.setup else []
        if cluster.nodes * cluster.on_a_node > 1:  # the others would wait for one that is gone
            asked["srun_args"] = ["--kill-on-bad-exit=1"]
        self.update_parameters(**asked, wckey=None, stderr_to_stdout=True, setup=setup, additional_parameters=more)

    @classmethod
    def affinity(cls) -> int:
        """Usable anywhere, because a batch file is also planned without SLURM (`client.check_here` asks for it)."""
        return 2

    def batch_file(self, count: int) -> str:
        """What sbatch gets for an array of `count` tasks."""
        self.parameters["map_count"] = count
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _environment(self, code: str | None) -> list[str]:
        path = [f"export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}"] if code else []
        return [
            *path,
            "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 SUBMITIT_PREEMPT_SIGNAL=USR2",
            "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK MKL_NUM_THREADS=$SLURM_CPUS_PER_TASK",
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take them over by itself",
            "export SLURM_EXPORT_ENV=ALL  # where sbatch got --export=NONE, srun would pass on none of this",
        ]

    def _link(self) -> list[str]:
        """Bash that waits until the shared folder is visible, and links the pickle that submitit looks for."""
        pickle, folder = shlex.quote(f"{self.stem}.pkl"), shlex.quote(str(self.folder))
        link = f'{folder}/"${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_submitted.pkl"'
        return [
            "for delay in 2 5 10 20 30; do",
            f"  [ -e {pickle} ] && break",
            f'  echo "$SLURMD_NODENAME does not see "{pickle}"; trying again in $delay s" >&2; sleep $delay',
            "done",
            f"[ -e {pickle} ] || exit {errno.ESTALE}",
            f"ln -sfn ../{shlex.quote(self.stem.name)}.pkl {link} || exit {errno.ENOSPC}",
        ]

    def _snapshot(self, code: str | None) -> list[str]:
        """Bash that ends the job if the snapshot is gone, because Python would import another installation."""
        if code is None:
            return []
        package = shlex.quote(f"{code}/lamabench")
        return [f'[ -d {package} ] || {{ echo "{OTHER_CODE_LINE}: "{package}" is gone" >&2; exit {OTHER_CODE}; }}']

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        # % begins a pattern of sbatch and srun.
        folder = str(self.folder).replace("%", "%%")
        text = slurm._make_sbatch_string(command=command, folder=folder, **self.parameters)
        head, mark, rest = text.partition("\n# setup\n")
        lines = [head.rstrip(), *(f"#SBATCH {option}" for option in self.cluster.options)]
        return "\n".join([*lines, mark + rest])

    def _internal_process_submissions(
        self, delayed_submissions: Sequence[DelayedSubmission]
    ) -> list[submitit.Job[Any]]:
        first, *others = delayed_submissions
        if any((one.function, one.args, one.kwargs) != (first.function, first.args, first.kwargs) for one in others):
            raise ValueError("the tasks of an array are one call, and differ only by their number in the environment")
        self.folder.mkdir(parents=True, exist_ok=True)
        first.set_timeout(self.cluster.time_min, self.max_num_timeout)
        first.dump(f"{self.stem}.pkl")
        self.parameters["map_count"] = len(delayed_submissions)
        job = self._submit_command(self._submitit_command_str)
        ranks = list(range(self._num_tasks()))
        return [
            submitit.SlurmJob(self.folder, f"{job.job_id}_{task}", tasks=ranks)
            for task in range(len(delayed_submissions))
        ]

    def _submit_command(self, command: str) -> submitit.Job[Any]:
        """Call sbatch, and retry while it does not answer. A lost answer does not queue the array twice. Raises
        SlurmError."""
        script = self.stem.with_name(f"{self.stem.name}.sh")
        write_atomically(script, self._make_submission_file_text(command, "").encode())
        return submitit.SlurmJob(self.folder, client.sbatch(script, self.parameters["job_name"], self.after, self.pair))


def check(path: Path) -> None:
    """Raise InputError for a path that submitit or sbatch would read as another one, or that has a line break."""
    if (sign := re.search(r"%[jtAa]|\n|\\", str(path.absolute()))) is not None:
        raise InputError(
            f"{str(path.absolute())!r} has {sign[0]!r} in its name, which SLURM or submitit would take for something "
            "else: start in another folder, give another run.root, or the study another name"
        )
