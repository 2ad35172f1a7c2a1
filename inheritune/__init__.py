"""Inheritune: small language models from the first layers of larger ones (arXiv 2404.08634), trained with
DeepSpeed."""
