"""A pretrained model as the reference of its own cuts: evaluated, grown against, in every table; what is
refused before anything is written."""

import shutil

import numpy as np
import pytest
from conftest import REPOSITORY, refused, run_verb, write_experiment
from tiny_models import config_of, random_model

from inheritune.cli import main
from inheritune.cluster.planner import Action, plan_next_action
from inheritune.config.experiment import load_experiment
from inheritune.config.run import Grow
from inheritune.data.bpe_training import train_bpe
from inheritune.data.prepare import prepare
from inheritune.files.json_files import read_json, write_json
from inheritune.files.rundir import RunDir

TEXTS = sorted((REPOSITORY / "inheritune" / "config").glob("*.py"))


def write_source(folder):
    """A tiny Llama of 4 layers with a tokenizer of its own, as a pretrained model lies on a disk."""
    config = config_of("llama")
    config.vocab_size, config.max_position_embeddings = 320, 64
    random_model(config).save_pretrained(folder)
    train_bpe("bpe:300", [path.read_text() for path in TEXTS], folder)
    return folder


def experiment_of(source, documents) -> dict:
    """An experiment whose reference is `source` itself, as a person writes it."""
    start = {"inherit": {"source": str(source), "layers": "0:2"}}
    train = {"steps": 2, "batch_tokens": 256, "lr": 1e-3, "warmup_steps": 1, "precision": "fp32"}
    train |= {"deepspeed": "ds_configs/cpu.json", "eval_every": 1, "eval_windows": 4, "final_windows": 8}
    return {
        "paper": [{"run": "public", "label": "the model"}, {"run": "grown", "label": "its layers"}],
        "data": {
            "name": "own",
            "source": "files",
            "files": [str(documents)],
            "tokenizer": str(source),
            "validation": {"fraction": 0.3},
            "sequence_length": 32,
            "sampling": "random_windows",
        },
        "model": {"from": str(source)},
        "train": train,
        "runs": {
            "public": {"init": {"external": {"source": str(source)}}},
            "grown": {
                "init": start,
                "compare": "public",
                "grow": {"by": 1, "max_layers": 3, "margin": -9.0},
            },
            "random": {"init": "random", "layers": 2, "compare": "public"},
        },
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture
def written(source, tmp_path):
    """(the experiment as a mapping, a function that writes it and returns its path)"""
    documents = tmp_path / "texts"
    documents.mkdir()
    for path in TEXTS:
        shutil.copy(path, documents / f"{path.stem}.txt")
    raw = experiment_of(source, documents / "*.txt")
    return raw, lambda: write_experiment(tmp_path / "recipes", raw)


def test_growth_evaluates_an_external_reference_before_its_stages():
    asked = ([2, 3], Grow(max_layers=3), False, True, "public", "grown", [])
    assert plan_next_action(*asked, is_external=True) == Action("evaluate", run="public")
    assert plan_next_action(*asked) == Action("train", run="public")


@pytest.mark.slow
def test_growth_against_the_model_itself(written, source, capsys):
    """From nothing to the table: prepare, evaluate, two stages; each advised command works as it stands."""
    raw, write = written
    path = write()
    experiment = load_experiment(path)
    public, grown = RunDir.of(experiment, "public"), RunDir.of(experiment, "grown")

    said = run_verb("status", path).stdout
    assert "table" not in said, "there is nothing to show yet"
    done = run_verb("grow", path, "--run", "grown").stdout
    assert done.count("$ python -m inheritune") == 4 and "evaluate" in done
    assert "grown did not reach public's validation loss" in done
    theirs = read_json(public.results)
    assert theirs["layers"] == 4 and theirs["steps"] is None and theirs["run"] == "public"
    for stage in (1, 2):
        results = read_json(grown.stage(stage).results)
        ours = np.load(grown.stage(stage).losses(2)) - np.array(theirs["window_losses"])
        assert results["compared_with"] == "public"
        assert results["difference"]["mean"] == pytest.approx(ours.mean(), abs=1e-12)
    assert read_json(grown.done)["margin"] == -9.0

    said = run_verb("status", path).stdout
    row = next(line for line in said.splitlines() if line.startswith("public (third-party model)"))
    assert "finished" in row and f"inheritune table {path}" in said
    page = run_verb("table", path).stdout
    row = next(line for line in page.splitlines() if "the model" in line)
    assert row.split("|")[2].strip() == "4" and row.split("|")[4].strip() == "", "it took no steps here"
    assert page.count("its layers, stage") == 2
    run_verb("figure", path)
    assert (public.path.parent / "loss.png").is_file()

    # the same command again does nothing; another model in the source's place is noticed
    run_verb("grow", path, "--run", "grown")
    write_json(public.results, read_json(public.results) | {"weights": "others"})
    assert "compares with weights of run 'public'" in refused("table", path)


@pytest.mark.slow
def test_an_evaluated_model_is_compared_with_and_shown(written, source, capsys):
    raw, write = written
    path = write()
    experiment = load_experiment(path)
    assert main(["table", path]) == 2 and "evaluate it first" in capsys.readouterr().err
    prepare(experiment)
    assert main(["status", path]) == 0
    advice = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("public: next: "))
    words = advice.removeprefix("public: next: python -m inheritune ").split()
    assert words == ["evaluate", path, "--run", "public"] and main(words) == 0
    assert RunDir.of(experiment, "public").is_evaluated()
    run_verb("train", path, "--run", "random")
    results = read_json(RunDir.of(experiment, "random").results)
    assert results["compared_with"] == "public" and results["difference"]["n"] == 8
    raw["train"]["final_windows"] = 6
    raw["runs"]["random_2"] = raw["runs"]["random"]
    said = refused("train", write(), "--run", "random_2")
    assert f"measure it again: python -m inheritune evaluate {path} --run public" in said
    capsys.readouterr()


