"""dslint and `check`: every mistake of dslint_cases.yaml is caught with the key and the way out, what
DeepSpeed itself does with it is as noted, and no key of the installed DeepSpeed is without a verdict; the
shipped JSON files are sound and train.

`python tests/unit/test_dslint.py` writes ds_configs/MISTAKES.md, the list for readers."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inheritune.engines import deepspeed_keys

sys.path.extend(str(Path(__file__).resolve().parents[2] / place) for place in ("tests", "tests/support"))
from conftest import REPOSITORY, experiment_dict, run_verb, write_experiment, write_tokens

from inheritune.config.experiment import load_experiment
from inheritune.engines import dslint
from inheritune.errors import UserError
from inheritune.files.rundir import get_data_dir

CASES = yaml.safe_load((REPOSITORY / "tests" / "dslint_cases.yaml").read_text(encoding="utf-8"))
SHIPPED = sorted((REPOSITORY / "ds_configs").glob("*.json"))
NAMES = [case["name"] for case in CASES]


def merged(base: dict, over: dict) -> dict:
    """`base` with `over` put over it, block by block; a None takes its key away."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return {key: value for key, value in result.items() if value is not None}


def sound(stage: int) -> dict:
    """A JSON of that stage about which nothing is to be said."""
    zero = {"stage": stage} | ({"reduce_bucket_size": 50_000_000} if stage else {})
    zero |= {"stage3_max_live_parameters": 100_000_000} if stage == 3 else {}
    return {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}


def settings_of(case: dict) -> dict:
    return merged(sound(case["stage"]), case.get("set", {}))


def file_of(case: dict) -> str:
    return case["text"] if "text" in case else json.dumps(settings_of(case), indent=1)


def said_of(case: dict, folder: Path, capsys) -> tuple[str, str]:
    """What check says of the case: (severity, sentences without the file's name)."""
    from inheritune.cluster.check import check

    raw = merged(experiment_dict(), case.get("experiment", {}))
    raw["train"] |= case.get("train", {})
    experiment = write_experiment(folder, raw)
    ds = None
    if "experiment" not in case:
        ds = str(folder / "ds.json")
        Path(ds).write_text(file_of(case), encoding="utf-8")
    environment = {key: str(value) for key, value in case.get("env", {}).items()}
    with pytest.MonkeyPatch.context() as patch:
        for key in ("SLURM_MEM_PER_NODE", "DEEPSPEED_TIMEOUT", "LOCAL_WORLD_SIZE"):
            patch.delenv(key, raising=False)
        for key, value in environment.items():
            patch.setenv(key, value)
        try:
            check(experiment, ds=ds, gpus=str(case["gpus"]) if "gpus" in case else None)
        except UserError as error:
            said, severity = str(error), "refuse"
        else:
            said = "\n".join(
                line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")
            )
            severity = "warn" if said else "nothing"
    return severity, re.sub(rf"(warning: )?{re.escape(str(folder))}/\w+\.(json|yaml):? ?", "", said)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_mistake_is_caught_with_the_key_and_the_way_out(case, tmp_path, capsys):
    severity, said = said_of(case, tmp_path, capsys)
    assert severity == case.get("severity", "refuse"), said
    for words in case["says"]:
        assert words in said
    assert len(said.splitlines()) == 1, said  # that mistake and nothing else


def test_cases_are_distinct_by_cause():
    assert len(CASES) >= 40 and len(set(NAMES)) == len(CASES)
    keys = {
        "name",
        "stage",
        "set",
        "text",
        "experiment",
        "train",
        "gpus",
        "env",
        "severity",
        "says",
        "deepspeed",
        "words",
    }
    assert not [case["name"] for case in CASES if set(case) - keys]
    causes = [(str(case["says"]), case.get("stage"), case.get("gpus")) for case in CASES]
    assert len(set(causes)) == len(causes)


