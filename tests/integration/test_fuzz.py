"""Whatever a file holds, its reader succeeds or raises UserError: never another error, never a hang.

FUZZ=10000 pytest tests/integration/test_fuzz.py    inputs per reader (300 by default)"""

import copy
import json
import os
import struct

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, experiment_dict, write_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import config_of, random_model

from inheritune.cluster.verify import verify
from inheritune.config.experiment import Experiment, load_experiment, rehearse_experiment
from inheritune.config.layers import parse_layers
from inheritune.config.problems import parse_section
from inheritune.data.batches import Tokens
from inheritune.engines import dslint
from inheritune.engines.deepspeed_json import load_deepspeed_json
from inheritune.errors import UserError
from inheritune.files.json_files import add_seal, read_json, read_jsonl
from inheritune.models.sources import open_source
from inheritune.models.weight_files import read_safetensors

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ", "300")),
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)

numbers = st.one_of(st.integers(), st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30]), st.floats())
odd = ["0:4", ":", "-1:", "../x", "/etc", "$(id)", "NaN", "reference", "\x00"]
words = st.one_of(st.text(max_size=12), st.sampled_from(odd))
leaves = st.one_of(st.none(), st.booleans(), numbers, words)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw, whole):
    """`whole` (nested dicts and lists) with one to three places replaced, removed or added to."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        place, key = None, None
        inside = whole
        while isinstance(inside, dict | list) and inside and (place is None or draw(st.integers(0, 3))):
            place = inside
            key = draw(st.sampled_from(list(inside) if isinstance(inside, dict) else range(len(inside))))
            inside = inside[key]
        if place is None:
            return draw(values)
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace":
            place[key] = draw(values)
        elif what == "remove":
            del place[key]
        elif isinstance(place, dict):
            place[draw(words)] = draw(values)
    return whole


def survives(function, *arguments) -> None:
    try:
        function(*arguments)
    except UserError as error:
        assert str(error)


EXPERIMENT = experiment_dict()
EXPERIMENT["name"] = "small"


@fuzzed
@given(changed(EXPERIMENT))
def test_experiment(raw):
    def load():
        experiment = parse_section(Experiment, raw, "small.yaml")
        for run in experiment.runs.values():
            if run.grow:
                survives(run.grow.depths, run.init.inherit.layers, experiment.model.layers)
        rehearse_experiment(experiment)

    survives(load)


@fuzzed
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(str.encode),
        values.map(lambda v: yaml.safe_dump(v).encode()),
    )
)
def test_experiment_file(tmp_path, content):
    (tmp_path / "e.yaml").write_bytes(content)
    survives(load_experiment, str(tmp_path / "e.yaml"))


@fuzzed
@given(st.one_of(st.text(max_size=20), st.lists(st.integers(), max_size=4)), st.integers(1, 100))
def test_layers(layers, n_source):
    survives(parse_layers, layers, n_source)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


@fuzzed
@given(
    st.one_of(changed(HEADER), values),
    st.integers(-9, 9),
    st.one_of(st.just(0), st.integers(-(2**63), 2**63 - 1)),
    st.binary(max_size=8),
)
def test_safetensors_header(tmp_path, header, more, length, extra):
    try:
        text = json.dumps(header).encode()
    except ValueError:
        return
    path = tmp_path / "model.safetensors"
    claimed = (length or len(text)) % 2**64
    path.write_bytes(struct.pack("<Q", claimed) + text + b"\0" * max(0, 32 + more) + extra)
    survives(read_safetensors, path)


@fuzzed
@given(st.binary(max_size=64))
def test_safetensors_bytes(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    survives(read_safetensors, tmp_path / "model.safetensors")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    random_model(config_of("paper")).save_pretrained(folder, max_shard_size="20KB")
    return folder, read_json(folder / "model.safetensors.index.json"), read_json(folder / "config.json")


@fuzzed
@given(st.data())
def test_index_and_config_of_a_checkpoint(sharded, data):
    folder, index, config = sharded
    which = data.draw(st.sampled_from(["index", "config"]))
    for name, content in (("model.safetensors.index.json", index), ("config.json", config)):
        asked = name.endswith(f"{which}.json")
        (folder / name).write_text(json.dumps(data.draw(changed(content)) if asked else content))

    def read():
        source = open_source(folder)
        for tensor in source.names()[:3]:
            source.tensor(tensor)

    survives(read)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = write_tokens(tmp_path_factory.mktemp("prepared") / "data")
    return folder, read_json(folder / "manifest.json")


@fuzzed
@given(st.data())
def test_manifest_of_data(prepared, data):
    folder, manifest = prepared
    (folder / "manifest.json").write_text(json.dumps(data.draw(changed(manifest))))

    def read():
        for split in ("train", "val"):
            tokens = Tokens(folder, split)
            if tokens.n_tokens:
                assert tokens.read(0, 1).dtype == np.int64

    survives(read)
    survives(verify, folder)


LOADED = parse_section(Experiment, EXPERIMENT, "small.yaml")
SHIPPED = [load_deepspeed_json(path) for path in sorted((REPOSITORY / "ds_configs").glob("*.json"))]


@fuzzed
@given(
    st.one_of(
        st.sampled_from(SHIPPED).flatmap(changed).map(json.dumps).map(str.encode),
        values.map(json.dumps).map(str.encode),
        st.text(max_size=60).map(str.encode),
        st.binary(max_size=40),
    ),
    st.sampled_from([None, 1, 3, 8]),
)
def test_deepspeed_json(tmp_path, content, ranks):
    """As `check --ds` reads it; whatever DeepSpeed's own reader raises is a sentence."""
    path = tmp_path / "ds.json"
    path.write_bytes(content)

    def check():
        assert all(
            dslint.check_problems(
                path, dslint.lint(load_deepspeed_json(path), LOADED.model, LOADED.train, ranks)
            )
        )

    survives(check)


@fuzzed
@given(st.lists(st.one_of(values, changed({"step": 3, "loss": 2.5}))), st.booleans(), st.binary(max_size=9))
def test_rows(tmp_path, rows, seal, extra):
    rows = [add_seal(row) for row in rows] if seal else rows
    (tmp_path / "metrics.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + extra)
    survives(read_jsonl, tmp_path / "metrics.jsonl")


MARKER = {"step": 4, "ranks": 2, "zero_stage": 3, "files": {"a": {"bytes": 3, "xxh3": "x"}}}


@fuzzed
@given(
    st.one_of(changed(MARKER).map(json.dumps).map(str.encode), st.binary(max_size=50)),
    st.sampled_from(["COMPLETE", "DONE", "inherited.json"]),
)
def test_marker(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    survives(verify, tmp_path)
    (tmp_path / name).unlink()