def test_a_reference_of_other_token_ids_is_refused(written, source, tmp_path, own_root, capsys):
    raw, write = written
    other = tmp_path / "other"
    shutil.copytree(source, other)
    train_bpe("bpe:280", ["a quite different text, with other pairs of letters " * 50], other)
    raw["data"]["tokenizer"] = str(other)
    path = write()
    for words in (["check", path], ["grow", path, "--run", "grown"]):
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "the loss of 'public'" in said and f"its tokenizer is not {other}; set data.tokenizer" in said
        assert said.count("\n") == 1
    assert not own_root.exists()
    # and by evaluate, where the data are there
    prepare(load_experiment(path))
    assert main(["evaluate", path, "--run", "public"]) == 2
    assert "cannot be measured on these tokens" in capsys.readouterr().err
    assert not (own_root / "runs").exists()


def test_a_tokenizer_beyond_the_embedding_is_refused(written, source, tmp_path, own_root, capsys):
    raw, write = written
    large = tmp_path / "large"
    shutil.copytree(source, large)
    train_bpe("bpe:400", [path.read_text() for path in TEXTS], large)
    raw["data"]["tokenizer"] = str(large)
    raw["model"] = {"from": str(large)}
    raw["runs"]["public"]["init"]["external"]["source"] = str(large)
    path = write()
    for words in (["check", path], ["grow", path, "--run", "grown"]):
        assert main(words) == 2
        assert "has 400 ids and the model's embedding 320 rows" in capsys.readouterr().err
    assert not own_root.exists()


def test_without_slurm_no_message_speaks_of_a_login_node(written, monkeypatch, capsys, tmp_path):
    raw, write = written
    raw["runs"]["base"] = {"init": "random"}
    raw["runs"]["cut"] = {"init": {"inherit": {"source": "base", "layers": "0:2"}}}
    path = write()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["check", path, "--run", "cut"]) == 2
    said = capsys.readouterr().err
    assert "login" not in said and f"    python -m inheritune prepare {path}\n" in said
    assert f"    python -m inheritune train {path} --run base\n" in said
    assert f"    python -m inheritune train {path} --run cut\n" in said
    for words in (["submit", "train", path, "base"], ["cancel", path]):
        assert main(words) == 2
        assert "login" not in capsys.readouterr().err
