"""A pretrained model as the reference of its own cuts: evaluated, grown against, in every table; what is
refused before anything is written."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, refused, run_verb, write_experiment
from test_schema import SCHEMA, agrees
from tiny_models import config_of, random_model

from inheritune.cli import main
from inheritune.cluster.planner import Action, plan_next_action
from inheritune.config.experiment import load_experiment
from inheritune.config.layers import RULES, AutoLayers
from inheritune.config.reading import read_yaml
from inheritune.config.run import Grow
from inheritune.config.sections import Model, Train
from inheritune.data.batches import Tokens
from inheritune.data.bpe_training import train_bpe
from inheritune.data.prepare import prepare
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, read_jsonl, write_json
from inheritune.files.rundir import RunDir
from inheritune.models.choice import pick_layers
from inheritune.planning.draft_sizes import Text, choose_depths, choose_sizes
from inheritune.planning.machine import ON_ONE_GPU, Machine, fit_settings

TEXTS = sorted((REPOSITORY / "inheritune" / "config").glob("*.py"))


def write_source(folder, seed=1):
    """A tiny Llama of 4 layers with a tokenizer of its own, as a pretrained model lies on a disk."""
    config = config_of("llama")
    config.vocab_size, config.max_position_embeddings = 320, 64
    random_model(config, seed).save_pretrained(folder)
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


def draft(source, tmp_path, *words) -> str:
    """The file that `init` writes for `source` and the written texts."""
    out, texts = str(tmp_path / "mine.yaml"), str(tmp_path / "texts/*.txt")
    assert main(["init", "--model", str(source), "--text", texts, "--out", out, *words]) == 0
    return out


@pytest.mark.slow
def test_from_init_to_export(written, source, tmp_path, capsys):
    """A model and some text: prepare, evaluate, two stages; each advised command works as it stands."""
    path = draft(source, tmp_path, "--steps", "2")
    text = Path(path).read_text()
    text = text.replace("max_layers: 3}", "max_layers: 3, margin: -9.0}")  # never parity
    Path(path).write_text(re.sub(r"(final|eval)_windows: \d+", r"\1_windows: 80", text))
    experiment = load_experiment(path)
    public, grown = RunDir.of(experiment, "reference"), RunDir.of(experiment, "inheritune")

    assert "table" not in run_verb("status", path).stdout, "there is nothing to show yet"
    done = run_verb("grow", path, "--run", "inheritune").stdout
    assert done.count("$ python -m inheritune") == 4 and "evaluate" in done
    assert "inheritune did not reach reference's validation loss" in done
    theirs = read_json(public.results)
    assert theirs["layers"] == 4 and theirs["steps"] is None and theirs["run"] == "reference"
    for stage in (1, 2):
        results = read_json(grown.stage(stage).results)
        ours = np.load(grown.stage(stage).losses(2)) - np.array(theirs["window_losses"])
        assert results["compared_with"] == "reference"
        assert results["difference"]["mean"] == pytest.approx(ours.mean(), abs=1e-12)
    assert read_json(grown.done)["margin"] == -9.0

    said = run_verb("status", path).stdout
    row = next(line for line in said.splitlines() if line.startswith("reference (third-party model)"))
    assert "finished" in row and f"inheritune table {path}" in said
    said = refused("train", path, "--run", "cost")
    assert f"first: python -m inheritune analyze --model reference --data {path}" in said
    run_verb("analyze", "--model", "reference", "--data", path, "--sequences", "4", "--length", "16")
    run_verb("train", path, "--run", "random,distilled,cost,influence,window")
    page = run_verb("table", path).stdout
    assert_cuts_are_shown(experiment, page, tmp_path)
    row = next(line for line in page.splitlines() if "the model" in line)
    assert row.split("|")[2].strip() == "4" and row.split("|")[4].strip() == "", "it took no steps here"
    assert page.count("first layers, stage") == 2 and "random start" in page and "distilled" in page
    run_verb("figure", path)
    assert (public.path.parent / "loss.png").is_file()
    run_verb("export", grown.path, "--to", tmp_path / "exported")
    assert read_json(tmp_path / "exported" / "config.json")["num_hidden_layers"] in (2, 3)

    # the same command again does nothing; another model in the source's place is noticed
    run_verb("grow", path, "--run", "inheritune")
    write_json(public.results, read_json(public.results) | {"weights": "others"})
    assert "was started from weights of run 'reference', which has other weights by now" in refused(
        "table", path
    )


def assert_cuts_are_shown(experiment, page: str, folder) -> None:
    """A cut by each rule is one line of YAML: its blocks are those of the analysis, and the table has its
    loss before and after training; so has that of the first layers, distilled."""
    rows = RunDir.of(experiment, "reference").read_attention()
    lines = [[cell.strip() for cell in row.split("|")] for row in page.splitlines() if row.startswith("| ")]
    before, after = lines[0].index("loss before training"), lines[0].index("validation loss (95% interval)")
    cells = {line[1]: line for line in lines}
    kept = {rule: pick_layers(rows, AutoLayers(2, rule)) for rule in RULES} | {"distilled": [0, 1]}
    labels = {row.run: row.label for row in experiment.paper}
    for name, layers in kept.items():
        run = RunDir.of(experiment, name)
        assert read_json(run.init / "inherited.json")["layers"] == layers, name
        out = folder / f"{name}.json"
        run_verb("evaluate", experiment.given, "--model", run.init, "--out", out)
        row = cells[labels[name]]
        assert row[before] == f"{read_json(out)['validation']['mean']:.4f}", name
        assert (
            row[after].startswith(f"{read_json(run.results)['validation']['mean']:.4f} (") and row[4] == "2"
        )
    assert all(
        "distil_loss" in row
        for row in read_jsonl(RunDir.of(experiment, "distilled").metrics)
        if "loss" in row
    )
    assert cells["the model"][before] == "", "it is not trained here"


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


# --- init ---------------------------------------------------------------------------------------------------


def test_what_init_writes_is_whole(written, source, tmp_path, capsys, own_root):
    path = draft(source, tmp_path)
    said = capsys.readouterr().out
    assert not own_root.exists()
    experiment, text = load_experiment(path), Path(path).read_text()
    assert experiment.model.from_ == str(source) == experiment.data.tokenizer
    assert list(experiment.runs) == ["reference", "inheritune", "random", "distilled", *RULES]
    assert experiment.layers_of(experiment.runs["random"]) == 2 and "analyze --model" in text
    assert experiment.runs["distilled"].distil.teacher == str(source)
    # for an editor: the schema that the first line names is there, and the file agrees with it
    schema = Path(path).with_name(text.splitlines()[0].removeprefix("# yaml-language-server: $schema="))
    assert json.loads(schema.read_text()) == SCHEMA and agrees(read_yaml(Path(path)), SCHEMA)
    for verb in ("check", "plan"):
        assert main([verb, path]) == 0
    assert "warning" not in capsys.readouterr().out
    assert f"    python -m inheritune grow {path} --run inheritune" in said

    prepare(experiment)
    for split, share in (("train", 0.9), ("val", 0.1)):
        ours = Tokens.of(experiment, split).n_tokens / said_tokens(said)
        assert ours == pytest.approx(share, rel=0.1), "as init estimated"


def test_of_a_text_that_is_not_read_whole_no_total_is_told(written, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("inheritune.planning.draft.MOST_READ", 5000)
    text = Path(draft(source, tmp_path)).read_text()
    assert ", more than " in capsys.readouterr().out
    assert "a part of the text is read" in text and " times\n" not in text


def said_tokens(said: str) -> int:
    return int(said.split("about ")[1].split(" tokens")[0].replace(",", ""))


def test_sizes_fit_text_and_machine():
    cpu, gpu = Machine(0, 8e9), Machine(1, 80e9)
    short = choose_sizes(Text(1, 2000), 1024, cpu)
    assert short.length == 16 and short.split["shard_tokens"] == 200 and short.windows >= 8
    assert short.steps * short.sequences * short.length <= 4 * 2000
    long = choose_sizes(Text(10**5, 10**9), 2048, gpu)
    assert (long.length, long.sequences, long.held_out) == (1024, 64, 0.01)
    assert choose_sizes(Text(10**5, 10**9), 48, gpu, steps=7).length == 32
    with pytest.raises(UserError, match="about 300 tokens, too few"):
        choose_sizes(Text(3, 300), 1024, cpu)
    assert [choose_depths(layers) for layers in (2, 3, 4, 12, 30)] == [
        (1, 1, 1),
        (2, 1, 2),
        (2, 1, 3),
        (6, 2, 10),
        (15, 4, 23),
    ]


def test_a_model_that_does_not_fit_gets_a_json_of_its_own(source):
    model = Model.model_validate({"size": "gpt2_small"})
    train = Train(steps=1, batch_tokens=64 * 1024, lr=1e-3, warmup_steps=0)
    room = [
        fit_settings(Machine(1, 1e9 * gb), ON_ONE_GPU, [(model, 12, 0)], train, 1024) for gb in (80, 6, 1)
    ]
    assert [(fit.settings is None, fit.fits) for fit in room] == [(True, True), (False, True), (True, False)]
    assert room[1].peak <= 6e9 < room[0].peak


MISTAKES = {
    "glob": ({"text": "nothing/*.txt"}, "--text 'nothing/*.txt': "),
    "kind": ({"text": "llama/config.yaml"}, "documents are read from .txt"),
    "id": ({"model": "owner/none"}, "'owner/none' is not a local folder and is not available from the Hub"),
    "name": ({"model": "no/such/model"}, "is neither a folder nor a Hub id"),
    "config": ({"without": "config.json"}, "config.json is missing"),
    "adapter": ({"without": "*", "config": None, "adapter": True}, "is an adapter without the model"),
    "quantized": ({"config": {"quantization_config": {"bits": 4}}}, "describes a quantized model"),
    "t5": ({"config": {"model_type": "t5", "is_encoder_decoder": True}}, "describes an encoder-decoder"),
    "code": (
        {"config": {"auto_map": {"AutoConfig": "x.Y"}, "architectures": ["Mine"]}},
        "needs code that comes with the model",
    ),
    "tokenizer": ({"without": "tokenizer*"}, "cannot be opened"),
    "schema": ({"schema": True}, "mine.schema.json exists and is left as it is; give another --out"),
    "exists": ({"exists": True}, "exists and is left as it is; give another --out"),
    "suffix": ({"out": "mine"}, "--out is the file of an experiment, NAME.yaml"),
    "reserved": ({"out": "paper.yaml"}, "is a reserved folder name"),
    "steps": ({"steps": "0"}, "--steps must be at least 1"),
}


def test_what_the_same_command_wrote_is_kept_and_what_another_wrote_is_refused(
    written, source, tmp_path, capsys, monkeypatch
):
    """As recipes/own_model.sh calls it again: for another model the old experiment would be of no use."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, "llama")
    shutil.copytree(source, "other")
    words = ["init", "--text", "texts/*.txt", "--out", "mine.yaml"]
    assert main([*words, "--model", "llama"]) == 0
    edited = Path("mine.yaml").read_text() + "# edited\n"
    Path("mine.yaml").write_text(edited)
    capsys.readouterr()
    assert main([*words, "--model", "llama"]) == 0
    assert "mine.yaml is kept: this command wrote it" in capsys.readouterr().out
    for other in (["--model", "other"], ["--model", "llama", "--steps", "7"]):
        assert main([*words, *other]) == 2
        assert "mine.yaml exists and is left as it is" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == edited


@pytest.mark.parametrize("case", MISTAKES)
def test_init_refuses_in_one_sentence_and_writes_nothing(
    case, source, tmp_path, own_root, capsys, monkeypatch
):
    import huggingface_hub.constants

    change, says = MISTAKES[case]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, "llama")
    Path("llama/config.yaml").write_text("")
    Path("text.txt").write_text(TEXTS[0].read_text())
    for file in Path("llama").glob(change.get("without", "-")):
        file.unlink()
    if config := change.get("config"):
        write_json(Path("llama/config.json"), read_json(Path("llama/config.json")) | config, seal=False)
    if "adapter" in change:
        Path("llama/adapter_config.json").write_text("{}")
    if "schema" in change:
        Path("mine.schema.json").write_text("mine")
    if "exists" in change:
        Path("mine.yaml").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    words = {"model": "llama", "text": "*.txt", "out": "mine.yaml"}
    words |= {key: value for key, value in change.items() if key in ("model", "text", "out", "steps")}
    assert main(["init", *(f"--{key}={value}" for key, value in words.items())]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and said.count("inheritune: ") == 1
    assert sorted(tmp_path.rglob("*")) == before and not own_root.exists()
