"""Code that lm-eval's task files name, found without running any of it.

A third-party experiment could run code by its `evaluate.task_files`, because lm-eval

- imports what a task file calls !function, from a module next to the file or from any that Python finds;
- loads a metric that it does not know by a script from the Hub or from the disk;
- renders templates by jinja without a sandbox, where `{{ x.__init__.__globals__ }}` leads to every module.

`refuse_task_code` reads the files, and those that they include, as text. A template can also assemble the
name of an attribute while it is rendered, which only a sandbox sees: `guard_templates`.
"""

from importlib.util import find_spec
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from inheritune.config.paths import RECIPES, resolve_path
from inheritune.config.reading import STANDARD_TAGS, compose_nodes, find_line, read_text, walk_nodes
from inheritune.errors import UserError

TASK_FILES = RECIPES / "lm_eval"
SKIPPED = {"__pycache__", ".ipynb_checkpoints"}
"""Folders that lm-eval skips."""
TRUE_MEANS_CODE = {
    "trust_remote_code": "runs the data set's loading script",
    "unsafe_code": "runs what the model writes",
    "hf_evaluate": "runs a metric's script",
}
FALSE = ("false", "no", "off", "n", "null", "~", "")
SHOWN = 3
"""Findings that one message lists."""


def refuse_task_code(task_files: str | None, allowed: bool = False) -> None:
    """Raise UserError if task files name code that is not `allowed`.

    This repository's and lm-eval's own files may name code."""
    if allowed or not task_files:
        return
    folder = resolve_path(task_files)
    found = find_code(folder)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"the task files in {folder} name code, which lm-eval would run: "
            f"{'; '.join(found[:SHOWN])}{more}. Read it, and if you trust it, give --allow-task-code"
        )


def find_code(folder: Path) -> list[str]:
    """Return 'FILE, line N: what' of all code that the task files of a folder name.

    Raises UserError for a file that is not YAML."""
    trusted = _list_trusted_folders()
    seen: set[Path] = set()
    found: list[str] = []
    files = [path for path in sorted(folder.glob("**/*.yaml")) if not SKIPPED & set(path.parts)]
    while files:
        path = files.pop(0).expanduser().resolve()
        if path in seen or any(path.is_relative_to(own) for own in trusted):
            continue
        seen.add(path)
        node = compose_nodes(path, yaml.SafeLoader(read_text(path)))
        if node is not None:
            found += [f"{path}, line {n}: {what}" for n, what in _find_file_code(node, path.parent)]
            files += _list_included(node, path.parent)
    return found


def _list_trusted_folders() -> list[Path]:
    """Return the folders whose task files may name code: this repository's and lm-eval's own."""
    spec = find_spec("lm_eval")  # without importing it
    own = [Path(place) / "tasks" for place in spec.submodule_search_locations or ()] if spec else []
    return [path.resolve() for path in (TASK_FILES, *own)]


def _list_included(node: Node, folder: Path) -> list[Path]:
    """Return the files that a task file includes. Any of its mappings may have the key, for a merge (<<)."""
    values = [value for inner in walk_nodes(node) for name, value in _list_pairs(inner) if name == "include"]
    names = [inner.value for value in values for inner in walk_nodes(value) if isinstance(inner, ScalarNode)]
    paths = [folder / name for name in names]  # an absolute name stays what it is
    return [path for path in paths if path.is_file()]


def _list_pairs(node: Node) -> list[tuple[str, Node]]:
    """Return (key, value) of a mapping for its scalar keys, nothing for another node."""
    pairs = node.value if isinstance(node, MappingNode) else ()
    return [(key.value, value) for key, value in pairs if isinstance(key, ScalarNode)]


def _find_file_code(node: Node, folder: Path) -> list[tuple[int, str]]:
    """Return (line, what) of all that names code in a task file: a tag, a template, a key with its value."""
    nodes = list(walk_nodes(node))
    # A group's aggregate_metric_list names scores that exist; only a metric_list loads what it names.
    computes = any(name == "metric_list" for inner in nodes for name, _ in _list_pairs(inner))
    found = []
    for inner in nodes:
        scalar = isinstance(inner, ScalarNode)
        if inner.tag not in STANDARD_TAGS:
            found.append((find_line(inner), f"{inner.tag} {inner.value}" if scalar else inner.tag))
        elif scalar:
            found += [(find_line(inner), what) for what in find_template_code(inner.value)]
        for name, value in _list_pairs(inner):
            text = value.value if isinstance(value, ScalarNode) and value.tag in STANDARD_TAGS else None
            if text is not None and (what := _find_key_code(name, text, folder, computes)):
                found.append((find_line(value), f"{name}: {text} ({what})"))
    return found


def _find_key_code(name: str, text: str, folder: Path, computes: bool) -> str:
    """Return what code a key with this value names, '' if it names none.

    `computes`: whether the file has a metric_list."""
    if name in TRUE_MEANS_CODE and text.lower() not in FALSE:
        return TRUE_MEANS_CODE[name]
    if name == "use_prompt" and not text.startswith("qa-basic:"):
        return "templates of another place"
    if name == "dataset_path" and _is_script(text, folder):
        return "a loading script"
    if name == "metric" and computes and text not in _list_known_metrics():
        return "a metric that is not lm-eval's own is loaded by a script"
    return ""


def _is_script(name: str, folder: Path) -> bool:
    """Return whether a data set's path is a Python file, or a folder with one of the folder's name, which old
    versions of `datasets` ran."""
    places = [Path(name).expanduser(), folder / name]
    return name.endswith(".py") or any((place / f"{place.name}.py").is_file() for place in places)


def _list_known_metrics() -> set[str]:
    """Return the metrics that lm-eval computes itself."""
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import metric_registry

    return set(metric_registry)


def find_template_code(text: str) -> list[str]:
    """Return the first attribute in a template that begins with an underscore.

    No document has such attributes, but Python's own objects do."""
    if "{{" not in text and "{%" not in text:
        return []
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        tree = Environment(extensions=[]).parse(text)
    except TemplateSyntaxError:  # lm-eval reports it
        return []
    names = [part.attr for part in tree.find_all(nodes.Getattr)]
    keys = [part.arg for part in tree.find_all(nodes.Getitem)]
    names += [key.value for key in keys if isinstance(key, nodes.Const) and isinstance(key.value, str)]
    return [f"a template that reads {name}" for name in names if name.startswith("_")][:1]


def guard_templates(allowed: bool) -> None:
    """Let lm-eval render templates in jinja's sandbox, or with `allowed` as it does by default.

    The sandbox refuses attributes of Python's own objects however they are spelt. What it allows, it renders
    in the same way."""
    from jinja2 import Environment
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    kind = Environment if allowed else SandboxedEnvironment
    if type(utils.env) is not kind:
        usual = utils.env
        kept = {key: getattr(usual, key) for key in ("loader", "undefined", "keep_trailing_newline")}
        utils.env = kind(**kept)
        utils.env.filters = dict(usual.filters)
