"""Saves in the background: training continues while a thread writes, and what is on the disk at any moment is
what it would be if training had waited."""

import json

import pytest
import torch
from conftest import run_verb
from launching import launch_locally
from test_stop import make as make_run
from test_stop import record, start

from inheritune.config.sections import Model
from inheritune.engines.generators import get_generator_file
from inheritune.files.json_files import read_json
from inheritune.files.markers import COMPLETE, hash_folder
from inheritune.models.initialization import make_generator
from inheritune.models.networks import build_config
from inheritune.models.surgery import write_random

WORKER = "background_worker.py"


def make(folder, in_background: bool = True, **train):
    """A run of 12 steps at ZeRO 3, with a checkpoint every 3 steps.  -> (experiment's path, root, RunDir)"""
    folder.mkdir(exist_ok=True)
    made = make_run(folder, 3, **{"checkpoint_every": 3, **train})
    settings = json.loads((folder / "ds.json").read_text())
    settings["inheritune"] = {"background_saves": in_background}
    (folder / "ds.json").write_text(json.dumps(settings))
    return made


def finish(path, root, run) -> str:
    said = run_verb("train", path, "--run", "reference", procs=2, INHERITUNE_ROOT=root).stdout
    assert run.is_done() and not list(run.path.parent.rglob(".*"))
    return said


@pytest.fixture(scope="module")
def waited(tmp_path_factory):
    """The run, finished, whose training waited for its saves."""
    path, root, run = make(tmp_path_factory.mktemp("waited"), in_background=False)
    finish(path, root, run)
    return run


def assert_equal(run, waited) -> None:
    """The same bits: record, final weights, and every file of the last checkpoint but the clocks' numbers."""
    assert record(run) == record(waited)
    assert hash_folder(run.final) == hash_folder(waited.final)
    newest = run.complete_checkpoints()[-1]
    assert newest == waited.complete_checkpoints()[-1]
    last = (run.checkpoint(newest), waited.checkpoint(newest))
    new, old = ({n: f for n, f in hash_folder(c).items() if n != "metrics.jsonl"} for c in last)
    assert new == old and len(new) > 6, new


@pytest.mark.slow
def test_a_checkpoint_holds_the_generators_that_the_runs_seed_and_the_rank_determine(waited):
    """Not those with which torch happened to start in these processes: the bytes of two runs would differ."""
    saved = [
        torch.load(get_generator_file(waited.checkpoint(waited.complete_checkpoints()[-1]), rank))["cpu"]
        for rank in range(2)
    ]
    expected = [make_generator("rank", 0, rank).get_state() for rank in range(2)]
    assert all(map(torch.equal, saved, expected)) and not torch.equal(*saved)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_holds_the_states_of_its_step_at_each_zero_stage(tmp_path, ranks):
    """In every byte, although the weights changed twice before the thread wrote; the marker too."""
    shape = {"layers": 3, "width": 33, "heads": 3, "positions": 16, "vocab_size": 61}
    write_random(build_config(Model(size="gpt2_tiny", **shape), 3), tmp_path / "start")
    launch_locally(["tests/support/save_worker.py", str(tmp_path / "start"), str(tmp_path)], ranks)
    for stage in range(4):
        saved = [
            tmp_path / f"zero{stage}" / name / "checkpoints/step_00000001"
            for name in ("waiting", "background")
        ]
        assert read_json(saved[0] / COMPLETE) == read_json(saved[1] / COMPLETE)
        waiting, background = (hash_folder(folder) for folder in saved)
        assert waiting == background == read_json(saved[1] / COMPLETE)["files"]
        assert (
            len([name for name in waiting if name.endswith("states.pt")])
            == [1, 1 + ranks, 1 + ranks, 2 * ranks][stage]
        )


@pytest.mark.slow
def test_training_continues_the_next_save_waits_and_so_does_the_end(tmp_path, waited):
    path, root, run = make(tmp_path)
    # the first save is held until the second one, at step 6, waits for it
    codes, said = start(path, root, "NONE@1:0", worker=WORKER)
    assert codes == [0, 0], said
    assert "rank 0 read 3 batches while save 1 was held" in said and "rank 1 read 3 batches" in said
    assert "complete at check_room: [3]" in said and "complete at check_room: [3, 6]" in said
    assert "complete at export_weights: [6, 9]" in said
    assert_equal(run, waited)


@pytest.mark.slow
def test_the_last_save_is_complete_before_final_is_written(tmp_path):
    # that of step 11, held until the run has come to its end
    path, root, run = make(tmp_path, checkpoint_every=11)
    codes, said = start(path, root, "NONE@1:0", worker=WORKER)
    assert codes == [0, 0] and run.is_done(), said
    assert "read 1 batches while save 1 was held" in said and "complete at export_weights: [11]" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_between_copy_and_marker_resumes_from_the_checkpoint_before(tmp_path, waited, rank):
    path, root, run = make(tmp_path)
    codes, said = start(path, root, f"SIGKILL@2:{rank}", worker=WORKER)
    assert 0 not in codes and f"struck: SIGKILL@2:{rank}" in said, said
    assert run.complete_checkpoints() == [3] and not run.is_done()
    assert "resumed at step 3" in finish(path, root, run)
    assert_equal(run, waited)


@pytest.mark.slow
def test_a_signal_while_a_thread_writes_saves_and_leaves(tmp_path, waited):
    path, root, run = make(tmp_path)
    codes, said = start(path, root, "SIGUSR1@2:1", worker=WORKER)
    assert codes == [0, 0] and "all saved" in said, said
    step = read_json(run.stopped)["step"]
    assert step in (8, 9) and run.complete_checkpoints() == [6, step], said  # both: the one that was held too
    assert f"resumed at step {step}" in finish(path, root, run)
    assert_equal(run, waited)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_error_in_a_thread_is_one_sentence_and_nothing_is_lost(tmp_path, waited, rank):
    path, root, run = make(tmp_path)
    codes, said = start(path, root, f"FULL@2:{rank}", worker=WORKER)
    assert codes == [2, 2] and "Traceback" not in said, said
    assert f"(rank {rank}): {run.checkpoint(6)} is larger than a file may be here" in said, said
    assert run.complete_checkpoints() == [3] and not list(run.path.parent.rglob(".*"))
    assert "resumed at step 3" in finish(path, root, run)
    assert_equal(run, waited)


@pytest.mark.slow
def test_without_host_memory_training_waits_and_says_so(tmp_path, waited):
    path, root, run = make(tmp_path)
    codes, said = start(path, root, "LITTLE@1:0", worker=WORKER)
    assert codes == [0, 0] and "training waits while" in said and "of free memory for a copy" in said, said
    assert_equal(run, waited)
