"""What a person writes: the typed experiment and its loading, layer ranges, names, numbers, YAML, variables
of the environment.

Every mistake in these is told here, before anything is done. No file of a run is read or written here, and
torch is not needed.
"""
