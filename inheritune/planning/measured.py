"""The plan of a finished run beside what the run measured."""

from inheritune.config.experiment import Experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.markers import COMPLETE
from inheritune.files.rundir import RunDir
from inheritune.planning.memory import FRAGMENTATION, estimate_memory
from inheritune.planning.workload import count_teacher_elements, resolve_shape


def compare_measured(folder: RunDir, experiment: Experiment) -> list[list]:
    """Return [component, planned, measured] of a finished run, in bytes per rank.

    The plan has the DeepSpeed JSON, ranks and precision of the run's last start. Raises UserError if the run
    has left no measurement."""
    results = folder.read_results() if folder.results.is_file() else {}
    measured = [rank for rank in results.get("memory", []) if "weights" in rank]
    if not measured:
        raise UserError(
            f"{folder.path} holds no measured memory (results.json of a finished run); train it until it "
            f"finishes first"
        )
    start = folder.read_starts("deepspeed", "ranks")[-1]
    spec = experiment.run(results["run"])
    train = experiment.train_of(spec).model_copy(update={"precision": results["precision"]})
    length = experiment.data.sequence_length
    shape, teacher = resolve_shape(experiment, spec), count_teacher_elements(experiment, spec)
    planned = estimate_memory(
        shape, results["layers"], start["deepspeed"], train, start["ranks"], length, teacher
    )
    held = ("weights", "masters", "moments", "gradients")
    rows = [[what, planned["component"][what], max(rank[what] for rank in measured)] for what in held]
    for step in folder.complete_checkpoints()[-1:]:  # a short run has saved none
        files = read_json(folder.checkpoint(step) / COMPLETE)["files"]
        rows.append(["checkpoint", planned["checkpoint"], sum(facts["bytes"] for facts in files.values())])
    # The peak excludes what CUDA and NCCL hold, which torch does not count either.
    peak = planned["phases"][planned["peak_phase"]]
    for what, expected in (("allocated", peak), ("reserved", peak * (1 + FRAGMENTATION))):
        peaks = [rank["peak"][what] for rank in measured if what in rank["peak"]]
        if peaks:
            rows.append([f"peak {what}", expected, max(peaks)])
    return rows
