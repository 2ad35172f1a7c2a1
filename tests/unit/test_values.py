"""Numbers that you write (values.py): whatever is not a number of its kind is refused before the first step,
in an experiment, on the command line and in the environment alike; and what would be no JSON is not met after
the work."""

import ast
import copy
import inspect
import shutil
import typing
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, experiment_dict, refused, run_verb, write_experiment, write_tokens
from tiny_models import random_model

from inheritune.cli import main
from inheritune.cli.arguments import bind_arguments
from inheritune.cli.verbs import Verbs
from inheritune.config import environment, values
from inheritune.config.experiment import Experiment, load_experiment
from inheritune.config.fields import Strict
from inheritune.config.values import ARGUMENTS, Kind
from inheritune.errors import UserError
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.networks import build_config
from inheritune.paper.items import Item  # noqa: F401 - a class of Strict

# --- the experiment -----------------------------------------------------------------------------------------


def full_experiment() -> dict:
    """An experiment that sets every number there is."""
    raw = experiment_dict()
    raw["data"] |= {
        "files": {"a": ["a.txt"], "b": ["b.txt"]},
        "weights": {"a": 0.5, "b": 1.5},
        "shard_tokens": 1000,
        "max_tokens": 10_000,
        "validation": {"fraction": 0.1, "seed": 3},
    }
    raw["model"] |= {"kv_heads": 2, "mlp_width": 64, "norm_eps": 1e-5}
    raw["train"] |= {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0, "keep_last": 2}
    raw["runs"]["reference"] |= {"layers": 4, "keep_at": [2, 6], "train": {"steps": 6, "lr": 1e-3}}
    raw["runs"]["grown"]["grow"]["margin"] = 0.01
    placed = {"source": "reference", "layers": [0, 1], "depth": 4, "at": 1}
    distil = {"teacher": "reference", "alpha": 0.5, "temperature": 2.0}
    raw["runs"]["placed"] = {"init": {"inherit": placed}, "distil": distil}
    raw["evaluate"] = {"tasks": {"piqa": {"shots": 2}}, "batch": 4}
    return raw


def numbers_in(raw, path: tuple = ()) -> list[tuple]:
    """The paths of all numbers."""
    if isinstance(raw, dict | list):
        items = raw.items() if isinstance(raw, dict) else enumerate(raw)
        return [found for key, value in items for found in numbers_in(value, (*path, key))]
    return [path] if isinstance(raw, int | float) and not isinstance(raw, bool) else []


def kinds_in(annotation) -> list[Kind | type]:
    """The kinds within an annotation; int or float itself where a number has none."""
    if typing.get_origin(annotation) is typing.Annotated:
        kinds = [extra for extra in annotation.__metadata__ if isinstance(extra, Kind)]
        return kinds or kinds_in(annotation.__origin__)
    if annotation in (int, float):
        return [annotation]
    return [kind for inner in typing.get_args(annotation) for kind in kinds_in(inner)]


def fields_of(model: type) -> dict[str, list[Kind | type]]:
    """{key: kinds} of the fields of a model that are, or hold, numbers."""
    hints = typing.get_type_hints(model, include_extras=True)
    found = {field.alias or name: kinds_in(hints[name]) for name, field in model.model_fields.items()}
    return {key: kinds for key, kinds in found.items() if kinds}


def below(model: type) -> list[type]:
    return [model, *(found for child in model.__subclasses__() for found in below(child))]


PLACES = numbers_in(full_experiment())


def test_every_number_of_an_experiment_has_a_kind_and_is_tried_here():
    tried = {key for path in PLACES for key in path if isinstance(key, str)}
    tried |= {"weight"}  # of a mixture, which excludes files: integration/test_mixtures.py
    for model in below(Strict):
        for key, kinds in fields_of(model).items():
            assert all(isinstance(kind, Kind) for kind in kinds), (model, key)
            assert key in tried or not model.__module__.startswith("inheritune.config."), (model, key)


def kind_at(path: tuple) -> Kind:
    """The kind of the number at a path of an experiment."""
    keys = [key for key in path if isinstance(key, str)]
    found = [kinds for model in below(Strict) for key, kinds in fields_of(model).items() if key == keys[-1]]
    if keys[-2:-1] == ["weights"]:
        found = [fields_of(type(Experiment.model_fields["data"].annotation.model_construct()))["weights"]]
    if keys[-1] == "layers" and keys[0] == "runs" and isinstance(path[-1], int):
        return values.LAYER
    assert found, path
    return found[0][0]


