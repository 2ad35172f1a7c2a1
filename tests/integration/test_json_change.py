"""A run resumes under another DeepSpeed JSON with the losses of the unbroken run, or not at all.

Two ranks, at each ZeRO stage (outside the drills those that decide the layout, and a third of the others at
one stage). Each run is stopped after step 3 of 6 (its folder is copied as it was then) and resumed under its
JSON with one key changed: for each key that dslint.yaml (`resume`) allows to change, and the way back. The
steps after that must have the losses of the unbroken run.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, experiment_dict, refused, run_verb, write_experiment, write_tokens
from launching import launch_locally

from inheritune.config.experiment import load_experiment
from inheritune.config.sections import RESUMABLE_KEYS
from inheritune.engines import dslint
from inheritune.files.json_files import read_json, read_jsonl, write_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir

RESUME = dslint.VERDICTS["resume"]
AT, STEPS = 3, 6
ZERO = "zero_optimization."
ROUND_ROBIN = ZERO + "round_robin_gradients"
UNUSED = ("pipeline_read", "pipeline_write", "cpuadam_cores_perc", "ratio", "super_offload")
"""Keys of offload_optimizer that come with the block and do nothing here: for nvme, or for an optimizer that
is refused."""
OFFLOADED = {ZERO + "offload_optimizer.device": "cpu", ZERO + "offload_optimizer.pin_memory": False}
OFFLOADED_PARAMETERS = {ZERO + "offload_param.device": "cpu", ZERO + "offload_param.pin_memory": False}

CHANGES = {
    "train_micro_batch_size_per_gpu": 4,
    ZERO + "contiguous_gradients": False,
    ZERO + "reduce_scatter": False,
    ZERO + "reduce_bucket_size": 700,
    ZERO + "overlap_comm": True,
    ZERO + "use_multi_rank_bucket_allreduce": False,
    ZERO + "allgather_partitions": False,
    ZERO + "allgather_bucket_size": 700,
    ZERO + "ignore_unused_parameters": False,
    ZERO + "stage3_prefetch_bucket_size": 700,
    ZERO + "stage3_param_persistence_threshold": 0,
    ZERO + "stage3_model_persistence_threshold": 0,
    ZERO + "stage3_max_live_parameters": 700,
    ZERO + "stage3_max_reuse_distance": 700,
    ZERO + "stage3_module_granularity_threshold": 1000,
    ZERO + "stage3_use_all_reduce_for_fetch_params": True,
    ZERO + "stage3_allgather_sequential": True,
    ZERO + "stage3_gather_16bit_weights_on_model_save": True,
    ZERO + "zero_hpz_partition_size": 2,
    ZERO + "memory_efficient_linear": False,
    ZERO + "override_module_apply": False,
    ZERO + "log_trace_cache_warnings": True,
    ZERO + "enable_sanity_checks": True,
    ZERO + "pipeline_loading_checkpoint": True,
    ZERO + "save_muon_momentum_buffer_in_memory": True,
    ZERO + "offload_optimizer.device": OFFLOADED,
    ZERO + "offload_optimizer.pin_memory": (OFFLOADED, True),
    ZERO + "offload_optimizer.buffer_count": (OFFLOADED, 6),
    ZERO + "offload_optimizer.fast_init": (OFFLOADED, True),
    ZERO + "offload_param.device": OFFLOADED_PARAMETERS,
    ZERO + "offload_param.pin_memory": (OFFLOADED_PARAMETERS, True),
    ZERO + "offload_param.max_in_cpu": (OFFLOADED_PARAMETERS, 700),
    ZERO + "offload_param.buffer_count": (OFFLOADED_PARAMETERS, 6),
    ZERO + "offload_param.buffer_size": (OFFLOADED_PARAMETERS, 7000),
    "checkpoint.tag_validation": "Fail",
    "checkpoint.checkpoint_serialization": False,
    "checkpoint.parallel_write": {"checkpoint.parallel_write.pipeline_stage": True},
    "inheritune.activation_checkpointing": True,
    "inheritune.compile": True,
    "inheritune.background_saves": True,
    "inheritune.gather_in_bf16": True,
    "aio": {"aio.block_size": 1 << 16},
    "comms_logger": {"comms_logger.enabled": True},
    "csv_monitor": {"csv_monitor.enabled": False},
    "disable_python_gc": True,
    "dump_state": True,
    "flops_profiler": {"flops_profiler.enabled": True, "flops_profiler.profile_step": 5},
    "log_level": "error",
    "memory_breakdown": True,
    "steps_per_print": 2,
    "timers": {"timers.throughput.enabled": True},
    "wall_clock_breakdown": True,
    ROUND_ROBIN: True,
    ZERO + "parameter_alignment": True,
    ZERO + "elastic_checkpoint": True,
    ZERO + "sub_group_size": 1000,
}
"""What each key is changed to, from DeepSpeed's default or from the settings of a pair's first part."""


def set_keys(settings: dict, values: dict) -> dict:
    """`settings` with {path: value} set."""
    result = copy.deepcopy(settings)
    for path, value in values.items():
        *parents, key = path.split(".")
        block = result
        for parent in parents:
            block = block.setdefault(parent, {})
        block[key] = value
    return result


def both(key: str, stage: int) -> tuple[dict, dict]:
    """The JSON before and after the change of `key`."""
    base = {"train_micro_batch_size_per_gpu": 5, "zero_optimization": {"stage": stage}}
    first, change = CHANGES[key] if isinstance(CHANGES[key], tuple) else ({}, CHANGES[key])
    base = set_keys(base, first)
    return base, set_keys(base, change if isinstance(change, dict) else {key: change})


def is_refused(settings: dict, experiment) -> bool:
    problems = dslint.lint(settings, experiment.model, experiment.train, 2)
    return any(problem.severity == "refuse" for problem in problems)


class Lab:
    """Runs on two ranks: an unbroken one for each JSON, and copies of it, as it was after step AT, that
    resume."""

    def __init__(self, folder):
        self.folder, self.sources, self.first, self.second = folder, {}, [], []
        raw = experiment_dict(runs={f"zero{stage}": {"init": "random"} for stage in range(4)}, paper=[])
        raw["model"]["layers"] = 2
        raw["train"] |= {"steps": STEPS, "lr": 3e-3, "clip": 0.1, "weight_decay": 0.5, "final_windows": 8}
        raw["train"] |= {"checkpoint_every": AT, "eval_every": AT, "keep_last": 9}
        self.raw, self.path = raw, write_experiment(folder / "recipes", raw)
        self.experiment = load_experiment(self.path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INHERITUNE_ROOT", str(folder))
            self.data = get_data_dir(self.experiment).name
        write_tokens(folder / "data" / self.data)

    def job(self, root: str, settings: dict, path: str | None = None, **more) -> dict:
        """A run under `root`, for resize_worker."""
        (self.folder / root).mkdir(exist_ok=True)
        (self.folder / root / "data").symlink_to(self.folder / "data")
        (self.folder / f"{root}.json").write_text(json.dumps(settings))
        stage = settings["zero_optimization"]["stage"]
        where = {"root": str(self.folder / root), "experiment": path or self.path, "run": f"zero{stage}"}
        return where | {"ds": str(self.folder / f"{root}.json"), **more}

    def run(self, job: dict) -> RunDir:
        experiment = load_experiment(job["experiment"])
        return RunDir(self.folder / job["root"] / "runs" / experiment.name / "seed0" / job["run"])

    def unbroken(self, settings: dict, path: str | None = None) -> dict:
        """The job of the run that is never stopped, for these settings."""
        key = json.dumps([settings, path])
        if key not in self.sources:
            self.sources[key] = self.job(f"unbroken{len(self.sources)}", settings, path)
            self.first.append(self.sources[key])
        return self.sources[key]

    def resumed(self, root: str, before: dict, now: dict, path: str | None = None, **more) -> dict:
        """The job of a copy of the run under `before` that resumes under `now` (and as `path` has it, if
        given)."""
        self.second.append((self.unbroken(before), self.job(root, now, path, **more)))
        return self.second[-1][1]

    def start(self, jobs: list[dict], name: str) -> None:
        (self.folder / name).write_text(json.dumps(jobs))
        worker = [str(REPOSITORY / "tests/support/resize_worker.py"), str(self.folder / name)]
        launch_locally(worker, 2, OMP_NUM_THREADS="1")

    def launch(self) -> None:
        """Train all unbroken runs, then resume all copies."""
        self.start(self.first, "first.json")
        for source, job in self.second:
            copy_stopped(self.run(source), self.run(job))
        self.start([job for _, job in self.second], "second.json")


def copy_stopped(source: RunDir, target: RunDir) -> None:
    """Copy a finished run's folder as it was after step AT."""
    ends = shutil.ignore_patterns("final", "DONE", "results.json", f"step_{STEPS:08d}")
    shutil.copytree(source.path, target.path, ignore=ends)
    shutil.copytree(source.seed_checkpoint(2), target.seed_checkpoint(2))


