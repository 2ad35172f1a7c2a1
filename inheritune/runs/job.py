"""A job: what is trained, and where its folder lies."""

from dataclasses import dataclass

from inheritune.config.experiment import Experiment, Run, Train
from inheritune.errors import UserError
from inheritune.files.rundir import RunDir


@dataclass(frozen=True)
class Job:
    """What is trained: a run of an experiment with one seed, or stage `stage` (from 1) of a grown run."""

    experiment: Experiment
    name: str
    seed: int = 0
    stage: int | None = None

    @property
    def run(self) -> Run:
        return self.experiment.run(self.name)

    @property
    def settings(self) -> Train:
        return self.experiment.train_of(self.run)

    @property
    def root(self) -> RunDir:
        return RunDir.of(self.experiment, self.name, self.seed)

    @property
    def dir(self) -> RunDir:
        return self.root.stage(self.stage) if self.stage else self.root

    def sibling(self, name: str) -> RunDir:
        return RunDir.of(self.experiment, name, self.seed)

    def title(self) -> str:
        mark = "REHEARSAL " if self.experiment.rehearsal else ""
        stage = f" stage {self.stage}" if self.stage else ""
        return f"{mark}{self.experiment.name}/{self.name}{stage} seed {self.seed}"

    def depths(self) -> list[int]:
        """Return the layers of each stage of a grown run. Raises UserError if `stage` is none of them, or the
        run has none."""
        if not self.run.grow:
            raise UserError(
                f"run '{self.name}' has no 'grow' section, so it has no stage {self.stage}; leave out --stage"
            )
        depths = self.run.grow.depths(self.run.init.inherit.layers, self.experiment.model.layers)
        if self.stage and self.stage > len(depths):
            raise UserError(
                f"run '{self.name}' has stages 1 to {len(depths)} ({depths} layers), no stage {self.stage}"
            )
        return depths

    def resolved(self, train: Train) -> dict:
        """What experiment.yaml of the run folder holds: everything that decides this run, its `train` as
        resolved."""
        return {
            "experiment": self.experiment.name,
            "rehearsal": self.experiment.rehearsal,
            "run_name": self.name,
            "seed": self.seed,
            "stage": self.stage,
            "data": self.experiment.data.model_dump(mode="json"),
            "model": self.experiment.model.model_dump(mode="json"),
            "train": train.model_dump(mode="json"),
            "run": self.run.model_dump(mode="json", by_alias=True, exclude={"train"}),
        }