def wrong_numbers(kind: Kind) -> list:
    wrong = [True, float("nan"), float("inf"), float("-inf"), "six", "nan", [1], {"a": 1}]
    wrong += [6.5, 6.0, 10**30] if kind.whole else ["1e400"]
    wrong += [kind.ge - 1] if kind.ge is not None else [kind.gt, kind.gt - 1] if kind.gt is not None else []
    return wrong + ([kind.le * 2] if kind.le is not None else [kind.lt] if kind.lt is not None else [])


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_what_is_no_number_of_its_kind_is_refused_in_an_experiment(path, tmp_path):
    assert load_experiment(write_experiment(tmp_path, full_experiment()))
    kind = kind_at(path)
    for wrong in wrong_numbers(kind):
        raw = copy.deepcopy(full_experiment())
        inside = raw
        for key in path[:-1]:
            inside = inside[key]
        if isinstance(inside, list) and isinstance(wrong, list):
            continue
        inside[path[-1]] = wrong
        with pytest.raises(UserError) as caught:
            load_experiment(write_experiment(tmp_path, raw))
        said = str(caught.value)
        assert ".".join(map(str, path[:-1] if isinstance(path[-1], int) else path)) in said, (wrong, said)
        assert "\n" not in said and "Traceback" not in said


def test_text_that_yaml_does_not_take_for_a_number_still_is_one(tmp_path):
    path = write_experiment(tmp_path, full_experiment())
    text = (tmp_path / "small.yaml").read_text()
    (tmp_path / "small.yaml").write_text(
        text.replace("min_lr: 0.0001", "min_lr: 1e-4").replace("eps: 1.0e-08", "eps: '1e-8'")
    )
    train = load_experiment(path).train
    assert (train.min_lr, train.eps) == (1e-4, 1e-8)


def test_a_step_to_keep_that_never_comes_is_refused_with_the_run_and_its_steps(tmp_path):
    raw = experiment_dict()
    raw["runs"]["reference"]["keep_at"] = [6]
    load_experiment(write_experiment(tmp_path, raw))
    raw["runs"]["reference"]["keep_at"] = [3, 7]
    with pytest.raises(
        UserError, match="runs.reference.keep_at: step 7 is never reached, the run has 6 steps"
    ):
        load_experiment(write_experiment(tmp_path, raw))
    raw["runs"]["reference"]["train"] = {"steps": 12}
    small = load_experiment(write_experiment(tmp_path, raw), rehearse=True)
    reference = small.runs["reference"]
    assert max(reference.keep_at) <= small.train_of(reference).steps
    raw["runs"]["theirs"] = {"init": {"external": {"source": "gpt2"}}, "keep_at": [1]}
    with pytest.raises(UserError, match="runs.theirs.keep_at: a third-party model is not trained"):
        load_experiment(write_experiment(tmp_path, raw))


def test_every_kept_step_of_the_recipes_is_reached_in_a_rehearsal_too():
    for path in sorted((REPOSITORY / "recipes").glob("*.yaml")):
        for experiment in (load_experiment(path.stem), load_experiment(path.stem, rehearse=True)):
            for run in experiment.runs.values():
                assert not run.keep_at or max(run.keep_at) <= experiment.train_of(run).steps


def test_layers_that_no_machine_could_list_are_refused(tmp_path):
    raw = experiment_dict()
    raw["runs"]["grown"]["init"]["inherit"]["layers"] = "0:1000000000000"
    with pytest.raises(UserError, match="asks for layer 4; the source has 4 layers"):
        load_experiment(write_experiment(tmp_path, raw))
    raw["runs"]["grown"] = {"init": {"inherit": {"source": "owner/elsewhere", "layers": "a:b"}}}
    for rehearse in (False, True):
        with pytest.raises(UserError, match="runs.grown: layers 'a:b' is neither a half-open range"):
            load_experiment(write_experiment(tmp_path, raw), rehearse=rehearse)


# --- the command line ---------------------------------------------------------------------------------------

VERBS = {name: f for name, f in inspect.getmembers(Verbs, inspect.isfunction) if not name.startswith("_")}
TYPED = [
    (verb, name)
    for verb, f in VERBS.items()
    for name in inspect.signature(f).parameters
    if name in ARGUMENTS and (verb, name) != ("check", "gpus")
]


def bound(verb: str, name: str, text: str):
    """The value that the verb would get."""
    parameters = inspect.signature(VERBS[verb]).parameters.items()
    needed = [f"--{key}=x" for key, p in parameters if p.default is p.empty and key not in ("self", name)]
    return bind_arguments(verb, VERBS[verb], [*needed, f"--{name.replace('_', '-')}={text}"])[name]