def losses(run: RunDir) -> np.ndarray:
    return np.array([row["loss"] for row in read_jsonl(run.metrics) if "loss" in row])


def resumes(run: RunDir) -> bool:
    return f"resumed at step {AT} of {STEPS}" in run.log.read_text()


def thinned(key: str, number: int) -> set[int]:
    """The stages at which `key`, the `number`-th, is tried outside the drills: those where it decides the
    layout, else one for each third key."""
    if stages := RESUME["layout"].get(key):
        return set(stages)
    if number % 3 and "hpz" not in key:
        return set()
    return {3} if any(word in key for word in ("stage3", "offload", "hpz")) else {number % 4}


CASES = [
    pytest.param(key, stage, marks=[] if stage in thinned(key, number) else pytest.mark.drill)
    for number, key in enumerate(key for key in CHANGES if key != "inheritune.compile")
    for stage in range(4)
]
BACK = [(key, stage) for key, stages in RESUME["layout"].items() for stage in stages]


@pytest.fixture(scope="module")
def lab(request, tmp_path_factory):
    """The runs that the chosen tests of this file need, but the compiled ones."""
    made = Lab(tmp_path_factory.mktemp("json"))
    made.jobs = {}
    chosen = [item for item in request.session.items if item.module is request.module]
    params: dict[str, list[dict]] = {}
    for item in chosen:
        if hasattr(item, "callspec"):
            params.setdefault(item.originalname, []).append(item.callspec.params)
    for each in params.get("test_a_change_keeps_the_losses_or_is_refused", ()):
        before, now = both(each["key"], each["stage"])
        if not is_refused(now, made.experiment) and not is_refused(before, made.experiment):
            made.jobs[each["key"], each["stage"]] = made.resumed(
                f"zero{each['stage']}_{each['key']}", before, now
            )
    for each in params.get("test_a_layout_is_left_again", ()):
        before, now = both(each["key"], each["stage"])
        made.jobs[each["key"], each["stage"], "back"] = made.resumed(
            f"back{each['stage']}_{each['key']}", now, before
        )
    for each in params.get("test_a_layout_resumes_under_its_own_json", ()):
        _, now = both(each["key"], each["stage"])
        made.jobs[each["key"], each["stage"], "own"] = made.resumed(
            f"own{each['stage']}_{each['key']}", now, now
        )
    plain = both("dump_state", 1)[0]
    for each in params.get("test_a_key_of_train_that_may_change_keeps_the_bits", ()):
        raw = copy.deepcopy(made.raw)
        raw["train"][each["key"]] = KEYS_OF_TRAIN[each["key"]]
        path = write_experiment(made.folder / each["key"], raw)
        made.jobs[each["key"]] = made.resumed(each["key"], plain, plain, path)
    order = {"fault": "parameters in another order", "refused": str(made.folder / "order.txt")}
    made.jobs["order"] = made.resumed("order", plain, plain, **order)
    raw = copy.deepcopy(made.raw)
    raw["train"]["precision"] = "bf16"
    made.bf16 = [
        made.unbroken(its, write_experiment(made.folder / "bf16", raw)) for its in both(ROUND_ROBIN, 2)
    ]
    made.launch()
    return made


