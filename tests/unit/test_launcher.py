"""A launcher's environment is understood whole or refused in one sentence, before anything is written;
--procs is never ignored; the ranks of a launch listen where the launch is, and nowhere else."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, free_port, one_sentence, run_verb
from fork_client import connect
from fork_server import FORKS, ForkServer
from slurm_cluster import session_cluster, slurm  # noqa: F401 - fixtures

from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.rundir import RunDir
from inheritune.runtime import rendezvous
from inheritune.runtime.launcher import (
    ALONE,
    count_processes,
    find_first_host,
    find_launch,
    read_launch,
    remove_launch,
)

TORCH = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}
OPENMPI = {
    f"OMPI_COMM_WORLD_{name}": value for name, value in [("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1")]
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}
PLACE = {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}
STEP_PORT = 20000 + 77 * 61 + 1

UNDERSTOOD = [
    ("nothing", {}, (0, 1, 0, "127.0.0.1", None)),
    ("operator without LOCAL_RANK", TORCH, (1, 2, 0, "head", 29500)),
    ("torchrun", {**TORCH, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1, 2, 1, "head", 29500)),
    ("torchrun inside srun", {**SRUN, **TORCH, "LOCAL_RANK": "0"}, (1, 2, 0, "head", 29500)),
    ("srun", SRUN, (3, 4, 1, "node03", STEP_PORT)),
    ("srun on one node", {**SRUN, "SLURM_STEP_NUM_NODES": "1"}, (3, 4, 1, "127.0.0.1", STEP_PORT)),
    ("srun with an address", {**SRUN, "MASTER_ADDR": "node03-ib"}, (3, 4, 1, "node03-ib", STEP_PORT)),
    ("srun with a place", {**SRUN, **PLACE, "SLURM_STEP_NODELIST": ""}, (3, 4, 1, "head", 29500)),
    ("srun, ranks set again", {**SRUN, "WORLD_SIZE": "4", "RANK": "3"}, (3, 4, 1, "node03", STEP_PORT)),
    ("srun --mpi=pmi2", {**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4, 1, "node03", STEP_PORT)),
    (
        "srun of one task",
        {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        (0, 1, 0, "127.0.0.1", None),
    ),
    (
        "batch script",
        {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        (0, 1, 0, "127.0.0.1", None),
    ),
    ("stray SLURM_PROCID", {"SLURM_PROCID": "1"}, (0, 1, 0, "127.0.0.1", None)),
    ("Open MPI", {**OPENMPI, **PLACE}, (1, 2, 1, "head", 29500)),
    ("Open MPI inside a Slurm job", {**SRUN, **OPENMPI, **PLACE}, (1, 2, 1, "head", 29500)),
    ("MPICH", {**HYDRA, **PLACE}, (1, 2, 0, "head", 29500)),
    (
        "mpirun of one",
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        (0, 1, 0, "127.0.0.1", None),
    ),
]

REFUSED = [
    ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2 but not RANK, MASTER_ADDR and MASTER_PORT"),
    ({"RANK": "0"}, "has RANK=0 but not WORLD_SIZE, MASTER_ADDR and MASTER_PORT"),
    ({"RANK": "0", "WORLD_SIZE": "1"}, "has RANK=0 WORLD_SIZE=1 but not MASTER_ADDR and MASTER_PORT"),
    ({"LOCAL_RANK": "1"}, "unset LOCAL_RANK"),
    ({"MASTER_ADDR": "head"}, "has MASTER_ADDR=head but not RANK, WORLD_SIZE and MASTER_PORT"),
    ({"RANK": ""}, "has RANK='' but not"),
    ({**TORCH, "RANK": ""}, "RANK='', which must be a whole number from 0 to 1 of WORLD_SIZE=2"),
    ({**TORCH, "RANK": "2"}, "RANK=2, which must be a whole number from 0 to 1 of WORLD_SIZE=2"),
    ({**TORCH, "RANK": "-1"}, "RANK=-1, which"),
    ({**TORCH, "RANK": "one"}, "RANK=one, which"),
    ({**TORCH, "RANK": "\u0661"}, "RANK='\u0661', which"),
    ({**TORCH, "WORLD_SIZE": "0"}, "WORLD_SIZE=0, which must be a whole number from 1 up"),
    ({**TORCH, "WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0, which"),
    ({**TORCH, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1, which"),
    ({**TORCH, "LOCAL_RANK": ""}, "LOCAL_RANK='', which"),
    ({**TORCH, "MASTER_PORT": "http"}, "MASTER_PORT=http, which must be a whole number from 1 to 65535"),
    ({**TORCH, "MASTER_PORT": "65536"}, "MASTER_PORT=65536, which"),
    ({**TORCH, "MASTER_PORT": "0"}, "MASTER_PORT=0, which"),
    ({**TORCH, "MASTER_ADDR": ""}, "MASTER_ADDR='' is no name or address"),
    ({**TORCH, "MASTER_ADDR": "two words"}, "MASTER_ADDR='two words' is no name or address"),
    (
        {"SLURM_STEP_NUM_TASKS": "2"},
        "SLURM_STEP_NUM_TASKS=2 but not SLURM_PROCID, SLURM_LOCALID, SLURM_JOB_ID",
    ),
    ({**SRUN, "SLURM_JOB_ID": "seven"}, "SLURM_JOB_ID=seven, which"),
    (
        {**SRUN, "SLURM_PROCID": "4"},
        "SLURM_PROCID=4, which must be a whole number from 0 to 3 of SLURM_STEP_NUM_TASKS=4",
    ),
    ({**SRUN, "RANK": "3"}, "has RANK=3 alongside srun's SLURM_PROCID=3"),
    ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, "has RANK=0 WORLD_SIZE=1 alongside srun's"),
    ({**SRUN, "WORLD_SIZE": "8"}, "has WORLD_SIZE=8 alongside srun's"),
    (OPENMPI, "mpirun's OMPI_COMM_WORLD_SIZE=2 but not MASTER_ADDR and MASTER_PORT"),
    ({**HYDRA, "MASTER_ADDR": "head"}, "mpirun's PMI_SIZE=2 but not MASTER_PORT"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2", **PLACE}, "mpirun's PMI_SIZE=2 but not MPI_LOCALRANKID"),
]


@pytest.mark.parametrize(
    ("environment", "told"), [row[1:] for row in UNDERSTOOD], ids=[row[0] for row in UNDERSTOOD]
)
def test_launch_is_understood(environment, told):
    launch = read_launch(environment)
    assert (launch.rank, launch.world, launch.local_rank, launch.address, launch.port) == told
    assert find_launch(environment) == launch
    # what is exported for torch says the same
    again = read_launch(launch.variables(free_port=4000))
    assert (again.rank, again.world, again.local_rank, again.address, again.port) == (
        *told[:4],
        told[4] or 4000,
    )


@pytest.mark.parametrize(
    ("environment", "says"), REFUSED, ids=lambda value: str(value)[:50] if isinstance(value, dict) else ""
)
def test_launch_that_is_not_whole_is_refused(environment, says):
    with pytest.raises(UserError) as refused:
        read_launch(environment)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert find_launch(environment) == ALONE  # so that this process prints the sentence


def test_local_launches_are_told_from_others():
    assert read_launch({}).local and not read_launch(TORCH).local and not read_launch(SRUN).local
    assert (
        read_launch({**TORCH, "LOCAL_WORLD_SIZE": "2"}).local
        and not read_launch({**TORCH, "LOCAL_WORLD_SIZE": "1"}).local
    )
    assert read_launch({**SRUN, "SLURM_STEP_NUM_NODES": "1"}).local
    assert read_launch({**OPENMPI, **PLACE, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}).local


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[03-05,9],other7", "node03"),
        ("127.0.0.[2-3]", "127.0.0.2"),
        ("r[2,4]n[1-8]-ib", "r2n1-ib"),
        ("gpu-a-[7]", "gpu-a-7"),
    ],
)
def test_first_host_of_a_list_of_nodes(nodes, first):
    assert find_first_host(nodes) == first


JOB = {"SLURM_JOB_ID": "7", "INHERITUNE_LAUNCH": "srun --ntasks=8"}
COUNTS = [
    ("train", None, {}, 1),
    ("train", 2, {}, 2),
    ("evaluate", 2, {}, 2),
    ("train", 2, {**TORCH, "RANK": "0", "WORLD_SIZE": "1"}, 2),  # a pod of one, with two GPUs
    ("train", 2, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 2),
    ("train", 2, TORCH, 1),
    ("train", None, SRUN, 1),
    ("train", 2, {"SLURM_JOB_ID": "7"}, 2),
    ("train", None, JOB, 1),
    ("grow", 2, {}, 1),  # which starts the ranks of each step
    ("train", 3, TORCH, "--procs 3 is given, but a launcher (RANK=1 WORLD_SIZE=2) has started 2 ranks"),
    (
        "evaluate",
        1,
        SRUN,
        "--procs 1 is given, but srun (SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4) has started 4 ranks",
    ),
    ("train", 2, {"RANK": "0"}, "has RANK=0 but not"),
    ("grow", 2, {"RANK": "0", "WORLD_SIZE": "1"}, "has RANK=0 WORLD_SIZE=1 but not"),
    ("grow", None, SRUN, "grow starts the ranks of its steps itself"),
    ("grow", 2, JOB, "--procs 2 is given, but this job starts its ranks with 'srun --ntasks=8'"),
    ("train", 2, JOB, "--procs 2 is given, but this job starts its ranks with 'srun --ntasks=8'"),
    (
        "prepare",
        None,
        SRUN,
        "prepare runs as one process, but srun (SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4) has started it 4",
    ),
    ("status", None, TORCH, "status runs as one process"),
    ("prepare", None, {"WORLD_SIZE": "2"}, 1),  # for a verb without ranks a part of a launch means nothing
]


@pytest.mark.parametrize(("verb", "procs", "environment", "count"), COUNTS)
def test_procs_is_honoured_or_refused(verb, procs, environment, count):
    if isinstance(count, int):
        assert count_processes(verb, procs, environment) == count
    else:
        with pytest.raises(UserError, match=re.escape(count)):
            count_processes(verb, procs, environment)


def test_what_is_started_anew_knows_nothing_of_the_launch_of_its_parent():
    left = {
        **TORCH,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "LOCAL_SIZE": "2",
    }
    assert remove_launch({**left, "PATH": "/bin", "ROLE_ARN": "mine"}) == {
        "PATH": "/bin",
        "ROLE_ARN": "mine",
    }


# --- by real processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (
            ["train", "--run", "reference"],
            {"WORLD_SIZE": "2"},
            "has WORLD_SIZE=2 but not RANK, MASTER_ADDR and MASTER_PORT",
        ),
        (["train", "--run", "reference", "--procs", "2"], {"RANK": "0"}, "has RANK=0 but not WORLD_SIZE"),
        (
            ["grow", "--run", "grown", "--procs", "2"],
            {"RANK": "1", "WORLD_SIZE": "2"},
            "has RANK=1 WORLD_SIZE=2 but not",
        ),
        (["train", "--run", "refrence"], {"SLURM_PROCID": "1"}, "did you mean 'reference'?"),
        (
            ["train", "--run", "reference"],
            {"SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_NUM_TASKS=2 but not SLURM_PROCID",
        ),
        (
            ["train", "--run", "reference"],
            {**OPENMPI, "OMPI_COMM_WORLD_RANK": "0"},
            "but not MASTER_ADDR and MASTER_PORT",
        ),
        (["train", "--run", "reference"], {**TORCH, "MASTER_PORT": "none"}, "MASTER_PORT=none, which"),
        (["prepare"], {**SRUN, "SLURM_PROCID": "0"}, "prepare runs as one process, but srun"),
    ],
    ids=["part", "stray rank", "grow", "procid", "srun", "mpirun", "port", "prepare"],
)
def test_refusal_comes_before_anything_is_written(small, own_root, words, environment, says):
    before = set(own_root.rglob("*"))
    done = run_verb(words[0], small, *words[1:], check=False, **environment)
    assert says in one_sentence(done)
    assert set(own_root.rglob("*")) == before


@pytest.mark.slow
def test_two_pods_of_an_operator_without_local_rank_train_one_run_together(small):
    port = free_port()
    pods = [
        subprocess.Popen(
            [FORKS.python(), "-m", "inheritune", "train", small, "--run", "reference"],
            cwd=REPOSITORY,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    said = [pod.communicate(timeout=300)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    (start,) = read_json(RunDir.of(load_experiment(small), "reference").provenance)["starts"]
    assert start["ranks"] == 2


@pytest.mark.slow
def test_procs_is_honoured_in_a_pod_of_one(small):
    left = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    run_verb("train", small, "--run", "reference", procs=2, **left)
    (start,) = read_json(RunDir.of(load_experiment(small), "reference").provenance)["starts"]
    assert start["ranks"] == 2


def test_the_line_for_torchrun_that_is_printed_reaches_the_verb(small):
    """Without the two dashes torchrun refuses --run as short for two options of its own."""
    line = "torchrun --nproc_per_node 2 -m -- inheritune train quickstart --run reference"
    assert line in (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
    start = line.partition(" train ")[0]
    assert start.replace(" 2 ", " 8 ") in run_verb("train", "--help").stdout
    words = [
        Path(sys.executable).with_name("torchrun"),
        *start.split()[1:],
        "train",
        small,
        "--run",
        "reference",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (start,) = read_json(RunDir.of(load_experiment(small), "reference").provenance)["starts"]
    assert start["ranks"] == 2


# --- who can reach the ranks --------------------------------------------------------------------------------


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """(address, port) on which a process and its children accept connections."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            found |= {
                tuple(c.laddr) for c in one.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN
            }
        except psutil.NoSuchProcess:
            continue
    return found


