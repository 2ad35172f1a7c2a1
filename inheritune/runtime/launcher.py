"""What started this process, read from the environment variables that a launcher sets for its processes.

Three sets are understood: torch's five (torchrun, `deepspeed`, `--procs`, a Kubernetes operator), srun's, and
mpirun's together with MASTER_ADDR and MASTER_PORT. An incomplete set is refused: a process that guesses would
train alone, alongside others that do the same. Nothing here uses the network, Slurm or torch.
"""

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from inheritune.config.paths import find_checkout
from inheritune.errors import UserError

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
NEEDED = ("RANK", "WORLD_SIZE", *MEETING)
"""LOCAL_RANK may be missing: it is 0 if each process has its own machine or container."""

TORCHRUN = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME")
DEEPSPEED = ("LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")

LOOPBACK = "127.0.0.1"
JOINING = ("train", "evaluate")
"""Verbs whose processes are ranks of one group. The others run as one process."""


def format_script(name: str) -> str:
    """Return the shell command that starts slurm/NAME.sh from the current folder, with a relative path inside
    the checkout."""
    checkout = find_checkout()
    own = checkout / "slurm" / f"{name}.sh"
    here = os.path.relpath(own) if os.path.realpath(os.curdir) == os.path.realpath(checkout) else own
    return f"bash {shlex.quote(str(here))}"


@dataclass(frozen=True)
class Launch:
    """This process among the processes of its launch; by default it is the only one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = LOOPBACK
    """The name or address of rank 0's machine, where the ranks meet."""
    port: int | None = None
    """None for any free port (a single process)."""
    local: bool = True
    """Whether all ranks are known to be on this machine."""
    by: str = "the command line"
    """What started this process, for messages."""

    def variables(self, free_port: int) -> dict[str, str]:
        """Return what torch.distributed and DeepSpeed read; `free_port` is for a launch that names no
        port."""
        named: dict[str, object] = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world,
            "LOCAL_RANK": self.local_rank,
        }
        named |= {"MASTER_ADDR": self.address, "MASTER_PORT": self.port or free_port}
        named |= {"LOCAL_WORLD_SIZE": self.world} if self.local else {}
        return {name: str(value) for name, value in named.items()}


ALONE = Launch()


@dataclass(frozen=True)
class Scheme:
    """The variable names of a launcher other than torch's."""

    by: str
    rank: str
    world: str
    local_rank: str
    local_world: str


