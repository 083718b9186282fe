"""submitit's executor as we use it: the batch file, one pickle an array, sbatch with patience; no SLURM needed."""

import inspect
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import submitit
from lamabench.kernels.errors import InputError
from lamabench.launch import worker
from lamabench.launch.slurm import client
from lamabench.launch.slurm.cluster import ClusterConfig, load
from lamabench.launch.slurm.executor import SlurmExecutor
from submitit.core import core, job_environment, submission, utils
from submitit.local import local
from submitit.slurm import slurm


def test_submitit_has_the_names_that_we_rely_on():
    """Its private ones too: another release may have others, which is why the version is pinned."""
    asked = {"command", "folder", "map_count", "job_name", "partition", "account", "qos", "constraint", "time", "nodes"}
    asked |= {"ntasks_per_node", "cpus_per_task", "mem", "gpus_per_node", "array_parallelism", "wckey", "setup"}
    asked |= {"stderr_to_stdout", "additional_parameters"}
    assert asked <= set(inspect.signature(slurm._make_sbatch_string).parameters)
    for name in ("_internal_process_submissions", "_submit_command", "_make_submission_file_text", "_num_tasks"):
        assert callable(getattr(submitit.SlurmExecutor, name))
        assert name in inspect.getsource(slurm) + inspect.getsource(core)
    assert isinstance(submitit.SlurmExecutor._submitit_command_str, property)
    assert "python" in inspect.signature(submitit.SlurmExecutor).parameters
    started = inspect.signature(local.start_controller).parameters
    assert {"folder", "command", "cuda_devices", "timeout_min", "stderr_to_stdout"} <= set(started)
    assert {"folder", "job_id", "process"} <= set(inspect.signature(local.LocalJob).parameters)
    assert {"function", "args", "kwargs"} <= set(vars(utils.DelayedSubmission(print)))
    assert {"set_timeout", "dump", "result"} <= set(dir(utils.DelayedSubmission))
    paths = utils.JobPaths("/f", "7_3", 0)
    assert str(paths.stdout) == "/f/7_3_0_log.out" and str(paths.submitted_pickle) == "/f/7_3_submitted.pkl"
    # SystemExit of the worker passes through what catches its exceptions, and its signal handlers are set before.
    text = inspect.getsource(submission.process_job)
    assert "except Exception as" in text and "BaseException" not in text
    assert text.index("_handle_signals") < text.index("delayed.result()")
    assert job_environment._PREEMPT_SIG_ENV == "SUBMITIT_PREEMPT_SIGNAL"


SRUN = 'srun() { while [[ $1 == --* ]]; do [[ $1 == --output ]] && shift; shift; done; "$@"; }\n'