@pytest.mark.parametrize(("verb", "name"), TYPED)
def test_what_is_no_number_of_its_kind_is_refused_on_the_command_line(verb, name):
    kind = ARGUMENTS[name]
    texts = [
        "True",
        "²",
        "1²",
        "١",
        "nan",
        "inf",
        "1e400",
        "9" * 5000,
        "x",
        "1 2",
        "1_0",
        "0x10",
        "[1]",
        "'1'",
    ]
    texts += ["1.0", "1e1"] if kind.whole else []
    texts += [str(number) for number in (-1, 10**30) if kind.problem(number)]
    for text in texts:
        with pytest.raises(UserError, match=f"^{verb}: --{name.replace('_', '-')} "):
            bound(verb, name, text)
    good = 1 if kind.whole else 0.5
    assert bound(verb, name, f" {good}") == good


def test_all_numbers_of_the_command_line_are_in_the_table():
    """An argument whose default is a number is one."""
    for verb, function in VERBS.items():
        for name, parameter in inspect.signature(function).parameters.items():
            if isinstance(parameter.default, int | float):
                assert name in ARGUMENTS, (verb, name)


@pytest.mark.parametrize("text", ["2", "maybe", "[]", "None"])
def test_a_switch_is_true_or_false(text):
    with pytest.raises(UserError, match="train: --rehearse is given alone, or with true or false"):
        bound("train", "rehearse", text)
    assert bound("train", "rehearse", "no") is False


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["plan", "quickstart", "--mfu", "1e400"],
            "--mfu is the share of the GPU's peak rate that is used, between 0 and 1",
        ),
        (["plan", "quickstart", "--mfu", "True"], "--mfu takes a number (got 'True')"),
        (
            ["check", "quickstart", "--gpus", "1,²"],
            "--gpus takes a number of GPUs or several, as in 1,2,4 (got '1,²')",
        ),
        (
            ["train", "quickstart", "--run", "reference", "--seed", "True"],
            "--seed takes a whole number (got 'True')",
        ),
        (["train", "quickstart", "--run", "reference", "--seed", "-1"], "--seed must be at least 0 (got -1)"),
        (
            ["inherit", "--source", "x", "--layers", "0,a", "--out", "y"],
            "--layers as a list takes a whole number",
        ),
        (
            ["analyze", "--model", "x", "--data", "quickstart", "--maps", "0:1"],
            "--maps takes pairs layer:head, counted from 1",
        ),
        (
            ["analyze", "--model", "x", "--data", "quickstart", "--maps", "1:2:3"],
            "--maps takes pairs layer:head",
        ),
    ],
)
def test_mistakes_of_the_command_line_are_one_sentence(words, says, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_plan_checks_what_python_gives_it(tmp_path):
    from inheritune.planning.plan import plan

    path = write_experiment(tmp_path, experiment_dict())
    for wrong in ({"mfu": float("inf")}, {"mfu": float("nan")}, {"mfu": 0}, {"gpus": 0}, {"gpu_memory": 0}):
        with pytest.raises(UserError, match=f"plan: --{next(iter(wrong)).replace('_', '-')} "):
            plan(path, **wrong)


# --- the environment ----------------------------------------------------------------------------------------

NUMBERS = [name for name, variable in environment.VARIABLES.items() if variable.kind]


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_of_its_kind_is_refused_in_the_environment(name, monkeypatch, capsys):
    """By the verb that reads it last or never, before it begins."""
    variable = environment.VARIABLES[name]
    for text in ["True", "²", "nan", "1e400", "x", "-1", "30m", "9" * 5000]:
        monkeypatch.setenv(name, text)
        assert main(["verify", str(REPOSITORY / "tests")]) == 2
        said = capsys.readouterr().err
        assert f"inheritune: {name}={text}" in said and "unset it" in said and said.count("\n") == 1
    monkeypatch.setenv(name, "1")
    assert environment.read_number(name) == 1
    for unset in ("", None):
        monkeypatch.setenv(name, "") if unset == "" else monkeypatch.delenv(name)
        assert environment.read_number(name) == variable.default


def test_the_environments_numbers_reach_who_reads_them(tmp_path, monkeypatch):
    from inheritune.files.lock import Lock
    from inheritune.runtime.rendezvous import get_collective_timeout_s

    monkeypatch.setenv("INHERITUNE_LOCK_WAIT", "2.5")
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "7")
    monkeypatch.setenv("REHEARSE", "1")
    assert (
        Lock(tmp_path / "x").wait == 2.5
        and get_collective_timeout_s() == 420
        and load_experiment("quickstart").rehearsal
    )
    monkeypatch.setenv("REHEARSE", "0")
    assert not load_experiment("quickstart").rehearsal
    monkeypatch.setenv("REHEARSE", "no")
    with pytest.raises(UserError, match="REHEARSE=no is neither 1 nor 0"):
        load_experiment("quickstart")


@pytest.mark.parametrize("text", ["CPU", "gpu", "cpu,cuda", " cpu"])
def test_an_accelerator_that_is_not_known_is_refused(monkeypatch, text):
    """DS_ACCELERATOR=CPU would train on the GPU that somebody wished to leave alone."""
    monkeypatch.setenv("DS_ACCELERATOR", text)
    said = refused("status", "quickstart")
    assert f"DS_ACCELERATOR={text} is not known here; set it to cpu or cuda, or unset it" in said


