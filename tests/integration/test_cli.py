"""The command line as a user meets it: mistakes are one sentence with exit code 2 and leave nothing behind;
the shape of the package (imports in order, sizes)."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import (
    REPOSITORY,
    experiment_dict,
    one_sentence,
    refused,
    run_verb,
    write_experiment,
    write_tokens,
)

from inheritune.config.experiment import load_experiment
from inheritune.files.rundir import get_data_dir

ROOMS = """
errors config files runtime data models runs engines training analysis planning evaluation paper cluster
submit cli """.split()  # noqa: SIM905 - a list to read
"""A file imports from its own room and from those before it, nowhere else."""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian", "quickstart"], "unknown verb 'trian'; did you mean 'train'?"),
        (["train", "quickstart", "--rum", "reference"], "train has no flag --rum; did you mean '--run'?"),
        (["train", "quickstart"], "train needs RUN"),
        (["train", "quickstrat", "--run", "reference"], "did you mean 'quickstart'?"),
        (["train", "quickstart", "--run", "refrence"], "has no run 'refrence'; did you mean 'reference'?"),
        (
            ["train", "quickstart", "--run", "reference,refrence"],
            "has no run 'refrence'; did you mean 'reference'?",
        ),
        (
            ["train", "quickstart", "--run", "reference", "--seed", "one"],
            "--seed takes a whole number (got 'one')",
        ),
        (
            ["train", "quickstart", "--run", "reference", "--seed", "1", "--seed", "2"],
            "--seed is given twice",
        ),
        (["train", "quickstart", "--run", "reference", "--ds"], "--ds needs a value"),
        (["train", "quickstart", "--run", "reference", "extra"], "takes no further argument 'extra'"),
        (
            ["train", "quickstart", "--run", "inheritune"],
            "grows by stages; use 'grow quickstart --run inheritune'",
        ),
        (["train", "quickstart", "--run", "reference", "--stage", "1"], "has no 'grow' section"),
        (["grow", "quickstart", "--run", "reference"], "has no 'grow' section; use train"),
        (["train", "quickstart", "--run", "reference", "--ds", "ds_configs/zero4.json"], "did you mean"),
        (["train", "quickstart", "--run", "reference"], "holds no prepared data"),
        (["table", "quickstart"], "run 'reference' of quickstart (seed 0) is not finished"),
        (["figure", "quickstart"], "nothing to draw"),
        (["evaluate", "quickstart"], "either --run NAME or --model CHECKPOINT"),
        (["inherit", "--source", "/nowhere", "--layers", "0:2", "--out", "x"], "/nowhere"),
        (["analyze", "--model", "/nowhere", "--data", "quickstart"], ""),
    ],
    ids=lambda value: "-".join(value)[:60] if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(words, says, own_root):
    assert says in refused(*words)
    assert not own_root.exists() or not any(own_root.iterdir())  # nothing written


def test_help_names_every_verb():
    text = run_verb("--help").stdout
    verbs = [
        "init",
        "schema",
        "prepare",
        "fetch",
        "train",
        "inherit",
        "analyze",
        "grow",
        "evaluate",
        "table",
        "figure",
    ]
    verbs += ["status", "export", "plan", "verify", "sync", "check", "submit", "queue", "cancel", "retry"]
    for verb in verbs:
        assert f"  {verb} " in text
        assert run_verb(verb, "--help").stdout.startswith(f"python -m inheritune {verb}")
    assert "torch" not in run_verb_imports()


def test_help_of_a_verb_shows_types_and_positions():
    lines = [line.split(maxsplit=2) for line in run_verb("train", "--help").stdout.splitlines()]
    assert ["EXPERIMENT", "text,", "positional 1 (or --experiment EXPERIMENT)"] in lines
    assert ["--run", "RUN", "text, required (or positional 2)"] in lines
    assert ["--seed", "SEED", "whole number, default 0"] in lines and ["--rehearse", "switch"] in lines
    # what is typed without a flag is shown so
    assert "JOB        text, positional 1\n" in run_verb("submit", "--help").stdout
    assert run_verb("verify", "--help").stdout.startswith("python -m inheritune verify PATH\n")


def test_version_is_that_of_the_package():
    from importlib.metadata import PackageNotFoundError, version

    try:
        expected = version("inheritune")
    except PackageNotFoundError:
        expected = "unknown"
    assert run_verb("--version").stdout == f"{expected}\n"


def run_verb_imports() -> str:
    """Modules that --help loads."""
    code = "import sys; from inheritune.cli import main; main(['--help']); print('LOADED', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    return done.stdout.split("LOADED")[1].split()


JSON_MISTAKES = [
    ({"gradient_clipping": 1.0}, "sets 'gradient_clipping', which belongs to the experiment (train.clip)"),
    ({"bf16": {"enabled": True}}, "sets 'bf16', which belongs to the experiment (train.precision)"),
    ({"train_batch_size": 8}, "sets 'train_batch_size', which belongs to the experiment"),
    ({"optimizer": {"type": "Adam"}}, "sets 'optimizer', which belongs to the experiment"),
    ({"train_micro_batch_size_per_gpu": "auto"}, "must be a positive number of sequences (got 'auto')"),
    ({"inheritune": {"compiel": True}}, "unknown key 'compiel' in 'inheritune'; did you mean 'compile'?"),
]


@pytest.mark.parametrize(
    ("extra", "says"), JSON_MISTAKES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_key_of_the_experiment_in_the_deepspeed_json_is_refused(tmp_path, extra, says):
    from inheritune.engines.deepspeed_json import load_deepspeed_json
    from inheritune.errors import UserError

    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, **extra})
    )
    with pytest.raises(UserError) as caught:
        load_deepspeed_json(path)
    assert says in str(caught.value)


def test_damaged_deepspeed_json_is_refused(tmp_path):
    from inheritune.engines.deepspeed_json import load_deepspeed_json
    from inheritune.errors import UserError

    (tmp_path / "twice.json").write_text(
        '{"train_micro_batch_size_per_gpu": 2, "train_micro_batch_size_per_gpu": 4}'
    )
    with pytest.raises(UserError, match="sets 'train_micro_batch_size_per_gpu' twice"):
        load_deepspeed_json(tmp_path / "twice.json")
    (tmp_path / "cut.json").write_text('{"train_micro_batch_size_per_gpu": [')
    with pytest.raises(UserError, match="not valid JSON"):
        load_deepspeed_json(tmp_path / "cut.json")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_json_loads(path):
    from inheritune.engines.deepspeed_json import load_deepspeed_json, make_deepspeed_config

    train = load_experiment("quickstart").train
    config = make_deepspeed_config(load_deepspeed_json(path), train, 2, 3)
    assert config["gradient_clipping"] == train.clip and config["gradient_accumulation_steps"] == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"vocab_size": 200}}, "300"),
        (
            {
                "data": {"sequence_length": 4096},
                "model": {"positions": 4096},
                "train": {"batch_tokens": 8192},
            },
            "fewer than one window",
        ),
        ({"data": {"sampling": "one_pass"}, "train": {"steps": 1000}}, "at most 10 steps"),
    ],
    ids=["vocabulary", "short corpus", "too few windows"],
)
def test_data_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, own_root, change, says):
    raw = experiment_dict()
    for section, keys in change.items():
        raw[section].update(keys)
    path = write_experiment(tmp_path, raw)
    write_tokens(get_data_dir(load_experiment(path)))
    assert says in refused("train", path, "--run", "reference")
    assert not (own_root / "runs").exists()


def test_fetch_has_nothing_to_download_for_local_text():
    assert "0 files of quickstart are in the cache" in run_verb("fetch", "quickstart").stdout


def test_fetch_names_the_way_out_where_the_hub_cannot_be_reached(tmp_path):
    said = refused("fetch", "gpt2_medium_owt", HF_HUB_OFFLINE=1, HF_HOME=tmp_path)
    assert "HF_HOME" in said


def test_unfinished_source_is_refused_with_the_command(small):
    assert f"first: python -m inheritune train {small} --run reference" in refused(
        "train", small, "--run", "grown", "--stage", "1"
    )


def test_mistake_on_several_ranks_is_told_once(tmp_path):
    raw = experiment_dict()
    raw["train"]["batch_tokens"] = 32  # one sequence for two ranks
    path = write_experiment(tmp_path, raw)
    write_tokens(get_data_dir(load_experiment(path)))
    assert "2 ranks for a batch of 1 sequences" in refused(
        "train", path, "--run", "reference", "--procs", "2"
    )


@pytest.fixture
def slurm_path(tmp_path) -> str:
    """A PATH with the commands by which a machine is known as one of a Slurm cluster, with an empty queue."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])


