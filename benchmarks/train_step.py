"""A training step: ours (the code of the `train` verb) beside a plain PyTorch loop, DDP, and HF Trainer, also
with DeepSpeed.

All start from the same weights and read the same windows, so their losses agree. The plain loop is what one
would write by hand, after nanoGPT's model.py and train.py: linear layers without biases,
scaled_dot_product_attention, fused AdamW, fused cross-entropy; on a GPU bf16 autocast and torch.compile. The
limit is the FLOPs of forward and backward (6 per matrix element and token, and attention) at the rate of a
plain matrix product, measured in the same turn.
"""

import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
from harness import Case, Goal, main, over, write_experiment, write_tokens

WARM_UP = 2  # steps before the clock starts
COPYING_LESS = {"stage3_prefetch_bucket_size": 0, "contiguous_gradients": False}
"""ZeRO 3 on a CPU: weights that are gathered one by one are not joined from their parts, gradients go into no
bucket."""
OPTIMIZER = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


def setup(work: dict, folder: Path) -> None:
    """The experiment with its DeepSpeed JSON and data, and for the others the same start and windows."""
    from inheritune.config.experiment import load_experiment
    from inheritune.data.batches import Order, Tokens
    from inheritune.files.rundir import get_data_dir
    from inheritune.models.networks import build_config
    from inheritune.models.surgery import write_random

    place = folder / work["key"]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    settings = {"train_micro_batch_size_per_gpu": work["micro"], "zero_optimization": work["zero"]}
    settings = {"ours": settings, "compiled": {**settings, "inheritune": {"compile": True}}}
    if work["zero"]["stage"] == 3:
        settings["copying_less"] = {**settings["ours"], "zero_optimization": {**work["zero"], **COPYING_LESS}}
    for name, its in settings.items():
        (place / f"{name}.json").write_text(json.dumps(its))
    train = {
        "steps": WARM_UP + work["steps"],
        "batch_tokens": work["sequences"] * work["length"],
        "warmup_steps": 1,
        "lr": 3e-4,
    }
    train |= {
        "precision": work["precision"],
        "eval_every": 10**6,
        "eval_windows": 2,
        "final_windows": 2,
        "log_every": 1,
    }
    train |= {"checkpoint_every": 10**6, "schedule": "constant"}
    runs = {
        name: {"init": "random", "train": {"deepspeed": str(place / f"{name}.json")}} for name in settings
    }
    path = write_experiment(
        place,
        {"sequence_length": work["length"], "name": work["key"]},
        model=work["model"],
        train=train,
        runs=runs,
    )
    experiment = load_experiment(str(path))
    write_tokens(get_data_dir(experiment), 2_000_000, 4 * work["length"], experiment.model.vocab_size)
    write_random(build_config(experiment.model), place / "start", seed=0)
    order = Order(
        Tokens(get_data_dir(experiment), "train"), "random_windows", work["length"], work["sequences"], seed=0
    )
    rows = [
        [order.tokens.read(int(s), work["length"] + 1) for s in order.starts(step)]
        for step in range(train["steps"])
    ]
    np.save(place / "windows.npy", np.array(rows))  # (steps, B, T + 1)


class Stamps:
    """Wall and CPU clock after each step, and the step's loss."""

    def __init__(self):
        self.rows = []

    def add(self, loss: float) -> None:
        self.rows.append((time.perf_counter(), time.process_time(), loss))

    def result(self, work: dict) -> dict:
        """Seconds per step after the warm-up; the last loss, and the model FLOPs per second and device
        (TFLOP/s)."""
        (start, cpu, _), (end, cpu_end, loss) = self.rows[WARM_UP - 1], self.rows[-1]
        steps = len(self.rows) - WARM_UP
        seconds = (end - start) / steps
        return {
            "seconds": seconds,
            "cpu_seconds": (cpu_end - cpu) / steps,
            "loss": loss,
            **rates(work, seconds),
        }


def rates(work: dict, seconds: float) -> dict:
    """Tokens and model TFLOPs per second; on a GPU of inheritune/config/gpus.yaml, the share of its rate
    (MFU); memory."""
    import torch

    from inheritune.engines.memory import find_peak_flops, measure_peak_memory

    tokens = work["sequences"] * work["length"]
    found = {"tokens_per_s": tokens / seconds, "tflops": step_flops(work) / seconds / 1e12 / work["ranks"]}
    if torch.cuda.is_available():
        peak = find_peak_flops(torch.device("cuda", 0))
        found |= {"mfu": found["tflops"] * 1e12 / peak} if peak else {}
        found["gpu_gb"] = measure_peak_memory(torch.device("cuda", 0))["allocated"] / 1e9
    return found


