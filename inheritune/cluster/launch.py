"""Starting a verb as other processes: ranks on this machine, or the tasks of a Slurm job's srun line.

Local ranks are started here and not by torchrun, which also works. Compared with torchrun of torch 2.13:

- A run that saved and stopped at SIGTERM or SIGHUP exits with 0; after Ctrl-C a shell shows 130. torchrun
  exits with 1 and a traceback each time.
- SIGUSR1 is passed on. It ends torchrun at once, and the ranks train on.
- A save may take any time. torchrun kills the ranks 30 s after the signal.
- A second Ctrl-C ends all processes at once. torchrun waits 30 s for ranks that do not answer.
- The ranks' store listens on the loopback interface. torchrun's listens on all interfaces.

A launcher that is killed leaves its ranks behind either way. torchrun names a rank that a signal ended; here
only the exit code shows the signal (256 minus its number).
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

from inheritune.config.paths import REPOSITORY
from inheritune.errors import UserError
from inheritune.runtime import launcher, signals
from inheritune.runtime.rendezvous import find_free_port


def launch_verb(verb: list[str], procs: int, as_step: bool = True) -> int:
    """Run `python -m inheritune VERB ...` as `procs` processes on this machine, or, with `as_step` inside a
    Slurm job, as the tasks of $INHERITUNE_LAUNCH (an srun line, slurm/job.sh).

    Returns the exit code of the first process that failed, or 0. The other processes are then ended, because
    they would wait for the failed one forever. A signal that asks this process to save reaches the ranks as
    SIGUSR1, since srun would answer a SIGTERM by killing its tasks. A second Ctrl-C ends them."""
    signals.listen_for_signals()
    step = as_step and _has_launch_line()
    tasks: list[subprocess.Popen] = []

    def end() -> None:
        _end_tasks(tasks, gently=step)

    signals.exit_callbacks.append(end)
    try:
        if step:
            _start_step(tasks, verb)
        else:
            _start_ranks(tasks, verb, procs)
        return _wait_for_tasks(tasks)
    finally:
        end()
        signals.exit_callbacks.remove(end)


def _wait_for_tasks(tasks: list[subprocess.Popen]) -> int:
    """Pass signals on until all processes have finished, or one has failed. Returns the exit code."""
    n_passed = 0
    while any(process.poll() is None for process in tasks):
        failed = next((process.returncode for process in tasks if process.poll()), 0)
        if failed:
            time.sleep(1)  # gives the others time to print what they know
            return failed
        for _ in signals.received[n_passed:]:
            n_passed += 1
            for process in tasks:
                if process.poll() is None:
                    process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    return next((process.returncode for process in tasks if process.returncode), 0)


def _has_launch_line() -> bool:
    return launcher.is_in_batch_script(os.environ) and bool(os.environ.get("INHERITUNE_LAUNCH"))


def _start_step(tasks: list[subprocess.Popen], verb: list[str]) -> None:
    """Start the srun of a Slurm job's script, which starts the ranks on the job's nodes."""
    command = [*shlex.split(os.environ["INHERITUNE_LAUNCH"]), "python", "-m", "inheritune", *verb]
    if not shutil.which(command[0]):
        raise UserError(
            f"'{command[0]}', with which this job starts its ranks (INHERITUNE_LAUNCH), is not on the PATH"
        )
    tasks.append(subprocess.Popen(command, env=_make_environment(1)))


def _start_ranks(tasks: list[subprocess.Popen], verb: list[str], procs: int) -> None:
    """Start `procs` processes on this machine, which are ranks of one launch if there are several."""
    # in a job's script, this may be Python inside a container image
    image = os.environ.get("INHERITUNE_PYTHON") if launcher.is_in_batch_script(os.environ) else None
    command = [*shlex.split(image or shlex.quote(sys.executable)), "-m", "inheritune", *verb]
    if not shutil.which(command[0]):
        raise UserError(f"'{command[0]}', which is to start Python (INHERITUNE_PYTHON), is not on the PATH")
    port = find_free_port()
    for rank in range(procs):
        own = launcher.Launch(rank, procs, rank, port=port).variables(port) if procs > 1 else {}
        # no signal may end a rank before it listens; the starter of an image keeps its own handling
        with contextlib.nullcontext() if image else signals.hold_signals():
            tasks.append(subprocess.Popen(command, env={**_make_environment(procs), **own}))


def _make_environment(procs: int) -> dict[str, str]:
    """Return what the processes of a launch share: this repository, their share of the cores, and nothing of
    the launch of this process."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = str(max(1, (os.cpu_count() or 1) // procs))
    inherited = launcher.remove_launch(os.environ)
    return {"OMP_NUM_THREADS": threads, **inherited, "PYTHONPATH": path, signals.CHILD: "1"}


def _end_tasks(tasks: list[subprocess.Popen], gently: bool) -> None:
    """End the processes that still run: ranks by SIGKILL, an srun (`gently`) by SIGTERM, which also ends its
    tasks."""
    for process in tasks:
        if gently and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        if process.poll() is None:
            process.kill()
    for process in tasks:
        process.wait()
