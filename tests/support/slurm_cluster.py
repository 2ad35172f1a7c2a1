"""A throw-away real Slurm cluster for the tests (tests/support/slurm/slurmlab.sh), and what they ask of it.

`with cluster(LAB_GPUS=0) as slurm:` starts one in about 0.1 s; the fixture `slurm` is one of two nodes with
four declared GPUs each, shared by a session. Both skip, with the reason, where Slurm is not installed.
"""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest

from inheritune.submit.request import read_request
from inheritune.submit.sbatch import is_rehearsal, make_submission
from inheritune.submit.site import read_site
from inheritune.submit.submission import list_keys, queue_job

REPOSITORY = Path(__file__).resolve().parents[2]
COUNTING = REPOSITORY / "tests" / "support" / "slurm" / "counting.sh"
LAB = REPOSITORY / "tests" / "support" / "slurm" / "slurmlab.sh"
UNFINISHED = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "SIGNALING")


class Slurm:
    """A running cluster. `run` and what builds on it use the environment of the moment ($INHERITUNE_ROOT of
    the test)."""

    def __init__(self, conf: str):
        self.conf = conf

    def run(self, *command, check=True, cwd="/", timeout=120, **environment) -> str:
        """Standard output and error of a command, run from `cwd` (by default far from the repository)."""
        env = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "SITE_"))
        }
        env.update({"SLURM_CONF": self.conf}, **{k: str(v) for k, v in environment.items()})
        done = subprocess.run(
            [str(c) for c in command],
            env=env,
            cwd=cwd,
            check=False,
            timeout=timeout,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert not check or done.returncode == 0, f"{shlex.join(str(c) for c in command)}\n{done.stdout}"
        return done.stdout.strip()

    def submit(self, script, *words, **environment) -> str:
        """`bash SCRIPT WORDS` as a person on the login node; the id of the job it submits.

        COUNTING works on no experiment that could be checked: it is queued by what is behind the check."""
        if script == COUNTING:
            return self.submit_counting([str(w) for w in words], environment)
        printed = self.run("bash", script, *words, **environment)
        return re.search(r"^submitted job (\d+)$", printed, re.MULTILINE)[1]

    def submit_counting(self, words: list[str], environment: dict) -> str:
        """Queue counting.sh, in this process; the id of the job."""
        cwd, given = environment.pop("cwd", "/"), os.environ.copy()
        cleaned = {
            k: v for k, v in given.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "SITE_"))
        }
        whole = {**cleaned, "SLURM_CONF": self.conf, **{k: str(v) for k, v in environment.items()}}
        name = "grow" if whole.get("COUNTING_SLOTS") == "1" else "train"
        if name == "grow":
            whole.setdefault("ARRAY", "1-4%1")
        whole.setdefault("GPUS", "4")
        with self.environment(whole), chdir(cwd):
            request = read_request(
                name,
                [*words, "--no-snapshot"] if "--" not in words else ["--no-snapshot", *words],
                str(COUNTING),
            )
            site = read_site(whole)
            submission = make_submission(request, site, whole)
            keys = list_keys(request, is_rehearsal(request, whole), [], submission)
            return queue_job(request, submission, site, whole, keys).job

    @contextmanager
    def environment(self, whole: dict):
        """Let this process have the environment `whole` for a while."""
        with pytest.MonkeyPatch.context() as patch:
            for key in set(os.environ) - set(whole):
                patch.delenv(key)
            for key, value in whole.items():
                patch.setenv(key, value)
            yield

    @contextmanager
    def login(self, **environment):
        """Let this process have the environment of a login shell for a while."""
        own = ("SLURM_", "SBATCH_", "SRUN_", "SITE_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        with self.environment({**kept, "SLURM_CONF": self.conf, **environment}):
            yield

    def plan(self, job: str, *words, **environment) -> str:
        """The command that would submit `job` with these words; an array over runs has three tasks."""
        cleaned = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SITE_"))}
        whole = {**cleaned, "SLURM_CONF": self.conf, **{k: str(v) for k, v in environment.items()}}
        with self.environment(whole):
            site = read_site(whole)
        return make_submission(read_request(job, [str(w) for w in words]), site, whole, 3).line(site)

    def records(self, job: str) -> list[dict]:
        """What Slurm knows of a job; an array has one record per task (and one for those still pending)."""
        shown = self.run("scontrol", "show", "job", "-o", job)
        return [
            dict(w.split("=", 1) for w in line.split() if "=" in w)
            for line in shown.splitlines()
            if "JobId=" in line
        ]

    def ask_to_stop(self, job: str) -> None:
        """The signal that Slurm sends to a job's script before the time limit; '12_3' is task 3 of an
        array."""
        # of an array's task scancel reports, after 5 s, that it is in transition, though the signal came
        # through at once
        self.run("scancel", "--batch", "--signal=USR1", job, check=False)

    def wait(self, *jobs: str, timeout=60) -> list[dict]:
        """Wait until the jobs are at their end; their records. A job that waits to start again is not at its
        end."""

        def ended():
            records = [record for job in jobs for record in self.records(job)]
            return None if any(record["JobState"] in UNFINISHED for record in records) else records

        return self.until(ended, timeout)

    def until(self, answer, timeout=60):
        """Ask until the answer is true, and return it."""
        end = time.time() + timeout
        while not (found := answer()):
            if time.time() > end:
                raise TimeoutError(self.run("squeue", "-r", "-o", "%i %T %r") + "\n" + self.logs())
            time.sleep(0.1)
        return found

    def log(self, job: str) -> str:
        """The log of a job, or of an array's task ('12_3')."""
        path = Path(re.search(r"StdOut=(.*)", self.run("scontrol", "show", "job", job))[1])
        return path.read_text() if path.is_file() else ""

    def logs(self) -> str:
        """All logs under this test's root."""
        found = sorted(Path(os.environ["INHERITUNE_ROOT"]).glob("runs/logs/*.out"))
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in found)

    def wait_for_log(self, job: str, text: str, timeout=60) -> None:
        """Wait until the job's log holds `text`."""
        self.until(lambda: text in self.log(job), timeout)


def has_slurm() -> bool:
    """Whether Slurm is installed here."""
    return bool(shutil.which("slurmctld", path=os.environ["PATH"] + ":/usr/sbin"))


@contextmanager
def cluster(**knobs):
    """A cluster shaped by the LAB_... variables of slurmlab.sh, stopped at the end with its jobs."""
    if not has_slurm():
        pytest.skip(
            "Slurm is missing: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    folder = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")  # not tmp_path: sockets need a short path
    env = {**os.environ, **{name: str(value) for name, value in knobs.items()}}
    try:
        started = subprocess.run(
            ["bash", LAB, "up", folder], check=True, text=True, stdout=subprocess.PIPE, timeout=60, env=env
        )
        yield Slurm(shlex.split(started.stdout)[1].split("=", 1)[1])
    finally:
        subprocess.run(["bash", LAB, "down", folder], timeout=60, check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def session_cluster():
    with cluster() as running:
        yield running


@pytest.fixture
def slurm(session_cluster):
    """The session's cluster, with an empty queue."""
    yield session_cluster
    session_cluster.run("scancel", "--user", session_cluster.run("id", "-un"))
    session_cluster.until(lambda: not session_cluster.run("squeue", "-h"))
