"""What each choice within our training step gives on this GPU, and which kernels the fastest one runs:

    python benchmarks/step_variants.py [SIZE] [MICRO_BATCH] [VARIANT ...]

Two micro batches a step of random tokens, ZeRO 0, bf16 autocast. All variants start from the same weights and
read the same tokens, so their losses agree to rounding. Without a GPU a toy runs, to try the script. Minutes,
most of them torch.compile's. `train_step.py` compares with other programs; this finds out where a step's time
goes."""

import gc
import sys
import time

import torch
from harness import profile_lines

from inheritune.config.sections import Model, Train
from inheritune.engines import engine as engines
from inheritune.engines.memory import find_peak_flops
from inheritune.models import networks
from inheritune.models.initialization import make_generator
from inheritune.runtime import dist
from inheritune.runtime.log import set_up_logging
from inheritune.training.losses import ChunkedTokenLosses, FusedTokenLosses

ACCUMULATION, WARM_UP, STEPS = 2, 4, 10


def losses_in_chunks(logits, targets):
    return ChunkedTokenLosses.apply(logits.flatten(0, 1), targets.flatten())


def losses_fused(logits, targets):
    return FusedTokenLosses.apply(logits.flatten(0, 1), targets.flatten())


VARIANTS = {  # name: (loss, attention of training, blocks compiled, one graph for all of them, ZeRO stage)
    "first": (losses_in_chunks, False, False, False, 0),
    "loss": (losses_fused, False, False, False, 0),
    "attention": (losses_fused, True, False, False, 0),
    "graphs": (losses_fused, True, True, False, 0),
    "compiled": (losses_fused, True, True, True, 0),
    "zero1": (losses_fused, True, True, True, 1),
}
"""`first`: as the first GPU ran it. `compiled`: what `"inheritune": {"compile": true}` does now."""


class Start:
    """Weights drawn by name, as a source of them."""

    def __init__(self, config):
        self.shapes = networks.list_model_shapes(config)

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight")))
        return torch.randn(shape, generator=make_generator(name)) * 0.02


class Variant:
    """One engine, its step and its data."""

    def __init__(self, name: str, model: Model, micro: int, length: int):
        self.loss, causal, compiled, shared, stage = VARIANTS[name]
        self.device, config = dist.get_device(), networks.build_config(model)
        train = Train(
            steps=100,
            batch_tokens=ACCUMULATION * micro * length,
            lr=1e-4,
            warmup_steps=0,
            precision="bf16_autocast",
        )
        kept = engines.find_training_attention, engines.share_attention_scale
        engines.find_training_attention = kept[0] if causal else lambda config: None
        engines.share_attention_scale = kept[1] if shared else lambda model: None
        settings = {"zero_optimization": {"stage": stage}, "inheritune": {"compile": compiled}}
        try:
            self.engine = engines.start_engine(config, Start(config), settings, train, micro, ACCUMULATION)
        finally:
            engines.find_training_attention, engines.share_attention_scale = kept
        generator = torch.Generator(self.device).manual_seed(2)
        shape = (ACCUMULATION, micro, length + 1)
        self.data = torch.randint(0, model.vocab_size, shape, device=self.device, generator=generator)
        self.engine.train()

    def step(self) -> torch.Tensor:
        """Forward, backward and update as training has them; the mean loss."""
        total = torch.zeros((), device=self.device)
        for window in self.data:
            logits = self.engine(input_ids=window[:, :-1], use_cache=False).logits
            loss = self.loss(logits, window[:, 1:]).mean()
            del logits
            self.engine.backward(loss)
            total += loss.detach()
            self.engine.step()
        return total / len(self.data)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(name: str, model: Model, micro: int, length: int, kernels: bool) -> None:
    """Print the step time, MFU, memory and losses of a variant, and with `kernels` its GPU kernels."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.time()
    variant = Variant(name, model, micro, length)
    first = [variant.step() for _ in range(WARM_UP)][0]
    wait()
    started, begun = time.time(), time.time() - begun
    last = [variant.step() for _ in range(STEPS)][-1]
    issued = (time.time() - started) / STEPS
    wait()
    seconds = (time.time() - started) / STEPS
    tokens = ACCUMULATION * micro * length
    flops = networks.count_flops_per_token(networks.build_config(model), length) * tokens
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    peak = find_peak_flops(variant.device)
    mfu = f"MFU {flops / seconds / peak:.1%}, " if peak else ""
    print(
        f"{name}: {1000 * seconds:.1f} ms a step (the host was done after {1000 * issued:.1f}), "
        f"{tokens / seconds:,.0f} tokens/s, {mfu}"
        f"peak {memory:.1f} GB, ready after {begun:.0f} s, losses {float(first):.5f} and {float(last):.5f}",
        flush=True,
    )
    if kernels:
        print_kernels(variant, seconds)
    variant.engine.destroy()


def print_kernels(variant: Variant, seconds: float) -> None:
    """Print the share of each kernel in one step."""
    with torch.profiler.profile() as profile:
        variant.step()
        wait()
    print(f"  kernels of a step of {1000 * seconds:.1f} ms:")
    print("\n".join(f"  {line}" for line in profile_lines(profile, by_torch=True)), flush=True)


def main(size: str = "gpt2_medium", micro: str = "16", *names: str) -> None:
    set_up_logging()
    dist.init_distributed()
    toy = {"size": "gpt2_tiny", "layers": 2, "positions": 64, "vocab_size": 512}
    model = Model.model_validate({"size": size} if torch.cuda.is_available() else toy)
    for name in names or tuple(VARIANTS):
        sequences, length = (int(micro), 1024) if torch.cuda.is_available() else (2, 64)
        measure(name, model, sequences, length, kernels=name == "compiled")


if __name__ == "__main__":
    main(*sys.argv[1:])