def test_a_stage_beyond_the_last_is_refused_before_anything_is_asked(tmp_path):
    """No data is prepared, and no reference trained."""
    start = {"inherit": {"source": "reference", "layers": "0:1"}}
    runs = {"reference": {"init": "random"}, "grown": {"init": start, "grow": {"by": 1, "max_layers": 2}}}
    path = write_experiment(tmp_path, experiment_dict(paper=[], runs=runs))
    for verb in ("check", "train"):
        said = refused(verb, path, "--run", "grown", "--stage", "99")
        assert "run 'grown' has stages 1 to 2 ([1, 2] layers), no stage 99" in said


def variables_of(tree: ast.AST) -> set[str]:
    """Names of the variables that a module reads or sets by os.environ or environment."""
    found = set()
    for node in ast.walk(tree):
        inside = node.slice if isinstance(node, ast.Subscript) else None
        owner = node.value if inside else node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and node.args:
            inside = node.args[0]
        words = ast.unparse(owner) if owner else ""
        if words.startswith(("os.environ", "environment.")) and isinstance(inside, ast.Constant):
            found.add(inside.value)
    return found


def test_the_table_holds_all_variables_and_no_others():
    sources = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "inheritune").rglob("*.py")]
    read = set().union(*(variables_of(ast.parse(source)) for source in sources))
    assert len(read) > 15 and read <= set(environment.VARIABLES), read - set(environment.VARIABLES)
    others = [source for source in sources if "VARIABLES: dict" not in source]
    assert not [name for name in environment.VARIABLES if not any(name in source for source in others)]


# --- what would be no JSON ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section", [{"train": {"final_windows": 1, "eval_windows": 1}}, {"grow": {"margin": float("nan")}}]
)
def test_what_would_break_the_result_is_refused_before_the_first_step(section, small, own_root, capsys):
    raw = yaml.safe_load(Path(small).read_text())
    raw["train"] |= section.get("train", {})
    raw["runs"]["grown"]["grow"] |= section.get("grow", {})
    path = write_experiment(own_root.parent / "wrong", raw)
    for words in (["check", path], ["train", path, "--run", "reference"], ["grow", path, "--run", "grown"]):
        assert main(words) == 2
        assert "wrong/small.yaml: " in capsys.readouterr().err
    assert not (own_root / "runs").exists()


def test_a_validation_text_of_one_window_is_refused_before_the_first_step(tmp_path, own_root):
    path = write_experiment(tmp_path, experiment_dict())
    write_tokens(get_data_dir(load_experiment(path)), val_tokens=40)
    said = refused("train", path, "--run", "reference")
    assert "has 40 tokens, one window of 32 + 1; an interval needs two: hold out more" in said
    assert not (own_root / "runs").exists()


def test_damaged_weights_have_no_validation_loss(tmp_path, small):
    model = random_model(build_config(load_experiment(small).model, 2))
    model.transformer.ln_f.weight.data[:] = 3e38  # finite, but no logit is
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(
        get_data_dir(load_experiment(small)) / "tokenizer", tmp_path / "model", dirs_exist_ok=True
    )
    said = refused(
        "evaluate", small, "--model", tmp_path / "model", "--tasks", "none", "--out", tmp_path / "r.json"
    )
    assert "is not finite: its weights are damaged" in said and not (tmp_path / "r.json").exists()


def test_a_score_that_is_not_finite_is_refused_by_its_name():
    from inheritune.config.sections import Task
    from inheritune.evaluation.task_metrics import check_scores, parse_stderr

    task = Task(task="lambada", metrics=["perplexity", "acc"])
    row = {"perplexity": {"score": float("inf"), "stderr": None}, "acc": {"score": 0.0, "stderr": None}}
    with pytest.raises(UserError, match="perplexity of task words is inf"):
        check_scores("words", row, task)
    row["perplexity"]["score"] = 12.0
    check_scores("words", row, task)
    assert [parse_stderr(value) for value in ("N/A", 0.5, float("nan"), float("inf"))] == [
        None,
        0.5,
        None,
        None,
    ]


def test_a_run_of_the_least_windows_trains_to_its_end(small, own_root):
    """Two windows: the least that has an interval."""
    raw = yaml.safe_load(Path(small).read_text())
    raw["train"] |= {"final_windows": 2, "eval_windows": 1, "steps": 2, "eval_every": 1}
    path = write_experiment(own_root.parent / "least", raw)
    run_verb("train", path, "--run", "reference")
    run = RunDir.of(load_experiment(path), "reference")
    assert run.is_done() and run.read_results()["validation"]["n"] == 2
