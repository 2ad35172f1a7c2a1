"""The text of a drafted experiment: YAML with a comment on each number that was fitted."""

import json
import re
import shlex
from typing import Any

from inheritune.planning.draft_sizes import Sizes, Text, choose_depths

PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
NOT_TEXT = ("true", "false", "null", "yes", "no", "on", "off")


WRITTEN_BY = "# Written by: "
"""Before the command, in the head of the file."""


def _format_value(value: Any) -> str:
    """Return a value in one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_format_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_format_value, value)) + "]"
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or value.lower() in NOT_TEXT):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and value < 0.01:
        return f"{value:.1e}"  # YAML 1.1 reads 3e-4 as text
    return str(value).lower() if isinstance(value, bool) else str(value)


def _format_section(name: str, section: dict[str, Any], comments: dict[str, str]) -> list[str]:
    """Return the lines of a section, a key each, with the comments of some."""
    lines = [f"{name}:"]
    for key, value in section.items():
        text = f"  {key}: {_format_value(value)}"
        if key in comments and len(text) > 60:
            lines += [f"  # {comments[key]}", text]
        else:
            lines.append(f"{text:40}  # {comments[key]}" if key in comments else text)
    return [*lines, ""]


def format_file(
    raw: dict[str, Any],
    shape: dict[str, Any],
    command: str,
    text: Text,
    sizes: Sizes,
    memory: str,
    out: str,
    schema: str,
) -> str:
    """Return the text of the experiment `raw` as a file, with comments.

    `shape` is that of the model, `command` what made the file, `memory` what it needs, `schema` the file
    beside it by which editors check it."""
    n, by, most = choose_depths(shape["layers"])
    times = sizes.steps * raw["train"]["batch_tokens"] / text.tokens
    comments = {
        "data": {
            "files": "one document a file, or a line (.jsonl), or a row (.parquet)",
            "tokenizer": "the model's own: its loss has a meaning on these tokens only",
            "validation": f"about {sizes.windows:,} windows of the {text.tokens:,} tokens that were seen",
            "shard_tokens": "the first so many tokens are the validation text",
            "sequence_length": f"of at most {shape['positions']:,}",
        },
        "train": {
            "steps": f"the text is read {times:.1f} times" if text.is_whole else "a part of the text is read",
            "batch_tokens": f"{sizes.sequences} sequences of {sizes.length}",
            "lr": "a first guess; compare a third of it, and three times as much",
            "deepspeed": memory,
            "final_windows": "for the table, and for the rule that ends growth",
        },
        "runs": {
            "reference": "the model as it is, evaluated only",
            "inheritune": f"the first {n} layers, then {by} more a stage until it is as good, or has {most}",
            "random": f"{n} layers of the same kind, from scratch",
            "distilled": f"the first {n} layers, taught by the whole model (logits)",
            "cost": f"the {n} layers without which the loss rises most, one at a time; analyze comes first",
            "influence": f"the {n} layers that change their input most",
            "window": f"all but the {shape['layers'] - n} adjacent layers that change it least",
        },
    }
    given = shlex.quote(out)
    lines = [
        f"# yaml-language-server: $schema={schema}",
        f"{WRITTEN_BY}{command}",
        f"# {n} layers are half of the model's. What each layer is worth, and another n, says:",
        f"#     python -m inheritune analyze --model reference --data {given}",
        f"about: {_format_value(raw['about'])}",
        "",
        "paper:",
        *(f"  - {_format_value(row)}" for row in raw["paper"]),
        "",
        f"model: {_format_value(raw['model'])}  # family, sizes and all else of its config.json",
        "",
    ]
    for name, known in comments.items():
        lines += _format_section(name, raw[name], known)
    return "\n".join(lines).rstrip() + "\n"
