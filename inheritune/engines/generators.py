"""The states of each rank's random generators, stored beside DeepSpeed's files."""

import pickle
from pathlib import Path

import torch

from inheritune.models.initialization import make_generator
from inheritune.runtime.devices import get_device
from inheritune.runtime.ranks import NodeError, get_rank


def get_generator_file(folder: Path, rank: int) -> Path:
    """Return the file of `rank`'s generators in a checkpoint."""
    return folder / f"rng_{rank:05d}.pt"


def seed_generators(seed: int) -> None:
    """Set this rank's generators to a state that the run's seed and the rank determine.

    torch gives each process another one. Nothing draws from them while there is no dropout, but the bytes of
    a checkpoint hold them."""
    torch.manual_seed(make_generator("rank", seed, get_rank()).initial_seed())


def read_generators() -> dict[str, torch.Tensor]:
    """Return the states of this rank's generators: torch's on the CPU, and on its GPU."""
    states = {"cpu": torch.get_rng_state()}
    if get_device().type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(folder: Path, saved_rank: int) -> None:
    """Set this rank's generators to the states that `saved_rank` stored in a checkpoint.

    Raises NodeError if the file holds none: it has the right hash, but another program wrote it."""
    file = get_generator_file(folder, saved_rank)
    try:
        generators = torch.load(file, weights_only=True)
        torch.set_rng_state(generators["cpu"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, RuntimeError):
        raise NodeError(
            f"{file} holds no state of random generators; restore it, or delete its checkpoint"
        ) from None
    if "cuda" in generators and get_device().type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"])
