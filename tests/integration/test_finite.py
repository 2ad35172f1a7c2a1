"""Weights that are nan or inf: counted while they are copied, told, and never trained or measured."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import experiment_dict, refused, write_experiment, write_tokens
from tiny_models import config_of, random_model

from inheritune.config.experiment import load_experiment
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json
from inheritune.files.markers import INHERITED
from inheritune.files.rundir import RunDir, get_data_dir
from inheritune.models import extents
from inheritune.models.dtypes import FP32, find_dtype
from inheritune.models.extents import count_not_finite
from inheritune.models.sources import open_source
from inheritune.models.surgery import extend_model, halve_width, inherit, write_random
from inheritune.models.targets import check_start

BAD = "transformer.h.1.mlp.c_fc.weight"


def damaged(folder: Path, layers: int = 2, dtype=torch.float32) -> Path:
    """A saved model with two values of block 1 and one of the final norm that are not finite, and one as
    large as can be."""
    model = random_model(config_of("public", layers)).to(dtype)
    state = model.state_dict()
    flat = state[BAD].view(-1)
    flat[0], flat[7], flat[-1] = float("nan"), torch.finfo(dtype).max, -float("inf")
    state["transformer.ln_f.bias"][2] = float("inf")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_counted_is_what_is_not_finite(dtype):
    tiny = torch.finfo(dtype).smallest_normal / 2
    finite = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).max, torch.finfo(dtype).min, tiny, -tiny], dtype=dtype
    )
    bad = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")], dtype=dtype)

    def count(tensor: torch.Tensor) -> int:
        return count_not_finite(tensor.view(torch.uint8).numpy(), find_dtype(dtype))

    assert count(finite) == 0 and count_not_finite(b"", find_dtype(dtype)) == 0
    for one in bad:
        assert count(torch.cat([finite, one[None]])) == 1
    mixed = torch.cat([bad, finite, bad, bad])
    assert count(mixed) == 12 == int((~mixed.isfinite()).sum())


def test_a_cast_that_makes_them_is_named(tmp_path, caplog):
    """What fp16 cannot hold was once said to be copied as it is."""
    source = tmp_path / "source"
    model = random_model(config_of("llama"))
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    model.save_pretrained(source)
    with caplog.at_level(logging.WARNING):
        inherit(source, "0:2", tmp_path / "out", dtype="fp16")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "norm.weight has 1 value(s) that are nan or inf; cast torch.float32 to torch.float16" in said, said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inherit_copies_them_and_says_so(tmp_path, caplog, dtype):
    source = damaged(tmp_path / "source", dtype=dtype)
    out = tmp_path / "out"
    for _ in range(2):  # the second time it is there already
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            manifest = inherit(source, "0:2", out)
        (said,) = [record.getMessage() for record in caplog.records]
        assert (
            f"{out}: tensor {BAD} has 2 value(s) that are nan or inf, and 1 more tensor(s) have some" in said
        )
    assert manifest["not_finite"] == {BAD: 2, "transformer.ln_f.bias": 1}
    assert read_json(out / "inherited.json") == manifest
    before, after = open_source(source), open_source(out)
    assert all(
        after.tensor(name).view(torch.uint8).equal(before.tensor(name).view(torch.uint8))
        for name in after.names()
    )
    caplog.clear()
    assert (
        inherit(source, "0:1", tmp_path / "clean", parts=["blocks"])["not_finite"] == {}
        and not caplog.records
    )


def test_every_surgery_counts_them(tmp_path):
    source = damaged(tmp_path / "source", layers=4)
    random_model(config_of("public", 1)).save_pretrained(tmp_path / "previous")
    assert extend_model(tmp_path / "previous", source, 1, 2, tmp_path / "extended")["not_finite"] == {BAD: 2}
    assert inherit(source, [1], tmp_path / "stacked", copies=2)["not_finite"] == {
        BAD.replace(".1.", ".0."): 2,
        BAD: 2,
        "transformer.ln_f.bias": 1,
    }
    # a corner of it
    assert halve_width(source, tmp_path / "half")["not_finite"] == {BAD: 1, "transformer.ln_f.bias": 1}
    assert write_random(config_of("paper", 2), tmp_path / "random")["not_finite"] == {}


def test_blocks_of_a_disk_that_gives_a_few_bytes_at_a_time_are_whole_elements(tmp_path, monkeypatch):
    source = damaged(tmp_path / "source")

    class Slow:
        """A file whose reads are cut short, as those of a network's disk may be."""

        def __init__(self, path, *_, **__):
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, offset):
            self.file.seek(offset)

        def readinto(self, buffer):
            return self.file.readinto(memoryview(buffer)[:7])

    opened = open_source(source)
    expected = {name: b"".join(map(bytes, opened.blocks(name))) for name in opened.names()}
    monkeypatch.setattr(extents, "open", Slow, raising=False)
    monkeypatch.setattr(extents, "BLOCK_BYTES", 40)
    for name in opened.names():
        blocks = [bytes(block) for block in opened.blocks(name)]
        assert b"".join(blocks) == expected[name] and all(len(block) % 4 == 0 for block in blocks)
    assert sum(count_not_finite(block, FP32) for block in opened.blocks(BAD)) == 2


