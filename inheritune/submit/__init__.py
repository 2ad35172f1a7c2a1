"""Slurm jobs: `submit`, `cancel`, `retry` and `queue` on the login node, and what a job's script asks at its
start and its end.

`request` reads what is asked for, `site` what the cluster has, `sbatch` makes the command of the two; these
are pure. `preflight` refuses what cannot run, `submission` queues it and keeps a record, `job` decides in
a job. What needs a shell (modules, signals, srun) belongs to slurm/job.sh.
"""
