"""Shared by the tests: a small experiment, its prepared data made by hand, and a launcher for several
ranks."""

import copy
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fork_server import ENVIRONMENT, choose_server
from random_shards import write_shards

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ["DS_ACCELERATOR"] = "cpu"  # these tests are about the code, not about a GPU that may be there
# tests share the cores: the threads of one wait for each other while another computes
os.environ.setdefault("OMP_NUM_THREADS", "1")
PLACES = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "support"]
# for the programs that the tests start, wherever pytest itself is started from
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, PLACES))
# as in the background of a script, from where programs inherit it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
ENVIRONMENT.update(os.environ)


LONGEST = [
    "slurm_scripts",
    "slurm_growth",
    "train",
    "resize",
    "interrupt",
    "faults",
    "evaluate",
    "evidence",
    "json_change",
    "remedies",
]
LONGEST += [
    "paper_scripts",
    "limits",
    "baselines",
    "grow",
    "export",
    "planning",
    "architectures",
    "families",
    "resume",
    "launcher",
]
LONGEST += [
    "compared",
    "identity",
    "status",
    "stop",
    "versions",
    "dslint",
    "damage",
    "record",
    "streams",
    "third_party",
    "own_model",
    "stacking",
]


def pytest_collection_modifyitems(items):
    """Files with minutes of work begin first, so that the processes which share the tests end at about the
    same time."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    """Every test has its own $INHERITUNE_ROOT: nothing is read from or left in the checkout."""
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "root"))
    monkeypatch.delenv("REHEARSE", raising=False)
    return tmp_path / "root"


@pytest.fixture(autouse=True)
def own_log():
    """A verb that is called in this process sets the log up for itself; the next test finds it as a new
    process does."""
    yield
    logger = logging.getLogger("inheritune")
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture
def again(world, tmp_path, monkeypatch):
    """A function from changes {section: {key: value}} to the path of the changed experiment; the folder is a
    copy. `world`, of the file of tests, is (folder with root/, experiment as a dict)."""
    folder, raw = world
    shutil.copytree(folder / "root", tmp_path / "copy")
    monkeypatch.setenv("INHERITUNE_ROOT", str(tmp_path / "copy"))

    def write(**changes) -> str:
        changed = copy.deepcopy(raw)
        for section, values in changes.items():
            changed[section] |= values
        return write_experiment(tmp_path / "recipes", changed)

    return write


class Disk:
    """A small file system at `path`, whose size a test changes while it is in use."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()

    def resize(self, n_bytes: int) -> None:
        """Mount it, or change its size. Skips the test where this is not allowed."""
        again = "remount," if self.path.is_mount() else ""
        options = f"{again}size={max(4, -(-n_bytes // 4096) * 4)}k"
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")

    def used(self) -> int:
        facts = os.statvfs(self.path)
        return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


@pytest.fixture
def disk(tmp_path):
    """A file system of 60 MB, until `resize` gives it another size."""
    made = Disk(tmp_path / "disk")
    made.resize(60 << 20)
    yield made
    subprocess.run(["umount", str(made.path)], check=True)


GPT2_BPE = Path(os.environ.get("INHERITUNE_GPT2_BPE") or REPOSITORY.parent / "shared" / "data" / "gpt2-bpe")


def has_gpt2_bpe() -> bool:
    """Whether GPT-2's BPE is there, in GPT2_BPE."""
    return any((GPT2_BPE / name).is_file() for name in ("gpt2.tiktoken", "encoder.json"))


@pytest.fixture
def gpt2_bpe(monkeypatch) -> Path:
    """A folder with GPT-2's BPE, set as INHERITUNE_GPT2_BPE."""
    if not has_gpt2_bpe():
        pytest.skip(f"no GPT-2 BPE in {GPT2_BPE}: run tests/fetch_gpt2_bpe.sh and set INHERITUNE_GPT2_BPE")
    monkeypatch.setenv("INHERITUNE_GPT2_BPE", str(GPT2_BPE))
    return GPT2_BPE


