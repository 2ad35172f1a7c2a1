"""Gradual stacking (`grow: {from: middle}`): a stage is the one before with its middle blocks repeated,
tensor by tensor; from the reference's first layers, or from scratch."""

import shutil

import pytest
import torch
from conftest import experiment_dict, run_verb, write_experiment, write_tokens
from test_resume import kill_at
from tiny_families import family_config
from tiny_models import random_model

from inheritune.config.experiment import load_experiment
from inheritune.config.layers import repeat_middle
from inheritune.errors import UserError
from inheritune.files.json_files import read_json
from inheritune.files.markers import hash_folder
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models.architectures import find_architecture
from inheritune.models.sources import open_source
from inheritune.models.surgery import inherit
from inheritune.runs.identity import check_start_model
from inheritune.runs.job import Job

BY_HAND = {
    (4, 4): [0, 1, 2, 3, 0, 1, 2, 3],  # a single group
    (8, 4): [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7],  # the first of two
    (12, 4): [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11],  # the second of three
    (5, 1): [0, 1, 2, 2, 3, 4],
    (6, 1): [0, 1, 2, 2, 3, 4, 5],
    (7, 3): [0, 1, 2, 3, 4, 5, 3, 4, 5, 6],  # groups 0-2, 3-5 and 6
    (5, 3): [0, 1, 2, 0, 1, 2, 3, 4],  # groups 0-2 and 3-4
}


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_the_middle_group_is_followed_by_its_copy(case):
    assert repeat_middle(*case) == BY_HAND[case]


def grown(by, most, start=None, **more) -> dict:
    """A run that grows from its own middle, from the reference's first two layers if not from `start`."""
    grow = {"by": by, "max_layers": most, "margin": -9.0, "from": "middle"}
    first = {"init": {"inherit": {"source": "reference", "layers": "0:2"}}}
    return {**(start or first), "compare": "reference", "grow": grow, **more}


FROM_SCRATCH = {"init": "random", "layers": 2}


def write(folder, runs) -> str:
    raw = experiment_dict(runs={"reference": {"init": "random"}, **runs})
    raw["model"]["layers"] = 5
    raw["paper"] = [{"run": name, "label": f"the {name}"} for name in raw["runs"]]
    return write_experiment(folder, raw)


