"""What the ``quantization_config`` of any version of the compressed-tensors library says.

Versions differ in the keys that they write. What decides numbers is brought to one spelling, what
does not is dropped, and what is neither is an error that names the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ms_quant.errors import BadArgumentError, BadFileError, short
from ms_quant.recipe.bounded import BoundedPattern

KEY = "quantization_config"
EVERY, HEAD, PATTERN = "Linear", "lm_head", "re:"
NEUTRAL = frozenset({"global_compression_ratio", "version", "run_compressed", "dequantize"})
STATUSES = (None, "compressed", "frozen")
GROUP_KEYS = ("weights", "input_activations", "output_activations", "targets", "format")
DECIDING = ("type", "num_bits", "strategy", "group_size", "block_structure", "symmetric", "dynamic")
"""Arguments of weights and inputs that decide numbers, in the order in which they are compared."""
DEFAULTS = {"type": "int", "num_bits": 8, "symmetric": True, "dynamic": False}
STATED = frozenset({"observer", "observer_kwargs", "zp_dtype"})
"""Arguments of how scales were found, and of a type that the tensors tell themselves."""
ORDERS = (None, False, "weight", "static")
SCALE_TYPES = (None, "torch.float32", "torch.bfloat16", "torch.float16")
MAX_PATTERN = 256
MAX_REPEATS = 6  # each multiplies the time that a pattern may take by the length of a path
_REPEATED_REPEAT = re.compile(r"[*+}][^()]*\)\s*[*+{]")


def check_entry(config: Mapping[str, Any]) -> None:
    """Refuses keys of the whole entry that change numbers in a way that is not read here.

    Raises:
        MsQuantError: names the key.
    """
    for key, value in config.items():
        where = f"{KEY}: {key}"
        if key == "kv_cache_scheme" and value is not None:
            raise BadFileError(f"{where} is {short(value)}, expected null: no cache in int8 or fp8")
        if key == "sparsity_config" and not _is_dense(value):
            raise BadFileError(f"{where} is {short(value)}, expected none or format 'dense'")
        if key == "transform_config" and not _is_empty(value):
            raise BadFileError(
                f"{where} is {short(value)}, expected none: transforms at run time are not read"
            )
        if key == "quantization_status" and value not in STATUSES:
            raise BadFileError(f"{where} is {short(value)}, expected 'compressed' or 'frozen'")
        if key not in _KNOWN:
            raise BadFileError(f"{where} is unknown, expected one of {', '.join(sorted(_KNOWN))}")


_KNOWN = NEUTRAL | {
    "quant_method",
    "format",
    "quantization_status",
    "config_groups",
    "ignore",
    "kv_cache_scheme",
    "sparsity_config",
    "transform_config",
}


def _is_dense(value: Any) -> bool:
    return not value or (isinstance(value, Mapping) and value.get("format") == "dense")


def _is_empty(value: Any) -> bool:
    return not value or value == {"config_groups": {}}


def groups_of(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The groups by their places in the entry, each with its own ``format`` or that of the whole.

    Raises:
        MsQuantError: there is none, or one is not what a group is.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise BadFileError(f"{KEY}: config_groups is {short(groups)}, expected groups of linears")
    found = []
    for name, group in groups.items():
        where = f"{KEY}: {name}"
        if not isinstance(group, Mapping):
            raise BadFileError(f"{where} is {short(group)}, expected an object")
        unknown = [key for key in group if key not in GROUP_KEYS]
        if unknown:
            raise BadFileError(
                f"{where}.{unknown[0]} is unknown, expected one of {', '.join(GROUP_KEYS)}"
            )
        found.append((where, {**group, "format": group.get("format") or config.get("format")}))
    return found


def arguments_of(value: Any, where: str) -> dict[str, Any] | None:
    """The arguments of weights or inputs, in one spelling; None where they stay float.

    Args:
        value: as stored.
        where: its place, for errors.

    Raises:
        MsQuantError: an argument is unknown, or asks for what is not read here.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise BadFileError(f"{where} is {short(value)}, expected arguments or null")
    for key, given in value.items():
        if key == "actorder" and given not in ORDERS:
            raise BadFileError(
                f"{where}.actorder is {short(given)}, expected null, 'static' or 'weight': columns "
                "in another order (weight_g_idx) are not read"
            )
        if key == "scale_dtype" and given not in SCALE_TYPES:
            raise BadFileError(f"{where}.scale_dtype is {short(given)}, expected null")
        if key not in {*DECIDING, *STATED, "actorder", "scale_dtype"}:
            raise BadFileError(f"{where}.{key} is unknown, expected one of {', '.join(DECIDING)}")
    made = {key: _lower(value.get(key, DEFAULTS.get(key))) for key in DECIDING}
    return made | {"block_structure": _block(made["block_structure"]), **_grouping(made)}


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _block(value: Any) -> Any:
    """Old versions write ``"128x128"``."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        return [int(part) for part in value.split("x")]
    return value


def _grouping(made: Mapping[str, Any]) -> dict[str, Any]:
    """The strategy, which the size of groups stands for where it is not said, and that size."""
    strategy, size = made["strategy"], made["group_size"]
    if strategy is None:
        if made["block_structure"] is not None:
            strategy = "block"
        else:
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    return {"strategy": strategy, "group_size": None if size == -1 else size}


@dataclass(frozen=True)
class Difference:
    """Where a group is not what a scheme is spelled as.

    Attributes:
        count: how far it is: how many keys differ, and more for another type.
        place: the first of them.
        found, expected: both values, as messages show them.
    """

    count: int
    place: str
    found: str
    expected: str


def first_difference(
    found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None, where: str
) -> Difference | None:
    """How arguments differ from those of a scheme."""
    if found is None or expected is None:
        if found is expected:
            return None
        return Difference(len(DECIDING), where, described(found), described(expected))
    wrong = [key for key in DECIDING if not same(found[key], expected[key])]
    if not wrong:
        return None
    key = wrong[0]
    count = len(wrong) + (len(DECIDING) if key == "type" else 0)  # floats are far from integers
    return Difference(count, f"{where}.{key}", short(found[key]), short(expected[key]))


def described(arguments: Mapping[str, Any] | None) -> str:
    """Arguments in a few words, such as ``"float 8 bits, token, dynamic"``."""
    if arguments is None:
        return "null"
    words = [f"{arguments['type']} {arguments['num_bits']} bits", str(arguments["strategy"])]
    words += ["dynamic"] if arguments["dynamic"] else []
    return short(", ".join(words))


def same(one: Any, other: Any) -> bool:
    """Unlike Python, True and 1 are two."""
    return type(one) is type(other) and one == other


def names_of(entry: Mapping[str, Any], key: str, where: str) -> list[str]:
    """Targets or what is ignored: paths, classes, or patterns after ``re:``.

    Raises:
        MsQuantError: it is no list of texts, or a pattern cannot be read or would take too long.
    """
    names = entry.get(key)
    if names is None and key == "ignore":
        return []
    if not isinstance(names, list):
        raise BadFileError(f"{where}: {key} is {short(names)}, expected a list of names")
    for name in names:
        if not isinstance(name, str):
            raise BadFileError(f"{where}: {key} has {short(name)}, expected a text")
        if name.startswith(PATTERN):
            _check_pattern(name.removeprefix(PATTERN), f"{where}: {key}")
    return names


def _check_pattern(text: str, where: str) -> None:
    if len(text) > MAX_PATTERN:
        raise BadFileError(
            f"{where} has a pattern of {len(text)} characters, expected at most {MAX_PATTERN}"
        )
    if _REPEATED_REPEAT.search(text) or len(re.findall(r"[*+{]", text)) > MAX_REPEATS:
        raise BadFileError(
            f"{where} has the pattern {short(text)}, expected at most {MAX_REPEATS} repetitions, "
            "none of them repeated"
        )
    try:
        BoundedPattern(text, f"the pattern {short(text)}")
    except BadArgumentError as error:
        raise BadFileError(f"{where}: {error}") from None


class Targets:
    """Targets or ignored names of a group, by the rules of the library.

    Args:
        names: paths, patterns, and the class of all linears.
    """

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)
        patterns = sorted(name for name in self.names if name.startswith(PATTERN))
        self._patterns = [
            (name, BoundedPattern(name.removeprefix(PATTERN), f"the pattern {short(name)}"))
            for name in patterns
        ]

    def of(self, path: str) -> str | None:
        """The name that decides what a linear is: its path before patterns, those before its
        class. Several patterns are taken in the order of their texts, as the library takes
        them."""
        if path in self.names:
            return path
        for name, pattern in self._patterns:
            if pattern.match(path):
                return name
        return EVERY if EVERY in self.names else None
