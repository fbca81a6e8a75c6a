"""YAML read strictly: plain data of bounded size, with one meaning or one error."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import MAX_DEPTH, require_file

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
_MERGE = "tag:yaml.org,2002:merge"
_FLOAT = "tag:yaml.org,2002:float"
_INT = "tag:yaml.org,2002:int"
MAX_DIGITS, MAX_INTEGER = 100, (1 << 63) - 1
try:
    from yaml.cyaml import CParser  # type: ignore[attr-defined]

    _PARSER: tuple[Any, ...] = (CParser,)
except ImportError:
    from yaml.parser import Parser
    from yaml.reader import Reader
    from yaml.scanner import Scanner

    _PARSER = (Reader, Scanner, Parser)


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds.

    Raises:
        MsQuantError: there is no such file, it has more than 1 MiB, it is not UTF-8, it is not
            YAML of plain data, or it holds no mapping.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(content) > MAX_BYTES:
        raise BadFileError(f"{path}: is larger than {MAX_BYTES} bytes, expected a recipe")
    try:
        value = parse_yaml(content)
    except ValueError as error:
        raise BadFileError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(value, dict):
        raise BadFileError(f"{path}: found {_kind(value)}, expected a mapping")
    return value


def parse_yaml(content: bytes) -> Any:
    """Plain data from UTF-8.

    Raises:
        ValueError: the text is no single YAML document, or has a tag, a key twice, NaN, infinity,
            an integer of more than 63 bits, more than 64 levels of nesting, or more than 100,000
            values, every alias counted as what it stands for.
    """
    try:
        loader = _Loader(content.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_said(error)) from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels of nesting") from None


def _said(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    what = error.problem or error.context or "malformed"
    return what if mark is None else f"line {mark.line + 1}: {what}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


class _Loader(Composer, *_PARSER, SafeConstructor, Resolver):  # type: ignore[misc]
    """The safe loader, without what makes a text mean two things.

    Its parser is that of libyaml, where PyYAML has it, which every wheel of it has: the one in
    Python takes seconds for a large recipe. Nodes are made here, where they can be counted.
    """

    depth = count = 0

    def __init__(self, text: str):
        for part in _PARSER:
            part.__init__(self, *([text] if part is _PARSER[0] else []))
        for part in (Composer, SafeConstructor, Resolver):
            part.__init__(self)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.count += 1
        if self.depth > MAX_DEPTH:
            _refuse(f"more than {MAX_DEPTH} levels of nesting", self.peek_event().start_mark)
        if self.count > MAX_VALUES:
            _refuse(f"more than {MAX_VALUES} values", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in seen:
                    _refuse(f"the key {key.value!r:.80} appears twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=True)

    def construct_yaml_float(self, node: Any) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            _refuse(f"{node.value:.40}, expected a finite number", node.start_mark)
        return value

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node) if len(node.value) <= MAX_DIGITS else math.inf
        if abs(value) > MAX_INTEGER:
            _refuse(f"{node.value:.40} is too large for an integer", node.start_mark)
        return int(value)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError):
            return _refuse(f"a value is no {node.tag.rpartition(chr(58))[2]}", node.start_mark)


_Loader.add_constructor(_FLOAT, _Loader.construct_yaml_float)
_Loader.add_constructor(_INT, _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, found) for tag, found in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in Resolver.yaml_implicit_resolvers.items()
}
# As YAML 1.1 but for numbers to the base 60, such as 1:30, and with 1e-5, which it takes for text.
_Loader.add_implicit_resolver(
    _INT,
    re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _refuse(problem: str, mark: Any) -> Any:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _count(node: Any, sizes: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for, every alias counted as what it stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        _refuse("a value holds itself", node.start_mark)
    if id(node) not in sizes:
        above.add(id(node))
        pairs = isinstance(node, yaml.MappingNode)
        children = [part for pair in node.value for part in pair] if pairs else node.value
        sizes[id(node)] = 1 + sum(_count(child, sizes, above) for child in children)
        above.remove(id(node))
    if sizes[id(node)] > MAX_VALUES:
        _refuse(f"stands for more than {MAX_VALUES} values", node.start_mark)
    return sizes[id(node)]
