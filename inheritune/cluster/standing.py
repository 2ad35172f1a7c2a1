"""The state of a run, or of a stage of a grown run, read from its folder, its lock and its last job."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from inheritune.cluster.job_records import Key
from inheritune.cluster.planner import read_verdict
from inheritune.cluster.record_tail import find_number, read_last_rows
from inheritune.cluster.slurm_queue import (
    QueuedJob,
    has_slurm,
    list_lost_work,
    list_queued_work,
    read_jobs,
    read_queue,
)
from inheritune.config.experiment import Experiment
from inheritune.config.run import Run
from inheritune.errors import NoAccess, UserError
from inheritune.files.advice import check_unchanged
from inheritune.files.json_files import read_json
from inheritune.files.lock import Lock, describe_holder, find_lock_holders
from inheritune.files.markers import is_prepared
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.paper.published import interpolate_loss, load_curves, select_curve
from inheritune.runs.changes import check_kind

STATUS_COLUMNS = (
    "run",
    "state",
    "step",
    "loss",
    "validation loss",
    "minus the paper's there",
    "tokens/s",
    "time left",
    "queue",
    "job and node",
)


@dataclass
class Standing:
    """The state of a run, or of a stage of a grown run.

    `state` is not started, queued, starting, running, stopped, finished or failed; unknown if its files do
    not say."""

    label: str
    state: str = "not started"
    steps: int | None = None
    train: dict | None = None
    """Last training row of metrics.jsonl."""
    evaluation: dict | None = None
    """Last evaluation row of metrics.jsonl."""
    published: float | None = None
    """The paper's validation loss at the evaluation's step, in nats."""
    job: str = ""
    queue: str = ""
    """The job that waits to work on it, and why it waits."""
    errors: list[str] = field(default_factory=list)
    """What went wrong with the run, and which of its files cannot be read."""

    def cells(self) -> list[str]:
        """Return the row of the table, STATUS_COLUMNS wide."""
        row, evaluation = self.train or {}, self.evaluation or {}
        loss, rate = evaluation.get("val_loss"), find_number(row, "tokens_per_s")
        return [
            self.label,
            self.state,
            f"{row.get('step', 0):,} of {self.steps:,}" if self.steps and self.state != "not started" else "",
            f"{row['loss']:.4f}" if row else "",
            f"{loss:.4f} at {evaluation['step']:,}" if loss is not None else "",
            f"{loss - self.published:+.4f}" if loss is not None and self.published is not None else "",
            f"{rate:,.0f}" if rate else "",
            self._format_time_left(),
            self.queue,
            self.job,
        ]

    def _format_time_left(self) -> str:
        """Return the time to the last step as a cell; empty if the run is not running."""
        row = self.train or {}
        step_s = find_number(row, "step_s")
        if self.state != "running" or not self.steps or not step_s:
            return ""
        left_s = (self.steps - row["step"]) * step_s
        return f"{left_s / 3600:.1f} h" if left_s >= 3600 else f"{left_s / 60:.1f} min"

    @contextmanager
    def collect_errors(self) -> Iterator[None]:
        """Turn an error about a run's files inside the block into one of `errors`, so that the other runs are
        still shown."""
        try:
            yield
        except UserError as error:
            self.errors.append(str(error))
        except OSError as error:
            self.errors.append(f"{error.filename} cannot be read ({error.strerror})")


class View:
    """What is shared by all runs of an experiment and a seed; each shared file and folder is read once."""

    def __init__(self, experiment: Experiment, seed: int):
        self.experiment, self.seed = experiment, seed
        self.queue = read_queue()
        self.jobs = read_jobs(self.queue)
        self.work = list_queued_work(self.queue)
        self.lost = list_lost_work(self.queue)
        self.curves = {} if experiment.rehearsal else load_curves(experiment.name)
        self.errors: list[str] = []
        """What is shared and may not be read."""
        data = get_data_dir(experiment)
        try:
            self.data_ready = is_prepared(data)
        except PermissionError as error:
            self.data_ready = True  # as far as anybody knows: the next command says more
            self.errors.append(str(NoAccess(data, error.strerror)))
        self.slurm = has_slurm(self.queue)
        self._holders: dict[Path, dict[str, dict]] = {}

    def folder(self, run: str) -> RunDir:
        return RunDir.of(self.experiment, run, self.seed)

    def key(self, verb: str, run: str = "", stage: int | None = None) -> Key:
        """Return the work of `verb` on a run of this experiment and seed."""
        seed = 0 if verb == "prepare" else self.seed
        return Key(verb, self.experiment.name, run, stage, seed, self.experiment.rehearsal)

    def find_queued(self, verb: str, run: str = "", stage: int | None = None) -> QueuedJob | None:
        """Return the job in the queue that does this work, or None. One that will never start counts last."""
        key = self.key(verb, run, stage)
        found = [job for other, job in self.work if other.meets(key)]
        return min(found, key=lambda job: job.is_lost, default=None)

    def holder(self, path: Path) -> dict | None:
        """Return who holds the lock of `path`, or None."""
        if path.parent not in self._holders:
            self._holders[path.parent] = find_lock_holders(path.parent)
        holder = self._holders[path.parent].get(path.name)
        if holder and holder.get("slurm") and self.queue and holder["silent"] > 2 * Lock.BEAT:
            return holder if holder["slurm"][0] in self.queue else None  # None: its job has left the queue
        return holder


def list_standings(view: View, name: str, run: Run) -> list[Standing]:
    """Return the run's standing; for a grown run, also those of its stages up to the current one."""
    folder = view.folder(name)
    if run.init.external:
        found = Standing(f"{name} (third-party model)", "unknown")
        with found.collect_errors():
            is_reference = view.experiment.is_reference(name)
            done = folder.is_evaluated() if is_reference else folder.results.is_file()
            found.state = "finished" if done else "not started"
            if done:
                check_unchanged(read_json(folder.results), folder.results)
        return [found]
    standings = _list_trained(view, name, run)
    _fill_queue(view, name, standings[0])
    return standings


