"""Before a run queues: memory of each GPU and host, disk, time. Reckoned without a GPU."""
