"""This machine, and a DeepSpeed JSON under which given models fit into its memory."""

import os
from dataclasses import dataclass
from pathlib import Path

from inheritune.config.sections import Model, Train
from inheritune.config.units import format_memory
from inheritune.engines.deepspeed_json import load_deepspeed_json
from inheritune.planning.memory import estimate_memory
from inheritune.planning.proposals import apply_change, propose_changes

ON_CPU, ON_ONE_GPU, ON_GPUS = "ds_configs/cpu.json", "ds_configs/zero0.json", "ds_configs/zero1.json"
"""The JSON that is tried first, by machine."""


@dataclass(frozen=True)
class Machine:
    """The devices of this machine that one launch can use."""

    gpus: int
    """0: the CPU."""
    room: float
    """Bytes of one GPU, or of the whole memory."""

    @property
    def ranks(self) -> int:
        return max(1, self.gpus)

    @property
    def json(self) -> str:
        """The JSON of ds_configs/ to begin with."""
        if not self.gpus:
            return ON_CPU
        return ON_ONE_GPU if self.gpus == 1 else ON_GPUS

    def describe(self) -> str:
        """Return the machine in words."""
        if not self.gpus:
            return f"the CPU, {format_memory(self.room)} of memory"
        return f"{self.gpus} GPU(s) of {format_memory(self.room)}"


def find_machine() -> Machine:
    """Return this machine. Raises UserError if it has a GPU that torch cannot use."""
    import torch

    from inheritune.runtime.devices import get_device

    if get_device().type == "cuda":
        n = torch.cuda.device_count()
        return Machine(n, min(torch.cuda.get_device_properties(i).total_memory for i in range(n)))
    return Machine(0, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


@dataclass(frozen=True)
class Fit:
    """A DeepSpeed JSON for a machine."""

    settings: dict | None
    """Settings that ds_configs/ has not; None for the file `json` as it is."""
    fits: bool
    peak: float
    """Bytes at the peak, as planned."""


def fit_settings(
    machine: Machine, json: str | Path, models: list[tuple[Model, int, int]], train: Train, length: int
) -> Fit:
    """Return the cheapest change of the JSON `json` under which all `models` fit into the machine.

    `models`: (shape, layers, elements of the teacher, 0 without). Sequences have `length` tokens."""
    settings = load_deepspeed_json(json)
    ranks = min(machine.ranks, max(1, train.batch_tokens // length))

    def find_peak(tried: dict) -> float:
        plans = (estimate_memory(m, layers, tried, train, ranks, length, t) for m, layers, t in models)
        return max(float(planned["peak"]) for planned in plans)

    whole = find_peak(settings)
    if whole <= machine.room:
        return Fit(None, True, whole)
    for _, patch in propose_changes(settings):
        if not machine.gpus and any("offload" in key for key in patch):
            continue  # there is one memory
        changed = apply_change(settings, patch)
        if (peak := find_peak(changed)) <= machine.room:
            return Fit(changed, True, peak)
    return Fit(None, False, whole)