MISTAKES = {
    "by": (grown(3, 5), "runs.stacked: grow.by (3) repeats more layers than the 2 of the first stage"),
    "by from scratch": (grown(3, 5, FROM_SCRATCH), "grow.by (3) repeats more layers than the 2"),
    "deep": (grown(1, 6, FROM_SCRATCH), "grow.max_layers (6) must lie between"),
    "no layers": (grown(1, 4, {"init": "random"}), "'from: middle' also takes 'init: random' with 'layers'"),
    "from": (
        grown(1, 4, FROM_SCRATCH) | {"grow": {"by": 1, "max_layers": 4, "from": "previous"}},
        "'grow' needs 'init: {inherit: ...}'",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_stacked_is_refused(tmp_path, case):
    run, says = MISTAKES[case]
    with pytest.raises(UserError) as refusal:
        load_experiment(write(tmp_path, {"stacked": run}))
    assert says in str(refusal.value)


def assert_repeats(start, before, blocks) -> None:
    """Every tensor of the checkpoint `start` is that of `before`, of whose blocks it has `blocks`."""
    ours, theirs, table = (
        open_source(start),
        open_source(before),
        find_architecture(open_source(start).config),
    )
    manifest = read_json(start / "inherited.json")
    assert (manifest["kind"], manifest["layers"]) == ("inherit", blocks)
    assert getattr(ours.config, table.layers) == len(blocks)
    assert {inside[0] for name in ours.names() if (inside := table.split_name(name))} == {*range(len(blocks))}
    for name in ours.names():
        inside = table.split_name(name)
        copied = name if inside is None else table.block.format(i=blocks[inside[0]]) + inside[1]
        assert torch.equal(ours.tensor(name), theirs.tensor(copied)), name
        row = manifest["tensors"][name]["copied"]
        assert row["tensor"] == copied and row["file"].startswith(str(before))


@pytest.mark.slow
def test_stages_are_copies_of_the_one_before(tmp_path, own_root):
    path = write(tmp_path, {"stacked": grown(1, 4), "scratch": grown(2, 5, FROM_SCRATCH)})
    experiment = load_experiment(path)
    write_tokens(get_data_dir(experiment))
    assert "stacked stage 3" in run_verb("plan", path).stdout and run_verb("check", path).returncode == 0
    folders = {name: RunDir.of(experiment, name) for name in experiment.runs}
    for name in ("stacked", "scratch"):
        said = run_verb("grow", path, "--run", name, procs=2).stdout
        assert f"{name} did not reach reference's validation loss" in said

    # from the reference's first two layers by one: which block each stage repeats
    stacked = folders["stacked"]
    reference = open_source(folders["reference"].final)
    assert read_json(stacked.stage(1).init / "inherited.json")["layers"] == [0, 1]
    assert read_json(stacked.stage(1).init / "inherited.json")["source"] == str(reference.folder)
    assert_repeats(stacked.stage(2).init, stacked.stage(1).final, [0, 0, 1])
    assert_repeats(stacked.stage(3).init, stacked.stage(2).final, [0, 1, 1, 2])
    # from scratch by two, and by one in the last stage
    scratch = folders["scratch"]
    assert not scratch.stage(1).init.exists()
    assert_repeats(scratch.stage(2).init, scratch.stage(1).final, [0, 1, 0, 1])
    assert_repeats(scratch.stage(3).init, scratch.stage(2).final, [0, 1, 1, 2, 3])
    for folder, depths in ((stacked, [2, 3, 4]), (scratch, [2, 4, 5])):
        assert [folder.stage(n).read_results()["layers"] for n in (1, 2, 3)] == depths
        assert not folder.stage(4).path.exists() and read_json(folder.done)["max_layers"] == depths[-1]

    said = run_verb("status", path).stdout
    assert "stacked/stage3, 4 layers" in said and "scratch (stage " in said
    page = run_verb("table", path).stdout
    assert all(f"the {name}, stage {n}" in page for name in ("stacked", "scratch") for n in (1, 2, 3))
    assert "gradual stacking does not reach the reference's validation loss" in page

    # a stage that is killed resumes from its checkpoint, with the same bits; the others stay as they are
    before, third = hash_folder(stacked.stage(2).path), stacked.stage(3)
    weights = hash_folder(third.final)
    stacked.done.unlink()
    shutil.rmtree(third.path)
    kill_at(path, own_root, third, 3, "--run", "stacked", "--stage", "3")
    assert third.complete_checkpoints() == [2]
    run_verb("grow", path, "--run", "stacked", procs=2)
    assert hash_folder(third.final) == weights and hash_folder(stacked.stage(2).path) == before

    run_verb("export", scratch.path, "--to", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "scratch" in card and "a random start" not in card


def test_repeated_blocks_keep_their_kind(tmp_path):
    """Gemma 2 alternates between two kinds of attention."""
    source, before, start = (tmp_path / name for name in ("source", "before", "start"))
    random_model(family_config("gemma2")).save_pretrained(source)
    raw = experiment_dict(model={"from": str(source)}, paper=[])
    raw["runs"] = {"reference": {"init": "random"}, "scratch": grown(1, 4, FROM_SCRATCH)}
    experiment = load_experiment(write_experiment(tmp_path, raw))
    inherit(source, "0:2", before)
    inherit(before, repeat_middle(2, 1), start)
    config = open_source(start).config
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    check_start_model(Job(experiment, "scratch", stage=2), config, start)
    with pytest.raises(UserError, match="holds another model than small describes: its num_hidden_layers"):
        check_start_model(Job(experiment, "scratch", stage=3), config, start)
