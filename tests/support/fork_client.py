"""Stands for `python` where a test or a forked verb starts other processes.

`python -m inheritune ...`, the workers of this folder and the scripts of recipes/ become forks of the server
(fork_server.py), everything else a real Python. This process stays for as long as the fork runs: it passes
signals on, the fork and all that it started are killed if this process is, and it ends as the fork did. A
process whose limits, namespaces, user or environment differ from the server's in more than what a fork can
take over is a real start. Only the standard library is imported, because this is started often."""

import array
import contextlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

FORKABLE = ("INHERITUNE_", "REHEARSE", "PYTEST_", "SLURM", "SITE_", "SBATCH", "GPUS", "TERM", "COLUMNS")
"""How the names of those variables begin that may differ between the server and a verb: nothing reads them at
import."""
OF_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
)
"""What a launch sets for its ranks. The fork sets the number of threads itself."""
UNIMPORTANT = ("PYTHONPATH", "PYTHONSAFEPATH", "PATH", "_", "SHLVL", "PWD", "OLDPWD", "LINES", "PS1")
# of Slurm's, where a node has GPUs: there are none here, whatever they say
UNIMPORTANT += ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
# read when they are needed: by wandb's `init`, and by tempfile, which a fork asks anew
UNIMPORTANT += ("WANDB_MODE", "TMPDIR")
# set in this process by libraries, once a test has called them, and read again at each call
UNIMPORTANT += ("PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR")
OF_SLURM = ("RLIMIT_CORE", "RLIMIT_RSS")
"""Limits that Slurm sets for its tasks: the size of a core file, and one that Linux does not keep."""
PATIENCE_S = 300
PID = "pid"
"""File in which the server's process id stands."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGABRT)


ANYWAY = "INHERITUNE_FORK_ANYWAY"
"""Set where it does not matter that libraries have read other variables while they were imported."""


def is_forkable(environment: dict[str, str], of_server: dict[str, str]) -> bool:
    """Whether a fork of the server can take `environment` over: what differs is read after the imports."""
    if environment.get(ANYWAY):
        return True
    paths = [dict.fromkeys(e.get("PYTHONPATH", "").split(os.pathsep)) for e in (environment, of_server)]
    names = set(environment) ^ set(of_server)
    names |= {name for name in environment if environment[name] != of_server.get(name)}
    names -= {*OF_RANKS, *UNIMPORTANT}
    return paths[0] == paths[1] and all(name.startswith(FORKABLE) for name in names)


def is_ours(argv: list[str]) -> bool:
    """Whether this is to run the package, a script of this folder or one of recipes/."""
    if argv[:1] == ["-m"]:
        return len(argv) > 1 and argv[1].partition(".")[0] == "inheritune"
    here = os.path.dirname(os.path.realpath(__file__))
    recipes = os.path.join(os.path.dirname(os.path.dirname(here)), "recipes")
    folder = os.path.dirname(os.path.realpath(argv[0])) if argv else ""
    return folder == here or folder.startswith(recipes)


def describe_process() -> dict:
    """What a fork has from the server and cannot take over from the process that asks for it."""
    names = [name for name in dir(resource) if name.startswith("RLIMIT_") and name not in OF_SLURM]
    limits = {name: getattr(resource, name) for name in names}
    namespaces = sorted(os.listdir("/proc/self/ns"))
    return {
        "limits": {name: list(resource.getrlimit(number)) for name, number in limits.items()},
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in namespaces},
        "user": [os.getuid(), os.geteuid(), os.getgid(), os.getegid()],
    }


def send_request(link: socket.socket, files: list[int], asked: dict) -> None:
    """Ask the server for a fork with these files as its standard input, output and error."""
    request = json.dumps(asked).encode()
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    link.sendmsg([struct.pack("Q", len(request))], passed)
    link.sendall(request)


def receive_number(link: socket.socket) -> int | None:
    """The next number that the server sends, a process id and then an exit code; None if it has ended."""
    answer = link.recv(8, socket.MSG_WAITALL)
    return struct.unpack("q", answer)[0] if len(answer) == 8 else None


def describe_request(argv: list[str]) -> dict:
    """All that a fork takes over from this process."""
    mask = os.umask(0)
    os.umask(mask)
    numbers = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return {
        "argv": argv,
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "umask": mask,
        "ignored": [int(number) for number in numbers],
        "blocked": [int(number) for number in blocked],
    }


def connect(address: str) -> socket.socket:
    """A connection to the server, which may still be importing."""
    end = time.monotonic() + PATIENCE_S
    while True:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(address)
            return link
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
            if time.monotonic() > end or has_ended(os.path.dirname(address)):
                raise
            time.sleep(0.02)


def has_ended(folder: str) -> bool:
    """Whether the server whose process id is in `folder` has ended, even if nobody has waited for it."""
    try:
        with open(os.path.join(folder, PID)) as file:
            server = os.pidfd_open(int(file.read()))
    except FileNotFoundError:  # it is being started
        return False
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([server], [], [], 0)[0])
    finally:
        os.close(server)


def run_fork(address: str, argv: list[str]) -> int | None:
    """Be the fork's parent for whoever started this process; returns the fork's exit code."""
    asked = describe_request(argv)
    link = connect(address)
    send_request(link, [0, 1, 2], asked)
    child = receive_number(link)
    if child is None:
        return None

    def pass_on(number: int, _) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in PASSED_ON:
        if number not in asked["ignored"]:
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    return receive_number(link)


def main(folder: str, real: str) -> None:
    """Fork, or start the Python at `real`. Never returns."""
    argv = sys.argv[1:]
    if is_ours(argv):
        with open(os.path.join(folder, "server.json")) as file:
            server = json.load(file)
        if is_forkable(dict(os.environ), server["environment"]) and describe_process() == server["process"]:
            code = run_fork(os.path.join(folder, "socket"), argv)
            if code is not None and code < 0:
                signal.signal(-code, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            os._exit(1 if code is None else code)
    os.execv(real, [real, *argv])