def test_every_key_that_may_change_is_tried():
    keys = [*RESUME["kept"], *RESUME["layout"]]
    unused = {key for key in keys if key.startswith(ZERO + "offload_optimizer.")} - set(CHANGES)
    assert unused == {ZERO + f"offload_optimizer.{key}" for key in UNUSED} and set(keys) - unused == set(
        CHANGES
    )


@pytest.mark.slow
@pytest.mark.parametrize(("key", "stage"), CASES)
def test_a_change_keeps_the_losses_or_is_refused(lab, key, stage):
    before, now = both(key, stage)
    if (key, stage) not in lab.jobs:
        assert is_refused(now, lab.experiment) or is_refused(before, lab.experiment)
        return
    whole, run = lab.run(lab.unbroken(before)), lab.run(lab.jobs[key, stage])
    assert resumes(run) and run.is_done()
    assert np.abs(losses(run) - losses(whole)).max() < 1e-5
    resized = "resized from" in run.log.read_text()
    assert resized == (stage in RESUME["layout"].get(key, []))


@pytest.mark.slow
@pytest.mark.parametrize(("key", "stage"), BACK)
def test_a_layout_is_left_again(lab, key, stage):
    _, now = both(key, stage)
    whole, run = lab.run(lab.unbroken(now)), lab.run(lab.jobs[key, stage, "back"])
    assert resumes(run) and "resized from" in run.log.read_text()
    assert np.abs(losses(run) - losses(whole)).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("key", "stage"), BACK)
