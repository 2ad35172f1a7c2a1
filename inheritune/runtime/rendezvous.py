"""How the ranks of a launch meet: the store that rank 0 holds, the wait for every rank, the process group and
the proof that it works.

torch's rendezvous waits in a call of C, in which no signal is handled, and its error does not say who is
missing. Here a rank that is asked to stop leaves and the others follow; missing ranks are named with their
nodes.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from inheritune.config import environment
from inheritune.errors import Stopped
from inheritune.files.processes import get_node_name
from inheritune.runtime.devices import get_device
from inheritune.runtime.job_reports import report_failure
from inheritune.runtime.launcher import LOOPBACK, Launch
from inheritune.runtime.ranks import NodeError, get_rank, get_world_size
from inheritune.runtime.signals import get_stop_signal

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

RENDEZVOUS_S = 600
"""How long ranks wait for each other at the start, as torchrun's do: the slowest node may import torch from a
shared disk."""
VERDICT, GO = "verdict", "go"
"""The store's key for the outcome of the rendezvous, and its value when all ranks have arrived; another value
is the signal by which a rank was asked to stop. The first rank that knows the outcome sets it."""
TRY = timedelta(seconds=5)
"""How long a rank tries to reach the store before it checks whether it is asked to stop."""

_store: Store | None = None  # of keys and values, without a collective


def join_group(launch: Launch) -> None:
    """Join torch's process group, and prove with one sum over all ranks that it works.

    Raises NodeError naming the missing nodes, Stopped if a rank is asked to stop during the wait."""
    store = _meet_ranks(launch)
    _check_own_device(store)
    _init_group(store)
    _check_sum(store)


def get_store() -> Store:
    """Return the store through which the ranks met."""
    if _store is None:
        raise RuntimeError("the ranks have not met: dist.init_distributed comes first")
    return _store


def forget_store() -> None:
    """Drop the store, which ends with its last reference."""
    global _store
    _store = None


def get_collective_timeout_s() -> float:
    """Return how many seconds a rank waits for the others in a collective."""
    return 60.0 * float(environment.read_number("DEEPSPEED_TIMEOUT") or 0)


def _meet_ranks(launch: Launch) -> Store:
    """Return the store of the ranks, once all of them have arrived."""
    import torch

    global _store
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Store
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent holds the store
            store, *_ = next(torch.distributed.rendezvous("env://", get_rank(), get_world_size()))
        else:
            store = open_store(address, port, launch.local)
        _store = store
        store.set(f"device {get_rank()}", _identify_device())
        store.set(f"here {get_rank()}", get_node_name())
        if get_rank() == 0:
            _wait_for_all(store)
            if store.compare_set(VERDICT, "", GO).decode() != GO:
                _leave_if_asked(store)
        else:  # a little longer than rank 0, which knows who is missing
            _wait_for_rank0(store, RENDEZVOUS_S + 30)
    except torch.distributed.DistError as error:
        raise NodeError(
            f"cannot meet the other ranks at {address}:{port} ({str(error).splitlines()[0]})"
        ) from None
    return store


def _check_own_device(store: Store) -> None:
    """Raise NodeError if another rank has this rank's GPU, which NCCL would report as "invalid usage"."""
    devices = [store.get(f"device {r}") for r in range(get_world_size())]
    twin = devices.index(devices[get_rank()])
    if twin != get_rank():
        raise NodeError(
            f"ranks {twin} and {get_rank()} share one GPU on {get_node_name()}: start one task per GPU, "
            f"without "
            f"--ntasks-per-gpu (or set DS_ACCELERATOR=cpu)"
        )


def _init_group(store: Store) -> None:
    """Make torch's process group, with NCCL on GPUs and Gloo on CPUs."""
    import torch
    from torch.distributed import distributed_c10d

    backend = "nccl" if get_device().type == "cuda" else "gloo"
    timeout = timedelta(seconds=get_collective_timeout_s())
    # DeepSpeed makes groups of its own without a timeout: NCCL's 10 minutes would end them before the
    # watchdog reports
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    torch.distributed.init_process_group(
        backend, store=store, rank=get_rank(), world_size=get_world_size(), timeout=timeout
    )


def _check_sum(store: Store) -> None:
    """Sum the ranks' numbers over all ranks. Raises NodeError if the sum is wrong; ends the process if it
    hangs."""
    import torch

    done = threading.Event()
    if get_rank() == 0:
        threading.Thread(target=_exit_if_hanging, args=(store, done), daemon=True).start()
    ranks = torch.full((1,), float(get_rank()), device=get_device())
    torch.distributed.all_reduce(ranks)
    got, expected = float(ranks), get_world_size() * (get_world_size() - 1) / 2
    store.set(f"summed {get_rank()}", "")
    done.set()
    if got != expected:
        raise NodeError(
            f"the sum of the ranks is {got} instead of {expected}: the network or a GPU is broken"
        )


def _exit_if_hanging(store: Store, done: threading.Event) -> None:
    """End this process if the sum hangs, which cannot be cancelled; srun then ends the other ranks."""
    if done.wait(RENDEZVOUS_S):
        return
    missing = [r for r in range(get_world_size()) if not store.check([f"summed {r}"])]
    nodes = sorted({store.get(f"here {r}").decode() for r in missing})
    sentence = f"a sum over all ranks hangs; rank(s) {missing} on {', '.join(nodes)} have not finished it"
    print(f"inheritune: {sentence}", file=sys.stderr, flush=True)
    report_failure(sentence)
    os._exit(1)


