"""Real DeepSpeed checkpoints to read back: `torchrun --nproc-per-node R tests/support/zero_worker.py OUT`.

Trains a tiny paper GPT-2 (frozen biases, tied head) and a tiny Llama (untied) for two steps with the two
parameter groups of training, at ZeRO 0 to 3, and leaves in OUT/<kind>_zero<stage>_ranks<R>/ the checkpoint
(config.json beside the tag's files) and, beside it, <folder>.truth and <folder>.moments, the engine's own
fp32 weights and AdamW's moments. Widths are odd, so that partitions need padding."""

import os
import sys
from pathlib import Path

from inheritune.models import config_files, dtypes, initialization, networks

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from tiny_models import config_of

from inheritune.cli import leave


def true_weights(engine, stage: int) -> dict[str, torch.Tensor]:
    """The fp32 weights as the running engine has them; every rank takes part."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if stage and parameter.requires_grad:
            weights[name] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
        elif stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        else:
            weights[name] = parameter.detach().clone()
    return weights


def true_moments(engine) -> dict[str, dict[str, torch.Tensor]]:
    """{moment: {name: fp32 tensor}} of what is trained, as the running engine has them; every rank takes
    part."""
    # it links them after the first group's first step, when the second has none yet
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    read = deepspeed.utils.safe_get_full_optimizer_state
    return {
        moment: {n: read(p, moment).clone() for n, p in trained.items()}
        for moment in ("exp_avg", "exp_avg_sq")
    }


def save(out: Path, kind: str, config, stage: int) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = networks.build_model(config, "eager")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initialization.make_fresh_tensor(name, tuple(parameter.shape), config, seed=5))
    decayed = {id(p) for p in networks.find_linear_weights(model).values()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in decayed], "weight_decay": 0.1},
        {"params": [p for p in trainable if id(p) not in decayed], "weight_decay": 0.0},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "sub_group_size": 2000,
            "stage3_param_persistence_threshold": 40,
        }
        | ({"elastic_checkpoint": True} if stage == 2 else {}),  # keeps its moments in another form
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=settings
    )
    for step in range(2):
        ids = torch.randint(0, 61, (2, 12), generator=initialization.make_generator(step, rank))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    folder = out / f"{kind}_zero{stage}_ranks{world}"
    engine.save_checkpoint(str(folder.parent), tag=folder.name)
    weights = true_weights(engine, stage)
    moments = true_moments(engine) if stage else {}
    if rank == 0:
        config_files.write_config(folder / "config.json", config, dtypes.FP32)
        torch.save(weights, out / f"{folder.name}.truth")
        torch.save(moments, out / f"{folder.name}.moments")
    engine.destroy()


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for half a minute
    deepspeed.init_distributed("gloo")
    for stage in (0, 1, 2, 3):
        for kind in ("paper", "llama"):
            save(Path(sys.argv[1]), kind, config_of(kind, layers=3), stage)
    torch.distributed.destroy_process_group()
    leave(0)
