"""Bytes of the training states (weights, masters, moments, gradients) that a GPU holds, by ZeRO stage.

The formulas are exact: they follow how DeepSpeed 0.19 lays tensors out. A test compares them with real runs.
"""

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

from inheritune.errors import UserError
from inheritune.models.sizes import Parameter

ZERO_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}
"""DeepSpeed's own values of the keys used here, for a JSON that does not set them."""
ALLREDUCE_ELEMENTS = 5e8
"""Elements of the gradients that DeepSpeed flattens at once at ZeRO 0."""


@dataclass(frozen=True)
class Setup:
    """One model under one DeepSpeed JSON on `ranks` GPUs: what the formulas below start from."""

    tensors: list[Parameter]
    zero: dict
    """The JSON's zero_optimization over ZERO_DEFAULTS."""
    ranks: int
    accumulates: bool
    """Whether a step has more than one micro batch."""
    element: int
    """Bytes of an element of the weights."""
    optimizer_away: bool
    """Whether the optimizer's states are on the host."""
    weights_away: bool
    """Whether the weights are on the host."""

    @cached_property
    def stage(self) -> int:
        return int(self.zero.get("stage", 0))

    @cached_property
    def whole(self) -> int:
        """Elements of all parameters."""
        return sum(t.numel for t in self.tensors)

    @cached_property
    def trained(self) -> int:
        """Elements of the trained parameters."""
        return sum(t.numel for t in self.tensors if t.trained)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(t.numel for t in self.tensors)

    @cached_property
    def partition(self) -> tuple[list[int], int]:
        return partition_tensors(self.tensors, self.ranks if self.stage else 1, self.stage)

    @property
    def parts(self) -> list[int]:
        """Elements of a rank's part of each of AdamW's groups, padded."""
        return self.partition[0]

    @property
    def part(self) -> int:
        """Elements of a rank's part of all groups."""
        return sum(self.parts)

    @property
    def touched(self) -> int:
        """Elements of all parameters that a rank's parts touch."""
        return self.partition[1]


@dataclass(frozen=True)
class States:
    """Bytes of the training states on one GPU."""

    weights: float
    masters: float
    moments: float
    gradients: float
    """Between the last backward pass and the optimizer step."""
    buckets: float = 0
    live: float = 0
    """Gathered weights (ZeRO 3)."""
    earlier_gradients: float = 0
    """Gradients of the micro batches before the current one."""
    late_gradients: float = 0
    """Held during the last reduction, in addition to `gradients`."""
    reduction: float = 0
    """Buckets in which gradients are reduced."""
    step: float = 0
    """Temporary tensors of the optimizer step."""

    @property
    def static(self) -> float:
        """Held in every phase."""
        return self.weights + self.masters + self.moments + self.buckets


@dataclass(frozen=True)
class HostStates:
    """Bytes that one rank keeps on its host for offloading."""

    moved: float = 0
    pinned: float = 0


