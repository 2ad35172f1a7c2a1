"""Code that lm-eval's task files name, found without running any of it.

lm-eval imports what a task file calls !function, from a module beside the file or from any that Python finds;
it loads a metric that it does not know by a script of the Hub or of this disk; and it renders templates by
jinja without a sandbox, where `{{ x.__init__.__globals__ }}` leads to every module. So an experiment of
others could run code by its `evaluate.task_files`. `refuse_task_code` looks at the files, and at those that
they include, as text. A template can also put the name of an attribute together while it is rendered, which
nothing but a sandbox sees: `guard_templates`.
"""

from importlib.util import find_spec
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from inheritune.config.experiment import RECIPES, resolve_path
from inheritune.config.reading import STANDARD, compose, line, read_text, walk
from inheritune.errors import UserError

TASK_FILES = RECIPES / "lm_eval"
SKIPPED = {"__pycache__", ".ipynb_checkpoints"}
"""Folders that lm-eval passes over."""
TRUE_MEANS_CODE = {
    "trust_remote_code": "runs the data set's loading script",
    "unsafe_code": "runs what the model writes",
    "hf_evaluate": "runs a metric's script",
}
FALSE = ("false", "no", "off", "n", "null", "~", "")
SHOWN = 3  # finds in one sentence


def refuse_task_code(task_files: str | None, allowed: bool = False) -> None:
    """Raises UserError if task files, other than this repository's and lm-eval's own, name code and it is not
    `allowed`."""
    if allowed or not task_files:
        return
    folder = resolve_path(task_files)
    found = code_in(folder)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"the task files in {folder} name code, which lm-eval would run: "
            f"{'; '.join(found[:SHOWN])}{more}. "
            f"Read it, and if you trust it, give --allow-task-code"
        )


def code_in(folder: Path) -> list[str]:
    """'FILE, line N: what' of all code that the task files of a folder name. Raises UserError for a file that
    is no YAML."""
    trusted, seen, found = _trusted_folders(), set(), []
    files = [path for path in sorted(folder.glob("**/*.yaml")) if not SKIPPED & set(path.parts)]
    while files:
        path = files.pop(0).expanduser().resolve()
        if path in seen or any(path.is_relative_to(own) for own in trusted):
            continue
        seen.add(path)
        node = compose(path, yaml.SafeLoader(read_text(path)))
        if node is not None:
            found += [f"{path}, line {n}: {what}" for n, what in _code_in_file(node, path.parent)]
            files += _included(node, path.parent)
    return found


def _trusted_folders() -> list[Path]:
    """The folders whose task files may name code: this repository's and lm-eval's own. (lm-eval is found, not
    imported.)"""
    spec = find_spec("lm_eval")
    own = [Path(place) / "tasks" for place in spec.submodule_search_locations or ()] if spec else []
    return [path.resolve() for path in (TASK_FILES, *own)]


def _included(node: Node, folder: Path) -> list[Path]:
    """The files that a task file includes: the key may come by a merge (<<) from any of its mappings."""
    values = [value for inner in walk(node) for name, value in _pairs(inner) if name == "include"]
    names = [inner.value for value in values for inner in walk(value) if isinstance(inner, ScalarNode)]
    paths = [folder / name for name in names]  # an absolute name stays what it is
    return [path for path in paths if path.is_file()]


def _pairs(node: Node) -> list[tuple[str, Node]]:
    """(key, value) of a mapping, as far as its keys are words; none of another node."""
    pairs = node.value if isinstance(node, MappingNode) else ()
    return [(key.value, value) for key, value in pairs if isinstance(key, ScalarNode)]


def _code_in_file(node: Node, folder: Path) -> list[tuple[int, str]]:
    """(line, what) of all in a task file that names code: a tag, a template, a key with its value."""
    nodes = list(walk(node))
    # a group's aggregate_metric_list names scores that exist; only a metric_list loads what it names
    computes = any(name == "metric_list" for inner in nodes for name, _ in _pairs(inner))
    found = []
    for inner in nodes:
        scalar = isinstance(inner, ScalarNode)
        if inner.tag not in STANDARD:
            found.append((line(inner), f"{inner.tag} {inner.value}" if scalar else inner.tag))
        elif scalar:
            found += [(line(inner), what) for what in code_of_template(inner.value)]
        for name, value in _pairs(inner):
            text = value.value if isinstance(value, ScalarNode) and value.tag in STANDARD else None
            if text is not None and (what := _code_of_key(name, text, folder, computes)):
                found.append((line(value), f"{name}: {text} ({what})"))
    return found


def _code_of_key(name: str, text: str, folder: Path, computes: bool) -> str:
    """What code a key with this value names; empty if it names none."""
    if name in TRUE_MEANS_CODE and text.lower() not in FALSE:
        return TRUE_MEANS_CODE[name]
    if name == "use_prompt" and not text.startswith("qa-basic:"):
        return "templates of another place"
    if name == "dataset_path" and _is_script(text, folder):
        return "a loading script"
    if name == "metric" and computes and text not in _known_metrics():
        return "a metric that is not lm-eval's own is loaded by a script"
    return ""


def _is_script(name: str, folder: Path) -> bool:
    """Whether a data set's path is a Python file, or a folder with one of its own name, as old `datasets` ran
    it."""
    places = [Path(name).expanduser(), folder / name]
    return name.endswith(".py") or any((place / f"{place.name}.py").is_file() for place in places)


def _known_metrics() -> set[str]:
    """The metrics that lm-eval computes itself."""
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import metric_registry

    return set(metric_registry)


def code_of_template(text: str) -> list[str]:
    """A template's attributes that begin with an underscore: no document has such, Python's own objects
    do."""
    if "{{" not in text and "{%" not in text:
        return []
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        tree = Environment(extensions=[]).parse(text)
    except TemplateSyntaxError:  # lm-eval will say so
        return []
    names = [part.attr for part in tree.find_all(nodes.Getattr)]
    keys = [part.arg for part in tree.find_all(nodes.Getitem)]
    names += [key.value for key in keys if isinstance(key, nodes.Const) and isinstance(key.value, str)]
    return [f"a template that reads {name}" for name in names if name.startswith("_")][:1]


def guard_templates(allowed: bool) -> None:
    """Let lm-eval render templates in jinja's sandbox, which refuses attributes of Python's own objects
    however they are spelt; with `allowed`, as lm-eval does by itself. What the sandbox allows it renders the
    same."""
    from jinja2 import Environment
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    kind = Environment if allowed else SandboxedEnvironment
    if type(utils.env) is not kind:
        usual = utils.env
        kept = {key: getattr(usual, key) for key in ("loader", "undefined", "keep_trailing_newline")}
        utils.env = kind(**kept)
        utils.env.filters = dict(usual.filters)
