"""Stands for the training program in the tests of the job scripts: counts steps, saves and stops when it is
asked to.

    counting.py FOLDER STEPS          one rank of srun's: 0.1 s a step, its count kept in FOLDER/rank<r>
    counting.py FOLDER STEPS --slot   what `grow` is on the batch host: starts the ranks with
    $INHERITUNE_LAUNCH, passes USR1 on

Like the program, it keeps its steps in the run's metrics.jsonl and ends with the run's DONE.

COUNTING_FAILS: "killed" (rank 1 gets SIGKILL at step 5), "mistake" (exit code 2), "crash" (exit code 1 with a
cause), "idle" (saves without a step), "done" (ends without DONE).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def tell(name: str, line: str) -> None:
    """Leave a message for the job script."""
    (Path(os.environ["INHERITUNE_JOB"]) / name).write_text(line + "\n")


def slot() -> int:
    if (folder / "DONE").exists():
        print("nothing is left to do")
        return 0
    ranks = subprocess.Popen([*os.environ["INHERITUNE_LAUNCH"].split(), "python3", __file__, *sys.argv[1:3]])
    signal.signal(signal.SIGUSR1, lambda number, frame: ranks.send_signal(number))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return ranks.wait()


def count() -> int:
    asked = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    rank, fails = int(os.environ["SLURM_PROCID"]), os.environ.get("COUNTING_FAILS")
    if fails in ("mistake", "crash"):
        if rank == 0:
            code = 2 if fails == "mistake" else 1
            tell("failure", f"{os.environ['SLURMD_NODENAME']} rank 0: the loss is not a number\n{code}")
            return code
        time.sleep(60)  # srun ends this task when the other leaves, and reports 143
    # a rank that says it counts speaks for all: each can be asked to stop by now
    job, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", 0)
    start = f"listens-{job}-{restart}-{os.environ['SLURM_STEP_ID']}"
    messages = Path(os.environ["INHERITUNE_JOB"])
    (messages / f"{start}-{rank}").touch()
    while len(list(messages.glob(f"{start}-*"))) < int(os.environ["SLURM_STEP_NUM_TASKS"]):
        time.sleep(0.02)
    kept = folder / f"rank{rank}"
    step = int(kept.read_text()) if kept.exists() else 0
    print(f"rank {rank} counts from {step}", flush=True)
    while (step < steps or fails == "idle") and not asked:
        time.sleep(0.1)
        step += fails != "idle"
        if fails == "killed" and rank == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3 + 0.1 * rank)  # a save takes its time, and not all ranks the same
    kept.write_text(str(step))
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps({"step": step}) + "\n")
    if rank == 0 and asked and step < steps:
        print(f"stopped at {step} by {signal.Signals(asked[0]).name}", flush=True)
        tell("more", f"step {step} of {steps}")
    elif rank == 0 and fails != "done":
        (folder / "DONE").touch()
        (run / "DONE").touch()
    return 0


folder, steps = Path(sys.argv[1]), int(sys.argv[2])
run = Path(os.environ["INHERITUNE_ROOT"], "runs", "rehearsal" if os.environ.get("REHEARSE") == "1" else "")
run = run / folder.name / "seed0" / str(steps)
folder.mkdir(parents=True, exist_ok=True)
sys.exit(slot() if "--slot" in sys.argv else count())
