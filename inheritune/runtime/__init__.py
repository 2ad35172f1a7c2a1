"""The processes of a run: rank and world, how ranks meet, the device, signals, what is printed, the log.

Nothing here knows of models or data.
"""
