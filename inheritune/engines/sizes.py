"""What DeepSpeed keeps of a run, in bytes, by the ZeRO stage; reckoned without torch."""


def checkpoint_bytes(trained: int, weights: int, stage: int) -> int:
    """Bytes of one checkpoint: fp32 masters and two moments of what is trained; below ZeRO 3 the weights
    beside them, which at ZeRO 0 are the masters."""
    return 12 * trained + (weights - 4 * trained if stage == 0 else weights if stage < 3 else 0)