@pytest.fixture(scope="session")
def sentencepiece_models(tmp_path_factory) -> dict[str, Path]:
    """Tiny models trained here: Llama's kind (BPE, bytes as fallback), with sentencepiece's own
    normalization, unigram."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text").write_text(
        "".join(path.read_text() for path in sorted((REPOSITORY / "inheritune").rglob("*.py")))
    )
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    kinds = {
        "llama": {"model_type": "bpe", **plain},
        "open_llama": {"model_type": "bpe"},
        "unigram": {"model_type": "unigram"},
    }
    for name, options in kinds.items():
        sentencepiece.SentencePieceTrainer.train(
            input=folder / "text",
            model_prefix=folder / name,
            vocab_size=600,
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
    return {name: folder / f"{name}.model" for name in kinds}


@pytest.fixture(scope="session")
def older(request) -> Path:
    """A folder with transformers 4.57, kept between runs of the tests."""
    from versions import install_older

    return install_older(Path(request.config.cache.mkdir("transformers-4.57")))


def experiment_dict(**changes) -> dict:
    """A valid experiment in small: 4-layer GPT-2, 20 sequences of 32 tokens a step. `changes` replace whole
    sections."""
    raw = {
        "paper": [{"run": "reference", "label": "reference"}, {"run": "grown", "label": "Inheritune"}],
        "data": {
            "name": "tiny",
            "source": "embedded",
            "tokenizer": "bpe:300",
            "validation": {"fraction": 0.05},
            "sequence_length": 32,
            "sampling": "random_windows",
        },
        "model": {
            "size": "gpt2_tiny",
            "layers": 4,
            "width": 32,
            "heads": 2,
            "positions": 32,
            "vocab_size": 320,
        },
        "train": {
            "steps": 6,
            "batch_tokens": 640,
            "lr": 1e-3,
            "min_lr": 1e-4,
            "warmup_steps": 2,
            "precision": "fp32",
            "deepspeed": "ds_configs/cpu.json",
            "eval_every": 3,
            "eval_windows": 8,
            "final_windows": 16,
            "log_every": 1,
            "checkpoint_every": 2,
        },
        "runs": {
            "reference": {"init": "random"},
            "grown": {
                "init": {"inherit": {"source": "reference", "layers": "0:2"}},
                "grow": {"by": 1, "max_layers": 3},
            },
        },
    }
    raw.update(changes)
    return raw


def write_experiment(folder: Path, raw: dict, name: str = "small") -> str:
    """Write `raw` as an experiment file; returns its path, as the verbs take it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


def write_tokens(
    folder: Path, train_shards=(3000, 2500, 1500), val_tokens=1200, vocab=300, fingerprint="tiny"
) -> Path:
    """A prepared data folder with random tokens, in the form that `prepare` leaves."""
    from inheritune.data.bpe_training import train_bpe

    (folder / "tokenizer").mkdir(parents=True)
    train_bpe("bpe:300", [Path(__file__).read_text()], folder / "tokenizer")
    splits = write_shards(folder, {"train": train_shards, "val": [val_tokens]}, vocab)
    manifest = {
        "fingerprint": fingerprint,
        "dtype": "<u2",
        "splits": splits,
        "tokenizer": {"name": "bpe:300", "vocab_size": vocab, "end_of_text": 299},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def small(tmp_path, own_root):
    """Path of a small experiment whose data is prepared (random tokens)."""
    from inheritune.config.experiment import load_experiment
    from inheritune.files.rundir import get_data_dir

    path = write_experiment(tmp_path / "recipes", experiment_dict())
    write_tokens(get_data_dir(load_experiment(path)))
    return path


def write_lone_run(
    folder: Path, settings: dict, model: dict | None = None, run: dict | None = None, **train
) -> str:
    """An experiment whose only run is `reference`, its data prepared, with the DeepSpeed JSON `settings`; its
    path."""
    from inheritune.config.experiment import load_experiment
    from inheritune.files.rundir import get_data_dir

    (folder / "ds.json").write_text(json.dumps(settings))
    raw = experiment_dict(paper=[], runs={"reference": {"init": "random", **(run or {})}})
    raw["model"] |= model or {}
    raw["train"] |= {"deepspeed": str(folder / "ds.json"), **train}
    path = write_experiment(folder, raw)
    write_tokens(get_data_dir(load_experiment(path)))
    return path


def last_step(run) -> int:
    """The last step in the record of a run folder; 0 if there is none."""
    from inheritune.files.json_files import read_jsonl

    return max((row["step"] for row in read_jsonl(run.metrics)), default=0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_verb(*words, check=True, procs=1, fresh=False, **environment) -> subprocess.CompletedProcess:
    """`python -m inheritune WORDS` as a user runs it; with check, a failure shows what it printed. It is
    forked from a process that has imported already, unless `fresh` or its environment asks for a start of
    Python."""
    words = [str(w) for w in words] + (["--procs", str(procs)] if procs > 1 else [])
    whole = {**os.environ, **{k: str(v) for k, v in environment.items()}}
    server = None if fresh else choose_server(whole)
    if server:
        done = server.run(words, REPOSITORY, whole)
    else:
        command = [sys.executable, "-m", "inheritune", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=whole, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def one_sentence(done: subprocess.CompletedProcess) -> str:
    """What a refusal says: exit code 2, no traceback, one line that begins with the program's name."""
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said
    lines = [line for line in done.stderr.splitlines() if line.startswith("inheritune: ")]
    assert len(lines) == 1, said
    return lines[0]


def refused(*words, **environment) -> str:
    """The sentence with which `python -m inheritune WORDS` is refused."""
    return one_sentence(run_verb(*words, check=False, **environment))
