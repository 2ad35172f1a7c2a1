"""Ranks: joining the process group under srun, torchrun, `deepspeed`, mpirun or plainly (launcher.py), the
few collectives that are used, and what ranks tell their job's script: a file that says there is more to do, a
file with the cause of a failure.

Nothing here needs a compiler: DeepSpeed's shared-memory CPU collective, the one op it would build at start,
is turned off.
"""

import errno
import faulthandler
import ipaddress
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

from inheritune.config import environment
from inheritune.errors import Stopped, UserError
from inheritune.files.rundir import FULL, disk_error, fullest_place, node, path_of, root, root_problem
from inheritune.runtime.launcher import LOOPBACK, Launch, find_launch, read_launch
from inheritune.runtime.signals import asked_to_stop


class NodeError(UserError):
    """Something is wrong with this rank's node: printed by this rank, with the node's name."""

    def __init__(self, message: str):
        super().__init__(f"{node()} (rank {rank()}): {message}")


UNUSABLE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.ESTALE)


def limit_error(error: Exception) -> NodeError | None:
    """What to tell if `error` says that memory, open files or the disk are used up or that a file cannot be
    used, else None."""
    if isinstance(error, OSError) and error.errno == errno.EROFS and error.filename:
        return NodeError(str(disk_error(error, path_of(error, root()))))
    if isinstance(error, OSError) and error.filename and (problem := root_problem(error)):
        return NodeError(str(problem))
    if (
        isinstance(error, OSError) and error.errno in UNUSABLE and error.filename
    ):  # wherever met: it is the user's affair
        return NodeError(
            f"{error.filename} cannot be used ({error.strerror}): see its owner and mode, or restore it"
        )
    words = "" if isinstance(error, UserError) else str(error).partition("\n")[0]
    if "No usable temporary directory" in words:  # said by tempfile, at any library's import
        return NodeError(
            "no folder for temporary files can be written (/tmp, /var/tmp); set TMPDIR to one that can"
        )
    if "Too many open files" in words:
        return NodeError(f"{words}; allow more, as in: ulimit -n 4096")
    if any(
        os.strerror(code) in words for code in FULL
    ):  # also said by the tokenizers' Rust, which raises plain Exceptions
        return NodeError(str(disk_error(OSError(FULL[0], words), path_of(error, fullest_place()))))
    signs = ("allocate memory", "out of memory", "start new thread", "failed to map segment")
    if isinstance(error, MemoryError) or any(sign in words for sign in signs):
        what = f"out of memory ({words or type(error).__name__})"
        return NodeError(
            f"{what}; ask for more (--mem, ulimit -v) or use less (ds_configs/README.md; prepare --workers 1)"
        )
    return None


def rank() -> int:
    """This process's rank, also before the group exists; 0 where the environment names no whole launch."""
    return find_launch(os.environ).rank


def world() -> int:
    """Number of processes of the launch."""
    return find_launch(os.environ).world


def start() -> None:
    """Choose the device and join the process group; call once, before anything imports deepspeed.

    Raises UserError where the launch cannot be understood, or a GPU is present that torch cannot use."""
    _quiet()
    launch = read_launch(os.environ)
    os.environ.update(launch.variables(free_port()))
    if launch.local:
        _stay_on_this_machine()
    if not Path("/proc/self/stat").is_file():
        raise NodeError("/proc is not mounted, which DeepSpeed needs; mount it (mount -t proc proc /proc)")
    device()
    import deepspeed
    import torch

    if device().type == "cpu":  # its own sum would be compiled for half a minute, or fail without g++
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    _import_muon()
    if device().type == "cuda":
        torch.cuda.set_device(device())
    if not torch.distributed.is_initialized():
        _meet(launch)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def _import_muon() -> None:
    """DeepSpeed's engine imports its Muon at every start, whose decorators would load torch's compiler:
    seconds, for an optimizer that no run uses. Imported here first, undecorated, it costs nothing."""
    from deepspeed.runtime import compiler

    usual, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = usual


def patience_s() -> float:
    """Seconds that a rank waits for the others in a collective."""
    return 60.0 * environment.number("DEEPSPEED_TIMEOUT")


RENDEZVOUS_S = 600
"""How long ranks wait for each other at the start, as torchrun's do: the slowest node's import of torch from
a shared disk."""


VERDICT, GO = "verdict", "go"
"""What the first to know it says at the store: all are here, or the signal by which a rank was asked to
leave."""
TRY = timedelta(seconds=5)
"""How long a rank tries to reach the store before it looks whether it is asked to leave."""


