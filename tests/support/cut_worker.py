"""Cut models by hand and compare the logits with those of cuts, by whichever transformers is imported:
python cut_worker.py JOBS.json OUT.json

A job is {"source", "blocks", "cuts": {folder: [indexes of the blocks kept]}}, with the name of the module
list of the blocks. Its result is the largest |difference| and |logit| for each folder, or a traceback.
Imports nothing of this repository."""

import json
import sys
import traceback

import torch
import transformers
from transformers import AutoModelForCausalLM

EAGER = {"attn_implementation": "eager"}


def compute_logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of two fixed sequences, three windows of attention long.  -> (2, 12, 61)"""
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def remove_blocks(model: torch.nn.Module, blocks: str, kept: list[int]) -> torch.nn.Module:
    """`model` with only the blocks `kept`: module list, and config lists with an entry for each block."""
    modules = model.get_submodule(blocks)
    n, chosen = len(modules), [modules[i] for i in kept]
    del modules[:]
    modules.extend(chosen)
    config = model.config
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == n and isinstance(value[0], str | float):
            object.__setattr__(config, key, [value[i] for i in kept])
    setattr(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), len(kept))
    return model


def open_aligned(folder: str) -> torch.nn.Module:
    """The model in `folder`, its tensors at aligned addresses: in a mapped file they lie anywhere, and a
    product of matrices rounds otherwise there."""
    model = AutoModelForCausalLM.from_pretrained(folder, **EAGER).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def compare(job: dict) -> dict:
    """{folder: [largest |difference| of a logit, largest |logit|]} of one job"""
    found = {}
    for folder, kept in job["cuts"].items():
        by_hand = remove_blocks(open_aligned(job["source"]), job["blocks"], kept)
        expected, cut = compute_logits(by_hand), compute_logits(open_aligned(folder))
        found[folder] = [float((cut - expected).abs().max()), float(expected.abs().max())]
    return found


def run_jobs(jobs: list[dict]) -> list[dict]:
    """The results of `jobs`; of one that fails {"error": traceback}, of a family that is not there None."""
    results = []
    for job in jobs:
        try:
            results.append(compare(job) if job["family"] in transformers.CONFIG_MAPPING else None)
        except Exception:  # whatever a library raises is the result
            results.append({"error": traceback.format_exc()})
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf-8") as file:
        found = run_jobs(json.load(file))
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"version": transformers.__version__, "results": found}, file)
