"""The processes of a run: launchers, ranks and how they meet, devices, collectives, signals, streams, logs.

Nothing here knows of models or data.
"""
