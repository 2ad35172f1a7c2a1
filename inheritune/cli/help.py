"""What --help and --version print."""

import inspect
from collections.abc import Callable
from typing import get_args

from inheritune.cli.arguments import (
    OPEN_VERBS,
    POSITIONAL,
    SWITCHES,
    format_usage,
    list_arguments,
    list_required,
)
from inheritune.cli.verbs import Verbs

TYPE_NAMES = {int: "whole number", float: "number", str: "text"}


def list_verbs() -> dict[str, Callable]:
    """Return {name: function} of all verbs."""
    return {name: f for name, f in inspect.getmembers(Verbs, inspect.isfunction) if not name.startswith("_")}


def read_version() -> str:
    """Return the version of this package, or "unknown" if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("inheritune")
    except PackageNotFoundError:
        return "unknown"


def describe_verbs() -> str:
    """Return the text of `inheritune --help`: one line per verb."""
    lines = [inspect.getdoc(Verbs) or "", ""]
    lines += ["python -m inheritune VERB ... (VERB --help lists its arguments; --version)", ""]
    for name, function in list_verbs().items():
        lines.append(f"  {name:10} {(inspect.getdoc(function) or '').splitlines()[0]}")
    return "\n".join(lines)


def describe_verb(verb: str) -> str:
    """Return the text of `inheritune VERB --help`: usage, description, and type of each argument."""
    function = list_verbs()[verb]
    usage = f"python -m inheritune {verb} {format_usage(function)}"
    rows = [_describe_argument(function, name) for name in list_arguments(function)]
    width = max((len(words) for words, _ in rows), default=0)
    arguments = [f"  {words:{width}}  {kind}" for words, kind in rows]
    text = [usage.rstrip(), "", inspect.getdoc(function) or ""]
    return "\n".join([*text, *(["", "Arguments:", *arguments] if arguments else [])])


def _describe_argument(function: Callable, name: str) -> tuple[str, str]:
    """Return (how an argument is written, its type and default, and its position if it may have one)."""
    parameter, required = list_arguments(function)[name], list_required(function)
    flag = f"--{name.replace('_', '-')}"
    if name in SWITCHES:
        return flag, "switch"
    if name == "words":
        return "WORDS ...", "the arguments of slurm/JOB.sh"
    types = get_args(parameter.annotation) or (parameter.annotation,)
    kind = next(TYPE_NAMES[kind] for kind in types if kind in TYPE_NAMES)
    if name in required:
        place = f"positional {required.index(name) + 1}"
        if function.__name__ in OPEN_VERBS:
            return name.upper(), f"{kind}, {place}"
        if name in POSITIONAL:
            return name.upper(), f"{kind}, {place} (or {flag} {name.upper()})"
        return f"{flag} {name.upper()}", f"{kind}, required (or {place})"
    default = "" if parameter.default is None else f", default {parameter.default}"
    return f"{flag} {name.upper()}", kind + default
