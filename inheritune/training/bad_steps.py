"""Numbers that are not finite: what is recorded of a skipped step, and the error that ends a damaged run."""

import math

import torch

from inheritune.errors import UserError
from inheritune.files.json_files import write_json
from inheritune.files.processes import get_node_name
from inheritune.runs.job import Job
from inheritune.runtime import dist
from inheritune.training.inputs import RunInputs

MAX_BAD_STEPS = 3
"""Steps in a row whose loss or gradient is not finite, after which a run stops: a batch may be bad, but not
three."""


def describe_bad_step(inputs: RunInputs, step: int, loss_sums: torch.Tensor) -> dict:
    """Return what a replay of step `step` needs: the mean losses and the windows of every rank. Every rank
    must call, with its own `loss_sums`."""
    share = inputs.share
    losses = (loss_sums / (share.count * inputs.length)).tolist()
    windows = inputs.order.starts(step - 1)[share.first : share.first + share.count].tolist()
    finite = [loss if math.isfinite(loss) else None for loss in losses]  # JSON has no nan
    return {
        "step": step,
        "ranks": dist.gather_objects({"node": get_node_name(), "losses": finite, "windows": windows}),
    }


def write_bad_steps(inputs: RunInputs, bad_steps: list[dict]) -> None:
    """Write the bad steps in a row (each of `describe_bad_step`) for a replay."""
    facts = {
        "data": str(inputs.tokens.folder),
        "data_fingerprint": inputs.tokens.fingerprint,
        "seed": inputs.job.seed,
        "window_tokens": inputs.length + 1,
        "steps": bad_steps,
    }
    write_json(inputs.job.dir.bad_batch, facts)


def explain_bad_step(job: Job, bad_step: dict) -> str:
    """Return a sentence that says which loss is not finite, or that the gradient is not."""
    where = [
        f"{rank} ({facts['node']})" for rank, facts in enumerate(bad_step["ranks"]) if None in facts["losses"]
    ]
    what = f"the loss of rank {', '.join(where)}" if where else "the gradient"
    return f"{what} is not finite at step {bad_step['step']}, its batch is in {job.dir.bad_batch}"


def damage_error(job: Job, problem: str, saved_step: int) -> UserError:
    """Return the error that ends a run because of `problem`. `saved_step` is the step of its last checkpoint,
    or 0."""
    if saved_step:
        good = f"that of step {saved_step} is the last checkpoint"
    else:
        good = "there is no checkpoint yet"
    return UserError(
        f"{job.title()}: {problem}; {good}, and the same command resumes from there; if this happens again, "
        f"lower train.lr, or use precision fp32 or another node"
    )