_store = None  # where the ranks met: key and value, and no collective


def _meet(launch: Launch) -> None:
    """Join torch's process group, and prove it by one sum over all ranks. Raises NodeError naming the missing
    nodes, Stopped where a rank is asked to leave while they wait."""
    import torch
    from torch.distributed import distributed_c10d

    global _store
    backend = "nccl" if device().type == "cuda" else "gloo"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent holds the store
            store, *_ = next(torch.distributed.rendezvous("env://", rank(), world()))
        else:
            store = _open_store(address, port, launch.local)
        _store = store
        store.set(f"device {rank()}", _device_name())
        store.set(f"here {rank()}", node())
        if rank() == 0:
            _wait_for_all(store)
            if store.compare_set(VERDICT, "", GO).decode() != GO:
                _leave_if_asked(store)
        else:  # a little longer than rank 0, which knows who is missing
            _wait_for_rank0(store, RENDEZVOUS_S + 30)
    except torch.distributed.DistError as error:
        raise NodeError(
            f"cannot meet the other ranks at {address}:{port} ({str(error).splitlines()[0]})"
        ) from None
    devices = [store.get(f"device {r}") for r in range(world())]
    twin = devices.index(devices[rank()])
    if twin != rank():  # NCCL's own words for it are "invalid usage"
        raise NodeError(
            f"ranks {twin} and {rank()} share one GPU on {node()}: start one task per GPU, without "
            f"--ntasks-per-gpu (or set "
            f"DS_ACCELERATOR=cpu)"
        )
    patience = timedelta(seconds=patience_s())
    # DeepSpeed makes groups of its own and names no limit: NCCL's 10 minutes would come before the watchdog's
    # word
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = patience
    torch.distributed.init_process_group(
        backend, store=store, rank=rank(), world_size=world(), timeout=patience
    )
    done = threading.Event()

    def give_up():  # a sum that hangs cannot be called off: end this rank, and srun ends the others
        if not done.wait(RENDEZVOUS_S):
            missing = [r for r in range(world()) if not store.check([f"summed {r}"])]
            nodes = sorted({store.get(f"here {r}").decode() for r in missing})
            sentence = f"a sum over all ranks hangs; not through: rank(s) {missing} on {', '.join(nodes)}"
            print(f"inheritune: {sentence}", file=sys.stderr, flush=True)
            tell_failure(sentence)
            os._exit(1)

    threading.Thread(target=give_up, daemon=True).start() if rank() == 0 else None
    ranks = torch.full((1,), float(rank()), device=device())
    torch.distributed.all_reduce(ranks)
    got, expected = float(ranks), world() * (world() - 1) / 2
    store.set(f"summed {rank()}", "")
    done.set()
    if got != expected:
        raise NodeError(
            f"the sum of the ranks is {got} instead of {expected}: the network or a GPU is broken"
        )


def _device_name() -> str:
    """Tells this rank's device from all others of the launch."""
    import torch

    gpu = device().type == "cuda"
    return str(torch.cuda.get_device_properties(device()).uuid) if gpu else f"CPU of rank {rank()}"


def _open_store(address: str, port: int, local: bool = False):
    """The ranks' store, held by rank 0 on the address at which the ranks look for it, and no other. The port
    follows from job and step, so that one that was just requeued may still hold it for a moment: then it is
    tried again for a while.

    Raises torch's DistError, NodeError if the port stays in use, Stopped where this rank is asked to leave
    meanwhile."""
    import torch

    wait = timedelta(seconds=RENDEZVOUS_S)
    if rank():
        return _reach_store(address, port, wait)
    deadline = time.monotonic() + 60
    while True:
        _leave_if_asked()
        try:
            server = _bind(address, port, local)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise NodeError(
                    f"cannot listen for the other ranks at {address}:{port} ({error.strerror})"
                ) from None
            time.sleep(1)
    own = server.getsockname()[
        0
    ]  # rank 0 reaches its own store there, whatever the network makes of its name
    own = LOOPBACK if own in ("::", "0.0.0.0") else own
    return torch.distributed.TCPStore(
        own, port, world(), True, wait, wait_for_workers=False, master_listen_fd=server.detach()
    )


def _reach_store(address: str, port: int, wait: timedelta):
    """The store that rank 0 holds, asked for anew every few seconds: a signal is not answered within one try,
    which is a call of C. Raises torch's DistError where it is not reached in time, Stopped where this rank is
    asked to leave meanwhile."""
    import torch

    deadline = time.monotonic() + wait.total_seconds()
    while True:
        try:
            store = torch.distributed.TCPStore(address, port, world(), False, TRY, wait_for_workers=False)
            break
        except torch.distributed.DistError:
            _leave_if_asked()
            if time.monotonic() > deadline:
                raise
    store.set_timeout(wait)
    return store


