"""YAML and JSON that you write.

A key given twice is refused. So is what nobody writes by hand, before it is built: a file of megabytes, an
alias that expands to millions of values, brackets nested too deeply.

The surprising readings of YAML 1.1 are left out, as in YAML 1.2: yes, no, on and off are text (pydantic
converts them to true and false where these are meant), 1:30 is not a number of seconds, 2024-01-31 is not a
date. 012, which would be ten, is refused. `compose_nodes` and `walk_nodes` construct nothing, so they also
serve to inspect files that name code.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from inheritune.config.units import format_bytes
from inheritune.errors import UserError, is_machine_limit

MAX_FILE_BYTES = 1 << 20  # the longest recipe here has 20 kB
MAX_VALUES = 100_000
"""Values of a file, with each alias counted as all that it stands for."""
MAX_LEVELS = 40
YAML_TAG = "tag:yaml.org,2002:"
MERGE = f"{YAML_TAG}merge"
STANDARD_TAGS = {
    YAML_TAG + name
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
"""Tags that stand for plain values. Any other, such as !function, stands for code to run."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with fewer surprises.

    It resolves, composes and constructs; `read_yaml` checks the nodes before they are constructed."""

    def __init__(self, path: Path):
        super().__init__(read_text(path))
        self.path = path

    def construct_whole(self, node: ScalarNode) -> int:
        """Return a whole number.

        Raises UserError for one with a leading zero, which YAML 1.1 reads as octal."""
        if re.match(r"[-+]?0[0-9_]", node.value):
            raise UserError(
                f"{self.path}, line {find_line(node)}: {node.value} begins with a zero, which makes it "
                f"octal; write it without, or in quotes if it is text"
            )
        return self.construct_yaml_int(node)


_Loader.add_constructor(f"{YAML_TAG}int", _Loader.construct_whole)
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _firsts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)", [*"-+0123456789"]),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?", [*"-+0123456789."]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(YAML_TAG + _name, re.compile(f"^(?:{_pattern})$"), _firsts)


def find_line(node: Node) -> int:
    """Return the line of its file, counted from 1, on which a node begins."""
    return node.start_mark.line + 1


def read_text(path: Path) -> str:
    """Return the text of a short file.

    Raises UserError if it has more than MAX_FILE_BYTES, is not UTF-8 or cannot be read."""
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise UserError(
                f"{path} has {format_bytes(size, 'MB', 1)}; a file of this kind has kilobytes, name another"
            )
        return path.read_text(encoding="utf-8-sig")  # without the byte order mark of some editors
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        if is_machine_limit(error):
            raise
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def compose_nodes(path: Path, loader: yaml.SafeLoader) -> Node | None:
    """Return the nodes of the YAML file that `loader` holds; None if it is empty. Constructs no values.

    Raises UserError if it is malformed or expands to more than anybody writes."""
    try:
        node = loader.get_single_node()
        if node is not None:
            _measure_expansion(node, {}, path)
        return node
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} holds more than {MAX_LEVELS} levels of nesting; no file here does") from None


def list_children(node: Node) -> list[Node]:
    """Return the nodes directly below a node, including keys."""
    if isinstance(node, MappingNode):
        return [child for pair in node.value for child in pair]
    return [] if isinstance(node, ScalarNode) else node.value


def walk_nodes(node: Node) -> Iterator[Node]:
    """Yield a node and all nodes below it, each once, however many aliases refer to it."""
    seen: set[int] = set()
    rest = [node]
    while rest:
        node = rest.pop()
        if id(node) not in seen:
            seen.add(id(node))
            rest += reversed(list_children(node))
            yield node


def _measure_expansion(node: Node, known: dict[int, tuple[int, int] | None], path: Path) -> tuple[int, int]:
    """Return the (values, levels) that a node stands for with its aliases written out.

    `known` holds those of other nodes, by id; None for a node that contains this one. Raises UserError if
    the numbers are too large or infinite."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise UserError(f"{path}, line {find_line(node)}: an alias refers to a value that contains it")
        return found
    known[id(node)] = None
    below = [_measure_expansion(child, known, path) for child in list_children(node)]
    values, levels = 1 + sum(n for n, _ in below), 1 + max((n for _, n in below), default=0)
    if values > MAX_VALUES or levels > MAX_LEVELS:
        what = f"{MAX_VALUES:,} values" if values > MAX_VALUES else f"{MAX_LEVELS} levels of nesting"
        where = f"{path}, line {find_line(node)}"
        raise UserError(f"{where}: holds more than {what}, aliases (*name) written out; no file here does")
    known[id(node)] = values, levels
    return values, levels


def _check_keys(node: Node, path: Path, place: str = "", seen: set[int] | None = None) -> None:
    """Raises UserError for a key that is given twice, with both lines, and for one that is not text."""
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
        where = f"{path}, line {find_line(key)}"
        if not isinstance(key, ScalarNode):
            raise UserError(f"{where}: a list or mapping is used as a key; write a word")
        if key.tag not in (f"{YAML_TAG}str", MERGE):
            what = f"'{key.value}', a {key.tag.removeprefix(YAML_TAG)},"
            raise UserError(f"{where}: {what} is used as a key; put it in quotes if it is one")
        name = f"{place}{key.value}"
        if key.value in first:
            way = "merge several with <<: [*a, *b]" if key.tag == MERGE else "keep one"
            raise UserError(f"{where}: '{name}' is given twice (first in line {first[key.value]}); {way}")
        first[key.value] = find_line(key)
        _check_keys(value, path, f"{name}.", seen)


def read_yaml(path: Path) -> dict:
    """Return the mapping in a YAML file, an experiment's or a run's.

    Raises UserError, with the line, if the file holds none."""
    raw = None
    try:
        loader = _Loader(path)
        node = compose_nodes(path, loader)
        if node is not None:
            _check_keys(node, path)
            raw = loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML raises these for a value that its tag does not allow: !!int x, !!bool x, !!float ""
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} must hold a mapping with data, model, train and runs, not {type(raw).__name__}"
        )
    return raw


def refuse_duplicate_keys(path: Path | str, pairs: list[tuple[str, object]]) -> dict:
    """Return the object with these pairs, as an `object_pairs_hook` of json and hjson.

    Raises UserError if a key is given twice, since one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"{path} sets '{next(key for key in keys if keys.count(key) > 1)}' twice; keep one")
    return found
