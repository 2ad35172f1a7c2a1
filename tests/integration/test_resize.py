"""A run goes on at another number of ranks or another ZeRO stage: every pair of 1, 2, 3 ranks and of ZeRO 1,
2, 3 (as a drill; else 15 of these 72 pairs, in which each shape is left and reached).

Each source is stopped after step 3 of 8 (its folder is copied as it was then); the 5 steps after that must
have the losses of the unbroken run. Two decay groups, accumulation, a clip that binds, three data shards,
shares that do not divide.
"""

import itertools
import json
import shutil

import numpy as np
import pytest
from conftest import experiment_dict, run_verb, write_experiment, write_tokens
from launching import launch_jobs

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_jsonl
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.sources import open_source

AT, STEPS = 3, 8
SHAPES = list(itertools.product((1, 2, 3), (1, 2, 3)))  # (ranks, ZeRO stage)
PAIRS = [(before, now) for before in SHAPES for now in SHAPES if before != now]
FEW = [((2, 3), (3, 1)), ((2, 1), (1, 3)), ((3, 2), (2, 3)), ((3, 3), (2, 2))]
KINDS = {
    "gpt2": (
        {"size": "gpt2_tiny", "layers": 2, "width": 32, "heads": 2, "positions": 32, "vocab_size": 320},
        "fp32",
        PAIRS,
    ),
    "llama": (
        {"size": "llama_tiny", "layers": 2, "width": 32, "heads": 2, "mlp_width": 48, "vocab_size": 320},
        "fp32",
        FEW,
    ),
    "gpt2_bf16": (
        {"size": "gpt2_tiny", "layers": 2, "width": 32, "heads": 2, "positions": 32, "vocab_size": 320},
        "bf16_autocast",
        FEW,
    ),
}
TOLERANCE = {"fp32": 1e-5, "bf16_autocast": 5e-4}
FAULTS = ("exp_avg zero", "exp_avg_sq zero", "step not restored", "one group's weight decay for all")


