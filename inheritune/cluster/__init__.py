"""Runs on a cluster: growth stage by stage, `check`, `status`, `verify`, and `fetch`, which downloads what
compute nodes cannot.

`planner` is pure and `grow` runs what it says; `launch` starts a verb as other processes. How a process
trains, and what it finds in its environment, belongs to training and runtime.
"""
