"""What DeepSpeed itself does with each JSON of a list: python tests/support/dslint_worker.py CASES.json
OUTCOMES.json

A plain DeepSpeed program: two steps of two micro batches' worth of a tiny GPT-2 with torch's AdamW on one CPU
rank, the file as it is. An outcome is {"raises": what, "at": "initialize" or "step"} or {"losses": [...]}."""

import json
import os
import sys

os.environ.update(DS_ACCELERATOR="cpu", WANDB_MODE="disabled")


def outcome(settings: dict) -> dict:
    import deepspeed
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    at = "initialize"
    try:
        model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        # DeepSpeed's own AdamW for offload would be compiled: say that torch's is meant
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config={"zero_force_ds_cpu_optimizer": False, **settings}
        )
        at, losses = "step", []
        for step in range(4):
            tokens = (torch.arange(2 * 16).reshape(2, 16) * (step + 3)) % 64
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
        return {"losses": losses}
    except BaseException as error:  # SystemExit too: DeepSpeed ends a process now and then
        return {"raises": f"{type(error).__name__}: {error}"[:400], "at": at}


if __name__ == "__main__":
    from inheritune.cli import leave
    from inheritune.runtime import dist

    dist.init_distributed()
    with open(sys.argv[1], encoding="utf-8") as file:
        cases = json.load(file)
    outcomes = {name: outcome(settings) for name, settings in cases.items()}
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(outcomes, file)
    leave(0)
