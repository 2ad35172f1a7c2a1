"""What others made is read, never run, and read from its own folder only; secrets of the environment are in
no file or word that a run leaves; no file is for everyone to write; names are data, not shell. (More
refusals: test_sources.py.)"""

import json
import logging
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, experiment_dict, one_sentence, write_experiment
from fork_server import FORKS
from tiny_models import config_of, random_model

from inheritune.analysis.attention import load_model
from inheritune.cli import main
from inheritune.config.experiment import load_experiment
from inheritune.config.sections import Task
from inheritune.data.bpe_training import train_bpe
from inheritune.data.tokenizer_loading import load_tokenizer
from inheritune.errors import UserError
from inheritune.evaluation.downstream import load_tasks, open_tokenizer
from inheritune.evaluation.taskcode import TASK_FILES, find_code, find_template_code
from inheritune.files.rundir import RunDir
from inheritune.models.sources import open_source
from inheritune.models.surgery import inherit
from inheritune.models.torch_files import list_deepspeed_classes, load_skeleton
from inheritune.submit.request import read_request
from inheritune.submit.sbatch import make_submission
from inheritune.submit.site import Site

# --- code of others -----------------------------------------------------------------------------------------


class Trap:
    """Pickles to a call that leaves the file `trapped` in the current folder."""

    def __reduce__(self):
        return open, ("trapped", "w")


def zip_of(folder: Path) -> None:
    torch.save({"a": Trap()}, folder / "pytorch_model.bin")