def test_a_layout_resumes_under_its_own_json(lab, key, stage):
    """Of an elastic checkpoint DeepSpeed 0.19.8 cannot read what it wrote."""
    _, now = both(key, stage)
    whole, run = lab.run(lab.unbroken(now)), lab.run(lab.jobs[key, stage, "own"])
    assert resumes(run) and ("resized from" in run.log.read_text()) == key.endswith("elastic_checkpoint")
    assert np.abs(losses(run) - losses(whole)).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.drill), 3])
def test_blocks_are_compiled_from_a_checkpoint_on(tmp_path, stage):
    if not shutil.which("g++"):
        pytest.skip("torch.compile on a CPU needs g++")
    made = Lab(tmp_path)
    before, now = both("inheritune.compile", stage)
    job = made.resumed("compiled", before, now)
    made.launch()
    assert resumes(made.run(job))
    assert np.abs(losses(made.run(job)) - losses(made.run(made.unbroken(before)))).max() < 1e-5


KEYS_OF_TRAIN = {
    "eval_every": 2,
    "log_every": 2,
    "checkpoint_every": 2,
    "keep_last": 1,
    "wandb": "offline",
    "wandb_project": "other",
}


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS_OF_TRAIN)
def test_a_key_of_train_that_may_change_keeps_the_bits(lab, key):
    whole, run = lab.run(lab.unbroken(both("dump_state", 1)[0])), lab.run(lab.jobs[key])
    assert resumes(run) and hash_folder(run.final) == hash_folder(whole.final)


def test_every_key_of_train_that_may_change_is_tried():
    assert {*KEYS_OF_TRAIN, "deepspeed"} == set(RESUMABLE_KEYS)


@pytest.mark.slow
def test_parameters_in_another_order_are_refused(lab):
    said = (lab.folder / "order.txt").read_text()
    assert "holds the parameters in another order than this program" in said and "provenance.json" in said
    assert not lab.run(lab.jobs["order"]).is_done()


@pytest.mark.slow
def test_masters_are_found_by_name_under_round_robin(lab):
    plain, reordered = (lab.run(job) for job in lab.bf16)
    assert losses(plain).tolist() == losses(reordered).tolist()
    assert hash_folder(plain.final) == hash_folder(reordered.final)


# --- refusals, on one rank ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(experiment, folder of a run that is stopped after step AT, its settings): ZeRO 1 on one rank."""
    made = Lab(tmp_path_factory.mktemp("refused"))
    plain = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000},
    }
    job = made.unbroken(plain)
    run_verb("train", made.path, "--run", "zero1", "--ds", job["ds"], INHERITUNE_ROOT=job["root"])
    return made, made.run(job), plain


def resume(stopped, tmp_path, settings: dict, change=lambda run: None):
    """(what the resumed start says as it is refused, or its RunDir)"""
    made, source, _ = stopped
    root = tmp_path / "root"
    run = RunDir(root / source.path.relative_to(made.folder / "unbroken0"))
    copy_stopped(source, run)
    (root / "data").symlink_to(made.folder / "data")
    change(run)
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    words = ("train", made.path, "--run", "zero1", "--ds", tmp_path / "ds.json")
    return run, words, {"INHERITUNE_ROOT": root}


