"""The bytes that DeepSpeed stores for a run, by ZeRO stage; computed without torch."""


def count_checkpoint_bytes(trained: int, weights: int, stage: int) -> int:
    """Return the bytes of one checkpoint, for `trained` parameters and `weights` bytes of weights at ZeRO
    `stage`.

    It holds fp32 masters and two moments of the trained parameters, and below ZeRO 3 the weights. At ZeRO 0
    the trained weights are the masters."""
    states = 12 * trained
    if stage == 0:
        return states + weights - 4 * trained
    return states + weights if stage < 3 else states


def count_rank0_bytes(checkpoint: int, trained: int, ranks: int, stage: int) -> float:
    """Return the bytes of a `checkpoint` that rank 0 writes. The weights are its own; the states of the
    `trained` parameters are spread over the ranks, except at ZeRO 0."""
    return checkpoint - (12 * trained * (1 - 1 / ranks) if stage else 0)
