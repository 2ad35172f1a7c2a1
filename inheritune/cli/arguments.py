"""The arguments of a verb, checked before python-fire sees them.

Fire calls a verb before it looks at flags that it does not know, and guesses the types of values.
"""

import inspect
from collections.abc import Callable

from inheritune.config import environment, values
from inheritune.errors import UserError, suggest_name

SWITCHES = ("rehearse", "slot", "json", "missing", "allow_task_code", "watch", "ranks_only")
"""Arguments that are True when given alone."""
POSITIONAL = ("experiment", "item", "folder", "job", "target", "path")
"""Arguments that a usage line shows without a flag."""
OPEN_VERBS = ("submit",)
"""Verbs whose first argument decides which others there are; they check them themselves."""


def list_arguments(function: Callable) -> dict[str, inspect.Parameter]:
    """Return {name: parameter} of a verb."""
    return {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}


def list_required(function: Callable) -> list[str]:
    """Return the names of the arguments without a default. They may be given by position, in this order."""
    return [name for name, p in list_arguments(function).items() if p.default is p.empty]


def bind_arguments(verb: str, function: Callable, argv: list[str]) -> dict:
    """Return {argument: value} of a verb's command line, with every flag and value checked.

    The numbers in the environment are also checked, because some are read only hours later.

    Raises UserError for an unknown, repeated or missing argument, and for a value of the wrong type."""
    environment.check_variables()
    if verb in OPEN_VERBS:
        if not argv or argv[0].startswith("-"):
            raise UserError(f"{verb} needs JOB; usage: python -m inheritune {verb} {format_usage(function)}")
        return {"job": argv[0], "words": argv[1:]}
    required = list_required(function)
    found: dict = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            name, value = _read_flag(verb, function, word, rest)
        else:
            name, value = _name_positional(verb, function, word, found), word
        if not value:
            raise UserError(f"{verb}: --{name} needs a value")
        if name in found:
            raise UserError(f"{verb}: --{name} is given twice")
        found[name] = convert_value(verb, name, value)
    missing = [name for name in required if name not in found]
    if missing:
        raise UserError(
            f"{verb} needs {missing[0].upper()}; usage: python -m inheritune {verb} {format_usage(function)}"
        )
    return found


def _read_flag(verb: str, function: Callable, word: str, rest: list[str]) -> tuple[str, str]:
    """Return (argument, text of its value) of a flag, taking the value from `rest` where it is a word of its
    own. The text is empty if there is no value."""
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    parameters = list_arguments(function)
    if name not in parameters:
        flags = [f"--{parameter.replace('_', '-')}" for parameter in parameters]
        raise UserError(f"{verb} has no flag --{name}; {suggest_name('--' + name, flags)}")
    if equals:
        return name, value
    if name in SWITCHES:
        return name, "True"
    return name, rest.pop(0) if rest and not rest[0].startswith("--") else ""


def _name_positional(verb: str, function: Callable, word: str, found: dict) -> str:
    """Return the first required argument that is not yet given. Raises UserError if all are."""
    name = next((name for name in list_required(function) if name not in found), None)
    if name is None:
        raise UserError(
            f"{verb} takes no further argument '{word}'; usage: python -m inheritune {verb} "
            f"{format_usage(function)}"
        )
    return name


def convert_value(verb: str, name: str, text: str) -> str | int | float | bool:
    """Return the value of an argument: a number, or True or False for a switch, or else the text itself.

    Text stays text because names, paths and layer ranges may look like numbers (1e3, 0:4). Raises UserError
    if the value has the wrong type."""
    flag = f"{verb}: --{name.replace('_', '-')}"
    if name in SWITCHES:
        if text.lower() not in values.SWITCH_VALUES:
            raise UserError(f"{flag} is given alone, or with true or false (got '{text}')")
        return values.SWITCH_VALUES[text.lower()]
    if name not in values.ARGUMENTS or (verb, name) == ("check", "gpus"):  # check takes a list
        return text
    try:
        return values.ARGUMENTS[name].read(text)
    except ValueError as problem:
        shown = f"'{text}'" if str(problem).startswith("takes") else text
        raise UserError(f"{flag} {problem} (got {shown})") from None


def format_usage(function: Callable) -> str:
    """Return the arguments of a verb in one line, e.g. 'EXPERIMENT --run RUN [--seed 0]'."""
    words = []
    for name, parameter in list_arguments(function).items():
        flag = f"--{name.replace('_', '-')}"
        if name in POSITIONAL:
            words.append(name.upper())
        elif parameter.default is parameter.empty:
            words.append(f"{flag} {name.upper()}")
        elif name in SWITCHES:
            words.append(f"[{flag}]")
        elif name == "words":
            words.append("[WORDS ...] [-- SBATCH OPTIONS]")
        else:
            value = name.upper() if parameter.default is None else parameter.default
            words.append(f"[{flag} {value}]")
    return " ".join(words)