def test_start_of_an_older_version_is_looked_through(tmp_path):
    inherit(damaged(tmp_path / "source"), "0:2", tmp_path / "init")
    with pytest.raises(
        UserError,
        match=f"init: tensor {BAD} has 2 .*repair the source .*, delete this folder and start again",
    ):
        check_start(tmp_path / "init")
    manifest = read_json(tmp_path / "init" / INHERITED)
    del manifest["not_finite"]  # as it was written before they were counted
    write_json(tmp_path / "init" / INHERITED, manifest)
    with pytest.raises(UserError, match=r"init: tensor transformer\.\S+ has \d value"):
        check_start(tmp_path / "init")
    inherit(tmp_path / "source", "0:1", tmp_path / "clean", parts=["blocks"])
    check_start(tmp_path / "clean")


@pytest.fixture
def experiment(tmp_path, own_root) -> str:
    """Runs that start from, learn from, and are, a model with weights that are not finite; the data are
    prepared."""
    model = random_model(sized(config_of("public", 2)))
    model.save_pretrained(tmp_path / "good")
    model.transformer.h[1].mlp.c_fc.weight.data.view(-1)[:2] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    raw = experiment_dict(paper=[], model={"from": str(tmp_path / "bad")})
    blocks = {"init": {"inherit": {"source": str(tmp_path / "bad"), "layers": "0:2"}}}
    taught = {"init": {"inherit": {"source": str(tmp_path / "good"), "layers": "0:2"}}}
    taught["distil"] = {"teacher": str(tmp_path / "bad"), "alpha": 0.5, "temperature": 2.0}
    raw["runs"] = {
        "cut": blocks,
        "taught": taught,
        "third": {"init": {"external": {"source": str(tmp_path / "bad")}}},
    }
    path = write_experiment(tmp_path, raw)
    write_tokens(get_data_dir(load_experiment(path)))
    return path


def sized(config):
    """The sizes of the tests' small experiment."""
    for key, value in {"vocab_size": 320, "n_positions": 32, "n_embd": 32, "n_head": 2}.items():
        setattr(config, key, value)
    return config


def test_no_run_starts_or_learns_from_them(experiment):
    for run in ("cut", "taught"):
        said = refused("train", experiment, "--run", run)
        assert f"tensor {BAD} has 2 value(s) that are nan or inf" in said
        folder = RunDir.of(load_experiment(experiment), run)
        assert (
            not folder.metrics.exists() and not folder.checkpoints.exists() and not folder.bad_batch.exists()
        )


def test_they_are_not_measured(experiment, tmp_path):
    out = tmp_path / "results.json"
    for words in (["--model", tmp_path / "bad", "--out", out], ["--run", "third"]):
        said = refused("evaluate", experiment, *words)
        assert f"{tmp_path / 'bad'}: tensor {BAD} has 2 value(s) that are nan or inf" in said
    assert not out.exists() and not RunDir.of(load_experiment(experiment), "third").results.exists()
