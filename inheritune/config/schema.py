"""The JSON Schema of an experiment's file, for editors: what pydantic says of the typed sections, with the
short forms that the loader accepts too."""

import copy
import json
from pathlib import Path
from typing import Any

from inheritune.config.catalog import FAMILIES, MODEL_SIZES, TASKS
from inheritune.config.experiment import Experiment

TITLE = "Experiment of Inheritune"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def make_schema() -> dict[str, Any]:
    """Return the JSON Schema of an experiment's file."""
    schema = Experiment.model_json_schema(by_alias=True)
    sections = schema["$defs"]
    schema["required"].remove("name")  # the file's own
    model = sections["Model"]
    del model["required"]
    model["anyOf"] = [{"required": ["size"]}, {"required": ["from"]}]
    model["properties"]["size"] = {"enum": [*MODEL_SIZES]}
    model["properties"]["family"] = {"enum": [*FAMILIES]}
    sections["Init"] = {"anyOf": [{"const": "random"}, sections["Init"]]}
    sections["RunTrain"] = copy.deepcopy(sections["Train"])
    del sections["RunTrain"]["required"]  # the experiment's own keys hold where a run has none
    sections["Run"]["properties"]["train"] = {"$ref": "#/$defs/RunTrain"}
    del sections["Task"]["required"]  # of a known task
    tasks = sections["Evaluate"]["properties"]["tasks"]
    listed = {"type": "array", "items": {"enum": [*TASKS]}}
    sections["Evaluate"]["properties"]["tasks"] = {"anyOf": [listed, tasks]}
    return {"$schema": DIALECT, **schema, "title": TITLE}


def format_schema() -> str:
    """Return the JSON Schema of an experiment's file as text."""
    return json.dumps(make_schema(), indent=2) + "\n"


def is_schema(path: Path) -> bool:
    """Return whether a file is such a schema, perhaps of another version."""
    try:
        return json.loads(path.read_bytes()).get("title") == TITLE
    except (ValueError, AttributeError, RecursionError):
        return False
