"""A job: what is trained, and where it is stored."""

from dataclasses import dataclass

from inheritune.config.experiment import Experiment
from inheritune.config.run import Run
from inheritune.config.sections import Train
from inheritune.errors import UserError
from inheritune.files.rundir import RunDir


@dataclass(frozen=True)
class Job:
    """A run of an experiment with one seed, or stage `stage` (from 1) of a grown run."""

    experiment: Experiment
    name: str
    seed: int = 0
    stage: int | None = None

    @property
    def run(self) -> Run:
        """The run's section of the experiment."""
        return self.experiment.run(self.name)

    @property
    def settings(self) -> Train:
        """The run's training settings, as the experiment states them."""
        return self.experiment.train_of(self.run)

    @property
    def root(self) -> RunDir:
        """The folder of the run, which holds the folders of its stages."""
        return RunDir.of(self.experiment, self.name, self.seed)

    @property
    def dir(self) -> RunDir:
        """The folder of the run, or of this stage of it."""
        return self.root.stage(self.stage) if self.stage else self.root

    def sibling(self, name: str) -> RunDir:
        """Return the folder of run `name` of the same experiment and seed."""
        return RunDir.of(self.experiment, name, self.seed)

    def title(self) -> str:
        """Return the job's name for messages."""
        mark = "REHEARSAL " if self.experiment.rehearsal else ""
        stage = f" stage {self.stage}" if self.stage else ""
        return f"{mark}{self.experiment.name}/{self.name}{stage} seed {self.seed}"

    @property
    def continues_stage(self) -> bool:
        """Whether the job is a stage that starts from the weights of the stage before."""
        return bool(self.stage and self.stage > 1 and self.run.grow and self.run.grow.from_ != "reference")

    def depths(self) -> list[int]:
        """Return the number of layers of each stage of a grown run. Raises UserError if the run has no
        stages, or none with the number `stage`."""
        depths = self.run.depths(self.experiment.model.layers)
        if not depths:
            raise UserError(
                f"run '{self.name}' has no 'grow' section, so it has no stage {self.stage}; leave out --stage"
            )
        if self.stage and self.stage > len(depths):
            raise UserError(
                f"run '{self.name}' has stages 1 to {len(depths)} ({depths} layers), no stage {self.stage}"
            )
        return depths

    def resolved(self, train: Train) -> dict:
        """Return what experiment.yaml of the run folder holds: all settings that define this run, with
        `train` as resolved. JSON's types only: what is read back from YAML or JSON is equal to it."""
        return {
            "experiment": self.experiment.name,
            "rehearsal": self.experiment.rehearsal,
            "run_name": self.name,
            "seed": self.seed,
            "stage": self.stage,
            "data": self.experiment.data.model_dump(mode="json"),
            "model": self.experiment.model.model_dump(mode="json", by_alias=True),
            "train": train.model_dump(mode="json"),
            "run": self.run.model_dump(mode="json", by_alias=True, exclude={"train"}),
        }
