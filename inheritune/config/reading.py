"""YAML and JSON that you write: a key given twice is refused, and so is what nobody writes by hand (a file of
megabytes, an alias that expands to millions of values, brackets in brackets in brackets), before it is built.

Of YAML 1.1 the readings that surprise are left out, as YAML 1.2 does: yes, no, on and off are text (pydantic
takes them for true and false where these are meant), 1:30 is no number of seconds, 2024-01-31 is no date.
012, which would be ten, is refused. `compose` and `walk` construct nothing: they are also how files are
looked at that name code.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from inheritune.errors import UserError

MOST_BYTES = 1 << 20  # the longest recipe here has 20 kB
MOST_VALUES = 100_000
"""Values of a file, each alias counted as all that it stands for."""
MOST_LEVELS = 40
TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"
STANDARD = {
    TAG + name
    for name in (
        "str",
        "int",
        "float",
        "bool",
        "null",
        "seq",
        "map",
        "merge",
        "timestamp",
        "binary",
        "set",
        "omap",
    )
}
"""Tags that stand for plain values; any other, such as !function, stands for something to be run."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with fewer surprises. It resolves, composes and constructs; `read_yaml` checks in
    between."""

    def __init__(self, path: Path):
        super().__init__(read_text(path))
        self.path = path

    def construct_whole(self, node: ScalarNode) -> int:
        """A whole number. Raises UserError for one with a leading zero, which YAML 1.1 reads as octal."""
        if re.match(r"[-+]?0[0-9_]", node.value):
            raise UserError(
                f"{self.path}, line {line(node)}: {node.value} begins with a zero, which makes it octal; "
                f"write it without, or in quotes if it is text"
            )
        return self.construct_yaml_int(node)


_Loader.add_constructor(f"{TAG}int", _Loader.construct_whole)
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _firsts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?", [*"-+0123456789."]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(TAG + _name, re.compile(f"^(?:{_pattern})$"), _firsts)


def line(node: Node) -> int:
    """The line of its file, from 1, on which a node begins."""
    return node.start_mark.line + 1


def read_text(path: Path) -> str:
    """A short text file. Raises UserError if it has more than MOST_BYTES, is not UTF-8 or cannot be read."""
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(
                f"{path} has {size / 1e6:,.1f} MB; a file of this kind has kilobytes, name another"
            )
        return path.read_text(encoding="utf-8-sig")  # without the mark that some editors put at the start
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def compose(path: Path, loader: yaml.SafeLoader) -> Node | None:
    """The nodes of the YAML file that `loader` holds, nothing of it constructed; None if it is empty.

    Raises UserError if it is malformed or expands to more than anybody writes."""
    try:
        node = loader.get_single_node()
        if node is not None:
            _expanded(node, {}, path)
        return node
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(
            f"{path} holds more than {MOST_LEVELS} levels of nesting; no file here does"
        ) from None


def children(node: Node) -> list[Node]:
    """The nodes directly below a node, keys among them."""
    if isinstance(node, MappingNode):
        return [child for pair in node.value for child in pair]
    return [] if isinstance(node, ScalarNode) else node.value


def walk(node: Node) -> Iterator[Node]:
    """A node and all below it, each once, whatever refers to it."""
    seen, rest = set(), [node]
    while rest:
        node = rest.pop()
        if id(node) not in seen:
            seen.add(id(node))
            rest += reversed(children(node))
            yield node


def _expanded(node: Node, known: dict[int, tuple[int, int] | None], path: Path) -> tuple[int, int]:
    """(values, levels) that a node stands for, aliases written out. Raises UserError if these are too many or
    endless."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise UserError(f"{path}, line {line(node)}: an alias refers to what it is part of")
        return found
    known[id(node)] = None
    below = [_expanded(child, known, path) for child in children(node)]
    values, levels = 1 + sum(n for n, _ in below), 1 + max((n for _, n in below), default=0)
    if values > MOST_VALUES or levels > MOST_LEVELS:
        what = f"{MOST_VALUES:,} values" if values > MOST_VALUES else f"{MOST_LEVELS} levels of nesting"
        where = f"{path}, line {line(node)}"
        raise UserError(f"{where}: holds more than {what}, aliases (*name) written out; no file here does")
    known[id(node)] = values, levels
    return values, levels


def _check_keys(node: Node, path: Path, place: str = "", seen: set[int] | None = None) -> None:
    """Raises UserError for a key that is given twice, with both lines, and for one that is no text."""
    seen = set() if seen is None else seen
    if id(node) in seen or isinstance(node, ScalarNode):
        return
    seen.add(id(node))
    if not isinstance(node, MappingNode):
        for child in node.value:
            _check_keys(child, path, place, seen)
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        where = f"{path}, line {line(key)}"
        if not isinstance(key, ScalarNode):
            raise UserError(f"{where}: a list or mapping stands where a key is meant; write a word")
        if key.tag not in (f"{TAG}str", MERGE):
            what = f"'{key.value}', a {key.tag.removeprefix(TAG)},"
            raise UserError(f"{where}: {what} stands where a key is meant; put it in quotes if it is one")
        name = f"{place}{key.value}"
        if key.value in first:
            way = "merge several with <<: [*a, *b]" if key.tag == MERGE else "keep one"
            raise UserError(f"{where}: '{name}' is given twice (first in line {first[key.value]}); {way}")
        first[key.value] = line(key)
        _check_keys(value, path, f"{name}.", seen)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file, an experiment's or a run's. Raises UserError, with the line, if there is
    none."""
    raw = None
    try:
        loader = _Loader(path)
        node = compose(path, loader)
        if node is not None:
            _check_keys(node, path)
            raw = loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML's ways to meet a value that its tag does not allow: !!int x, !!bool x, !!float ""
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} must hold a mapping with data, model, train and runs, not {type(raw).__name__}"
        )
    return raw


def refuse_twice(path: Path | str, pairs: list[tuple[str, object]]) -> dict:
    """An `object_pairs_hook` of json and hjson. Raises UserError if an object has a key twice, of which one
    would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"{path} sets '{next(key for key in keys if keys.count(key) > 1)}' twice; keep one")
    return found
