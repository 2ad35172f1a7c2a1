"""Models that are evaluated in shards (ZeRO 3): the losses and scores of whole copies, in less memory."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, refused, run_verb, write_experiment, write_lone_run
from launching import launch_locally
from test_evaluate import ALONE, checkpoint, scores, write_own  # noqa: F401
from test_zero3 import ZERO
from tiny_models import config_of, random_model

from inheritune.config.experiment import load_experiment
from inheritune.config.sections import Model
from inheritune.files.json_files import read_json
from inheritune.files.rundir import RunDir
from inheritune.models import networks
from inheritune.models.sources import open_source

pytestmark = pytest.mark.slow

WINDOWS = 19
"""Three batches: of two ranks one has two of them, the other one."""

SIZES = {"layers": 24, "width": 512, "heads": 4, "positions": 32, "vocab_size": 320}
"""303 MB of weights, of which a block has 13 MB."""


def write_ds_json(folder: Path, stage: int) -> Path:
    """A DeepSpeed JSON at this ZeRO stage that keeps few weights gathered."""
    path = folder / f"zero{stage}.json"
    settings = {"train_micro_batch_size_per_gpu": 5, "zero_optimization": ZERO[stage]}
    path.write_text(json.dumps(settings))
    return path


def write_llama(folder: Path) -> Path:
    """A third party's Llama whose head is not tied."""
    config = config_of("llama")
    config.vocab_size, config.max_position_embeddings = 320, 64
    random_model(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
def test_losses_in_shards_are_those_of_whole_copies(tmp_path, precision):
    """Window by window, on one rank and two: a run's final/, a checkpoint of it, a third party's Llama."""
    ds = json.loads(write_ds_json(tmp_path, 3).read_text())
    path = write_lone_run(tmp_path, ds, final_windows=WINDOWS, precision=precision)
    run = RunDir.of(load_experiment(path), "reference")
    run_verb("train", path, "--run", "reference")
    step = max((run.path / "checkpoints").glob("step_*"))
    folders = {"trained": run.final, "saved": step, "llama": write_llama(tmp_path / "llama")}
    raw = yaml.safe_load(Path(path).read_text())
    raw["runs"] |= {name: {"init": {"external": {"source": str(f)}}} for name, f in folders.items()}
    path = write_experiment(tmp_path, raw)
    runs = {name: RunDir.of(load_experiment(path), name) for name in folders}
    losses: dict = {}
    for ranks in (1, 2):
        for stage in (1, 3):
            command = ("evaluate", path, "--run", ",".join(["reference", *folders]), "--tasks", "none")
            said = run_verb(*command, "--ds", write_ds_json(tmp_path, stage), procs=ranks).stdout
            divided = f"in shards by ZeRO 3, over {ranks} rank" in said
            assert divided == (stage == 3)
            for name, folder in runs.items():
                losses.setdefault(name, []).append(read_json(folder.results)["window_losses"])
                folder.results.unlink()
            losses.setdefault("own", []).append(list(read_json(run.results)["validation"].values()))
    for name, (first, *others) in losses.items():
        assert len(first) == (WINDOWS if name in folders else len(losses["own"][0]))
        for other in others:
            torch.testing.assert_close(torch.tensor(other), torch.tensor(first), rtol=0, atol=1e-6, msg=name)
    for ranks in (1, 2):  # without --ds several ranks go by the experiment's JSON, a single one has a copy
        said = run_verb("evaluate", path, "--run", "llama", procs=ranks).stdout
        assert ("in shards by ZeRO 3" in said) == (ranks == 2)
        torch.testing.assert_close(
            torch.tensor(read_json(runs["llama"].results)["window_losses"]),
            torch.tensor(losses["llama"][0]),
            rtol=0,
            atol=1e-6,
        )
        runs["llama"].results.unlink()


def test_scores_in_shards_are_those_of_whole_copies(tmp_path, checkpoint):  # noqa: F811
    """Two ranks have requests of different numbers of forwards."""
    path, found = write_own(tmp_path, checkpoint), {}
    for stage in (1, 3):
        out = tmp_path / f"out{stage}.json"
        ds = write_ds_json(tmp_path, stage)
        run_verb("evaluate", path, "--model", checkpoint, "--out", out, "--ds", ds, procs=2, **ALONE)
        found[stage] = scores(read_json(out))
    assert len(found[1]) == 6 and found[3].keys() == found[1].keys()
    for key, value in found[1].items():
        assert found[3][key]["score"] == pytest.approx(value["score"], rel=1e-6)


def test_no_rank_holds_a_whole_copy(tmp_path):
    """By how much the memory of each of two ranks rises, in whole copies."""
    settings = json.loads(write_ds_json(tmp_path, 3).read_text())
    runs = {}
    for name, layers in (("little", 1), ("large", SIZES["layers"])):
        config = networks.build_config(Model(size="gpt2_tiny", **SIZES), layers)
        random_model(config).save_pretrained(tmp_path / name)
        runs[name] = {"init": {"external": {"source": str(tmp_path / name)}}}
    raw = yaml.safe_load(Path(write_lone_run(tmp_path, settings, model=SIZES)).read_text())
    path = write_experiment(tmp_path, raw | {"runs": raw["runs"] | runs})
    source = open_source(str(tmp_path / "large"))
    whole = 4 * sum(torch.Size(source.shape(name)).numel() for name in source.names())
    worker = str(REPOSITORY / "tests/support/evaluate_worker.py")
    peaks = {}
    for stage in (1, 3):
        words = [path, str(tmp_path), str(write_ds_json(tmp_path, stage)), *runs]
        launch_locally([worker, *words], 2)
        peaks[stage] = [int((tmp_path / f"zero{stage}_{rank}").read_text()) / whole for rank in range(2)]
    assert min(peaks[1]) >= 1.0 and max(peaks[3]) < 0.8, peaks


def test_a_copy_that_does_not_fit_is_refused_with_the_way_out(tmp_path, small):
    """Before anything is read: two terabytes, of which no byte is stored."""
    config, folder = config_of("llama", layers=300), tmp_path / "huge"
    config.vocab_size, config.max_position_embeddings = 320, 64
    config.hidden_size, config.intermediate_size, config.head_dim = 4096, 1 << 17, 1024
    config.save_pretrained(folder)
    write_sparse(folder / "model.safetensors", config)
    command = ("evaluate", small, "--model", folder, "--tasks", "none")
    said, sharded = refused(*command), refused(*command, "--ds", "ds_configs/zero3.json")
    assert f"{folder} takes 1," in said and "GB as a whole fp32 copy on each rank, which has " in said
    assert "give --ds ds_configs/zero3.json, which divides it over the ranks, and start " in said
    assert "GB in shards on each rank" in sharded and "; start " in sharded
    number = r"start (\d+) or more ranks with as much free memory each$"
    assert re.findall(number, said) == re.findall(number, sharded) != []
    away = refused(*command, "--ds", "ds_configs/zero3_offload_all.json")  # the weights are on the host then
    assert "GB in shards on each rank" in away and re.findall(number, away) == re.findall(number, said)


def test_what_does_not_fit_the_data_is_refused_before_weights_are_read(tmp_path, small):
    """Those of the model are damaged, which is found only while they are read."""
    config = config_of("llama")
    config.vocab_size, config.max_position_embeddings = 320, 16
    model = random_model(config)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(tmp_path / "short")
    said = refused("evaluate", small, "--model", tmp_path / "short", "--tasks", "none")
    assert "is beyond the 16 positions of" in said


@pytest.mark.parametrize(
    ("offload", "said"),
    [
        ("cpu", "zero_optimization.offload_param"),
        ({"device": "cpu", "foo": 1}, "unknown key 'foo' in 'zero_optimization.offload_param'"),
        ({"device": "nvme"}, "'zero_optimization.offload_param.nvme_path' is missing"),
    ],
)
def test_a_json_that_cannot_be_worked_with_is_refused(tmp_path, small, offload, said):
    path = tmp_path / "bad.json"
    zero = {"stage": 3, "offload_param": offload}
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 5, "zero_optimization": zero}))
    folder = write_llama(tmp_path / "llama")
    assert said in refused("evaluate", small, "--model", folder, "--tasks", "none", "--ds", path)


def test_a_disk_that_deepspeed_cannot_read_here_is_refused(tmp_path):
    """Nothing of the run is written."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is installed, so DeepSpeed can compile its disk reader")
    away = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": False}}
    path = write_lone_run(tmp_path, {"train_micro_batch_size_per_gpu": 5, "zero_optimization": away})
    command = ("evaluate", path, "--model", write_llama(tmp_path / "llama"), "--tasks", "none")
    said = refused(*command, "--ds", tmp_path / "ds.json")
    for words in (said, refused("train", path, "--run", "reference")):
        assert "(async_io) cannot be compiled here; install libaio" in words, words
    assert not RunDir.of(load_experiment(path), "reference").experiment.exists()


def write_sparse(path: Path, config) -> None:
    """Weights of `config` whose bytes are a hole in the file."""
    from inheritune.models.networks import list_model_shapes

    header, end = {}, 0
    for name, shape in list_model_shapes(config).items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