def _fill_queue(view: View, name: str, found: Standing) -> None:
    """Fill in which queued job is to work on a run, and what became of the last one that never started."""
    job = view.find_queued("train", name)
    if found.state in ("running", "finished", "unknown"):
        return
    if job and job.state == "RUNNING":  # its program has not begun to write
        found.queue, found.job = job.describe(), ""
        found.state = "starting" if found.state == "not started" else found.state
    elif job:
        found.queue, found.job = job.describe_waiting(), ""
        found.state = "queued" if found.state == "not started" else found.state
        if job.is_lost:
            found.errors.append(f"job {job.name} will never start, because what it waits for failed")
    key = view.key("train", name)
    lost = [text for other, text in view.lost if other.meets(key)]
    if lost and not job:
        found.errors.append(lost[-1])


def _list_trained(view: View, name: str, run: Run) -> list[Standing]:
    """Return the standing of a run that this repository trains, and of its stages."""
    folder, experiment = view.folder(name), view.experiment
    if depths := run.depths(experiment.model.layers):
        return _list_growth(view, name, depths, experiment.train_of(run).steps)
    found = Standing(name, "unknown")
    with found.collect_errors():
        check_kind(folder, is_grown=False)
    if found.errors:
        return [found]
    # counting layers takes long, so it is done only where the paper has a curve
    curve = select_curve(view.curves, name, experiment.layers_of(run)) if name in view.curves else {}
    return [make_standing(view, name, folder, experiment.train_of(run).steps, curve)]


