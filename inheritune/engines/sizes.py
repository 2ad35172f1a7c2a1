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
