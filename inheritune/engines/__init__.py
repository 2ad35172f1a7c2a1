"""DeepSpeed: the check of its JSON, the engine with its optimizer and schedule, checkpoints, resizing.

All code that knows DeepSpeed's classes and files is here.
"""