def _list_growth(view: View, name: str, depths: list[int], steps: int) -> list[Standing]:
    """Return the standing of a grown run, and those of its stages up to the current one. `depths` are the
    layers of each stage, `steps` those of one stage."""
    folder, whole = view.folder(name), Standing(name, "unknown")
    chosen = None
    with whole.collect_errors():
        check_kind(folder, is_grown=True)
        if folder.is_done():
            chosen = _read_chosen_stage(folder, depths)
        whole.state = "finished" if chosen else "not started"
    if whole.errors:
        return [whole]
    stages: list[Standing] = []
    for number, layers in enumerate(depths, start=1):
        label = f"{name}/stage{number}, {layers} layers" + (" (chosen)" if chosen == number else "")
        curve = select_curve(view.curves, name, layers)
        stages.append(make_standing(view, label, folder.stage(number), steps, curve))
        if stages[-1].state != "finished":
            break
    if chosen:
        whole.label = f"{name} (stage {chosen} of {len(depths)})"
        return [whole, *(stage for stage in stages if stage.state != "not started")]
    whole.label = f"{name} (stage {len(stages)} of {len(depths)})"
    whole.state = stages[-1].state
    is_between_stages = len(stages) > 1 and whole.state == "not started"
    if is_between_stages or whole.state == "finished":
        whole.state = "stopped"
    return [whole, *stages]


def _read_chosen_stage(folder: RunDir, depths: list[int]) -> int:
    """Return the stage that the DONE of a grown run names. Raises UserError if it has another depth than in
    `depths`, those of the experiment's stages."""
    done = read_verdict(folder, len(depths))
    stage, planned = done["stage"], dict(enumerate(depths, start=1))
    if done.get("layers", planned.get(stage)) != planned.get(stage):
        raise UserError(
            f"{folder.done} chose stage {stage} of {done['layers']} layers, the stages of the experiment now "
            f"have {depths} (run.grow.by, run.grow.max_layers)"
        )
    return stage


def make_standing(view: View, label: str, folder: RunDir, steps: int, curve: dict[int, float]) -> Standing:
    """Return the standing of the run in `folder`, from its files, its lock and its last job."""
    found = Standing(label, "unknown", steps)
    with found.collect_errors():
        rows = read_last_rows(folder.metrics, ("loss", "val_loss"))
        found.train, found.evaluation = rows.get("loss"), rows.get("val_loss")
        found.published = interpolate_loss(curve, found.evaluation["step"]) if found.evaluation else None
    with found.collect_errors():
        _fill_state(found, view.jobs.get(folder.path), view.holder(folder.path), folder)
    return found


def _fill_state(found: Standing, job: QueuedJob | None, holder: dict | None, folder: RunDir) -> None:
    """Fill in state, job and errors. Raises UserError or OSError for what cannot be read."""
    if job and job.state:
        found.job = job.describe()
    if folder.is_done():
        found.state, found.job = "finished", ""
    elif holder:
        found.state, found.job = "running", found.job or describe_holder(holder)
    elif job and job.state in ("RUNNING", "COMPLETING"):
        found.state = "running"
    elif job and job.failure:
        found.state = "failed"
        found.errors.append(f"job {job.name} failed: {job.failure}")
    elif folder.stopped.is_file():
        found.state = "stopped"
        found.errors.append(f"stopped: {_read_reason(folder.stopped)}")
    elif folder.provenance.is_file():
        found.state = "failed"
        where = _describe_start(folder.read_starts()[-1])
        found.errors.append(f"its last start ended without a word ({where}): killed, or its node was lost")
    else:
        found.state = "not started"


def _describe_start(start: dict) -> str:
    """Return where and when a run was started."""
    words = {"slurm_job": "job {}", "host": "{}", "time": "started {}"}
    return ", ".join(word.format(start[key]) for key, word in words.items() if start.get(key))


def _read_reason(file: Path) -> str:
    """Return the reason in STOPPED. Raises UserError if the file is damaged."""
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("why"), str):
        raise UserError(f"{file} does not say why the run stopped: it is damaged; delete it")
    return content["why"]
