"""YAML of experiments as you write it (reading.py): a key once, a bounded size, no surprises of YAML 1.1; and
the repository's own YAML by the same rules."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, experiment_dict, write_experiment

from inheritune.config import reading
from inheritune.config.experiment import load_experiment
from inheritune.config.reading import compose_nodes, read_yaml
from inheritune.engines.deepspeed_json import load_deepspeed_json
from inheritune.errors import UserError
from inheritune.files.json_files import read_json, write_json

SOUND = yaml.safe_dump(experiment_dict(), sort_keys=False)


def said_of(tmp_path: Path, content: str | bytes) -> str:
    """The sentence about a file with this content."""
    path = tmp_path / "small.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        load_experiment(str(path))
    said = str(caught.value)
    assert said.startswith(f"{path}") and "\n" not in said and len(said) < 800, said
    return said.removeprefix(str(path))


def loaded(tmp_path: Path, content: str | bytes):
    path = tmp_path / "small.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_experiment(str(path))


# --- a key twice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "  steps: 6\n",
            "  steps: 6\n  lr: 0.1\n  steps: 7\n",
            "'train.steps' is given twice (first in line",
        ),
        (
            "  grown:\n",
            "  reference: {init: random, layers: 2}\n  grown:\n",
            "'runs.reference' is given twice",
        ),
        ("runs:\n", "train: {}\nruns:\n", "'train' is given twice (first in line"),
        (
            "    init: random\n",
            "    init: random\n    'init': random\n",
            "'runs.reference.init' is given twice",
        ),
        (
            "    init: random\n",
            "    init: {stack: {source: a, source: b}}\n",
            "'runs.reference.init.stack.source' is given twice",
        ),
        ("- run: reference\n", "- run: grown\n  run: reference\n", "'paper.run' is given twice"),
    ],
)
def test_a_key_given_twice_is_refused_by_name_and_line(tmp_path, old, new, says):
    assert SOUND.count(old) == 1
    text = SOUND.replace(old, new)
    said = said_of(tmp_path, text)
    assert says in said
    key = re.search(r"'(?:\w+\.)*(\w+)' is given", said)[1]
    first, second = (
        int(number)
        for number in (re.search(r"first in line (\d+)", said)[1], re.search(r"line (\d+):", said)[1])
    )
    lines = text.splitlines()
    assert (
        first <= second and key in lines[first - 1] and key in lines[second - 1] and said.endswith("keep one")
    )


def test_merge_keys_and_aliases_work_and_are_no_key_twice(tmp_path):
    text = SOUND.replace(
        "  grown:\n", "  other: &base\n    init: random\n    train: &short {steps: 3, lr: 0.1}\n  grown:\n"
    )
    text += (
        "  merged:\n    <<: *base\n    train: {<<: *short, lr: 0.2}\n  both:\n    <<: [*base, {layers: 2}]\n"
    )
    runs = loaded(tmp_path, text).runs
    assert (
        runs["merged"].train == {"steps": 3, "lr": 0.2}
        and runs["both"].layers == 2
        and runs["both"].init.random
    )
    said = said_of(tmp_path, text.replace("    <<: *base\n", "    <<: *base\n    <<: {layers: 2}\n"))
    assert "'runs.merged.<<' is given twice" in said and "merge several with <<: [*a, *b]" in said


def test_no_yaml_of_the_repository_has_a_key_twice():
    files = [path for path in REPOSITORY.rglob("*.yaml") if ".venv" not in path.parts]
    assert len(files) > 20
    for path in files:
        node = compose_nodes(path, yaml.SafeLoader(path.read_text(encoding="utf-8")))
        for mapping in (inner for inner in reading.walk_nodes(node) if isinstance(inner, yaml.MappingNode)):
            keys = [key.value for key, _ in mapping.value]
            assert len(keys) == len(set(keys)), (path, reading.find_line(mapping))


# --- what nobody writes by hand -----------------------------------------------------------------------------


def bomb(levels: int, width: int, form: str = "[{}]") -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} " + form.format(", ".join([f"*a{n - 1}"] * width)) for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bomb(10, 10), "holds more than 100,000 values, aliases (*name) written out"),
        (bomb(200, 1), "holds more than 40 levels of nesting"),
        (bomb(10, 10, "{{<<: [{}]}}"), "100,000 values"),
        ("a: &a [*a]", "an alias refers to a value that contains it"),
        ("a: &a {b: {c: *a}}", "an alias refers to a value that contains it"),
        ("[" * 5000, "levels of nesting"),
        ("a: " * 1, "data: Field required"),
        ("{a: " * 100 + "1" + "}" * 100, "holds more than 40 levels of nesting"),
        ("- " * 3000 + "a", "levels of nesting"),
        ("x: " + "y" * (2 << 20), "has 2.1 MB; a file of this kind has kilobytes, name another"),
        (b"\xff\xfed\x00a\x00", "is not UTF-8 text (byte 0); save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not UTF-8 text (byte 0)"),
        (b"a: \x00", "is not valid YAML"),
        ("a:\n\t- b", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [id]", "is not valid YAML: could not determine a constructor"),
        *(
            (f"a: !!{tag}", "is not valid YAML")
            for tag in ("int x", 'int ""', 'float ""', "bool x", "timestamp x", "binary é")
        ),
        ("", "must hold a mapping with data, model, train and runs, not NoneType"),
        ("- a", "must hold a mapping"),
        ("? [a, b]\n: c", "a list or mapping is used as a key"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else value[:20].hex(),
)
def test_a_file_that_nobody_writes_by_hand_is_one_sentence(tmp_path, content, says):
    assert says in said_of(tmp_path, content)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    assert loaded(tmp_path, b"\xef\xbb\xbf" + SOUND.encode()).train.steps == 6


# --- YAML 1.1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("2024-01-31", ""),
        ("12", "'12', a int,"),
        ("1.5", "'1.5', a float,"),
        ("true", "'true', a bool,"),
        ("~", "'~', a null,"),
    ],
)
def test_a_key_that_yaml_does_not_read_as_text(tmp_path, key, says):
    text = SOUND.replace("  reference:\n", f"  {key}: {{init: random}}\n  reference:\n")
    if says:
        said = said_of(tmp_path, text)
        assert f"{says} is used as a key; put it in quotes if it is one" in said and ", line " in said
    else:
        assert key in loaded(tmp_path, text).runs  # no date
    if key != "~":
        assert key in loaded(tmp_path, text.replace(f"  {key}:", f"  '{key}':")).runs


def test_words_that_yaml_1_1_takes_for_truths_are_words(tmp_path):
    """As names and texts; where a truth is meant they are one."""
    text = SOUND.replace(
        "  reference:\n", "  on: {init: random}\n  no: {init: {random: yes}}\n  reference:\n"
    )
    text = text.replace("  source: embedded\n", "  source: embedded\n  text_key: off\n")
    experiment = loaded(tmp_path, text)
    assert (
        {"on", "no"} <= set(experiment.runs)
        and experiment.runs["no"].init.random
        and experiment.data.text_key == "off"
    )
    assert "train.steps: Input should be a valid integer (got 'yes')" in said_of(
        tmp_path, SOUND.replace("steps: 6", "steps: yes")
    )


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("012", ": 012 begins with a zero, which makes it octal; write it without, or in quotes"),
        ("08", ": 08 begins with a zero"),
        ("-07", ": -07 begins with a zero"),
        ("1:30", "Input should be a valid integer (got '1:30')"),
        ("1e3", "Input should be a valid integer (got '1e3')"),
        ("2024-01-31", "Input should be a valid integer (got '2024-01-31')"),
        ("true", "Input should be a valid integer (got True)"),
        ("6.0", "Input should be a valid integer (got 6.0)"),
        ("=", "Input should be a valid integer (got '=')"),
        ("1" * 5000, "is not valid YAML: Exceeds the limit"),
    ],
    ids=lambda value: value[:12],
)
def test_numbers_that_yaml_1_1_reads_otherwise(tmp_path, written, says):
    assert says in said_of(tmp_path, SOUND.replace("steps: 6", f"steps: {written}"))


@pytest.mark.parametrize(
    ("written", "value"), [("1_0", 10), ("0x0a", 10), ("0b1010", 10), ("+10", 10), ("10 # ten", 10)]
)
def test_numbers_that_stay_numbers(tmp_path, written, value):
    assert loaded(tmp_path, SOUND.replace("steps: 6", f"steps: {written}")).train.steps == value


def test_a_range_of_layers_needs_no_quotes(tmp_path):
    """1:3 would be 63 seconds to YAML 1.1."""
    text = SOUND.replace("layers: 0:2", "layers: 1:3").replace(
        "    grow:\n      by: 1\n      max_layers: 3\n", ""
    )
    assert loaded(tmp_path, text).runs["grown"].init.inherit.layers == "1:3"


def test_what_runs_write_is_read_as_it_was(tmp_path):
    """yaml.safe_dump quotes by the rules of YAML 1.1, which loses nothing here."""
    words = [
        "yes",
        "on",
        "012",
        "1:30",
        "2024-01-31",
        "1e3",
        "1.5e-3",
        "=",
        "<<",
        "~",
        "null",
        "0x1",
        "",
        " a",
        "a: b",
        "é",
        "\n",
    ]
    whole = {"words": words, "numbers": [1, -2, 0.5, 1e-8, 1e22, True, None], **dict.fromkeys(words, 1)}
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    assert read_yaml(tmp_path / "written.yaml") == whole


def test_every_recipe_is_read_as_pyyaml_reads_it():
    for path in sorted((REPOSITORY / "recipes").rglob("*.yaml")):
        if "lm_eval" not in path.parts and path.parent.name != "paper":
            assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8")), path


def test_reading_a_sound_file_is_as_in_an_experiment(tmp_path):
    again = load_experiment(write_experiment(tmp_path / "again", experiment_dict()))
    assert loaded(tmp_path, SOUND).model_dump() == again.model_dump()


# --- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            '"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e400}',
            "is not valid JSON: cannot convert float infinity",
        ),
        (
            '"zero_optimization": {"stage": 1, "reduce_bucket_size": NaN\n}',
            "reduce_bucket_size = 'NaN' is not a valid integer",
        ),
        (
            '"zero_optimization": {"stage": 1, "reduce_bucket_size": -Infinity\n}',
            "'-Infinity' is not a valid integer",
        ),
        (
            '"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}',
            "reduce_bucket_size = -5 must be greater than 0",
        ),
        (
            '"zero_optimization": {"stage": 1, "reduce_bucket_size": true}',
            "reduce_bucket_size = True is not a valid integer",
        ),
        (
            '"zero_optimization": {"stage": 1, "reduce_bucket_size": 1.5}',
            "reduce_bucket_size = 1.5 is not a valid integer",
        ),
        (
            '"zero_optimization": {"stage": 3, "sub_group_size": 0}',
            "sub_group_size = 0 must be greater than 0",
        ),
        (
            '"zero_optimization": {"stage": 3, "sub_group_size": "5"}',
            "sub_group_size = '5' is not a valid integer",
        ),
        (
            '"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "x"}',
            "= 'x' is not a valid integer",
        ),
        (f'"zero_optimization": {{"stage": 1, "reduce_bucket_size": 1{"0" * 5000}}}', "is not valid JSON"),
        ('"x": ' + "[" * 5000, "is not valid JSON: maximum recursion"),
        (
            '"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}',
            "'train_micro_batch_size_per_gpu' twice",
        ),
    ],
    ids=lambda value: value[:60],
)
def test_numbers_of_the_deepspeed_json(line, says, tmp_path):
    (tmp_path / "ds.json").write_text(f'{{"train_micro_batch_size_per_gpu": 2, {line}}}')
    with pytest.raises(UserError) as caught:
        load_deepspeed_json(tmp_path / "ds.json")
    assert says in str(caught.value)


def test_sizes_of_the_deepspeed_json_may_be_written_as_powers(tmp_path):
    (tmp_path / "ds.json").write_text(
        '{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}'
    )
    assert load_deepspeed_json(tmp_path / "ds.json")["zero_optimization"]["reduce_bucket_size"] == 5e8


def test_a_key_given_twice_in_json_of_ours_is_refused(tmp_path):
    write_json(tmp_path / "DONE", {"final": {}}, seal=False)
    assert read_json(tmp_path / "DONE") == {"final": {}}
    (tmp_path / "DONE").write_text('{"final": {}, "stage": 1, "stage": 2}')
    with pytest.raises(UserError, match="DONE sets 'stage' twice; keep one"):
        read_json(tmp_path / "DONE")
    assert json.loads('{"a": 1, "a": 2}') == {"a": 2}  # what Python makes of it
