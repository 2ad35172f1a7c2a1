"""Command lines for messages: as the scripts of slurm/ where there is a Slurm, else as verbs."""

from inheritune.config.experiment import Experiment
from inheritune.config.jobs import format_shape
from inheritune.files.advice import format_seed_flag
from inheritune.runtime import launcher


def format_command(
    verb: str,
    experiment: Experiment,
    run: str = "",
    seed: int = 0,
    stage: int | None = None,
    slurm: bool = False,
    shape: bool = True,
) -> str:
    """Return the line to paste that runs `verb` on `run` (empty for prepare and fetch) and `stage`.

    With `slurm` it is the script of slurm/, with the GPUs that the experiment's jobs take unless `shape` is
    False."""
    name, small = experiment.given.removesuffix(" --rehearse"), experiment.rehearsal
    number = f" --stage {stage}" if stage else ""
    if not slurm:
        which = f" --run {run}" if run else ""
        rehearse = " --rehearse" if small else ""
        return f"python -m inheritune {verb} {name}{which}{number}{format_seed_flag(seed)}{rehearse}"
    prefix = "REHEARSE=1 " if small else format_shape(verb, experiment.name) if shape else ""
    which = f" {run}" if run else ""
    return f"{prefix}{launcher.format_script(verb)} {name}{which}{number}{format_seed_flag(seed)}"
