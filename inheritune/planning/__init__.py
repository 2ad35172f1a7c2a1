"""Planning: the memory, time and disk of every run before it queues, by formulas.

No module here imports torch at its top: the cluster's growth planner uses these hours on a batch host. What a
run measured is compared with its plan in measured.py.
"""
