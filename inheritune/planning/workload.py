"""What each run of an experiment trains, and what that costs to compute: parameters, FLOPs, hours of a GPU.

Everything follows from the sizes in the experiment's file; no model is built.
"""

from inheritune.config.catalog import GPU_SPECS
from inheritune.config.experiment import Experiment
from inheritune.config.run import Run
from inheritune.config.sections import Model, Train
from inheritune.models.sizes import (
    halve_model,
    list_parameters,
    predict_flops_per_token,
)

MFU = 0.4
"""Assumed share of a GPU's peak rate."""


def estimate_hours(flops: float, gpu: str, mfu: float) -> float:
    """Return the hours in which one `gpu` computes `flops` at the share `mfu` of its peak rate."""
    return flops / (mfu * GPU_SPECS[gpu]["tflops"] * 1e12) / 3600


def estimate_gpu_hours(
    model: Model, layers: int, train: Train, length: int, gpu: str = "H100", mfu: float = MFU
) -> float:
    """Return the hours of one GPU for a whole run, without evaluation, saving and queueing."""
    flops = train.steps * train.batch_tokens * predict_flops_per_token(model, layers, length)
    return estimate_hours(flops, gpu, mfu)


# --- the runs of an experiment ------------------------------------------------------------------------------


def list_models(experiment: Experiment, name: str) -> list[tuple[int | None, int]]:
    """Return (stage, layers) of every model that run `name` trains.

    That is one model, one per stage of a grown run, and none of an external run."""
    run, full = experiment.run(name), experiment.model.layers
    if run.init.external:
        return []
    if depths := run.depths(full):
        return list(enumerate(depths, start=1))
    return [(None, experiment.layers_of(run))]


def resolve_shape(experiment: Experiment, run: Run) -> Model:
    """Return the experiment's model as `run` has it, except for the depth."""
    return halve_model(experiment.model) if run.init.half_width else experiment.model


def get_teacher_depth(experiment: Experiment, run: Run) -> int:
    """Return the layers of the teacher of a distilled run, 0 if there is none.

    A teacher from outside the experiment is assumed to be as deep as the reference."""
    name = run.distil.teacher if run.distil else None
    if not name:
        return 0
    if name in experiment.runs:
        return experiment.layers_of(experiment.runs[name])
    return experiment.model.layers


def count_teacher_elements(experiment: Experiment, run: Run) -> int:
    """Count the elements of the teacher of a distilled run, 0 if there is none."""
    layers = get_teacher_depth(experiment, run)
    return sum(t.numel for t in list_parameters(experiment.model, layers)) if layers else 0