@pytest.mark.parametrize("stage", range(4))
def test_nothing_is_said_of_a_sound_file(stage, tmp_path, capsys):
    assert said_of({"stage": stage, "gpus": 4}, tmp_path, capsys) == ("nothing", "")


def test_several_mistakes_are_told_at_once(tmp_path, capsys):
    wrong = {"gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 0, "inheritune": {"x": 1}}
    said = said_of({"stage": 1, "set": wrong}, tmp_path, capsys)[1]
    assert all(
        words in said
        for words in ("'gradient_clipping'", "train_micro_batch_size_per_gpu", "'x' in 'inheritune'")
    )


# --- the list of keys ---------------------------------------------------------------------------------------


def verdict_of(key: str) -> bool:
    """Whether dslint.yaml says what `key` (or the block it lies in) means."""
    spoken = {*dslint.VERDICTS["experiment"], *dslint.VERDICTS["fine"], *dslint.VERDICTS["stages"]}
    blocks = {"comms_logger", "flops_profiler", "timers"} | {rule["key"] for rule in dslint.VERDICTS["rules"]}
    above = {".".join(key.split(".")[:n]) for n in range(1, key.count(".") + 1)}
    return key in spoken | blocks or bool(
        above & (blocks | set(dslint.VERDICTS["experiment"]) | {LEAF_MODULES})
    )


LEAF_MODULES = "zero_optimization.leaf_module"


def known(path: tuple = ()) -> set[str]:
    """Paths of all keys that the installed DeepSpeed reads, in their canonical spelling, deprecated and
    removed ones aside."""
    from deepspeed.runtime import config

    found = set()
    for canonical, deprecated in deepspeed_keys.valid_keys(path).values():
        name = ".".join((*path, canonical))
        if not deprecated and not (not path and canonical in config._REMOVED_TOP_LEVEL_CONFIG_KEYS):
            found |= {name} | known((*path, canonical))
    return found


def test_every_key_of_the_installed_deepspeed_has_a_verdict():
    """A new DeepSpeed with a new key fails here: decide what the key means for a run, and say it in
    dslint.yaml."""
    keys = known()
    assert {
        "zero_optimization.offload_param.max_in_cpu",
        "checkpoint.writer.decoupled",
        "wandb.team",
        "steps_per_print",
    } <= keys
    assert len(keys) > 200
    assert not sorted(key for key in keys if not verdict_of(key))


def test_no_verdict_is_about_a_key_that_is_gone():
    # read elsewhere, by a group of ranks; the experiment's
    keys = known() | {"sequence_parallel_size", "train.precision"}
    keys |= {f"inheritune.{key}" for key in dslint.OWN_KEYS}
    spoken = {*dslint.VERDICTS["experiment"], *dslint.VERDICTS["fine"], *dslint.VERDICTS["stages"]}
    spoken |= {
        key
        for rule in dslint.VERDICTS["rules"]
        for key in (rule["key"], *rule.get("with", {}), *rule.get("unless", {}))
    }
    assert not sorted(spoken - keys)


def test_keys_named_by_deepspeeds_constants_are_seen():
    """The reader was watched; that it reads what DeepSpeed's constants name shows that the watching misses
    nothing."""
    from deepspeed.runtime import constants

    words = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    words = {word for word in words if re.fullmatch(r"[a-z][a-z0-9_]+", word)}
    # values, and names of routes
    no_keys = {"train", "eval", "predict", "encode", "mean", "sum", "auto", "fp32"}
    # below optimizer
    no_keys |= {"max_grad_norm", "legacy_fusion", "params", "type", "check_overflow", "immediate_grad_update"}
    no_keys |= {"ddp_bf16", "ds_pipe_replicated", "data_parallel_group", "global_rank"}  # of the program
    assert not sorted(words - no_keys - {part for key in known() for part in key.split(".")})


def test_a_key_that_deepspeed_gains_is_noticed(monkeypatch):
    """The tests above can fail: with one more key read at the top level, it is found and has no verdict."""
    from deepspeed.runtime import config

    reads = config.get_steps_per_print
    monkeypatch.setattr(
        config, "get_steps_per_print", lambda block: block.get("brand_new_key") or reads(block)
    )
    deepspeed_keys.valid_keys.cache_clear()
    try:
        assert "brand_new_key" in deepspeed_keys.valid_keys(()) and not verdict_of("brand_new_key")
    finally:
        deepspeed_keys.valid_keys.cache_clear()


# --- DeepSpeed itself ---------------------------------------------------------------------------------------


def outcomes(cases: dict[str, dict], folder: Path) -> dict[str, dict]:
    """What a plain DeepSpeed program does with each of these JSON files (dslint_worker.py)."""
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = [
        sys.executable,
        "tests/support/dslint_worker.py",
        str(folder / "cases.json"),
        str(folder / "outcomes.json"),
    ]
    done = subprocess.run(worker, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.slow
def test_deepspeed_does_with_each_mistake_what_is_noted(tmp_path):
    tried = {case["name"]: case for case in CASES if case["deepspeed"] != "untried" and "text" not in case}
    bases = {f"stage {stage}": sound(stage) for stage in range(4)}
    found = outcomes({**bases, **{name: settings_of(case) for name, case in tried.items()}}, tmp_path)
    reference = found["stage 1"]["losses"]
    assert all(
        abs(a - b) < 1e-5 for base in bases for a, b in zip(found[base]["losses"], reference, strict=True)
    )
    wrong = []
    for name, case in tried.items():
        losses = found[name].get("losses")
        same = losses is not None and max(abs(a - b) for a, b in zip(losses, reference, strict=True)) < 1e-5
        does = "raises" if losses is None else "ignores" if same else "changes"
        if does != case["deepspeed"]:
            wrong.append((name, case["deepspeed"], found[name]))
    assert not wrong


@pytest.mark.parametrize("case", [case for case in CASES if "text" in case], ids=lambda case: case["name"])
def test_deepspeed_raises_for_each_broken_file(case, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    (tmp_path / "ds.json").write_text(case["text"], encoding="utf-8")
    assert case["deepspeed"] == "raises"
    with pytest.raises((ValueError, AttributeError, TypeError)):
        DeepSpeedConfig(str(tmp_path / "ds.json"))


# --- the shipped files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_json_passes_check(path):
    from inheritune.engines.deepspeed_json import load_deepspeed_json

    experiment = load_experiment("gpt2_xl_owt")
    settings = load_deepspeed_json(path)
    assert dslint.lint(settings, experiment.model, experiment.train, 16) == []
    text = path.read_text(encoding="utf-8")
    assert (
        "Costs:" in text
        and len(re.search(r"First to turn: ([^.]*(?:\.[a-z][^.]*)*)\.", text)[1].split(", ")) >= 3
    )
    assert (REPOSITORY / "ds_configs" / "README.md").read_text().count(path.name) >= 1


@pytest.mark.slow
def test_every_shipped_json_trains_two_steps(tmp_path, own_root):
    """On four ranks, for the hierarchical partitioning; losses are those of ZeRO 0, offload included."""
    import numpy as np
    from launching import train_runs
    from test_train import losses_of

    from inheritune.files.rundir import RunDir

    raw = experiment_dict(paper=[], runs={})
    raw["train"] |= {"steps": 2, "eval_every": 2, "checkpoint_every": 2}
    for path in SHIPPED:
        ds = str(path)
        if path.stem == "zero3_multinode":  # 8 GPUs a node: here nodes of two ranks
            ds = str(tmp_path / path.name)
            Path(ds).write_text(
                path.read_text().replace('"zero_hpz_partition_size": 8', '"zero_hpz_partition_size": 2')
            )
        raw["runs"][path.stem] = {"init": "random", "train": {"deepspeed": ds}}
    experiment = write_experiment(tmp_path, raw)
    write_tokens(get_data_dir(load_experiment(experiment)))
    train_runs([f"{experiment}:{path.stem}" for path in SHIPPED], 4, own_root)
    losses = {path.stem: losses_of(RunDir.of(load_experiment(experiment), path.stem)) for path in SHIPPED}
    for name, mine in losses.items():
        assert len(mine) == 2 and np.abs(mine - losses["zero0"]).max() < 1e-5, name


# --- the verbs ----------------------------------------------------------------------------------------------


def test_check_shows_the_batch_for_each_number_of_gpus(small):
    done = run_verb("check", small, "--ds", "ds_configs/zero2.json", "--gpus", "1,3")
    assert (
        "20 sequences x 32 tokens = 640 tokens a step: 1 rank(s) x 4 micro batch x 5 accumulation"
        in done.stdout
    )
    assert (
        "3 rank(s) x 4 micro batch x 2 accumulation" in done.stdout
        and "warning: ds_configs/zero2.json:" in done.stdout
    )
    wrong = run_verb("check", small, "--gpus", "two", check=False)
    assert (
        wrong.returncode == 2
        and "--gpus takes a number of GPUs or several, as in 1,2,4 (got 'two')" in wrong.stderr
    )


def test_train_refuses_and_warns_as_check_does(small, tmp_path):
    bad, doubtful = tmp_path / "bad.json", tmp_path / "doubtful.json"
    bad.write_text(json.dumps(merged(sound(1), {"zero_optimisation": {}})))
    doubtful.write_text(json.dumps(merged(sound(1), {"disable_allgather": True})))
    done = run_verb("train", small, "--run", "reference", "--ds", bad, check=False)
    assert (
        done.returncode == 2
        and "unknown key 'zero_optimisation'" in done.stderr
        and "Traceback" not in done.stderr
    )
    done = run_verb("train", small, "--run", "reference", "--ds", doubtful, procs=2)
    assert done.stdout.count("'disable_allgather' is not read by") == 1


# --- the list for readers -----------------------------------------------------------------------------------

HEAD = """# Mistakes in a DeepSpeed JSON

What `python -m inheritune check EXPERIMENT [--ds FILE] [--gpus N]` says of each, and what DeepSpeed 0.19.8 does with the same
file by itself. *ignores*: trains as if it were not there; *raises*: stops when the job starts, or where said; *changes*: trains
on other numbers; *not tried*: needs GPUs, several ranks or a cluster, or is no file of DeepSpeed's.

Made by `python tests/unit/test_dslint.py` from `tests/dslint_cases.yaml`; a test tries each on one CPU rank.

| mistake | check | what it says | DeepSpeed alone |
| --- | --- | --- | --- |
"""  # noqa: E501 - the text is written as it stands


def mistakes(folder: Path, capsys) -> str:
    rows = []
    for case in CASES:
        severity, said = said_of(case, folder, capsys)
        said = re.sub(r"experiment '?small'?", "the experiment", said).replace("|", "\\|")
        does = case["deepspeed"].replace("untried", "not tried") + (
            f": {case['words']}" if "words" in case else ""
        )
        rows.append(f"| {case['name']} | {severity}s | {said} | {does} |")
    return HEAD + "\n".join(rows) + "\n"


def test_list_of_mistakes_is_current(tmp_path, capsys):
    assert (REPOSITORY / "ds_configs" / "MISTAKES.md").read_text(encoding="utf-8") == mistakes(
        tmp_path, capsys
    )


class _Captured:
    """capsys for a run of this file as a program."""

    def __init__(self):
        import io

        sys.stdout = self.stream = io.StringIO()

    def readouterr(self):
        from types import SimpleNamespace

        text = self.stream.getvalue()
        self.stream.seek(0), self.stream.truncate()
        return SimpleNamespace(out=text)


if __name__ == "__main__":
    import tempfile

    screen = sys.stdout
    with tempfile.TemporaryDirectory() as scratch:
        text = mistakes(Path(scratch), _Captured())
    sys.stdout = screen
    (REPOSITORY / "ds_configs" / "MISTAKES.md").write_text(text, encoding="utf-8")