def test_a_change_of_unknown_effect_is_refused_by_name(stopped, tmp_path):
    settings = set_keys(stopped[2], OFFLOADED | {ZERO + "offload_optimizer.nvme_path": "/tmp"})
    run, words, environment = resume(stopped, tmp_path, settings)
    said = refused(*words, **environment)
    assert f"was written with {ZERO}offload_optimizer.nvme_path = None" in said and "has /tmp" in said
    assert run.complete_checkpoints() == [AT] and len(losses(run)) == STEPS  # nothing was touched


def forget_layout(run: RunDir) -> None:
    """Leave a marker as it was before layouts were recorded."""
    marker = run.checkpoint(AT) / "COMPLETE"
    facts = read_json(marker)
    write_json(marker, {key: facts[key] for key in ("step", "ranks", "zero_stage", "files")})


def test_an_older_checkpoint_resumes_under_its_own_json_only(stopped, tmp_path):
    run, words, environment = resume(stopped, tmp_path / "same", stopped[2], forget_layout)
    run_verb(*words, **environment)
    assert resumes(run) and hash_folder(run.final) == hash_folder(stopped[1].final)
    for settings in (
        set_keys(stopped[2], {ROUND_ROBIN: True}),
        set_keys(stopped[2], {ZERO + "reduce_bucket_size": 9000}),
    ):
        run, words, environment = resume(stopped, tmp_path / str(settings), settings, forget_layout)
        said = refused(*words, **environment)
        assert "does not record how its states are stored" in said and str(run.provenance) in said
        assert run.complete_checkpoints() == [AT]


def test_another_version_of_deepspeed_is_read_parameter_by_parameter(stopped, tmp_path):
    def written_before(run: RunDir) -> None:
        marker = run.checkpoint(AT) / "COMPLETE"
        write_json(marker, read_json(marker) | {"deepspeed_version": "0.18.0"})

    run, words, environment = resume(stopped, tmp_path, stopped[2], written_before)
    done = run_verb(*words, **environment)
    assert "read parameter by parameter, for a change of the version of DeepSpeed" in done.stdout
    assert np.abs(losses(run) - losses(stopped[1])).max() < 1e-5


class Trap:
    """Pickles to a call that makes the file `trapped` in the current folder."""

    def __reduce__(self):
        return open, ("trapped", "w")


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_code_in_a_received_checkpoint_is_not_run(stopped, tmp_path, name):
    def plant(run: RunDir) -> None:
        folder = run.checkpoint(AT)
        states = torch.load(folder / "deepspeed" / name, weights_only=False)
        torch.save({**states, "more": Trap()}, folder / "deepspeed" / name)
        facts = read_json(folder / "COMPLETE")
        write_json(folder / "COMPLETE", facts | {"files": hash_folder(folder)})

    (REPOSITORY / "trapped").unlink(missing_ok=True)
    _, words, environment = resume(stopped, tmp_path, stopped[2], plant)
    said = refused(*words, **environment)
    assert f"{name} asks to run" in said and "which is refused" in said
    assert not (REPOSITORY / "trapped").exists()


def test_ranks_that_read_other_files_are_refused(small, tmp_path):
    for rank in range(2):
        settings = {
            "train_micro_batch_size_per_gpu": 3,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 5000 + rank},
        }
        (tmp_path / f"ds{rank}.json").write_text(json.dumps(settings))
    said = refused("train", small, "--run", "reference", "--ds", tmp_path / "ds$RANK.json", "--procs", "2")
    assert "that rank 1 on" in said and "is not that of rank 0" in said
    assert not RunDir.of(load_experiment(small), "reference").path.exists()


@pytest.mark.slow
def test_several_runs_of_one_start_keep_weights_twice_per_node(tmp_path, own_root):
    """DeepSpeed makes the group of `zero_hpz_partition_size` once per process."""
    (tmp_path / "hpz.json").write_text(json.dumps(both(ZERO + "zero_hpz_partition_size", 3)[1]))
    path = write_experiment(
        tmp_path, experiment_dict(runs={"a": {"init": "random"}, "b": {"init": "random"}}, paper=[])
    )
    write_tokens(get_data_dir(load_experiment(path)))
    run_verb("train", path, "--run", "a,b", "--ds", tmp_path / "hpz.json", procs=2)
    a, b = (RunDir.of(load_experiment(path), name) for name in "ab")
    assert hash_folder(a.final) == hash_folder(b.final)
