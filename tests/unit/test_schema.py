"""`inheritune schema`: every recipe agrees with the JSON Schema, and a misspelt key does not."""

import copy
import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from inheritune.cli import main
from inheritune.config.catalog import TASKS
from inheritune.config.reading import read_yaml
from inheritune.config.schema import make_schema

SCHEMA = make_schema()
RECIPES = [
    path for folder in ("recipes", "recipes/public") for path in sorted((REPOSITORY / folder).glob("*.yaml"))
]
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}
LIMITS = {
    "minimum": float.__ge__,
    "maximum": float.__le__,
    "exclusiveMinimum": float.__gt__,
    "exclusiveMaximum": float.__lt__,
}
NOTES = {"title", "description", "default", "$schema", "$defs"}


def agrees(value, schema: dict) -> bool:
    """Whether `value` is valid, by the keywords of JSON Schema that ours uses; any other is an error."""
    schema = dict(schema)
    if "$ref" in schema:
        schema |= SCHEMA["$defs"][schema.pop("$ref").rpartition("/")[2]]
    rules = {key: rule for key, rule in schema.items() if key not in NOTES}
    return all(_agrees_with(value, key, rule, rules) for key, rule in rules.items())


def _agrees_with(value, key: str, rule, rules: dict) -> bool:
    if key == "type":
        fits = value is None if rule == "null" else isinstance(value, TYPES[rule])
        return fits and (rule == "boolean" or not isinstance(value, bool))
    if key in ("enum", "const"):
        return value in (rule if key == "enum" else [rule])
    if key == "anyOf":
        return any(agrees(value, {**choice}) for choice in rule)
    if key in LIMITS:
        return not isinstance(value, int | float) or LIMITS[key](float(value), float(rule))
    if key == "pattern":
        return not isinstance(value, str) or re.search(rule, value) is not None
    return _agrees_inside(value, key, rule, rules)


def _agrees_inside(value, key: str, rule, rules: dict) -> bool:
    """The keywords of arrays and of objects, which hold for these only."""
    if key in ("items", "prefixItems", "minItems", "maxItems"):
        return not isinstance(value, list) or _agrees_as_list(value, key, rule, rules)
    assert key in ("required", "properties", "patternProperties", "additionalProperties"), key
    if not isinstance(value, dict):
        return True
    if key == "required":
        return set(rule) <= set(value)
    named = rules.get("properties", {})
    patterns = rules.get("patternProperties", {})
    if key == "properties":
        return all(agrees(value[name], inner) for name, inner in rule.items() if name in value)
    if key == "patternProperties":
        return all(agrees(value[n], rule[p]) for n in value for p in rule if re.search(p, n))
    rest = [name for name in value if name not in named and not any(re.search(p, name) for p in patterns)]
    return rule is True or all(rule is not False and agrees(value[name], rule) for name in rest)


def _agrees_as_list(value: list, key: str, rule, rules: dict) -> bool:
    if key == "minItems":
        return len(value) >= rule
    if key == "maxItems":
        return len(value) <= rule
    if key == "prefixItems":
        return all(agrees(item, part) for item, part in zip(value, rule, strict=False))
    return all(agrees(item, rule) for item in value[len(rules.get("prefixItems", [])) :])


def leaves(raw, path=()):
    """The path of every mapping in an experiment."""
    if isinstance(raw, dict):
        yield path
        for key, value in raw.items():
            yield from leaves(value, (*path, key))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_agree_and_a_misspelt_key_does_not(path):
    raw = read_yaml(path)
    assert agrees(raw, SCHEMA)
    free = {("runs",), ("evaluate", "tasks"), ("data", "files"), ("data", "weights")}
    for place in leaves(raw):
        if place in free:
            continue
        wrong = copy.deepcopy(raw)
        section = wrong
        for key in place:
            section = section[key]
        section["stepz"] = 1
        assert not agrees(wrong, SCHEMA), place


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", 0),
        ("train", "steps", "many"),
        ("train", "precision", "fp8"),
        ("train", "betas", [0.9, 1.5]),
        ("data", "sampling", "twice"),
        ("model", "size", "gpt2_tinny"),
        ("model", "layers", 1.5),
        ("data", "sequence_length", True),
    ],
)
def test_a_wrong_value_does_not_agree(section, key, value):
    raw = read_yaml(REPOSITORY / "recipes" / "quickstart.yaml")
    raw[section][key] = value
    assert not agrees(raw, SCHEMA)


def test_the_short_forms_agree():
    raw = read_yaml(REPOSITORY / "recipes" / "quickstart.yaml")
    raw["model"] = {"from": "somewhere"}
    raw["evaluate"] = {"tasks": list(TASKS)[:2]}
    raw["runs"]["random"]["train"] = {"steps": 3}
    assert agrees(raw, SCHEMA)
    raw["model"] = {}
    assert not agrees(raw, SCHEMA)


def test_the_verb_writes_it(tmp_path, capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(SCHEMA))
    assert main(["schema", "--out", str(tmp_path / "experiment.schema.json")]) == 0
    assert json.loads(Path(tmp_path / "experiment.schema.json").read_text()) == json.loads(json.dumps(SCHEMA))
    assert main(["schema", "--out", str(tmp_path / "experiment.schema.json")]) == 0  # of an older version
    (tmp_path / "mine.yaml").write_text("about: an experiment\n")
    assert main(["schema", "--out", str(tmp_path / "mine.yaml")]) == 2
    assert "exists and is no schema; it is left as it is" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "about: an experiment\n"
    assert main(["schema", "--out", str(tmp_path)]) == 2
    assert "is a folder; give the file" in capsys.readouterr().err
