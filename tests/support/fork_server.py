"""A process that has imported what the verbs need, and forks one child for each verb that a test runs, for
each rank and step that such a verb starts, and for the workers of this folder.

Starting Python and importing torch, transformers and DeepSpeed takes 3 to 8 seconds, a fork 10 ms. A forked
verb is a process of its own: its own environment, working folder, signals and exit code. It is not a fresh
start of Python, so a test of imports, of the program's first moments or of variables that libraries read
while they are imported starts a real one. fork_client.py is what asks for a fork.
"""

import array
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from fork_client import ANYWAY, PID, connect, describe_process, is_forkable, receive_number, send_request

PRELOADED = [
    "torch.distributed",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "safetensors.torch",
    "inheritune.cli",
    "inheritune.training.loop",
    "inheritune.cluster.grow",
    "inheritune.cluster.status",
    "inheritune.evaluation.evaluate",
    "inheritune.evaluation.export",
    "inheritune.data.prepare",
    "inheritune.models.surgery",
    "inheritune.analysis.attention",
    "inheritune.planning.plan",
    "inheritune.paper.tables",
    "inheritune.paper.figures",
    "inheritune.submit.job_start",
    "inheritune.submit.job_end",
    "matplotlib.figure",
    "matplotlib.style",
    "distutils.ccompiler",
]

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""What libraries read while they are imported, and most tests of `evaluate` set."""
FOR_EVALUATE = ["lm_eval.tasks", "lm_eval.models.huggingface", "lm_eval.evaluator"]

ENVIRONMENT = dict(os.environ)
"""That of all tests, which conftest.py completes: one of them may set what the server cannot start with."""

CLIENT = """#!{python} -IS
import sys
sys.path.insert(0, {support!r})
import fork_client
fork_client.main({folder!r}, {python!r})
"""


class ForkServer:
    """The client's side: starts the server at the first verb, and ends it with this process. The server has
    imported with the variables `own` set, and the modules `more` beside PRELOADED."""

    def __init__(self, own: dict[str, str] | None = None, more: Sequence[str] = ()):
        self.process = None
        self.environment: dict[str, str] = {}
        self.own, self.more = own or {}, more

    def takes(self, environment: dict[str, str]) -> bool:
        """Whether a verb in this environment may be forked."""
        if any(environment.get(name) != value for name, value in self.own.items()):
            return False
        self.start()
        return is_forkable(environment, self.environment)

    def python(self) -> str:
        """Path of the program that stands for `python` (fork_client.py)."""
        self.start()
        return os.path.join(self.folder.name, "python")

    def on_path(self, anyway: bool = False) -> dict[str, str]:
        """Variables with which a shell script's `python` is that program; `anyway`: also where the script
        sets variables that libraries read while they are imported."""
        path = f"{os.path.dirname(self.python())}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, **({ANYWAY: "1"} if anyway else {})}

    def start(self) -> None:
        """Start the server unless it runs."""
        if self.process is not None and self.process.poll() is None:
            return
        self.environment = {**ENVIRONMENT, **self.own}
        self.folder = tempfile.TemporaryDirectory(prefix="forks")
        write_client(Path(self.folder.name), self.environment)
        self.address = os.path.join(self.folder.name, "socket")
        reader, writer = os.pipe()  # it ends when this process does
        self.alive = writer
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.address, str(reader), *self.more],
            env=self.environment,
            pass_fds=[reader],
            stdin=subprocess.DEVNULL,
        )
        os.close(reader)
        written = Path(self.folder.name) / "pid.new"
        written.write_text(str(self.process.pid))
        written.rename(written.with_name(PID))

    def run(self, argv: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
        """Run `inheritune ARGV` in a fork and wait for it; its exit code and what it printed."""
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            open(os.devnull) as nothing,
            connect(self.address) as link,
        ):
            asked = {"argv": ["-m", "inheritune", *argv], "cwd": str(cwd), "environment": environment}
            send_request(link, [nothing.fileno(), out.fileno(), err.fileno()], asked)
            receive_number(link)
            code = receive_number(link)
            if code is None:
                raise RuntimeError("the fork server has not answered")
            out.seek(0), err.seek(0)
            said = [
                file.read().decode("utf-8", errors="replace").replace("\r\n", "\n") for file in (out, err)
            ]
            return subprocess.CompletedProcess(["inheritune", *argv], code, *said)


FORKS = ForkServer()
"""The server of this process."""
OFFLINE_FORKS = ForkServer(OFFLINE, FOR_EVALUATE)
"""A second one, which has imported lm_eval too, as on a machine without internet."""


def choose_server(environment: dict[str, str]) -> ForkServer | None:
    """The server that may fork a verb in this environment."""
    return next((server for server in (FORKS, OFFLINE_FORKS) if server.takes(environment)), None)


def write_client(folder: Path, environment: dict[str, str]) -> None:
    """Write the program that stands for `python` in forked verbs, and what it compares itself with."""
    facts = {"environment": environment, "process": describe_process()}
    (folder / "server.json").write_text(json.dumps(facts))
    names = {"python": sys.executable, "support": str(Path(__file__).parent), "folder": str(folder)}
    (folder / "python").write_text(CLIENT.format(**names))
    (folder / "python").chmod(0o755)


def serve(address: str, alive: int, more: list[str]) -> None:
    """Import PRELOADED and `more`, then fork for each request until the other end of the pipe `alive` is
    closed."""
    import importlib

    for name in [*PRELOADED, *more]:
        importlib.import_module(name)
    gc.freeze()  # a fork's collections leave out what is imported: 0.1 s each
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(16)
    os.rename(address + ".new", address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait for the verbs
    while True:
        ready, _, _ = select.select([listener, alive], [], [])
        if alive in ready:
            return
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os.close(alive)
            watch(link, os.path.join(os.path.dirname(address), "python"))
        link.close()


def watch(link: socket.socket, python: str) -> None:
    """Run one request in a child of this process, and answer with its process id and its exit code. The child
    is killed if the process that asked for it has ended."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        first, ancillary, _, _ = link.recvmsg(8, socket.CMSG_SPACE(12))
        files = list(array.array("i", ancillary[0][2]))
        (size,), request = struct.unpack("Q", first), b""
        while len(request) < size:
            request += link.recv(size - len(request))
        asked = json.loads(request)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)  # with all that it starts, it ends with the process that asked for it
            link.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
            for file in files:
                os.close(file)
            begin(python, **asked)
        for file in files:
            os.close(file)
        link.sendall(struct.pack("q", child))
        ended = os.pidfd_open(child)
        ready, _, _ = select.select([link, ended], [], [])
        if ended not in ready:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        link.sendall(struct.pack("q", os.waitstatus_to_exitcode(status)))
    finally:
        os._exit(0)


def begin(
    python: str,
    argv: list[str],
    cwd: str,
    environment: dict[str, str],
    umask: int | None = None,
    ignored: tuple[int, ...] = (),
    blocked: tuple[int, ...] = (),
) -> None:
    """Be `python ARGV`. Never returns."""
    code = 1
    try:
        take_over(environment, umask, ignored, blocked)
        os.chdir(cwd)
        sys.executable = python
        if argv[0] == "-m":
            if environment.get("PYTHONSAFEPATH"):
                del sys.path[0]
            else:
                sys.path[0] = cwd
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0], sys.argv = os.path.dirname(os.path.abspath(argv[0])), argv
            runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def take_over(environment: dict[str, str], umask: int | None, ignored, blocked) -> None:
    """Have the environment, and what else a process inherits, of the process that asked for this one."""
    threads = environment.get("OMP_NUM_THREADS")
    if threads != os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads) if threads else os.cpu_count() or 1)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    if umask is not None:
        os.umask(umask)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