def step_flops(work: dict) -> float:
    from inheritune.config.sections import Model
    from inheritune.models.sizes import predict_flops_per_token

    model = Model(**work["model"])
    return predict_flops_per_token(model, model.layers, work["length"]) * work["sequences"] * work["length"]


# --- ours ---------------------------------------------------------------------------------------------------


def ours(work: dict, folder: Path, run: str = "ours") -> dict:
    """`train` itself; a clock is read where it logs a step."""
    from harness import _profiler, nullcontext

    from inheritune.config.experiment import load_experiment
    from inheritune.files.json_files import read_json
    from inheritune.files.rundir import RunDir
    from inheritune.runtime import dist
    from inheritune.training import loop as training
    from inheritune.training.step_log import StepLog

    stamps, log_step, path = (
        Stamps(),
        StepLog._log_step,
        str(folder / work["key"] / f"{work['key']}.yaml"),
    )

    def log_and_stamp(self, state, losses, *rest):
        log_step(self, state, losses, *rest)
        stamps.add(losses["loss"])

    StepLog._log_step = log_and_stamp
    with _profiler or nullcontext():
        training.train(path, run)
    its, found = RunDir.of(load_experiment(path), run), stamps.result(work)
    if dist.get_rank() == 0:
        if "gpu_gb" in found:  # now the engine is gone, and the peak counts from there
            found["gpu_gb"] = read_json(its.results)["memory"][0]["peak"]["allocated"] / 1e9
        shutil.rmtree(its.path)  # the next turn trains it again
    return found


def ours_compiled(work: dict, folder: Path) -> dict:
    return ours(work, folder, "compiled")


def ours_copying_less(work: dict, folder: Path) -> dict:
    return ours(work, folder, "copying_less")


# --- a loop by hand -----------------------------------------------------------------------------------------


def build_gpt(config):
    """nanoGPT's GPT for a transformers GPT-2 configuration of the paper's form (no biases, scaling by layer,
    tied head)."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, index: int):
            super().__init__()
            d = config.n_embd
            self.scale = 1 / math.sqrt(d // config.n_head) / (index + 1)
            self.ln_1, self.ln_2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
            self.attn, self.attn_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.fc, self.proj = (
                nn.Linear(d, config.n_inner, bias=False),
                nn.Linear(config.n_inner, d, bias=False),
            )

        def forward(self, x):  # (B, T, C)
            q, k, v = (
                t.unflatten(-1, (config.n_head, -1)).transpose(1, 2)
                for t in self.attn(self.ln_1(x)).chunk(3, dim=-1)
            )
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            x = x + self.attn_proj(y.transpose(1, 2).flatten(2))
            return x + self.proj(functional.gelu(self.fc(self.ln_2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = (
                nn.Embedding(config.vocab_size, config.n_embd),
                nn.Embedding(config.n_positions, config.n_embd),
            )
            self.blocks = nn.ModuleList(Block(i) for i in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, bias=False)

        def forward(self, x, y):
            h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
            for block in self.blocks:
                h = block(h)
            logits = functional.linear(self.ln_f(h), self.wte.weight)
            return functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    return GPT()


PUBLISHED = {
    "ln_1": "ln_1",
    "ln_2": "ln_2",
    "attn": "attn.c_attn",
    "attn_proj": "attn.c_proj",
    "fc": "mlp.c_fc",
    "proj": "mlp.c_proj",
}


def load_gpt(folder: Path):
    """The model of `build_gpt` with the weights of a Hugging Face GPT-2 (whose linear layers are stored
    transposed)."""
    import torch

    from inheritune.models.sources import open_source

    source = open_source(str(folder))
    model = build_gpt(source.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks."):
                _, index, part, _ = name.split(".")
                value = source.tensor(f"transformer.h.{index}.{PUBLISHED[part]}.weight")
            else:
                value = source.tensor(f"transformer.{name}")
            parameter.copy_(value.T if value.dim() == 2 and name.startswith("blocks.") else value)
    return model


def load_llama(folder: Path):
    """Transformers' Llama with a loss: nanoGPT has none."""
    import torch
    from transformers import AutoModelForCausalLM

    class WithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

        def forward(self, x, y):
            logits = self.model(input_ids=x, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    return WithLoss()


def plain(work: dict, folder: Path) -> dict:
    """The hand-written loop; under several ranks with DistributedDataParallel, on a GPU with
    torch.compile."""
    import torch

    place, cuda = folder / work["key"], torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.cuda.set_device(device) if cuda else None
    model = (load_llama if work["model"]["size"].startswith("openllama") else load_gpt)(place / "start").to(
        device
    )
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **OPTIMIZER, fused=True)
    forward = torch.compile(model) if cuda else model
    if world > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
        forward = torch.nn.parallel.DistributedDataParallel(forward, device_ids=[rank] if cuda else None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=work["precision"] == "bf16_autocast")
    each = work["sequences"] // world
    windows = torch.from_numpy(np.load(place / "windows.npy")[:, rank * each : (rank + 1) * each])
    stamps = Stamps()
    for step in windows:
        total, parts = torch.zeros((), device=device), step.split(work["micro"])
        for number, window in enumerate(parts, 1):
            window = window.to(device, non_blocking=True)
            if world > 1:
                forward.require_backward_grad_sync = number == len(parts)  # nanoGPT's way to sum once a step
            with autocast:
                loss = forward(window[:, :-1].contiguous(), window[:, 1:].contiguous())
            loss = loss * len(window) / each
            loss.backward()
            total += loss.detach()
        if world > 1:  # the step's loss is that of all ranks, as ours logs it
            torch.distributed.all_reduce(total)
            total /= world
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stamps.add(float(total))
    if world > 1:
        torch.distributed.destroy_process_group()
    return stamps.result(work)


