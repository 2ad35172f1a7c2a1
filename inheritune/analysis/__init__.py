"""What attention does, layer by layer: rank, column mass, lazy layers (the paper's section 3)."""
