"""Config: what you write (the typed experiment, layer ranges, names, numbers, YAML, environment variables).

Every mistake in these is reported here, before any work starts. This room reads and writes no file of a run
and needs no torch.
"""