def old_pickle(folder: Path) -> None:
    torch.save({"a": Trap()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def deepspeed_model(folder: Path) -> None:
    torch.save({"module": {}, "param_shapes": [Trap()]}, folder / "mp_rank_00_model_states.pt")


def deepspeed_optimizer(folder: Path) -> None:
    state = {"module": {}, "param_shapes": [{}], "dp_world_size": 1, "shared_params": {}}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": Trap()}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def not_deepspeed(folder: Path) -> None:
    torch.save({"module": {"a": torch.zeros(2)}, "param_shapes": 3}, folder / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("make", [zip_of, old_pickle, deepspeed_model, deepspeed_optimizer, not_deepspeed])
def test_nothing_of_others_is_unpickled(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "source"
    config_of("public").save_pretrained(folder)
    make(folder)
    with pytest.raises(UserError) as refused:
        inherit(folder, "0:1", tmp_path / "out")
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)
    if make in (zip_of, old_pickle):
        with pytest.raises(UserError, match="cannot be loaded"):  # analyze opens it by transformers
            load_model(str(folder))
    assert not Path("trapped").exists() and not Path("out").exists()


EVIL = (
    "open('trapped', 'w')\nclass Evil:\n    from_pretrained = classmethod(lambda cls, *a, **k: "
    "open('trapped', 'w'))\n"
)


class Getattr:
    """Pickled as a call of getattr, as Python 3.11.0 to 3.11.3 write a member of an enum."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_a_member_of_deepspeeds_enum_is_read_as_every_python_writes_it(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for number, written in enumerate((ZeroStageEnum.gradients, Getattr(ZeroStageEnum, "gradients"))):
        torch.save({"stage": written}, tmp_path / f"{number}.pt")
        assert load_skeleton(tmp_path / f"{number}.pt")["stage"] == ZeroStageEnum.gradients
        with torch.serialization.safe_globals(list_deepspeed_classes()):
            assert (
                torch.load(tmp_path / f"{number}.pt", weights_only=True)["stage"] is ZeroStageEnum.gradients
            )


@pytest.mark.parametrize(
    "name", ["__class__", "__init_subclass__", "mro", "nothing", "_generate_next_value_"]
)
def test_nothing_but_a_member_of_an_enum_is_got(tmp_path, name):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for number, asked in enumerate(
        (Getattr(ZeroStageEnum, name), Getattr(torch.nn.Parameter, name), Getattr("text", name))
    ):
        torch.save({"stage": asked}, tmp_path / f"{number}.pt")
        with pytest.raises(UserError, match="asks to run|cannot be read as a torch file"):
            load_skeleton(tmp_path / f"{number}.pt")
        with (
            torch.serialization.safe_globals(list_deepspeed_classes()),
            pytest.raises(Exception, match="getattr"),
        ):
            torch.load(tmp_path / f"{number}.pt", weights_only=True)


@pytest.mark.parametrize("model_type", ["mine", "gpt2"])
def test_code_beside_a_model_is_not_run(tmp_path, monkeypatch, model_type):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "source"
    random_model(config_of("public")).save_pretrained(folder)
    train_bpe("bpe:300", [EVIL * 9], folder)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        code = {
            "AutoConfig": "evil.Evil",
            "AutoModelForCausalLM": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        }
        content |= {"auto_map": code} | ({"model_type": model_type} if name == "config.json" else {})
        content |= {"tokenizer_class": "Evil"} if name == "tokenizer_config.json" else {}
        (folder / name).write_text(json.dumps(content))
    (folder / "evil.py").write_text(EVIL)
    raw = experiment_dict()
    raw["data"]["tokenizer"] = str(folder)
    data = load_experiment(write_experiment(tmp_path, raw)).data
    for opening in (
        lambda: open_source(folder),
        lambda: load_model(str(folder)),
        lambda: open_tokenizer(folder),
        lambda: load_tokenizer(data),
    ):
        try:  # a family of transformers' own may be opened, by transformers' own code
            opening()
        except UserError as error:
            assert "\n" not in str(error)
        assert not Path("trapped").exists()


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    random_model(config_of("public")).save_pretrained(folder)
    elsewhere.mkdir()
    shutil.move(folder / "model.safetensors", elsewhere / "secret")
    (folder / "model.safetensors").symlink_to(elsewhere / "secret")
    with pytest.raises(UserError, match="is a link to .*secret, outside its folder"):
        open_source(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("weights")
    shutil.move(elsewhere / "secret", folder / "weights")
    assert open_source(folder).names()  # a link within the folder is the folder's own affair
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    shutil.move(folder / "weights", cache / "blobs" / "0123")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/0123")
    shutil.copytree(folder, cache / "snapshots" / "4567", symlinks=True)
    assert open_source(cache / "snapshots" / "4567").names()  # as the Hub's cache has it


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../outside"},
        {"name": "/tmp/outside"},
        {"name": ".."},
        {"runs": {"..": {"init": "random"}}},
    ],
)
def test_an_experiment_cannot_name_a_folder_outside(tmp_path, change):
    with pytest.raises(UserError, match="match pattern"):
        load_experiment(write_experiment(tmp_path, experiment_dict(paper=[], **change)))


# --- code that an experiment names --------------------------------------------------------------------------

PLAIN = {
    "task": "plain",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(TASK_FILES / "rehearsal" / "test.jsonl")}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
PICKED = "{{ (cycler|attr('__in' ~ 'it__')|attr('__glo' ~ 'bals__'))['os'].system('touch trapped') }}"
"""Runs a command by attributes that are put together while the template is rendered."""
NAMES_CODE = {
    "a function": ("process_docs: !function evil.run", "!function evil.run"),
    "a task's class": ("class: !function evil.Task", "!function evil.Task"),
    "a data set": ("custom_dataset: !function evil.run", "!function evil.run"),
    "a metric": ("metric_list: [{metric: !function evil.run}]", "!function evil.run"),
    "an aggregation": ("metric_list: [{metric: acc, aggregation: !function evil.run}]", "!function evil.run"),
    "examples": ("fewshot_config: {samples: !function evil.run}", "!function evil.run"),
    "a filter": (
        "filter_list: [{name: x, filter: [{function: custom, filter_fn: !function evil.run}]}]",
        "!function evil.run",
    ),
    "a tag by another handle": ("%TAG !e! !func\n---\nprocess_docs: !e!tion evil.run", "!function evil.run"),
    "a key": ("? !function evil.run\n: x", "!function evil.run"),
    "a tag of Python": ("x: !!python/name:os.system", "python/name:os.system"),
    "an included file": ("include: other/base_yaml", "!function evil.run"),
    "an included file's own": ("include: [other/first.txt]", "!function evil.run"),
    "an include by a merge key": ("x: &m {include: other/base_yaml}\n<<: *m", "!function evil.run"),
    "a metric of a path": (
        "metric_list: [{metric: ./evil.py}]",
        "metric: ./evil.py (a metric that is not lm-eval's own",
    ),
    "a metric of the Hub": (
        "metric_list: [{metric: someone/evil}]",
        "metric: someone/evil (a metric that is not",
    ),
    "a metric by a merge key": (
        "x: &m {metric: ./evil.py}\nmetric_list: [{<<: *m}]",
        "metric: ./evil.py (a metric that",
    ),
    "a metric's script": (
        "metric_list: [{metric: f1, hf_evaluate: true}]",
        "hf_evaluate: true (runs a metric's script)",
    ),
    "a data set's script": ("dataset_path: x/evil.py", "dataset_path: x/evil.py (a loading script)"),
    "a data set's folder": ("dataset_path: other", "dataset_path: other (a loading script)"),
    "trust": ("dataset_kwargs: {trust_remote_code: true}", "trust_remote_code: true (runs the data set's"),
    "the model's code": ("unsafe_code: true", "unsafe_code: true (runs what the model writes)"),
    "a template": ("doc_to_text: '{{ cycler.__init__.__globals__ }}'", "a template that reads __globals__"),
    "a template's key": ("doc_to_target: \"{{ ''['__class__'] }}\"", "a template that reads __class__"),
    "another's prompts": (
        "use_prompt: other/prompts.yaml:x",
        "use_prompt: other/prompts.yaml:x (templates of another place)",
    ),
}


def task_folder(tmp_path: Path, content: str) -> Path:
    """Task files of others, one of which has this content, and code beside them that would leave the file
    `trapped`."""
    folder = tmp_path / "tasks"
    (folder / "other").mkdir(parents=True)
    (folder / "mine.yaml").write_text(content)
    (folder / "other" / "base_yaml").write_text("task: x\nprocess_docs: !function evil.run\n")
    (folder / "other" / "first.txt").write_text("include: base_yaml\n")
    for place in (folder / "evil.py", folder / "other" / "evil.py", folder / "other" / "other.py"):
        place.write_text(EVIL + "run = Task = print\n")
    return folder


def own_tasks(tmp_path: Path, folder: Path, task: str = "plain") -> str:
    evaluate = {"task_files": str(folder), "tasks": {"mine": {"task": task, "metrics": ["acc"]}}}
    return write_experiment(tmp_path / "recipes", experiment_dict(evaluate=evaluate))


@pytest.mark.parametrize("case", NAMES_CODE)
def test_an_experiment_that_names_code_is_refused_before_it_runs(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    content, says = NAMES_CODE[case]
    if not content.startswith("%TAG"):
        content = f"task: plain\n{content}"
    path = own_tasks(tmp_path, task_folder(tmp_path, content))
    monkeypatch.setattr(logging.getLogger("inheritune"), "handlers", [])  # fetch's would outlive this screen
    for words in (["check", path], ["fetch", path], ["evaluate", path, "--model", "nowhere"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert (
            says in said and ", line " in said and "give --allow-task-code" in said and said.count("\n") == 1
        )
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    "content",
    [
        yaml.safe_dump(PLAIN),
        f"include: {TASK_FILES}/rehearsal/choice.yaml\ntask: plain",  # this repository's code
        "group: plain\ntask: [arc_easy]\naggregate_metric_list: [{metric: a_score_of_theirs}]",
        "task: plain\ndoc_to_text: 'It is _____ {{word}}'\ndataset_kwargs: {trust_remote_code: false}",
        "task: plain\nmetric_list: [{metric: acc_norm}, {metric: bleu}]\nuse_prompt: 'qa-basic:q-newline-a'",
    ],
)
def test_task_files_without_code_are_free_though_code_lies_beside_them(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    folder = task_folder(tmp_path, content)
    shutil.rmtree(folder / "other")
    assert find_code(folder) == []


def test_lm_evals_own_files_may_be_included(tmp_path):
    arc = Path(find_spec("lm_eval").origin).parent / "tasks" / "arc" / "arc_easy.yaml"
    assert arc.is_file()
    folder = task_folder(tmp_path, f"include: {arc}\ntask: plain")
    shutil.rmtree(folder / "other")
    assert find_code(folder) == []


def test_a_template_that_hides_what_it_reads_meets_the_sandbox(tmp_path, monkeypatch):
    """No reader of the file can see what this one does: it is refused while it is rendered."""
    monkeypatch.chdir(tmp_path)
    folder = task_folder(tmp_path, yaml.safe_dump({**PLAIN, "doc_to_text": PICKED}))
    shutil.rmtree(folder / "other")
    chosen = {"mine": Task(task="plain", metrics=["acc"])}
    with pytest.raises(UserError, match="a template of task mine cannot be rendered.*give --allow-task-code"):
        load_tasks(chosen, str(folder))
    assert not Path("trapped").exists()
    for wrong in ("{{ absent }}", "{{ question"):
        (folder / "mine.yaml").write_text(yaml.safe_dump({**PLAIN, "doc_to_text": wrong}))
        with pytest.raises(UserError, match="a template of task mine cannot be rendered"):
            load_tasks(chosen, str(folder))
    (folder / "mine.yaml").write_text(yaml.safe_dump({**PLAIN, "doc_to_text": PICKED}))
    load_tasks(chosen, str(folder), allow_code=True)
    assert Path("trapped").exists()
    (folder / "mine.yaml").write_text(yaml.safe_dump(PLAIN))
    (task,) = load_tasks(chosen, str(folder))["mine"]["tasks"].values()
    assert task.doc_to_text(task.task_docs[0]).startswith("Q: ")


def test_the_sandbox_refuses_no_template_of_lm_eval():
    """Their attributes that begin with an underscore would be refused; there are none."""
    texts = [
        path.read_text(encoding="utf-8")
        for path in (Path(find_spec("lm_eval").origin).parent / "tasks").rglob("*.yaml")
    ]
    assert len(texts) > 10_000
    found = [part for text in texts for part in re.findall(r"\{[{%][^}]*?(?:\.|\[['\"])_[^}]*\}\}", text)]
    assert not [part for part in found if find_template_code(part)]


# --- what a run leaves --------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "5ec2e7" + "0123456789abcdef" * 2 + "aa",
    "HF_TOKEN": "hf_SeCrEtSeCrEtSeCrEtSeCrEtSeCr",
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """(root, what was printed) of a real growth with W&B offline, begun under umask 000 with secrets in the
    environment."""
    folder = tmp_path_factory.mktemp("left")
    raw = experiment_dict()
    raw["data"] |= {"max_tokens": 100_000, "shard_tokens": 40_000, "validation": {"fraction": 0.2}}
    raw["train"]["wandb"] = "offline"
    raw["runs"]["grown"]["grow"]["margin"] = 9.0  # parity at once: one stage
    path = write_experiment(folder, raw)
    environment = {**os.environ, **SECRETS, "INHERITUNE_ROOT": str(folder / "root")}
    environment |= FORKS.on_path(anyway=True)
    words = [FORKS.python(), "-m", "inheritune", "grow", path, "--run", "grown", "--procs", "2"]
    done = subprocess.run(
        words, cwd=REPOSITORY, env=environment, umask=0, text=True, stdout=-1, stderr=-2, check=False
    )
    assert done.returncode == 0, done.stdout
    return folder / "root", done.stdout


@pytest.mark.slow
def test_no_secret_is_in_what_a_run_leaves(left):
    root, said = left
    files = [path for path in root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any(
        path.name == "provenance.json" for path in files
    )
    for name, secret in SECRETS.items():
        assert secret not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()], name


@pytest.mark.slow
def test_nothing_is_for_everyone_to_write(left):
    root, _ = left
    everything = [root, *root.rglob("*")]
    assert len(everything) > 50
    assert not [path for path in everything if path.lstat().st_mode & stat.S_IWOTH and not path.is_symlink()]


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0, 0o664, 0o775), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]
)
def test_a_group_may_share_what_its_umask_says(tmp_path, umask, file, folder):
    source = tmp_path / "source"
    random_model(config_of("public")).save_pretrained(source)
    code = "import sys; from inheritune.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["inherit", "--source", source, "--layers", "0:2", "--out", tmp_path / "out"]
    subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=REPOSITORY,
        umask=umask,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {file}


# --- names in scripts ---------------------------------------------------------------------------------------

NAME = 'it\'s "a" $(touch pwned) `touch pwned`; touch pwned & * \\ name'
GENERIC = {
    "train": [NAME, NAME],
    "grow": [NAME, NAME, "--seed", "1"],
    "analyze": [NAME, NAME],
    "prepare": [NAME],
    "evaluate": [NAME],
    "baselines": [NAME],
}


@pytest.mark.parametrize("script", GENERIC)
def test_a_name_reaches_the_job_as_it_is(tmp_path, script):
    """The command of `submit`, in a shell whose sbatch runs what it wraps, as a node does."""
    commands = {"sbatch": 'for word; do last=$word; done; eval "$last"', "bash": 'printf "%s\\n" "$@"'}
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    site = Site({"SITE_GPUS_PER_NODE": "8", "INHERITUNE_ROOT": str(tmp_path / NAME)})
    line = make_submission(read_request(script, GENERIC[script]), site, {}).line(site)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    shell = ["/bin/sh", "-c", line]
    ran = subprocess.run(shell, cwd=tmp_path, text=True, check=True, env=environment, capture_output=True)
    assert ran.stdout.splitlines() == [str(REPOSITORY / "slurm" / f"{script}.sh"), *GENERIC[script]]
    assert f"--job-name={script}-" in line and shlex.split(line)
    assert not list(tmp_path.rglob("pwned"))


def test_a_name_is_a_name_for_the_paper_scripts(tmp_path):
    """An item of that name does not exist, which is all that happens."""
    environment = {
        **os.environ,
        "INHERITUNE_ROOT": str(tmp_path),
        "DRAW": "1",
        "VIRTUAL_ENV": sys.prefix,
        "SEED": "0$(touch pwned)",
    }
    script = REPOSITORY / "recipes" / "paper_item.sh"
    done = subprocess.run(
        ["bash", script, NAME], cwd=tmp_path, text=True, env=environment, capture_output=True, check=False
    )
    one_sentence(done)
    assert not list(tmp_path.rglob("pwned")) and not (REPOSITORY / "pwned").exists()


def test_no_script_puts_a_variable_into_code():
    """`python -c "... $name ..."` would run what the name says."""
    for script in REPOSITORY.glob("*/*.sh"):
        found = re.findall(
            r'(?:python3?|sh|bash) -c "[^"]*\$[^"]*"|eval "?\$(?!\(conda)[^"\n]*', script.read_text()
        )
        assert not found, (script, found)


def test_run_folder_and_experiment_of_a_name_with_spaces_and_quotes(tmp_path, own_root):
    path = tmp_path / f"{NAME}.yaml"
    Path(write_experiment(tmp_path, experiment_dict())).rename(path)
    experiment = load_experiment(str(path))
    assert (
        experiment.name == NAME
        and RunDir.of(experiment, "reference").path.parent.parent == own_root / "runs" / NAME
    )
