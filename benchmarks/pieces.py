"""Pieces of a training step on a CPU, each beside another way to do it: where the step's time goes, and what
was tried.

The product that an MLP begins with, by torch's own choice of library and by oneDNN; the head with the loss,
ours, torch's and one that takes a few tokens at a time through head, loss and both gradients, so that the
logits are never whole (as Liger's kernel on a GPU); what ZeRO 3 and DistributedDataParallel send for one
step.
"""

import torch
from harness import Case, Goal, clock, main, over

MANY = 5
"""Calls in the clock, after one that warms up."""


def timed(call) -> dict:
    """Seconds of one call."""
    call()
    with clock() as measured:
        for _ in range(MANY):
            call()
    return {key: value / MANY for key, value in measured.items()}


# --- the product --------------------------------------------------------------------------------------------


def factors(work: dict):
    torch.manual_seed(0)
    return torch.randn(work["tokens"], work["width"]), torch.randn(work["outputs"], work["width"])


def torchs(work: dict, folder) -> dict:
    x, weight = factors(work)
    return timed(lambda: torch.nn.functional.linear(x, weight))


def onednn(work: dict, folder) -> dict:
    x, weight = factors(work)
    product = torch.ops.mkldnn._linear_pointwise
    apart = (product(x, weight, None, "none", [], "") - x @ weight.T).abs().max()
    return timed(lambda: product(x, weight, None, "none", [], "")) | {"apart": float(apart)}


# --- head and loss ------------------------------------------------------------------------------------------


def head(work: dict, loss_of) -> dict:
    """Forward and backward of the head and the mean loss, by autograd; the loss too."""
    from_below, weight = factors(work)
    from_below, weight = from_below.requires_grad_(), (0.02 * weight).requires_grad_()
    targets, losses = torch.randint(0, work["outputs"], (work["tokens"],)), []

    def step():
        from_below.grad = weight.grad = None
        loss = loss_of(torch.nn.functional.linear(from_below, weight), targets)
        loss.backward()
        losses.append(loss.item())

    return timed(step) | {"loss": losses[-1]}


def head_ours(work: dict, folder) -> dict:
    from inheritune.training.losses import token_losses

    return head(work, lambda logits, targets: token_losses(logits[None], targets[None]).mean())


def head_torchs(work: dict, folder) -> dict:
    return head(work, torch.nn.functional.cross_entropy)


def head_in_chunks(work: dict, folder) -> dict:
    from_below, weight = factors(work)
    weight *= 0.02
    targets, losses = torch.randint(0, work["outputs"], (work["tokens"],)), []

    def step():
        gradient, of_weight, total = torch.empty_like(from_below), torch.zeros_like(weight), 0.0
        for x, y, out in zip(
            *(each.split(work["chunk"]) for each in (from_below, targets, gradient)), strict=True
        ):
            logits = x @ weight.T
            sums = logits.logsumexp(dim=1)
            total += (sums - logits.gather(1, y[:, None])[:, 0]).sum().item()
            logits.sub_(sums[:, None]).exp_().scatter_add_(1, y[:, None], torch.full((len(y), 1), -1.0))
            logits.mul_(1 / len(from_below))
            torch.mm(logits, weight, out=out)
            of_weight.addmm_(logits.T, x)
        losses.append(total / len(from_below))

    return timed(step) | {"loss": losses[-1]}


def head_products(work: dict, folder) -> dict:
    from_below, weight = factors(work)

    def step():
        logits = from_below @ weight.T
        return logits @ weight, logits.T @ from_below

    return timed(step)


# --- what ranks send ----------------------------------------------------------------------------------------


def sent(work: dict, exchange) -> dict:
    """Seconds of `exchange(bucket, group's size)` over buckets that together hold the model."""
    torch.distributed.init_process_group("gloo")
    buckets, world = work["elements"] // work["bucket"], torch.distributed.get_world_size()
    bucket = torch.zeros(work["bucket"])
    exchange(bucket, world)
    torch.distributed.barrier()
    with clock() as measured:
        for _ in range(buckets):
            exchange(bucket, world)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return measured


def zero3(work: dict, folder) -> dict:
    """The weights are gathered for forward and again for backward, the gradients are summed and scattered."""

    def exchange(bucket, world):
        part = torch.zeros(len(bucket) // world)
        for _ in range(2):
            torch.distributed.all_gather_into_tensor(bucket, part)
        torch.distributed.reduce_scatter_tensor(part, bucket)

    return sent(work, exchange)


def ddp(work: dict, folder) -> dict:
    """The gradients are summed for all."""
    return sent(work, lambda bucket, world: torch.distributed.all_reduce(bucket))


# --- cases --------------------------------------------------------------------------------------------------


def losses_apart(turns: dict) -> list[float]:
    rows = zip(*(turns[name] for name in ("ours", "torch's cross-entropy", "in chunks")), strict=False)
    return [max(losses) - min(losses) for row in rows if (losses := [turn["loss"] for turn in row])]


def cases(size: str) -> list[Case]:
    tokens, width, vocabulary, elements = (
        (64, 64, 512, 1 << 20) if size == "small" else (1024, 768, 50257, 123_600_000)
    )
    product = {"tokens": tokens, "width": width, "outputs": 4 * width}
    heads = {"tokens": tokens, "width": width, "outputs": vocabulary, "chunk": 128}
    ways = {"ours": head_ours, "torch's cross-entropy": head_torchs, "in chunks": head_in_chunks}
    return [
        Case(
            "the MLP's first product, fp32",
            product,
            {"torch": torchs, "oneDNN": onednn},
            [Goal("time of oneDNN's", None, over("torch", "oneDNN"))],
        ),
        Case(
            "head and loss, fp32",
            heads,
            {**ways, "limit: their three products": head_products},
            [
                Goal("time of torch's cross-entropy", None, over("ours", "torch's cross-entropy")),
                Goal("time of the one in chunks", None, over("ours", "in chunks")),
                Goal("time of the three products alone", None, over("ours", "limit: their three products")),
                Goal("largest difference of a loss (nats)", 1e-4, losses_apart),
            ],
        ),
        Case(
            "what two ranks send in a step, fp32",
            {"elements": elements, "bucket": elements // 16 // 2 * 2},
            {"ZeRO 3": zero3, "DistributedDataParallel": ddp},
            [Goal("time of DistributedDataParallel's", None, over("ZeRO 3", "DistributedDataParallel"))],
            ranks=2,
        ),
    ]


if __name__ == "__main__":
    main(__file__, cases)
