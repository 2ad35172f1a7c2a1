"""data.window_start: each window begins with the end-of-text token, wherever windows are read."""

import numpy as np
import pytest
import torch
from conftest import experiment_dict, run_verb, write_experiment, write_tokens
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from inheritune.config.experiment import load_experiment
from inheritune.config.rehearsal import shrink_experiment
from inheritune.data.batches import Order, Tokens
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.runs.job import Job

LENGTH, END = 32, 299


@pytest.fixture
def path(tmp_path):
    raw = experiment_dict()
    raw["data"] |= {"window_start": "end_of_text", "sequence_length": LENGTH}
    path = write_experiment(tmp_path / "recipes", raw)
    write_tokens(get_data_dir(load_experiment(path)))
    return path


def test_training_validation_and_analysis_read_it(path):
    """Validation loss and attention are those that transformers computes on windows cut by hand, whose
    first token is the end of text; the stream itself, which tokenizers are compared on, stays as it is."""
    run_verb("train", path, "--run", "reference")
    run = RunDir.of(load_experiment(path), "reference")
    results = read_json(run.results)
    assert results["windows"].endswith(f", beginning with token {END}")
    stream = np.fromfile(get_data_dir(load_experiment(path)) / "val_00000.bin", "<u2").astype(np.int64)
    n = results["validation"]["n"]
    starts = np.arange(n) * ((len(stream) - 1) // LENGTH) // n * LENGTH
    windows = torch.from_numpy(np.stack([stream[start : start + LENGTH + 1] for start in starts]))
    model = AutoModelForCausalLM.from_pretrained(run.final, attn_implementation="eager").eval()
    losses = {}
    for name, first in (("its own", windows[:, 0]), ("end of text", torch.full((n,), END))):
        windows[:, 0] = first
        with torch.no_grad():
            logits = model(windows[:, :-1]).logits
        losses[name] = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert results["validation"]["mean"] == pytest.approx(losses["end of text"], abs=1e-5)
    assert abs(losses["end of text"] - losses["its own"]) > 1e-4

    run_verb("analyze", "reference", path, "--sequences", "4", "--length", "16", "--ranks-only")
    maps = [row for row in read_jsonl(run.attention) if row["kind"] == "map"]
    chosen = np.random.default_rng(0).choice(len(stream) // 16, size=4, replace=False) * 16
    ids = torch.from_numpy(np.stack([stream[start : start + 16] for start in chosen]))
    ids[:, 0] = END
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    assert [row["layer"] for row in maps] == [0, 1, 3]
    for row in maps:
        mean = attentions[row["layer"]][:3, row["head"]].mean(dim=0).numpy()
        np.testing.assert_allclose(np.array(row["mean"]), mean, atol=1e-4)


def test_training_reads_it(path):
    """The loss of the first step is that of the random start on the batch with the end of text in front."""
    experiment = load_experiment(path)
    run_verb("train", path, "--run", "reference")
    first = next(row for row in read_jsonl(RunDir.of(experiment, "reference").metrics) if "loss" in row)
    tokens = Tokens.of(experiment, "train")
    starts = Order(tokens, "random_windows", LENGTH, 20, seed=0).starts(0)
    windows = torch.from_numpy(np.stack([tokens.read(int(start), LENGTH + 1) for start in starts]))
    assert (windows[:, 0] != END).any()
    windows[:, 0] = END
    start = AutoModelForCausalLM.from_pretrained(Job(experiment, "reference").root.seed_checkpoint(4))
    with torch.no_grad():
        logits = start(windows[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert first["step"] == 1 and first["loss"] == pytest.approx(loss, abs=1e-5)


def test_the_prepared_data_are_the_same(path):
    """It is no key of the shards: an experiment without it reads the same folder."""
    with_start, without = load_experiment(path), experiment_dict()
    without["data"] |= {"sequence_length": LENGTH}
    assert with_start.data.preparation() == type(with_start.data)(**without["data"]).preparation()
    assert shrink_experiment(with_start.model_dump())["data"]["window_start"] == "end_of_text"