# --- HF Trainer ---------------------------------------------------------------------------------------------


def trainer(work: dict, folder: Path, deepspeed: dict | None = None) -> dict:
    """HF Trainer as its documentation has it; the model shifts the labels, so each window has one target
    less."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    place, stamps, cuda = folder / work["key"], Stamps(), torch.cuda.is_available()
    windows = np.load(place / "windows.npy")[:, :, :-1]
    rows = [
        {"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)}
        for row in windows.reshape(-1, work["length"])
    ]

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            torch.cuda.synchronize() if cuda else None
            stamps.add(math.nan)

    arguments = TrainingArguments(
        output_dir=str(place / "trainer"),
        per_device_train_batch_size=work["micro"],
        max_steps=len(windows),
        gradient_accumulation_steps=work["sequences"] // work["micro"] // work["ranks"],
        optim="adamw_torch_fused",
        learning_rate=3e-4,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=not cuda,
        bf16=work["precision"] == "bf16_autocast" and not deepspeed,
        torch_compile=cuda and not deepspeed,
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        deepspeed=deepspeed,
        ddp_backend="gloo" if not cuda and work["ranks"] > 1 else None,
    )
    model = AutoModelForCausalLM.from_pretrained(place / "start", dtype=torch.float32)
    # the paper's GPT-2 has no biases; transformers' has, and they are zero here
    if model.config.model_type == "gpt2":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(".bias"))
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    if os.environ.get("RANK") is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    result = stamps.result(work)
    del result["loss"]
    return result


def trainer_deepspeed(work: dict, folder: Path) -> dict:
    from inheritune.runtime import dist

    dist.init_distributed()  # joins a group of one, and keeps DeepSpeed from compiling its CPU collective
    batches = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings = {
        "zero_optimization": work["zero"],
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(batches, "auto"),
    }
    # fp32 weights as everywhere else: Trainer's own flag would round them
    if work["precision"] == "bf16_autocast":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return trainer(work, folder, settings)


# --- the limit ----------------------------------------------------------------------------------------------


def limit(work: dict, folder: Path) -> dict:
    """Seconds of the step's FLOPs at the rate of the MLP's matrix product, in the precision of the
    products."""
    import torch

    from inheritune.config.sections import Model

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0)) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if work["precision"] == "bf16_autocast" else torch.float32
    model, tokens = Model(**work["model"]), work["micro"] * work["length"]
    a = torch.randn(tokens, model.width, dtype=dtype, device=device)
    b = torch.randn(model.width, model.mlp_width, dtype=dtype, device=device)
    flops = 2 * tokens * model.width * model.mlp_width
    repeats = min(1000, max(3, int((2e13 if cuda else 1e11) / flops)))
    for timed in (False, True):
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats if timed else 3):
            a @ b
        torch.cuda.synchronize() if cuda else None
    rate, cpu_rate = (
        repeats * flops / (time.perf_counter() - start),
        repeats * flops / (time.process_time() - cpu),
    )
    seconds = step_flops(work) / rate / (1 if not cuda else work["ranks"])
    return {"seconds": seconds, "cpu_seconds": step_flops(work) / cpu_rate, "tflops": rate / 1e12}


# --- cases --------------------------------------------------------------------------------------------------

# the quickstart's
TINY = {"size": "gpt2_tiny", "layers": 8, "width": 128, "heads": 4, "positions": 128, "vocab_size": 2048}
GPT2_SMALL = {"size": "gpt2_small", "layers": 12, "width": 768, "heads": 12, "positions": 512}
TOY = {"size": "gpt2_tiny", "layers": 2, "width": 64, "heads": 4, "positions": 64, "vocab_size": 512}


def losses_apart(name: str):
    """|loss of ours - loss of `name`| at the last step: the same work was done."""
    return lambda turns: [
        abs(a["loss"] - b["loss"])
        for a, b in zip(turns["ours"], turns[name], strict=False)
        if "loss" in a and "loss" in b
    ]


def cpu_case(
    name: str, key: str, model: dict, length: int, sequences: int, steps: int, ranks: int = 1
) -> Case:
    from inheritune.engines.deepspeed_json import load_deepspeed_json

    zero = {"stage": 0} if ranks == 1 else load_deepspeed_json("ds_configs/cpu.json")["zero_optimization"]
    work = {
        "key": key,
        "model": model,
        "length": length,
        "sequences": sequences,
        "micro": sequences // ranks,
        "steps": steps,
        "precision": "fp32",
        "zero": zero,
        "ranks": ranks,
    }
    theirs = "plain loop" if ranks == 1 else "plain DDP"
    contestants = {"ours": ours, theirs: plain}
    goals = [
        Goal(f"time of the {theirs}", 1 / 1.1 if ranks == 1 else 1 / 0.9, over("ours", theirs)),
        Goal(f"CPU time of the {theirs}", None, over("ours", theirs, key="cpu_seconds")),
        Goal(f"loss beside that of the {theirs} (nats)", 1e-3, losses_apart(theirs)),
    ]
    contestants |= {"HF Trainer": trainer, "HF Trainer with DeepSpeed": trainer_deepspeed}
    goals += [
        Goal(f"time of {name}", 1.0, over("ours", name))
        for name in ("HF Trainer", "HF Trainer with DeepSpeed")
    ]
    if ranks == 1:
        contestants["limit: matrix products"] = limit
        goals.append(Goal("time of the matrix products alone", None, over("ours", "limit: matrix products")))
    else:
        contestants["ours, copying less"] = ours_copying_less
        goals.append(Goal("time of the plain DDP, copying less", None, over("ours, copying less", theirs)))
    return Case(name, work, contestants, goals, setup, ranks=ranks, by_torch=True)


def gpu_case(name: str, key: str, model: dict, length: int, micro: int, ranks: int) -> Case:
    work = {
        "key": key,
        "model": model,
        "length": length,
        "sequences": 2 * micro * ranks,
        "micro": micro,
        "steps": 10,
        "precision": "bf16_autocast",
        "zero": {"stage": 1} if ranks > 1 else {"stage": 0},
        "ranks": ranks,
    }
    contestants = {
        "ours": ours,
        "ours, compiled": ours_compiled,
        "plain loop, compiled": plain,
        "HF Trainer, compiled": trainer,
        "HF Trainer with DeepSpeed": trainer_deepspeed,
    }
    contestants["limit: matrix products"] = limit
    best = "ours, compiled"
    goals = [
        Goal("time of the plain loop, compiled", 1.0, over(best, "plain loop, compiled"), of=best),
        Goal("time of HF Trainer, compiled", 1.0, over(best, "HF Trainer, compiled"), of=best),
        Goal("time of HF Trainer with DeepSpeed", 1.0, over(best, "HF Trainer with DeepSpeed"), of=best),
        Goal(
            "time of the matrix products alone (60% of the rate)",
            1 / 0.6,
            over(best, "limit: matrix products"),
            of=best,
        ),
        Goal("loss beside that of the plain loop (nats)", 1e-2, losses_apart("plain loop, compiled")),
    ]
    return Case(name, work, contestants, goals, setup, ranks=ranks, by_torch=True)


def cases(size: str) -> list[Case]:
    if size == "gpu":
        ranks = int(os.environ.get("BENCH_GPUS") or 1)
        return [
            gpu_case("GPT-2 Medium", "medium", {"size": "gpt2_medium"}, 1024, 16, ranks),
            gpu_case("GPT-2 Large", "large", {"size": "gpt2_large"}, 1024, 8, ranks),
            gpu_case("GPT-2 XL, 24 layers", "xl24", {"size": "gpt2_xl", "layers": 24}, 1024, 8, ranks),
            gpu_case(
                "OpenLLaMA, 13 layers", "llama13", {"size": "openllama_3b", "layers": 13}, 2048, 2, ranks
            ),
        ]
    if size == "small":
        return [
            cpu_case("toy, one rank", "toy1", TOY, 64, 4, 3),
            cpu_case("toy, two ranks", "toy2", TOY, 64, 4, 3, ranks=2),
        ]
    return [
        cpu_case("quickstart's model, one rank", "tiny1", TINY, 128, 12, 40),
        cpu_case("quickstart's model, two ranks", "tiny2", TINY, 128, 12, 40, ranks=2),
        cpu_case("GPT-2 124M, windows of 512, one rank", "small1", GPT2_SMALL, 512, 2, 3),
        cpu_case("GPT-2 124M, windows of 512, two ranks", "small2", GPT2_SMALL, 512, 2, 3, ranks=2),
    ]


if __name__ == "__main__":
    main(__file__, cases)