# mpirun comes first: in a Slurm job it starts its processes through srun, whose own variables then count
# mpirun's daemons
SCHEMES = (
    Scheme("mpirun", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Scheme("mpirun", *(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Scheme("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Scheme("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
)


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Return the launch that `environment` names, ALONE if it names none.

    Raises UserError, with what is set and what is missing or wrong, for a set that is incomplete or
    contradicts itself."""
    given = [name for name in RANKS + MEETING if name in environment]
    if all(name in environment for name in NEEDED):
        return _read_torch(environment)
    scheme = next((scheme for scheme in SCHEMES if _is_used(scheme, environment)), None)
    if scheme is not None:
        return _read_scheme(scheme, environment)
    if given:
        missing = [name for name in NEEDED if name not in environment]
        raise UserError(
            f"the environment has {_format_variables(given, environment)} but not {_join_names(missing)}: a "
            f"launcher sets {_join_names(NEEDED)}; set what is missing, or run 'unset {' '.join(given)}' to "
            "start one process"
        )
    return ALONE


def find_launch(environment: Mapping[str, str]) -> Launch:
    """Return the launch that `environment` names, or ALONE if `read_launch` refuses it."""
    try:
        return read_launch(environment)
    except UserError:
        return ALONE


def count_processes(verb: str, procs: int | None, environment: Mapping[str, str]) -> int:
    """Return how many processes `verb` has to start on this machine for its flag --procs (None: not given);
    1 means this process.

    Raises UserError if the launch in `environment` is not understood, or does not fit the verb or the
    flag."""
    if verb not in (*JOINING, "grow"):
        _check_alone(verb, find_launch(environment))
        return 1
    launch = read_launch(environment)
    if procs is not None and environment.get("INHERITUNE_LAUNCH") and is_in_batch_script(environment):
        raise UserError(
            f"--procs {procs} is given, but this job starts its ranks with "
            f"'{environment['INHERITUNE_LAUNCH']}'; leave out --procs, and ask for another number when you "
            "submit the job (GPUS=N, or TASKS=N on CPUs)"
        )
    if verb == "grow":
        _check_alone(verb, launch)
        return 1
    if launch.world == 1:
        return procs or 1
    if procs not in (None, launch.world):
        raise UserError(
            f"--procs {procs} is given, but {launch.by} has started {launch.world} ranks; leave out one of "
            f"the two"
        )
    return 1


def is_in_batch_script(environment: Mapping[str, str]) -> bool:
    """Return whether this process runs in the script of a Slurm job and not in one of srun's tasks."""
    return bool(environment.get("SLURM_JOB_ID")) and not environment.get("SLURM_STEP_NUM_TASKS")


def remove_launch(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` for a new process: without the variables that torch's launchers set for this
    one."""
    own = {*RANKS, *MEETING, *TORCHRUN, *DEEPSPEED}
    return {
        name: value
        for name, value in environment.items()
        if name not in own and not name.startswith("TORCHELASTIC_")
    }


def find_first_host(nodes: str) -> str:
    """Return the first name in a node list of Slurm's: node03 of "node[03-05,9],other7"."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    first = found[0] if found else ""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _check_alone(verb: str, launch: Launch) -> None:
    """Raise UserError if `verb`, which runs as one process, was started several times."""
    if launch.world == 1:
        return
    own = "starts the ranks of its steps itself (--procs N)" if verb == "grow" else "runs as one process"
    raise UserError(
        f"{verb} {own}, but {launch.by} has started it {launch.world} times; start it once, as with srun "
        f"--ntasks=1"
    )


def _read_torch(environment: Mapping[str, str]) -> Launch:
    """Return the launch that torch's variables name."""
    rank, world, local_rank = _read_ranks(environment, *RANKS)
    address, port = _read_address(environment)
    # torchrun sets the first of the two, DeepSpeed the second
    counts = [environment.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")]
    local = world == 1 or str(world) in counts
    return Launch(
        rank,
        world,
        local_rank,
        address,
        port,
        local,
        f"a launcher ({_format_variables(RANKS[:2], environment)})",
    )


def _is_used(scheme: Scheme, environment: Mapping[str, str]) -> bool:
    """Return whether a launcher of this kind started several processes. PMI_... alone may also be srun's
    (--mpi=pmi2)."""
    of_srun = (
        scheme.world == "PMI_SIZE"
        and "MPI_LOCALRANKID" not in environment
        and "SLURM_STEP_NUM_TASKS" in environment
    )
    return environment.get(scheme.world) not in (None, "", "1") and not of_srun


def _read_scheme(scheme: Scheme, environment: Mapping[str, str]) -> Launch:
    """Return the launch that the variables of `scheme` name."""
    needed = [scheme.rank, scheme.local_rank]
    if scheme.by == "srun" and not all(name in environment for name in MEETING):
        needed += ["SLURM_JOB_ID", "SLURM_STEP_NODELIST"]
    _check_complete(scheme, needed, environment)
    rank, world, local_rank = _read_ranks(environment, scheme.rank, scheme.world, scheme.local_rank)
    _check_consistent(scheme, environment, {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank})
    if scheme.by == "srun":
        local = environment.get("SLURM_STEP_NUM_NODES") == "1"
        address, port = _find_step_address(environment, local)
    else:
        local = environment.get(scheme.local_world) == str(world)
        _check_complete(scheme, MEETING, environment)
        address, port = _read_address(environment)
    shown = _format_variables((scheme.rank, scheme.world), environment)
    return Launch(rank, world, local_rank, address, port, local, f"{scheme.by} ({shown})")


def _check_complete(scheme: Scheme, names: Iterable[str], environment: Mapping[str, str]) -> None:
    """Raise UserError if a variable without which the ranks of `scheme` cannot meet is not set."""
    missing = [name for name in names if not environment.get(name)]
    if missing:
        example = "; as in: mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500" if missing[0] in MEETING else ""
        raise UserError(
            f"the environment has {scheme.by}'s {_format_variables([scheme.world], environment)} but not "
            f"{_join_names(missing)}; set what is missing for every process, or run 'unset {scheme.world}' "
            f"to start one process{example}"
        )


def _check_consistent(scheme: Scheme, environment: Mapping[str, str], told: dict[str, int]) -> None:
    """Raise UserError if torch's variables name other ranks than the scheme does. A rank without WORLD_SIZE
    is refused even if it is the same: RANK=0, left over in the environment of all tasks, is right for the
    first of them."""
    given = [name for name in RANKS if name in environment]
    other = [name for name in given if environment[name] != str(told[name])]
    if other or (given and "WORLD_SIZE" not in given):
        names = (scheme.rank, scheme.world, scheme.local_rank)
        raise UserError(
            f"the environment has {_format_variables(given, environment)} alongside {scheme.by}'s "
            f"{_format_variables(names, environment)}; run 'unset {' '.join(given)}', or set "
            f"{_join_names(NEEDED)} for every process"
        )


def _find_step_address(environment: Mapping[str, str], local: bool) -> tuple[str, int]:
    """Return (address, port) at which the tasks of an srun line meet. The port follows from job and step, so
    that two jobs on one node do not meet."""
    if all(name in environment for name in MEETING):
        return _read_address(environment)
    job = _read_number(environment, "SLURM_JOB_ID", 0)
    step = _read_number(environment, "SLURM_STEP_ID", 0) if environment.get("SLURM_STEP_ID") else 0
    host = LOOPBACK if local else find_first_host(environment["SLURM_STEP_NODELIST"])
    return _read_address(
        {"MASTER_ADDR": host, "MASTER_PORT": str(20000 + (job * 61 + step) % 20000), **environment}
    )


def _read_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return (address, port) of MASTER_ADDR and MASTER_PORT."""
    address = environment["MASTER_ADDR"]
    if address.split() != [address]:
        raise UserError(
            f"{_format_variables(['MASTER_ADDR'], environment)} is no name or address of a machine; set it "
            "to that of rank 0"
        )
    return address, _read_number(environment, "MASTER_PORT", 1, 65535)


def _read_ranks(
    environment: Mapping[str, str], rank: str, world: str, local_rank: str
) -> tuple[int, int, int]:
    """Return the values of the three variables. Raises UserError for one that is not a number, or a rank that
    does not exist."""
    size = _read_number(environment, world, 1)
    of = f" of {world}={size}"
    local = _read_number(environment, local_rank, 0, size - 1, of) if local_rank in environment else 0
    return _read_number(environment, rank, 0, size - 1, of), size, local


def _read_number(
    environment: Mapping[str, str], name: str, least: int, most: int | None = None, of: str = ""
) -> int:
    """Return the whole number in variable `name`. Raises UserError if it is none, or not from `least` to
    `most`."""
    value = environment[name]
    if re.fullmatch("[0-9]{1,12}", value) and least <= int(value) and (most is None or int(value) <= most):
        return int(value)
    wanted = f"from {least} up" if most is None else f"from {least} to {most}"
    raise UserError(
        f"the environment has {_format_variables([name], environment)}, which must be a whole number "
        f"{wanted}{of}; correct the launch, or run 'unset "
        f"{' '.join(n for n in RANKS + MEETING if n in environment) or name}' to start one process"
    )


def _format_variables(names: Iterable[str], environment: Mapping[str, str]) -> str:
    """Return NAME=value of those variables that are set, quoted for a shell."""
    return " ".join(f"{name}={shlex.quote(environment[name])}" for name in names if name in environment)


def _join_names(names: Iterable[str]) -> str:
    """Return "A, B and C"."""
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last