class Lab:
    """The experiments, and every run of this file: an unbroken one per kind and source shape, a resized one
    per pair."""

    def __init__(self, folder, thinned: int):
        """`thinned`: take every so-manieth of the 72 pairs; of the few, every second at most."""
        self.folder = folder
        self.paths, self.pairs = (
            {},
            {kind: its[:: min(thinned, len(its) // 2)] for kind, (_, _, its) in KINDS.items()},
        )
        for kind, (model, precision, _) in KINDS.items():
            raw = experiment_dict(
                model=model, runs={f"from_{n}_{z}": {"init": "random"} for n, z in SHAPES}, paper=[]
            )
            raw["train"] |= {
                "steps": STEPS,
                "batch_tokens": 640,
                "lr": 3e-3,
                "clip": 0.1,
                "weight_decay": 0.5,
            }
            raw["train"] |= {"checkpoint_every": AT, "keep_last": 9, "eval_every": 4, "precision": precision}
            self.paths[kind] = write_experiment(folder / "recipes", raw, kind)
        for stage in (0, 1, 2, 3):
            settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
            if stage == 3:
                settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            (folder / f"zero{stage}.json").write_text(json.dumps(settings))

    def job(self, kind: str, before, now=None, fault: str = "") -> dict:
        stage = (now or before)[1]
        return {
            "root": str(self.root(now, fault)),
            "experiment": self.paths[kind],
            "run": "from_{}_{}".format(*before),
            "ds": str(self.folder / f"zero{stage}.json"),
            "fault": fault,
        }

    def root(self, now=None, fault: str = ""):
        name = "unbroken" if now is None else "to_{}_{}".format(*now) + fault.replace(" ", "_")
        return self.folder / name

    def run(self, kind: str, before, now=None, fault: str = "") -> RunDir:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INHERITUNE_ROOT", str(self.root(now, fault)))
            experiment = load_experiment(self.paths[kind])
            if not get_data_dir(experiment).exists():
                write_tokens(get_data_dir(experiment))
            return RunDir.of(experiment, "from_{}_{}".format(*before))

    def stopped_copy(self, kind: str, before, now, fault: str = "") -> RunDir:
        """The unbroken run's folder as it was after step AT, under the root of another shape."""
        source, target = self.run(kind, before), self.run(kind, before, now, fault)
        shutil.copytree(
            source.path,
            target.path,
            ignore=shutil.ignore_patterns("final", "DONE", "results.json", "checkpoints"),
        )
        shutil.copytree(source.checkpoint(AT), target.checkpoint(AT))
        shutil.copytree(source.seed_checkpoint(2), target.seed_checkpoint(2), dirs_exist_ok=True)
        return target


@pytest.fixture(
    scope="module", params=[9, pytest.param(1, marks=pytest.mark.drill)], ids=["some pairs", "every pair"]
)
def lab(request, tmp_path_factory):
    made = Lab(tmp_path_factory.mktemp("resize"), request.param)
    for ranks in (1, 2, 3):
        jobs = []
        for kind, pairs in made.pairs.items():
            for before in dict.fromkeys(before for before, _ in pairs if before[0] == ranks):
                made.run(kind, before)
                jobs.append(made.job(kind, before))
        launch_jobs(jobs, ranks, made.folder)
    for ranks in (1, 2, 3):
        jobs = []
        for kind, pairs in made.pairs.items():
            for before, now in pairs:
                if now[0] == ranks:
                    made.stopped_copy(kind, before, now)
                    jobs.append(made.job(kind, before, now))
        launch_jobs(jobs, ranks, made.folder)
    return made


def column(run: RunDir, key: str = "loss") -> np.ndarray:
    return np.array([row[key] for row in read_jsonl(run.metrics) if key in row])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_losses_after_a_resize_equal_the_unbroken_run(lab, kind):
    precision = KINDS[kind][1]
    for before, now in lab.pairs[kind]:
        whole, resized = lab.run(kind, before), lab.run(kind, before, now)
        where = f"{kind} {before} -> {now}"
        said = resized.log.read_text()
        assert (
            f"resized from {before[0]} rank(s), ZeRO {before[1]} to {now[0]} rank(s), ZeRO {now[1]}" in said
        ), where
        assert f"resumed at step {AT} of {STEPS}" in said, where
        ours, theirs = column(resized), column(whole)
        assert len(ours) == len(theirs) == STEPS, where
        assert np.abs(ours - theirs).max() < TOLERANCE[precision], where
        assert np.abs(column(resized, "val_loss") - column(whole, "val_loss")).max() < TOLERANCE[precision], (
            where
        )
        norms = column(whole, "grad_norm")
        assert norms.min() > 0.1 and np.abs(column(resized, "grad_norm") / norms - 1).max() < 1e-2, where
        marker = json.loads((resized.checkpoint(2 * AT) / "COMPLETE").read_text())
        assert (marker["ranks"], marker["zero_stage"]) == now, where  # what it writes next has the new shape
        if precision == "fp32":
            ours, theirs = open_source(str(resized.final)), open_source(str(whole.final))
            for name in theirs.names():
                assert (ours.tensor(name) - theirs.tensor(name)).abs().max() < 1e-4, (where, name)


@pytest.mark.slow
def test_this_comparison_sees_what_a_wrong_resize_does(lab):
    before, now = (2, 3), (1, 1)
    jobs = []
    for fault in FAULTS:
        lab.stopped_copy("gpt2", before, now, fault)
        jobs.append(lab.job("gpt2", before, now, fault))
    launch_jobs(jobs, 1, lab.folder)
    for fault in FAULTS:
        off = np.abs(column(lab.run("gpt2", before, now, fault)) - column(lab.run("gpt2", before))).max()
        print(f"{fault}: losses part by {off:.1e}")
        assert off > 2e-4, fault


@pytest.mark.slow
def test_zero_0_is_refused_with_the_way_out(lab):
    before = (2, 3)
    target = lab.stopped_copy("gpt2", before, (9, 9))
    done = run_verb(
        "train",
        lab.paths["gpt2"],
        "--run",
        "from_2_3",
        "--ds",
        lab.folder / "zero0.json",
        check=False,
        INHERITUNE_ROOT=lab.root((9, 9)),
    )
    assert done.returncode == 2 and "only ZeRO 1, 2 and 3 can be resized: use a ZeRO 1 JSON" in done.stderr, (
        done.stderr
    )
    assert not target.is_done() and target.complete_checkpoints() == [AT]
