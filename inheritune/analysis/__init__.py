"""Analysis: attention rank and column mass of a model's layers, lazy layers, how many layers to inherit."""