def test_check_says_what_a_run_starts_from_with_the_lines_that_make_it(small, slurm_path):
    words = ["check", "gpt2_xl_owt", "--run", "inheritune", "--stage", 1]
    done = run_verb(*words, check=False, PATH=slurm_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = done.stderr
    assert "its data is not prepared and run 'reference', which it needs, is not trained" in said
    assert "bash slurm/fetch.sh gpt2_xl_owt && bash slurm/prepare.sh gpt2_xl_owt" in said
    assert (
        "(13.1B tokens, about 95 GPU-hours" in said
        and "bash slurm/train.sh gpt2_xl_owt inheritune_public" in said
    )
    assert "inheritune --stage 1 -- --dependency=afterok:JOB" in said
    said = refused("check", small, "--run", "grown")
    assert "run 'reference', which it needs, is not trained" in said and "data is not" not in said
    assert "has no stage 2" in refused("check", small, "--run", "reference", "--stage", 2)
    assert "what it starts from is there" in run_verb("check", small, "--run", "reference").stdout


def test_lines_to_paste_work_from_another_folder(tmp_path, slurm_path, monkeypatch):
    """Scripts of the checkout by their whole path; 'bash slurm/...' only where that is right."""
    monkeypatch.setenv("PATH", slurm_path)
    command = [sys.executable, "-m", "inheritune"]
    said = []
    for words in (
        ["check", "gpt2_xl_owt", "--run", "inheritune"],
        ["check", "gpt2_medium_owt", "--run", "inheritune"],
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 2, done.stderr
        said += [done.stderr]
    scripts = re.findall(r"bash (\S+)", "".join(said))
    assert {Path(script).name for script in scripts} >= {"fetch.sh", "prepare.sh", "train.sh"}
    assert all(Path(script).is_absolute() and Path(script).is_file() for script in scripts), scripts


@pytest.mark.parametrize(
    "words", [["prepare", "quickstart"], ["status", "quickstart"], ["train", "quickstart", "--run", "random"]]
)
def test_a_current_folder_that_is_gone_is_told(tmp_path, words):
    (tmp_path / "gone").mkdir()
    line = f'rmdir "$PWD" && exec {shlex.quote(sys.executable)} -m inheritune {shlex.join(words)}'
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path / "gone", check=False
    )
    assert (
        one_sentence(done) == "inheritune: the current folder is gone; cd to one that exists, and start again"
    )


@pytest.mark.parametrize("root", ["/proc/x", "/proc/x/y", "FILE/x"])
def test_a_root_that_cannot_be_made_is_named(tmp_path, root):
    (tmp_path / "file").write_text("precious")
    root = root.replace("FILE", str(tmp_path / "file"))
    said = refused("prepare", "quickstart", "--rehearse", INHERITUNE_ROOT=root)
    assert (
        f"INHERITUNE_ROOT={root} is not a folder and cannot be created" in said
        and "set it to another one" in said
    )


# --- the package --------------------------------------------------------------------------------------------


def imports(path) -> set[str]:
    """Rooms from which a file imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path} imports by a relative name"
            found |= (
                {f"inheritune.{alias.name}" for alias in node.names}
                if node.module == "inheritune"
                else {node.module}
            )
    return {name.split(".")[1] for name in found if name.startswith("inheritune.")}


def test_a_room_imports_only_from_rooms_before_it():
    package = REPOSITORY / "inheritune"
    found = {
        path.name.removesuffix(".py") for path in package.iterdir() if not path.name.startswith("__")
    } - {"py.typed"}
    assert found == set(ROOMS)
    for position, room in enumerate(ROOMS):
        files = (
            sorted((package / room).glob("*.py")) if (package / room).is_dir() else [package / f"{room}.py"]
        )
        for path in files:
            later = imports(path) - set(ROOMS[: position + 1])
            assert not later, f"{path} imports from {later}"
        if (package / room).is_dir():
            assert ast.get_docstring(ast.parse((package / room / "__init__.py").read_text())), (
                f"{room} says what belongs there"
            )


def imports_at_the_top(path) -> list[str]:
    return [node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]


def test_main_imports_lazily():
    files = sorted((REPOSITORY / "inheritune" / "cli").glob("*.py"))
    top = {module for path in files for module in imports_at_the_top(path) if "inheritune" in module}
    top -= {"inheritune.analysis.thresholds"}  # constants, without imports
    rooms = {".".join(module.split(".")[:2]) for module in top if not module.startswith("inheritune.cli")}
    assert rooms == {"inheritune.config", "inheritune.errors", "inheritune.runtime"}  # and nothing slow
    heavy = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, inheritune.cli; print(*{'torch', 'numpy', 'deepspeed'} & set(sys.modules))",
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    assert heavy.stdout.strip() == ""


def test_no_file_or_function_is_too_long_to_read():
    sizes, functions = {}, {}
    for path in (REPOSITORY / "inheritune").rglob("*.py"):
        text = path.read_text()
        sizes[str(path)] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions[f"{path}:{node.name}"] = node.end_lineno - node.lineno + 1
    print(f"{sum(sizes.values())} lines in inheritune/")
    assert not {name: n for name, n in sizes.items() if n > 400}
    assert not {name: n for name, n in functions.items() if n > 60}


STILTED = (
    "goes on from",
    "go on from",
    "in small,",
    "in small.",
    "to be had",
    "be had from",
    "of others",
    "the world outside",
    "comes to an end",
    "lies under",
    "how-manieth",
    "so-manieth",
    "is given back",
    "mended",
    "so says",
    "stands beside",
)
"""Phrases that a native reader stumbles over (CONTRIBUTING.md, English)."""


def test_the_english_is_plain():
    files = [
        *(REPOSITORY / "inheritune").rglob("*.py"),
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/*.md"),
    ]
    found = [
        f"{path.relative_to(REPOSITORY)}: {phrase}"
        for path in files
        for phrase in STILTED
        if phrase in " ".join(path.read_text(encoding="utf-8").lower().split())
    ]
    assert not found


# --- documents ----------------------------------------------------------------------------------------------


PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))


def test_links_files_and_commands_of_the_documents_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), (page, target)
        for script in re.findall(r"bash ((?:recipes|tests|slurm|benchmarks)/[\w./]+)", text):
            assert (REPOSITORY / script).is_file(), (page, script)
        for program in re.findall(r"python ((?:tools|tests|benchmarks)/[\w./]+)", text):
            assert (REPOSITORY / program).is_file(), (page, program)
    promises = (REPOSITORY / "docs" / "promises.md").read_text(encoding="utf-8")
    for file in re.findall(r"`((?:unit|integration|slurm)/\w+\.py)`", promises):
        assert (REPOSITORY / "tests" / file).is_file(), file


def test_the_readme_is_short_and_names_every_verb():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    named = {verb for text in texts for verb in re.findall(r"python -m inheritune ([a-z]+)", text)}
    for verb in sorted(named):
        assert run_verb(verb, "--help").returncode == 0
    assert set(re.findall(r"^\| `([a-z]+)[ `]", text, re.MULTILINE)) == named


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_runs_its_recipes_in_the_active_environment():
    path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"]])
    variables = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path}
    done = subprocess.run(
        ["make", "setup"], cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_tests_need_is_installed_with_them():
    """A pin is a constraint only; an extra of the package installs."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = (REPOSITORY / "tests" / "requirements.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    assert len(pinned) > 5 and pinned <= {*extras["dev"], *extras["docs"]}


def test_every_way_to_check_a_commit_checks_the_same():
    pins = (REPOSITORY / "tests" / "requirements.txt").read_text().split()
    (local,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert {pin for hook in local["hooks"] for pin in hook["additional_dependencies"]} <= set(pins)
    install = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
    for path in (".ci/run", ".github/workflows/ci.yml"):
        text = (REPOSITORY / path).read_text()
        assert install in text and "bash tests/run.sh --all --durations=20" in text, path


def test_shell_is_clean():
    scripts = [str(p) for p in REPOSITORY.rglob("*.sh") if ".venv" not in p.parts]
    assert len(scripts) >= 4
    for (
        script
    ) in scripts:  # one by one: together, each would be checked with all that it sources (a second each)
        command = ["shellcheck", "--exclude=SC1091", script]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        assert done.returncode == 0, done.stdout
    # site.sh is sourced by login shells too, which must not end at the first error
    assert all(
        "set -euo pipefail" in Path(script).read_text()
        for script in scripts
        if not script.endswith("slurm/site.sh") and "slurm/sites/" not in script
    )


def test_yaml_of_the_recipes_is_what_the_tests_think():
    assert {"quickstart", "gpt2_medium_owt"} <= {p.stem for p in (REPOSITORY / "recipes").glob("*.yaml")}
    for path in (REPOSITORY / "recipes").glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