def _identify_device() -> str:
    """Return a name of this rank's device that no other rank of the launch has, unless both share it."""
    import torch

    if get_device().type == "cuda":
        return str(torch.cuda.get_device_properties(get_device()).uuid)
    return f"CPU of rank {get_rank()}"


# --- the store ----------------------------------------------------------------------------------------------


def open_store(address: str, port: int, local: bool = False) -> TCPStore:
    """Return the ranks' store. Rank 0 holds it, on the address at which the other ranks look for it and on no
    other.

    The port follows from job and step, so the processes of a job that was just requeued may still hold it:
    then rank 0 tries again for a minute. Raises torch's DistError, NodeError if the port stays in use,
    Stopped if this rank is asked to stop meanwhile."""
    import torch

    wait = timedelta(seconds=RENDEZVOUS_S)
    if get_rank():
        return _reach_store(address, port, wait)
    deadline = time.monotonic() + 60
    while True:
        _leave_if_asked()
        try:
            server = bind_socket(address, port, local)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise NodeError(
                    f"cannot listen for the other ranks at {address}:{port} ({error.strerror})"
                ) from None
            time.sleep(1)
    # rank 0 reaches its own store here, whatever the network makes of its name
    own = server.getsockname()[0]
    own = LOOPBACK if own in ("::", "0.0.0.0") else own
    return torch.distributed.TCPStore(
        own, port, get_world_size(), True, wait, wait_for_workers=False, master_listen_fd=server.detach()
    )


def _reach_store(address: str, port: int, wait: timedelta) -> TCPStore:
    """Return the store that rank 0 holds. One try is a call of C, in which no signal is handled, so each is
    short.

    Raises torch's DistError if the store is not reached in time, Stopped if this rank is asked to stop
    meanwhile."""
    import torch

    deadline = time.monotonic() + wait.total_seconds()
    while True:
        try:
            store = torch.distributed.TCPStore(
                address, port, get_world_size(), False, TRY, wait_for_workers=False
            )
            break
        except torch.distributed.DistError:
            _leave_if_asked()
            if time.monotonic() > deadline:
                raise
    store.set_timeout(wait)
    return store


def bind_socket(address: str, port: int, local: bool) -> socket.socket:
    """Return a socket that listens only on the interface of this machine that has the name or address
    `address`: whoever can reach the store may read and change it.

    It listens on all interfaces if that one cannot be found: for the name of a service in front of this
    machine, or a name that only this machine resolves to its loopback. Raises OSError. (torchrun holds a
    store of its own, which listens on all interfaces.)"""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        found = []
    # IPv4 first, which every other rank can reach
    for family, *_, place in sorted(found, key=lambda one: one[0] != socket.AF_INET):
        host = str(place[0])
        loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        if loopback and not (local or host == address):
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


def use_loopback() -> None:
    """Let the ranks of a local launch talk over the loopback interface, unless the user chose another."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if "lo" in (interface for _, interface in socket.if_nameindex()):
            os.environ.setdefault(name, "lo")


def find_free_port() -> int:
    """Return a TCP port that nothing on this machine uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- waiting ------------------------------------------------------------------------------------------------


def _wait_for_all(store: Store) -> None:
    """Raise NodeError naming the ranks that do not arrive in time (with their nodes, if Slurm lists them),
    Stopped if any rank is asked to stop meanwhile."""
    deadline = time.monotonic() + RENDEZVOUS_S
    missing = list(range(get_world_size()))
    while missing:
        _leave_if_asked(store)
        missing = [r for r in missing if not store.check([f"here {r}"])]
        if missing and time.monotonic() > deadline:
            hosts = list_slurm_hosts()
            per_node = max(1, get_world_size() // max(1, len(hosts)))  # srun fills node after node
            where = sorted({hosts[min(r // per_node, len(hosts) - 1)] for r in missing}) if hosts else []
            names = f" on {', '.join(where)}" if where else ""
            raise NodeError(
                f"rank(s) {missing}{names} did not arrive at the rendezvous within {RENDEZVOUS_S} s"
            )
        time.sleep(0.05)


def _wait_for_rank0(store: Store, limit_s: float) -> None:
    """Raise torch's DistError if rank 0 does not announce in time that all ranks have arrived, Stopped as
    `_wait_for_all` does. (The store's own wait is one call of C, in which no signal is handled.)"""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        _leave_if_asked(store)
        if store.check([VERDICT]):
            return
        time.sleep(0.05)
    store.wait([VERDICT], timedelta(seconds=1))


def _leave_if_asked(store: Store | None = None) -> None:
    """Raise Stopped if this rank, or another that has reached `store`, is asked to stop: nothing has begun
    that could be saved, and the ranks that stayed would wait for this one. Once all have arrived it raises
    nothing: then the ranks agree to stop at their next check."""
    why = get_stop_signal() if get_world_size() > 1 else None  # a single rank waits for nobody
    if store is not None:
        if why:
            store.compare_set(VERDICT, "", why)
        said = store.get(VERDICT).decode() if store.check([VERDICT]) else GO
        if get_rank() == 0 and said != GO:
            time.sleep(1)  # this rank holds the store, where the others look several times a second
        why = said if said != GO else None
    if why:
        raise Stopped(
            f"stopped while {get_world_size()} ranks were meeting ({why}); the same command starts again"
        )


def list_slurm_hosts() -> list[str]:
    """Return the names of the nodes of this srun line; none if Slurm does not list them."""
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if not nodes:
        return []
    if not shutil.which("scontrol"):  # as in a container; job.sh has asked before
        return os.environ.get("INHERITUNE_HOSTS", "").split()
    asked = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):  # the missing ranks are then named without their nodes
        return []
