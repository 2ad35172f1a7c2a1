"""Analysis: rank and column mass of attention, what a layer is worth, how many layers to inherit."""
