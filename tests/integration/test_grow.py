"""The main job end to end, through the command line: reference, growth, verdict, table, figures; what a
restart does."""

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import experiment_dict, run_verb, write_experiment, write_tokens

from inheritune.config.experiment import load_experiment
from inheritune.files.json_files import read_json, read_jsonl
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir


@pytest.mark.slow
def test_growth_on_three_ranks_with_a_batch_of_twenty(tmp_path, own_root):
    raw = experiment_dict()
    raw["train"]["wandb"] = "offline"
    raw["runs"]["grown"]["grow"]["margin"] = -9.0  # never parity: every stage is trained
    raw["runs"]["grown"]["grow"]["from"] = "previous"
    path = write_experiment(tmp_path, raw)
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment))
    grown, reference = RunDir.of(experiment, "grown"), RunDir.of(experiment, "reference")

    said = run_verb("grow", path, "--run", "grown", "--procs", "3").stdout
    assert "did not reach reference's validation loss" in said
    done = read_json(grown.done)
    assert (
        not done["parity"]
        and done["layers"] in (2, 3)
        and (grown.stage(done["stage"]).final / "config.json").is_file()
    )
    results = [read_json(grown.stage(n).results) for n in (1, 2)]
    assert [r["layers"] for r in results] == [2, 3] and not grown.stage(3).path.exists()
    assert done["train_flops_of_all_stages"] == sum(r["train_flops"] for r in results)
    for stage, result in zip((1, 2), results, strict=True):
        ours = np.load(grown.stage(stage).losses(6)) - np.load(reference.losses(6))
        assert (
            result["difference"]["mean"] == pytest.approx(ours.mean(), abs=1e-12)
            and result["difference"]["n"] == 16
        )
        assert result["paper_rule"] == (ours.mean() <= 0)
    rows = [row for row in read_jsonl(reference.metrics) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert {
        "tokens",
        "lr",
        "grad_norm",
        "step_s",
        "tokens_per_s",
        "mfu",
        "peak_memory_gb",
        "skipped_steps",
    } <= set(rows[0])
    assert reference.wandb_id.is_file() and list((reference.path / "wandb").glob("offline-run-*"))

    # stage 2 took blocks 0 and 1, embeddings and norm from stage 1, block 2 from the reference
    manifest = read_json(grown.stage(2).init / "inherited.json")["tensors"]
    origin = {name: str(facts["copied"]["file"]) for name, facts in manifest.items()}
    assert (
        "stage1/final" in origin["transformer.h.1.mlp.c_fc.weight"]
        and "stage1/final" in origin["transformer.wte.weight"]
    )
    assert "reference/final" in origin["transformer.h.2.mlp.c_fc.weight"]

    run_verb("figure", path)
    page = run_verb("table", path).stdout
    assert "Inheritune, stage 2" in page and "One seed." in page
    assert (reference.path.parent / "loss.png").read_bytes()[:4] == b"\x89PNG"

    # the same command again does nothing; one lost marker repeats one decision, not one training
    files = hash_folder(own_root / "runs")
    run_verb("grow", path, "--run", "grown", "--procs", "3")
    assert hash_folder(own_root / "runs") == files
    grown.done.unlink()
    run_verb("grow", path, "--run", "grown", "--procs", "3")
    assert hash_folder(own_root / "runs") == files

    # a stage that was lost is done again, the one before is not
    stage1 = hash_folder(grown.stage(1).path)
    shutil.rmtree(grown.stage(2).path)
    grown.done.unlink()
    run_verb("grow", path, "--run", "grown", "--procs", "3")
    assert hash_folder(grown.stage(1).path) == stage1
    assert (
        np.array_equal(np.load(grown.stage(2).losses(6)).shape, (16,))
        and read_json(grown.done)["layers"] == done["layers"]
    )

    # evaluation of final/ as one process finds what training on three ranks recorded
    recorded = read_json(reference.results)["validation"]["mean"]
    run_verb("evaluate", path, "--run", "reference")
    assert read_json(reference.results)["validation"]["mean"] == pytest.approx(recorded, abs=1e-6)
    assert read_json(reference.results)["steps"] == 6  # what training wrote is kept
    run_verb("evaluate", path, "--model", reference.final, "--out", tmp_path / "other.json")
    assert json.loads((tmp_path / "other.json").read_text())["validation"]["mean"] == pytest.approx(
        recorded, abs=1e-6
    )


@pytest.mark.slow
def test_rehearsal_of_a_paper_experiment_marks_everything(own_root):
    """The shipped Medium experiment through the same code in small: real corpus, real tokenizer, growth,
    table, figures."""
    run_verb("grow", "gpt2_medium_owt", "--run", "inheritune", "--procs", "2", REHEARSE=1)
    experiment = load_experiment("gpt2_medium_owt", rehearse=True)
    grown = RunDir.of(experiment, "inheritune")
    assert "rehearsal" in grown.path.parts and read_json(grown.done)["layers"] in (4, 5, 6)
    run_verb("analyze", "--model", grown.path, "--data", "gpt2_medium_owt", REHEARSE=1)
    assert "REHEARSAL" in run_verb("table", "gpt2_medium_owt", REHEARSE=1).stdout
    run_verb("figure", "gpt2_medium_owt", REHEARSE=1)
    kept = read_json(grown.stage(1).init / "inherited.json")
    fresh = sorted(name for name, facts in kept["tensors"].items() if "fresh" in facts)
    # the paper's reading
    assert fresh == ["transformer.ln_f.bias", "transformer.ln_f.weight", "transformer.wpe.weight"]
    assert yaml.safe_load(grown.stage(1).experiment.read_text())["rehearsal"] is True

    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = grown.weights()
    model = AutoModelForCausalLM.from_pretrained(weights)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    text = tokenizer.decode(model.generate(**tokenizer("import", return_tensors="pt"), max_new_tokens=8)[0])
    assert text.startswith("import")