def run_batch(text, folder, *, task=0, **environment):
    """Run a batch file with a srun that does what it is told, here; in the environment that sbatch makes for a task."""
    env = {"PATH": os.environ["PATH"], "SLURM_CPUS_PER_TASK": "3", "SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "7"}
    env |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", **environment}
    words = ["bash", text] if isinstance(text, Path) else ["bash", "-c", SRUN + text]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """An sbatch that gives job id 7 and leaves its arguments and environment in a file."""
    (tools := tmp_path / "tools").mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    (tools / "sbatch").write_text(f'#!/bin/sh\n(printf "%s\\n" "$@"; env) > {tools}/got; echo 7\n')
    (tools / "sbatch").chmod(0o755)
    return lambda: (tools / "got").read_text().splitlines()


def test_a_batch_file_is_bash_and_asks_for_what_the_cluster_says(tmp_path, sbatch):
    asked = load("example", ["cluster.mem_gb=0.5", "cluster.parallel=4"])
    text = SlurmExecutor(tmp_path / "a b" / "array-0", asked, "n", "/code dir").batch_file(12)
    wanted = "array=0-11%4 partition=gpu account=my-project qos=normal constraint=a100 time=720 cpus-per-task=8"
    wanted += " mem=512M gpus-per-node=1 signal=USR2@120 requeue open-mode=append exclude=node013 nodes=1"
    wanted += f" ntasks-per-node=1 job-name=n chdir={shlex.quote(os.getcwd())}"
    for line in [*wanted.split(), f"output='{tmp_path}/a b/logs/%A_%a_0_log.out'"]:
        assert f"\n#SBATCH --{line}\n" in text
    assert "wckey" not in text and "--error" not in text and "requeue=" not in text
    assert not (tmp_path / "a b").exists()  # a plan writes nothing
    plain = SlurmExecutor(tmp_path / "array-0", ClusterConfig(requeue=False), "n").batch_file(1000)
    assert "#SBATCH --array=0-999%256\n" in plain and "#SBATCH --no-requeue\n" in plain
    assert not [key for key in ("gpus", "mem", "partition", "account") if f"#SBATCH --{key}" in plain]


@pytest.mark.parametrize(
    ("cluster", "nodes", "tasks", "gpus"),
    [
        (ClusterConfig(gpus=4, nodes=2), 2, 4, 4),
        (ClusterConfig(tasks_per_node=2), 1, 2, None),
        (ClusterConfig(gpus=1), 1, 1, 1),
    ],
)
def test_a_job_has_a_task_for_each_gpu(cluster, nodes, tasks, gpus, tmp_path):
    """One task that dies ends the others, which would wait for it."""
    text = SlurmExecutor(tmp_path / "array-0", cluster, "n").batch_file(1)
    assert f"#SBATCH --nodes={nodes}\n" in text and f"#SBATCH --ntasks-per-node={tasks}\n" in text
    assert (f"#SBATCH --gpus-per-node={gpus}\n" in text) if gpus else "gpus" not in text
    assert ("--kill-on-bad-exit=1" in text) == (nodes * tasks > 1) and "_%t_log.out" in text


def test_a_task_finds_its_call_and_the_environment_that_was_asked_for(tmp_path, sbatch):
    """From the batch file to submitit's result, for both tasks of an array that has one pickle."""
    names = ("PYTHONPATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "SRUN_CPUS_PER_TASK", "SLURM_EXPORT_ENV", "MINE")
    names = (*names, "PYTHONSAFEPATH", "SUBMITIT_EXECUTOR", "SLURM_ARRAY_TASK_ID")
    (folder := tmp_path / "o'brien 100%1").mkdir()
    asked = ClusterConfig(setup=["export MINE=1"])
    probe = lambda: {name: os.environ[name] for name in names}  # noqa: E731  travels by value
    (code := tmp_path / "code dir" / "lamabench").mkdir(parents=True)
    jobs = SlurmExecutor(folder / "array-0", asked, "n", str(code.parent)).submit_array([probe] * 2)
    assert [(type(job), job.job_id) for job in jobs] == [(submitit.SlurmJob, "7_0"), (submitit.SlurmJob, "7_1")]
    assert len(list(folder.rglob("*.pkl"))) == 1
    for task, job in enumerate(jobs):
        text = (folder / "array-0.sh").read_text()
        done = run_batch(text, tmp_path, task=task, PYTHONPATH="/mine", SUBMITIT_PREEMPT_SIGNAL="NONE")
        assert done.returncode == 0, done.stderr
        assert submitit.SlurmJob(folder / "logs", job.job_id).result() == {
            "PYTHONPATH": f"{code.parent}:/mine",
            "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "SRUN_CPUS_PER_TASK": "3",
            "SLURM_EXPORT_ENV": "ALL", "MINE": "1", "PYTHONSAFEPATH": "1", "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_ARRAY_TASK_ID": str(task),
        }  # fmt: skip


def test_a_line_of_the_setup_that_fails_ends_the_job(tmp_path, sbatch):
    """The log names it. What fails inside a function, in a file that is read, or where it may is no failure."""
    (read := tmp_path / "read.sh").write_text("false\ntrue\n")
    fine = [
        "f() { false; true; }",
        "f",
        f"source {read}",
        "false || true",
        "if false; then",
        "  :",
        "fi",
        "export A=1 # x",
    ]
    fine += ["cat > /dev/null <<END", "a case of 'text", "END"]
    cases = [
        (fine, 0, ""),
        ([*fine, "module() { return 3; }", "module load nosuch # why"], 58, "code 3: module load nosuch # why"),
        (["if true; then", "  nosuch --x", "fi"], 58, "code 127:   nosuch --x"),
        (["false"], 58, "code 1: false"),
        (["exit 28"], 28, ""),
    ]
    for place, (lines, code, words) in enumerate(cases):
        stem = tmp_path / str(place) / "array"
        stem.parent.mkdir()
        SlurmExecutor(stem, ClusterConfig(setup=lines), "n").submit_array([lambda: 1])
        (file := stem.with_suffix(".run")).write_text(f"{SRUN}{stem.with_suffix('.sh').read_text()}")
        done = run_batch(file, tmp_path)
        assert done.returncode == code, done.stderr
        assert (f"cluster.setup failed with exit {words}\n" in done.stderr) == bool(words), done.stderr
        assert bool(list(stem.parent.glob("logs/*_result.pkl"))) == (not code)


def test_a_snapshot_that_is_gone_ends_the_job(tmp_path, sbatch):
    SlurmExecutor(tmp_path / "array", ClusterConfig(), "n", "/nowhere/code").submit_array([lambda: 1])
    done = run_batch((tmp_path / "array.sh").read_text(), tmp_path)
    assert done.returncode == 41
    assert done.stderr.splitlines()[-1] == "not the code that was submitted: /nowhere/code/lamabench is gone"


def test_sbatch_gets_no_option_from_below_the_head(tmp_path):
    """Bash takes such a line of cluster.setup for a comment, as sbatch does."""
    asked = ClusterConfig(setup=["echo\n#SBATCH --exclusive", "#SBATCH --partition=other"])
    (tmp_path / "a.sh").write_text(SlurmExecutor(tmp_path / "array", asked, "n").batch_file(1))
    assert not {"--exclusive", "--partition=other"} & {*client._options(tmp_path / "a.sh")}
    assert "--job-name=n" in client._options(tmp_path / "a.sh")


def test_a_notice_before_the_task_listens_does_not_kill_it(tmp_path, sbatch):
    """Sent as soon as Python runs, before submitit reads the pickle; later it is the worker that listens."""
    text = SlurmExecutor(tmp_path / "array", ClusterConfig(), "n").batch_file(1)
    (tmp_path / "array.pkl").touch()
    (tmp_path / "logs").mkdir()
    (early := tmp_path / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 12); os.kill(os.getpid(), 15)")
    done = run_batch(text, tmp_path, PYTHONPATH=str(early.parent))
    assert done.returncode == 1 and "EOFError" in done.stderr  # it got as far as the empty pickle


@pytest.mark.parametrize(("name", "code"), [("back", 0), ("gone", 116)])
def test_a_folder_that_is_away_is_waited_for(name, code, tmp_path, sbatch):
    (folder := tmp_path / name).mkdir()
    SlurmExecutor(folder / "array", ClusterConfig(), "n").submit_array([lambda: 1])
    text = (folder / "array.sh").read_text().replace("sleep $delay", f"mv {folder}/array.away {folder}/array.pkl")
    (folder / "array.pkl").rename(folder / ("array.away" if name == "back" else "array.lost"))
    done = run_batch(text, tmp_path, SLURMD_NODENAME="node1")
    assert done.returncode == code and f"node1 does not see {folder}/array.pkl; trying again in 2 s" in done.stderr


@pytest.mark.parametrize("name", ["a", "o'brien", "a#2", 'a "b"', "%5", "100%"])
def test_folders_of_any_name_reach_sbatch_whole(name, tmp_path):
    """An open quote in a #SBATCH line is an error of sbatch's, # begins a comment, and % a pattern."""
    text = SlurmExecutor(tmp_path / name / "array", ClusterConfig(), "n").batch_file(1)
    (tmp_path / "a.sh").write_text(text)
    doubled = str(tmp_path / name).replace("%", "%%")
    assert f"--output={doubled}/logs/%A_%a_0_log.out" in client._options(tmp_path / "a.sh")
    assert shlex.split(text.splitlines()[-1])[:4] == [
        "srun",
        "--unbuffered",
        "--output",
        f"{doubled}/logs/%A_%a_%t_log.out",
    ]
    assert subprocess.run(["bash", "-n", tmp_path / "a.sh"]).returncode == 0


@pytest.mark.parametrize("name", ["1%j", "%A", "x%ay", "%t", "a\nb", "back\\slash"])
def test_folders_that_would_be_read_as_another_are_refused(name, tmp_path):
    with pytest.raises(InputError, match="in its name") as caught:
        SlurmExecutor(tmp_path / name / "array", ClusterConfig(), "n")
    assert "\n" not in str(caught.value)


def test_variables_of_slurm_change_nothing_that_was_asked_for(tmp_path, monkeypatch, sbatch):
    """Those that a profile exports, and those of an interactive job from which a study is submitted."""
    (tmp_path / "tools" / "squeue").write_text("#!/bin/sh\nenv | grep -c ^SQUEUE_STATES || true\n")
    (tmp_path / "tools" / "squeue").chmod(0o755)
    given = {"SQUEUE_STATES": "all", "SLURM_CONF": "/etc/a", "SLURM_MEM_PER_CPU": "100", "SBATCH_ACCOUNT": "other"}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    asked = ClusterConfig(account="ours", options=["--comment='a b'  # why", "-w node1"])
    stem = tmp_path / "a b" / "array"

    def got(*after):
        SlurmExecutor(stem, asked, "n", after=after).submit_array([print] * 2)
        return sbatch()

    words, script = got("7"), f"{stem}.sh"
    wanted = {"--account=ours", "--requeue", "--comment=a b", "-w", "node1", "--array=0-1%2"}
    wanted |= {f"--output={stem.parent}/logs/%A_%a_0_log.out"}
    assert wanted <= {*words} and words.index("--dependency=afterany:7") + 1 == words.index(script)
    assert "SLURM_CONF=/etc/a" in words and "SLURM_MEM_PER_CPU=100" in words
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    words = got()
    assert "SLURM_CONF=/etc/a" in words and "SLURM_MEM_PER_CPU=100" not in words
    assert client.call("squeue") == "0\n"


def test_an_answer_that_got_lost_does_not_queue_twice(tmp_path, monkeypatch, sbatch):
    """The first sbatch queues and fails; then squeue knows the name. The call is on disk before that."""
    tools, stem = tmp_path / "tools", tmp_path / "array"
    lost = f"#!/bin/sh\n[ -s {stem}.pkl ] && echo sbatch >> {tools}/calls\necho 'Socket timed out' >&2; exit 1\n"
    (tools / "sbatch").write_text(lost)
    (tools / "squeue").write_text(f'#!/bin/sh\necho squeue "$@" >> {tools}/calls; echo "9|9"\n')
    (tools / "squeue").chmod(0o755)
    monkeypatch.setattr(client, "DELAYS_S", (0.0,))
    (job,) = SlurmExecutor(stem, ClusterConfig(), "mine").submit_array([print])
    calls = (tools / "calls").read_text().splitlines()
    assert job.job_id == "9_0" and calls[0] == "sbatch" and len(calls) == 2 and "--name=mine" in calls[1]


def test_an_array_is_one_call(tmp_path, sbatch):
    with pytest.raises(ValueError, match="are one call"):
        SlurmExecutor(tmp_path / "array", ClusterConfig(), "n").map_array(print, [1, 2])
    assert not (tmp_path / "array.pkl").exists()
    executor = SlurmExecutor(tmp_path / "array", replace(ClusterConfig(), tasks_per_node=2), "n")
    jobs = executor.map_array(worker.work, ["/manifest.json"] * 3, [4] * 3)
    assert [job.num_tasks for job in jobs] == [2, 2, 2]
    call = utils.DelayedSubmission.load(tmp_path / "array.pkl")
    assert call.function is worker.work and call.args == ("/manifest.json", 4)
    assert re.search(r"lamabench\.launch\.worker", (tmp_path / "array.pkl").read_bytes().decode("latin1"))


def test_code_of_an_installed_package_needs_no_path(tmp_path):
    assert "PYTHONPATH" not in SlurmExecutor(tmp_path / "a", ClusterConfig(), "n", None).batch_file(1)
    assert Path(tmp_path, "a") == SlurmExecutor(Path(tmp_path, "a"), ClusterConfig(), "n").stem
