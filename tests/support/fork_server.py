"""A process that has imported what the verbs need, and forks one child for each verb that a test runs.

Starting Python and importing torch, transformers and DeepSpeed takes 3 to 5 seconds, a fork 10 ms. A forked
verb is a process of its own: its own environment, working folder, signals and exit code. It is not a fresh
start of Python, so a test of imports, of the program's first moments or of variables that libraries read
while they are imported starts a real one (`FORKABLE` says which variables may differ).
"""

import array
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

FORKABLE = ("INHERITUNE_", "REHEARSE", "PYTEST_", "SLURM", "SITE_", "SBATCH", "GPUS", "TERM", "COLUMNS")
"""How the names of those variables begin that may differ between the server and a verb: nothing reads them at
import."""

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
]


class ForkServer:
    """The client's side: starts the server at the first verb, and ends it with this process."""

    def __init__(self):
        self.process = None
        self.environment: dict[str, str] = {}

    def takes(self, environment: dict[str, str]) -> bool:
        """Whether a verb in this environment may be forked: it differs from the server's in FORKABLE names
        only."""
        self.start()
        names = set(environment) ^ set(self.environment)
        names |= {name for name in environment if environment[name] != self.environment.get(name)}
        return all(name.startswith(FORKABLE) for name in names)

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.environment = dict(os.environ)
        self.folder = tempfile.TemporaryDirectory(prefix="forks")
        self.address = os.path.join(self.folder.name, "socket")
        reader, writer = os.pipe()  # it ends when this process does
        self.alive = writer
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.address, str(reader)], pass_fds=[reader], stdin=subprocess.DEVNULL
        )
        os.close(reader)

    def run(self, argv: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
        """Run `inheritune ARGV` in a fork and wait for it; its exit code and what it printed."""
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            socket.socket(socket.AF_UNIX) as link,
        ):
            while True:
                try:
                    link.connect(self.address)
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    if self.process.poll() is not None:
                        raise RuntimeError("the fork server has ended") from None
            request = json.dumps({"argv": argv, "cwd": str(cwd), "environment": environment}).encode()
            files = array.array("i", [out.fileno(), err.fileno()])
            link.sendmsg([struct.pack("Q", len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            link.sendall(request)
            answer = link.recv(8)
            if len(answer) != 8:
                raise RuntimeError("the fork server has not answered")
            (code,) = struct.unpack("q", answer)
            out.seek(0), err.seek(0)
            said = [
                file.read().decode("utf-8", errors="replace").replace("\r\n", "\n") for file in (out, err)
            ]
            return subprocess.CompletedProcess(["inheritune", *argv], code, *said)


def serve(address: str, alive: int) -> None:
    """Import, then fork for each request until the other end of the pipe `alive` is closed."""
    import importlib
    import select

    for name in PRELOADED:
        importlib.import_module(name)
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
            watch(link)
        link.close()


def watch(link: socket.socket) -> None:
    """Run one request in a child of this process, and answer with its exit code."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        first, ancillary, _, _ = link.recvmsg(8, socket.CMSG_SPACE(8))
        out, err = array.array("i", ancillary[0][2])
        (size,), request = struct.unpack("Q", first), b""
        while len(request) < size:
            request += link.recv(size - len(request))
        asked = json.loads(request)
        child = os.fork()
        if child == 0:
            link.close()
            os.dup2(out, 1), os.dup2(err, 2)
            os.close(out), os.close(err)
            begin(**asked)
        _, status = os.waitpid(child, 0)
        link.sendall(struct.pack("q", os.waitstatus_to_exitcode(status)))
    finally:
        os._exit(0)


def begin(argv: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Be `python -m inheritune ARGV`. Never returns."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        os.chdir(cwd)
        sys.path[0] = cwd
        sys.argv = ["inheritune", *argv]
        from inheritune.__main__ import start

        start()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    serve(sys.argv[1], int(sys.argv[2]))