def _bind(address: str, port: int, local: bool) -> socket.socket:
    """A socket that listens on this machine's interface of the name or address `address` only: who else can
    reach the store may read and change it. On all interfaces where that cannot be told: a name that stands
    for a service in front of this machine, or that only this machine takes for its loopback. Raises OSError.

    (torchrun holds a store of its own, which listens on all interfaces.)"""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    for family, *_, place in sorted(
        found, key=lambda one: one[0] != socket.AF_INET
    ):  # which every other rank can reach
        if ipaddress.ip_address(place[0].partition("%")[0]).is_loopback and not (
            local or place[0] == address
        ):
            continue
        try:
            return socket.create_server(place[:2], family=family)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
    )


def _stay_on_this_machine() -> None:
    """Let the ranks of a local launch talk over the loopback interface, unless the user chose another."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if "lo" in (interface for _, interface in socket.if_nameindex()):
            os.environ.setdefault(name, "lo")


def _wait_for_all(store) -> None:
    """Raises NodeError naming the ranks (with their nodes, where Slurm tells) that do not arrive in time,
    Stopped where any rank is asked to leave meanwhile."""
    deadline = time.monotonic() + RENDEZVOUS_S
    missing = list(range(world()))
    while missing:
        _leave_if_asked(store)
        missing = [r for r in missing if not store.check([f"here {r}"])]
        if missing and time.monotonic() > deadline:
            hosts = _slurm_hosts()
            per_node = max(1, world() // max(1, len(hosts)))  # tasks are laid out node by node
            where = sorted({hosts[min(r // per_node, len(hosts) - 1)] for r in missing}) if hosts else []
            names = f" on {', '.join(where)}" if where else ""
            raise NodeError(
                f"rank(s) {missing}{names} did not arrive at the rendezvous within {RENDEZVOUS_S} s"
            )
        time.sleep(0.05)


def _wait_for_rank0(store, limit_s: float) -> None:
    """Raises torch's DistError if rank 0 does not say in time that all are here, Stopped as `_wait_for_all`
    does. (The store's own wait is one call of C, in which no signal is answered.)"""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        _leave_if_asked(store)
        if store.check([VERDICT]):
            return
        time.sleep(0.05)
    store.wait([VERDICT], timedelta(seconds=1))


def _leave_if_asked(store=None) -> None:
    """Raises Stopped if this rank, or another that has come to `store`, is asked to leave: nothing has begun
    that could be saved, and those that stayed would wait for this one. Not so once all are here: then they
    agree on it at their next look."""
    why = asked_to_stop() if world() > 1 else None  # one alone meets at once
    if store is not None:
        if why:
            store.compare_set(VERDICT, "", why)
        said = store.get(VERDICT).decode() if store.check([VERDICT]) else GO
        if rank() == 0 and said != GO:
            time.sleep(1)  # it holds the store, where the others look several times a second
        why = said if said != GO else None
    if why:
        raise Stopped(f"stopped while {world()} ranks were meeting ({why}); the same command starts again")


def _slurm_hosts() -> list[str]:
    """Names of the nodes of this srun line, none where Slurm does not say."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes:
        return []
    if not shutil.which("scontrol"):  # as in a container; job.sh has asked before
        return os.environ.get("INHERITUNE_HOSTS", "").split()
    try:
        asked = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # then the ranks that are missing are named without their nodes
        return []


def preflight(folder: Path) -> str:
    """Compare what the ranks see before anything costs time: room in /dev/shm, `folder` (the prepared data)
    on every node.
    -> one line for the log. Raises UserError naming the nodes that are wrong."""
    cuda = device().type == "cuda"
    shm = shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0
    seen = gather({"node": node(), "shm": shm, "data": (folder / "manifest.json").is_file()})
    problems = []
    for facts in seen:
        if not facts["data"] and any(
            other["data"] for other in seen
        ):  # nowhere: it is not prepared, which is said later
            problems.append(
                f"{facts['node']} does not see {folder}: put INHERITUNE_ROOT on a disk that all nodes share"
            )
        if cuda and world() > 1 and facts["shm"] < 64 << 20:
            problems.append(
                f"{facts['node']} has {facts['shm'] >> 20} MB free in /dev/shm, NCCL needs 64 MB or more"
            )
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    nodes = len({facts["node"] for facts in seen})
    least = min(facts["shm"] for facts in seen) / 1e9
    room = f"/dev/shm {least:.1f} GB free" if least else "no writable /dev/shm"
    return f"preflight: {world()} rank(s) on {nodes} node(s), a device each, a sum over all works, {room}"


# --- a rank that hangs --------------------------------------------------------------------------------------


class Watchdog:
    """Ends a job that no longer gets on, with the stack of every rank in the log and a sentence that says
    which rank lags; a context manager.

    The work says `at` which place it has come to; all ranks come to the same places in the same order. A rank
    that stays at one for `limit_s` seconds prints the stacks of its threads, hears how far the others are,
    and leaves with exit code 1. A thread counts its own looks, not the clock: a job that Slurm suspended for
    an hour has not hung for an hour."""

    LOOKS = 10

    def __init__(self, limit_s: float):
        self.limit_s, self.passed, self.place = limit_s, 0, "the start"
        self._over = threading.Event()

    def at(self, place: str) -> None:
        self.passed, self.place = self.passed + 1, place

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen, looks = -1, 0
        while not self._over.wait(self.limit_s / self.LOOKS):
            # if something keeps the interpreter to itself, this thread does not run either, but that one of C
            # does
            faulthandler.dump_traceback_later(self.limit_s)
            looks, seen = looks + 1 if self.passed == seen else 0, self.passed
            if looks == self.LOOKS:
                self._end()

    def _end(self) -> None:
        """Say what this rank does; the first that still speaks says for all who lags. Never returns."""
        stacks = [
            traceback.format_stack(f) for t, f in sys._current_frames().items() if t != threading.get_ident()
        ]
        said = (
            f"{node()} (rank {rank()}) has been at '{self.place}' for {self.limit_s:.0f} s; the stacks of "
            f"its threads:"
        )
        print(
            "\n".join([f"inheritune: {said}", *("".join(stack) for stack in stacks)]),
            file=sys.stderr,
            flush=True,
        )
        try:
            reports = self._reports()
            if rank() == min(reports):
                sentence = who_lags(reports, {r: _store.get(f"here {r}").decode() for r in range(world())})
                print(f"inheritune: {sentence}", file=sys.stderr, flush=True)
                tell_failure(sentence)
            else:
                time.sleep(3)  # srun --kill-on-bad-exit would end that one before it has spoken
        finally:
            os._exit(1)

    def _reports(self) -> dict[int, tuple[int, str]]:
        """{rank: (places passed, the last of them)} of those that hang too; waits a little for all to say
        so."""
        _store.set(f"hangs {rank()}", json.dumps([self.passed, self.place]))
        keys, deadline = {r: f"hangs {r}" for r in range(world())}, time.monotonic() + self.limit_s / 5
        while time.monotonic() < deadline and not _store.check(list(keys.values())):
            time.sleep(0.1)
        return {r: tuple(json.loads(_store.get(key))) for r, key in keys.items() if _store.check([key])}


def who_lags(reports: dict[int, tuple[int, str]], nodes: dict[int, str]) -> str:
    """A sentence from {rank: (places passed, the last of them)} of the ranks that hang and still answer, and
    {rank: node} of all: those that do not answer lag, or else those that have passed fewer places than
    others."""
    silent, least = [r for r in nodes if r not in reports], min(reports.values())
    late = silent or [r for r, report in reports.items() if report[0] == least[0]]
    if len(late) == len(nodes):
        return (
            f"no progress: all ranks are at '{least[1]}' (their stacks are above): a collective, a GPU or a "
            f"disk hangs"
        )
    whose = f"rank {', '.join(map(str, late))} on {', '.join(sorted({nodes[r] for r in late}))}"
    how = "does not answer" if silent else f"is still at '{least[1]}'"
    return f"no progress: {whose} {how}, the others wait at '{max(reports.values())[1]}' (stacks above)"


# --- what a job and its ranks tell each other ---------------------------------------------------------------


def agree(reason: str | None) -> str | None:
    """A reason to stop that any rank has, on every rank; None if none has one. One small collective."""
    import torch

    if world() == 1:
        return reason
    flag = torch.tensor([1.0 if reason else 0.0], device=device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return next(filter(None, gather(reason))) if flag.item() else None


def tell_run(folder: Path) -> None:
    """Tell `status` which run folder this job works on ($INHERITUNE_JOB/run, relative to
    $INHERITUNE_ROOT)."""
    if rank() == 0:
        _tell("run", f"{folder.relative_to(root())}\n")


def tell_stopped(stop: Stopped) -> None:
    """Tell the job's script ($INHERITUNE_JOB, slurm/job.sh) that this start has saved and stopped with work
    left, which the script goes on with ("more") or leaves to the person who asked for the stop ("stopped").
    Raises UserError if it cannot be told: it would take the work for finished."""
    try:
        _tell("more" if stop.again else "stopped", f"{stop}\n")
    except OSError as error:
        raise UserError(
            f"{stop}; but {error.filename} cannot be written ({error.strerror}), so the job stops here"
        ) from None


def tell_failure(sentence: str, code: int = 1) -> None:
    """Tell the job's script why this rank failed, and its exit code (srun may report that of a task it ended
    because of this one); the first to fail is the cause, the others only lose their peer."""
    line = sentence.strip().partition("\n")[0].rstrip(".")
    try:
        _tell("failure", f"{node()} rank {rank()}: {line}\n{code}\n", mode="x")
    # another was first, or the disk is full: the sentence is in the log, and the exit code tells of a failure
    except OSError:
        return


def _tell(name: str, text: str, mode: str = "w") -> None:
    """Write a file for the script of this Slurm job, if there is one. Raises OSError."""
    if folder := os.environ.get("INHERITUNE_JOB"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / name, mode, encoding="utf-8", errors="replace") as file:
            file.write(text)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def stop() -> None:
    """Leave the group, with all other ranks: NCCL's end would wait for one that is still in a collective."""
    global _store
    _store, torch = None, sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device():
    """torch.device of this rank: its GPU, or the CPU where there is none (or DS_ACCELERATOR=cpu).

    Raises UserError where a GPU is present that torch cannot use."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        if (
            torch.cuda.device_count() == 1
        ):  # a GPU of each task's own: DeepSpeed would take the one of this number
            os.environ["LOCAL_RANK"] = "0"
        return torch.device("cuda", find_launch(os.environ).local_rank)
    unused = unused_gpu(torch.__version__, torch.version.cuda)
    if unused:
        raise NodeError(unused)
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu")


SMI_PATIENCE_S = 120
"""nvidia-smi takes half a minute on a machine of eight GPUs without the persistence daemon."""
CPU_ONLY = "DS_ACCELERATOR=cpu to use the CPU on purpose"


def unused_gpu(torch_version: str, torch_cuda: str | None) -> str | None:
    """A sentence if this machine has an NVIDIA GPU that the installed torch cannot use, else None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not shutil.which("nvidia-smi"):
        return None
    try:
        report = subprocess.run(
            ["nvidia-smi"], capture_output=True, text=True, check=False, timeout=SMI_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        hangs = f"nvidia-smi does not answer within {SMI_PATIENCE_S} s, so the GPU's driver hangs"
        return f"{hangs}; restart this machine, or set {CPU_ONLY}"
    except OSError:  # a file of that name that cannot be run
        return None
    driver = re.search(r"Driver Version: *([\d.]+)", report.stdout)
    cuda = re.search(r"CUDA Version: *([\d.]+)", report.stdout)
    if report.returncode or not driver:
        return None
    newest = cuda.group(1) if cuda else "unknown"
    return (
        f"this machine has a GPU (driver {driver.group(1)}, CUDA up to {newest}), but torch {torch_version} "
        f"(built for {'CUDA ' + torch_cuda if torch_cuda else 'the CPU only'}) cannot use it; install the "
        f"same torch from "
        f"PyTorch's wheel index cu{newest.replace('.', '')} or the nearest below it, or set {CPU_ONLY}"
    )


def _quiet() -> None:
    """Keep the libraries' warnings, which a user can do nothing about, off the screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|deepspeed|transformers)(\.|$)")


def barrier() -> None:
    import torch

    if world() > 1:
        torch.distributed.barrier()


def all_sum(tensor):
    """Sum of `tensor` over the ranks, in place."""
    import torch

    if world() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather(value) -> list:
    """Every rank's `value`, in rank order, on every rank."""
    import torch

    if world() == 1:
        return [value]
    values = [None] * world()
    torch.distributed.all_gather_object(values, value)
    return values


def on_rank0(function, *args, **kwargs):
    """Call `function` on rank 0 only; its result, or its UserError or Stopped, reaches every rank."""
    import torch

    outcome = [None, None]
    failure = None
    if rank() == 0:
        try:
            outcome[0] = function(*args, **kwargs)
        except (UserError, Stopped) as error:
            outcome[1] = error if isinstance(error, Stopped) else str(error)
        except Exception as error:
            failure, outcome[1] = error, f"rank 0 failed: {error!r}"
    if world() > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if isinstance(outcome[1], Stopped):
        raise outcome[1]
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
