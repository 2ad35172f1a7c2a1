"""Models as tensors in files: the architecture table, sizes and FLOP counts, checkpoints, surgery.

Nothing here trains. Weights are read and written tensor by tensor, never a whole model at a time.
"""
