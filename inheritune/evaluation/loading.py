"""The model that is measured: a whole fp32 copy on each rank, or one model in shards over all of them.

Shards are ZeRO 3's: each forward gathers the weights of one layer after the other.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from operator import le
from typing import Any

import torch

from inheritune.config.sections import Model, Train
from inheritune.config.units import format_memory
from inheritune.engines.deepspeed_json import get_zero_stage, load_deepspeed_json
from inheritune.errors import UserError
from inheritune.files.processes import get_node_name
from inheritune.models.networks import build_model, list_saved_tensors
from inheritune.models.sizes import list_network_parameters
from inheritune.models.sources import Source
from inheritune.planning.memory import FRAGMENTATION, estimate_evaluation
from inheritune.runtime import dist
from inheritune.runtime.host_memory import find_available_memory
from inheritune.runtime.log import logger

SHARDING_JSON = "ds_configs/zero3.json"
"""Named where a whole copy does not fit."""
RANKS = [2**n for n in range(1, 11)]
"""Numbers of ranks that are tried for a refusal's advice."""


def choose_shards(ds: str | None, model: Model, train: Train) -> dict | None:
    """Return the zero_optimization by which the model is divided over the ranks, None for whole copies.

    It is that of the JSON `ds` if that is at ZeRO 3. Without `ds` it is that of the experiment's, where
    there are several ranks. Raises UserError for a JSON with which training of the experiment's `model` would
    be refused."""
    ranks = dist.get_world_size()
    if ds is None and ranks == 1:
        return None
    path = ds or train.deepspeed
    settings = load_deepspeed_json(path)
    if get_zero_stage(settings) != 3:
        return None
    from inheritune.engines import dslint

    dslint.check_at_start(path, settings, model, train, ranks)
    return settings["zero_optimization"]


def check_room(source: Source, network: Any, zero: dict | None, precision: str, length: int) -> None:
    """Raise UserError, on every rank, if the model of `source` does not fit into the memory that is free.

    `network` is that model without weights (build_meta_model), `zero` that of `choose_shards`. Nothing is
    loaded."""
    tensors, config = list_network_parameters(network), source.config
    head = network.get_output_embeddings().weight.numel() if config.tie_word_embeddings else 0
    on_gpu = dist.get_device().type == "cuda"

    def estimate(shards: dict | None, ranks: int) -> list[float]:
        device, host = estimate_evaluation(tensors, head, config.vocab_size, shards, precision, ranks, length)
        return [(1 + FRAGMENTATION) * device, host] if on_gpu else [device + host * (shards is not None)]

    rooms, hosts = _find_rooms()
    free = [min(rooms), min(hosts)]  # those of a CPU are the same
    places = ["its GPU", "the host"] if on_gpu else ["the host"]
    needs = estimate(zero, len(rooms))
    lacking = next((found for found in zip(needs, free, places, strict=False) if found[0] > found[1]), None)
    if lacking is None:
        return
    need, room, where = lacking
    kind = "in shards" if zero is not None else "as a whole fp32 copy"
    what = (
        f"{source.origin} takes {format_memory(need)} {kind} on each rank, which has {format_memory(room)} "
        f"free on {where}"
    )
    tried = zero if zero is not None else load_deepspeed_json(SHARDING_JSON)["zero_optimization"]
    more = [ranks for ranks in RANKS if ranks > len(rooms) * (zero is not None)]
    enough = next((n for n in more if all(map(le, estimate(tried, n), free))), None)
    if enough is None:
        raise UserError(
            f"{what}; no number of ranks is enough: lower stage3_max_live_parameters in a copy of "
            f"{SHARDING_JSON} and give it as --ds, or use devices with more memory"
        )
    option = "" if zero is not None else f"give --ds {SHARDING_JSON}, which divides it over the ranks, and "
    raise UserError(f"{what}; {option}start {enough} or more ranks with as much free memory each")


def _find_rooms() -> tuple[list[float], list[float]]:
    """Return, for each rank, the free bytes of (its device, its part of the host). On a CPU both are the
    same."""
    gc.collect()  # the model that was measured before
    host, device, free = float(find_available_memory()), dist.get_device(), None
    if device.type == "cuda":  # torch reuses what it has reserved
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = float(torch.cuda.mem_get_info(device)[0] + unused)
    found = dist.gather_objects((get_node_name(), host, free))
    names = [name for name, _, _ in found]
    hosts = [own / names.count(name) for name, own, _ in found]
    return [part if free is None else free for part, (_, _, free) in zip(hosts, found, strict=True)], hosts


@contextmanager
def load_model(source: Source, zero: dict | None) -> Iterator[torch.nn.Module]:
    """Load the model of a checkpoint in fp32 and in evaluation mode: one copy on each rank's device, or in
    shards by `zero`.

    Raises UserError for a weight that is nan or inf."""
    if zero is None:
        yield load_weights(source)
        return
    from inheritune.engines.engine import has_finite_weights, start_frozen_engine

    ranks = dist.get_world_size()
    logger.info("the weights are in shards by ZeRO 3, over %d rank%s", ranks, "s" * (ranks > 1))
    engine = start_frozen_engine(source.config, source, zero)
    try:
        if not has_finite_weights(engine):
            dist.run_on_rank0(source.check_finite)  # which names the tensor
        yield engine.module
    finally:
        engine.destroy()


def load_weights(source: Source) -> torch.nn.Module:
    """Return the model of a checkpoint in fp32 and in evaluation mode, one copy on each rank's device.

    Raises UserError for a weight that is nan or inf."""
    model = build_model(source.config)
    with torch.no_grad():
        for name, tensor in list_saved_tensors(model).items():
            tensor.copy_(source.finite_tensor(name))
    return model.eval().to(dist.get_device())
