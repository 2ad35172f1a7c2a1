"""Models as tensors in files: the architecture table, sizes and parameter counts, reading and writing
checkpoints, surgery.

Nothing here trains. Weights are read tensor by tensor, never a whole model at a time.
"""