def is_open(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def wait_for(run: RunDir, process: subprocess.Popen) -> None:
    """Wait until the run's record begins: its ranks have met and train."""
    end = time.time() + 120
    while not (run.metrics.is_file() and run.metrics.stat().st_size):
        assert process.poll() is None and time.time() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_local_launch_listens_on_the_loopback_interface_only(small):
    command = [sys.executable, "-m", "inheritune", "train", small, "--run", "reference", "--procs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launched = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(RunDir.of(load_experiment(small), "reference"), launched)
        os.kill(launched.pid, signal.SIGSTOP)  # a parent that does not look is not yet at its end
        places = listening(psutil.Process(launched.pid))
        assert places and {address for address, _ in places} <= {"127.0.0.1", "::1"}, places
        assert any(is_open("127.0.0.1", port) for _, port in places)
        for _, port in places:
            assert not is_open("127.0.0.2", port)  # another address of this machine, as a stranger's would be
    finally:
        os.kill(launched.pid, signal.SIGCONT)
        assert launched.wait(300) == 0


STORE = """
import sys
from inheritune.runtime import dist, rendezvous
store = rendezvous.open_store(*sys.argv[1:2], int(sys.argv[2]))
if dist.get_rank() == 0:
    print("open", flush=True)
    sys.stdin.readline()
store.set(f"here {dist.get_rank()}", "yes")
store.wait([f"here {rank}" for rank in range(2)])
"""


def test_the_ranks_of_two_addresses_meet_at_that_of_the_first(tmp_path):
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", STORE, "127.0.0.2", str(port)],
            cwd=REPOSITORY,
            text=True,
            stdin=-1,
            stdout=-1,
            stderr=-1,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.2",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]
    assert ranks[0].stdout.readline() == "open\n", ranks[0].communicate()
    assert is_open("127.0.0.2", port) and not is_open("127.0.0.1", port)
    said = [rank.communicate("\n", timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


def test_a_name_that_is_no_address_of_this_machine_is_met_on_all_interfaces():
    """A service in front of a pod, or a name that the machine itself takes for its loopback."""
    for name in ("192.0.2.77", "localhost", "no-such-machine.invalid"):
        with rendezvous.bind_socket(name, 0, local=False) as server:
            assert server.getsockname()[0] in ("::", "0.0.0.0")
    with rendezvous.bind_socket("localhost", 0, local=True) as server:
        assert server.getsockname()[0] in ("127.0.0.1", "::1")


@pytest.mark.slow
def test_two_nodes_of_a_cluster_meet(small, slurm):  # noqa: F811
    """Each of them is an address of its own: 127.0.0.2 and 127.0.0.3."""
    line = [
        "srun",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--export=ALL",
        FORKS.python(),
        "-m",
        "inheritune",
    ]
    said = slurm.run(
        *line, "train", small, "--run", "reference", cwd=REPOSITORY, timeout=300, DS_ACCELERATOR="cpu"
    )
    assert "preflight: 2 rank(s) on 2 node(s)" in said and "finished" in said, said
    assert "prepare runs as one process, but srun" in slurm.run(
        *line, "prepare", small, check=False, cwd=REPOSITORY
    )


# --- a rank that waits for others ---------------------------------------------------------------------------


def accept_once(port: int) -> None:
    """Wait until someone asks for what listens at `port` of this machine, and send them away."""
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(120)
        server.accept()[0].close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_others_leaves_when_asked(small, rank):
    """It once waited out its ten minutes, and Slurm killed it before."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(
        [FORKS.python(), "-m", "inheritune", "train", small, "--run", "reference"],
        cwd=REPOSITORY,
        text=True,
        env={**os.environ, **variables, "MASTER_PORT": str(port := free_port())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if rank:
        accept_once(port)
    end = time.time() + 120
    while rank == 0 and not is_open("127.0.0.1", port):
        assert process.poll() is None and time.time() < end
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and "Traceback" not in said, said
    sentence = "inheritune: stopped while 2 ranks were meeting (SIGTERM); the same command starts again"
    assert (sentence in said) is (rank == 0), said  # one rank speaks for all


def test_a_rank_that_leaves_takes_those_that_wait_for_it_along(small):
    port, processes = free_port(), []
    for rank in (0, 1):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "inheritune", "train", small, "--run", "reference"],
            cwd=REPOSITORY,
            text=True,
            env={**os.environ, **variables, "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        processes.append(process)
    end = time.time() + 120
    while not any(
        c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(processes[1].pid).net_connections()
    ):
        assert time.time() < end and processes[1].poll() is None
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=30)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "inheritune: stopped while 3 ranks were meeting (SIGUSR1)" in said[
        0
    ] and "Traceback" not in "".join(said)


def test_a_dead_fork_server_is_noticed():
    """Else each test that asks it waits for five minutes."""
    server = ForkServer()
    server.start()
    server.process.kill()
    os.waitid(os.P_PID, server.process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
        connect(server.address)
    server.process.wait()