def partition_tensors(tensors: list[Parameter], ranks: int, stage: int) -> tuple[list[int], int]:
    """Return ([elements of a rank's part of each of AdamW's groups, padded], elements of all parameters that
    these parts touch)."""
    parts: list[int] = []
    touched = 0
    for decayed in (True, False):
        group = [t.numel for t in tensors if t.trained and t.decayed == decayed]
        starts = [0, *itertools.accumulate(group)]
        # ZeRO 3 cuts each parameter, ZeRO 1 and 2 the flattened group, at even elements.
        size = sum(-(-n // ranks) for n in group) if stage == 3 else -(-starts[-1] // (2 * ranks)) * 2
        parts.append(size)
        touched += max(_count_touched(starts, size * rank, size * (rank + 1)) for rank in range(ranks))
    return parts, touched


def _count_touched(starts: list[int], first: int, last: int) -> int:
    """Count the elements of the tensors, cut at `starts`, that [first, last) overlaps."""
    return sum(b - a for a, b in itertools.pairwise(starts) if a < last and b > first)


def read_offloads(settings: dict) -> tuple[bool, bool]:
    """Return whether (optimizer states, weights) are on the host.

    Raises UserError for NVMe, which is not planned."""
    found = []
    for key in ("offload_optimizer", "offload_param"):
        device = settings.get("zero_optimization", {}).get(key, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"plan knows zero_optimization.{key}.device 'cpu' and 'none' (got '{device}')")
        found.append(device == "cpu")
    return found[0], found[1]


# --- training states by ZeRO stage --------------------------------------------------------------------------


def count_states(setup: Setup) -> States:
    """Return the bytes of the training states on one GPU, before any offloading of the optimizer."""
    if setup.stage == 0:
        return _count_replicated(setup)
    return _count_sharded_optimizer(setup) if setup.stage < 3 else _count_sharded_weights(setup)


def _count_replicated(setup: Setup) -> States:
    """ZeRO 0: every rank holds everything, and the weights are the masters."""
    return States(
        weights=setup.element * setup.whole,
        masters=0,
        moments=8 * setup.part,
        gradients=4 * setup.touched,
        earlier_gradients=4 * setup.trained,
        reduction=4 * min(setup.trained, ALLREDUCE_ELEMENTS),
    )


def _count_sharded_optimizer(setup: Setup) -> States:
    """ZeRO 1 and 2: every rank holds all weights and a part of the optimizer's states.

    Buckets are made anew in each backward pass. Then a group's gradients are flattened, and their norm is
    computed in fp64."""
    overlap = 2 if setup.zero.get("overlap_comm") else 1
    gradients = 4 * setup.touched
    if setup.stage == 1:
        earlier, late = 4 * setup.trained, 4 * (setup.trained - setup.touched)
    else:
        earlier, late = gradients, gradients if setup.accumulates else 0
    return States(
        weights=setup.element * setup.whole,
        masters=4 * setup.part,
        moments=8 * setup.part,
        gradients=gradients,
        earlier_gradients=earlier,
        late_gradients=late,
        reduction=setup.element * setup.zero["reduce_bucket_size"] * overlap,
        step=max(4 * max(setup.parts), 8 * min(setup.largest, setup.part)),
    )


def _count_sharded_weights(setup: Setup) -> States:
    """ZeRO 3: every rank holds a part of everything, and gathers weights where they are used."""
    zero, element = setup.zero, setup.element
    weights, live = count_sharded_weights(setup)
    gradients = 4 * setup.part
    return States(
        weights=weights + _count_secondary_shards(setup, zero["stage3_param_persistence_threshold"]),
        masters=4 * setup.part,
        moments=8 * setup.part,
        gradients=gradients,
        buckets=element * zero["reduce_bucket_size"],
        live=live,
        earlier_gradients=gradients,
        reduction=2 * element * min(zero["reduce_bucket_size"], setup.trained),
        step=4 * min(max(setup.parts), zero["sub_group_size"]),
    )


def count_sharded_weights(setup: Setup) -> tuple[float, float]:
    """Return the bytes of (the parts of the weights that a rank of ZeRO 3 holds, what it gathers at once)."""
    zero, element = setup.zero, setup.element
    gathers = setup.ranks > 1 or setup.weights_away  # one rank's part is the whole weight
    persistent = zero["stage3_param_persistence_threshold"]
    kept = sum(t.numel for t in setup.tensors if t.numel <= persistent) if gathers else 0
    sharded = 0 if setup.weights_away else sum(-(-t.numel // setup.ranks) for t in setup.tensors)
    # fetched ahead up to the first; kept from forward to backward, if used again within the second
    at_once = max(zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"])
    at_once = max(at_once, setup.largest + zero["stage3_prefetch_bucket_size"])
    return element * (kept + sharded), element * min(setup.whole - kept, at_once) if gathers else 0


def _count_secondary_shards(setup: Setup, persistent: float) -> int:
    """Return the bytes of the copy that hierarchical partitioning keeps on each node, in shards."""
    shards = setup.zero.get("zero_hpz_partition_size", 1)
    if shards <= 1:
        return 0
    held = sum(
        t.numel // min(shards, setup.ranks) for t in setup.tensors if t.numel > persistent or not t.trained
    )
    return setup.element * held


def offload_states(setup: Setup, states: States) -> tuple[States, HostStates]:
    """Return (the states left on the GPU, those on the host) under the JSON's offloading."""
    moved: float = 0
    pinned: float = 0
    if setup.optimizer_away:
        if setup.stage == 3:
            pinned = 12 * setup.part
        else:
            buffers = setup.largest + (setup.touched if setup.accumulates else 0)
            pinned = (8 + setup.element) * setup.part + setup.element * buffers
        moved = pinned + states.moments
        states = replace(
            states,
            masters=0,
            moments=0,
            gradients=setup.element * setup.largest,
            step=0,
            earlier_gradients=states.earlier_gradients if setup.stage == 1 else 0,
            late_gradients=states.late_gradients if setup.stage == 1 else 0,
        )
    weights = setup.element * setup.part if setup.weights_away else 0
    return states, HostStates(moved=moved + weights, pinned=pinned + weights)
