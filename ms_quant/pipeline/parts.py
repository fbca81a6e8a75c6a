"""What is asked of each part of a model: attention, dense and shared MLPs, routed experts, and the
layers that predict further tokens (``mtp``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, get_args

from ms_quant.algorithms import ALGORITHMS, PLAIN, get_algorithms
from ms_quant.algorithms.pipeline import suiting
from ms_quant.errors import BadArgumentError
from ms_quant.models.block_spec import LinearGroup, Part
from ms_quant.models.config import ModelConfig
from ms_quant.models.names import GroupId
from ms_quant.plan.plan import all_groups
from ms_quant.recipe import LayerChoice
from ms_quant.schemes.table import get_scheme, taken_options

FLOAT = "FLOAT"
PARTS: tuple[str, ...] = get_args(Part)
FURTHER = "mtp"
NOTHING: Mapping[str, Any] = MappingProxyType({})
NAMES = (*PARTS, FURTHER, *(f"{FURTHER}.{part}" for part in PARTS))
IN_MLPS = dict.fromkeys(("W8A8", "W8A8_MIX", "W8A8_PER_TENSOR", "W8A8_PER_CHANNEL"), "W8A8_DYNAMIC")
"""A scheme with static inputs to what MLPs become where it is asked of a model with experts."""


@dataclass(frozen=True)
class ByPart:
    """What was asked of the parts of a model.

    Attributes:
        usual: of parts that are not named; "" for nothing.
        named: part to that.
    """

    usual: str = ""
    named: Mapping[str, str] = field(default_factory=dict)

    def whole(self, part: str) -> str:
        """What was asked of several parts at once, one of them this."""
        return self.named.get(FURTHER, "") if _is_further(part) else self.usual

    def of(self, part: str) -> str:
        """What was asked of a part; "" for nothing."""
        return self.named.get(part, self.whole(part))

    @property
    def names(self) -> list[str]:
        """Everything that was asked of some part, once each."""
        return list(dict.fromkeys(filter(None, [self.usual, *self.named.values()])))


def by_part(what: str, text: str) -> ByPart:
    """What a text says of each part: ``"W8A8"`` or ``"attention=W8A8,experts=W4A8_DYNAMIC"``.

    Args:
        what: what it is called: ``"scheme"``.
        text: names with commas, each behind its part; at most one without.

    Raises:
        MsQuantError: a part is unknown or named twice, or a name is missing.
    """
    usual, named = "", dict[str, str]()
    for entry in (entry.strip() for entry in text.split(",")):
        part, equals, name = (word.strip() for word in entry.rpartition("="))
        if not name or (not equals and usual):
            raise BadArgumentError(
                f"{what} is {text!r:.200}, expected one for the whole model, or "
                f"PART={what.upper()} with commas, and one without a part for the rest; parts are "
                f"{', '.join(NAMES)}"
            )
        if not equals:
            usual = name
        elif part not in NAMES:
            raise BadArgumentError(
                f"{what} {text!r:.200}: part {part!r:.80} is unknown, expected one of "
                f"{', '.join(NAMES)}"
            )
        elif part in named:
            raise BadArgumentError(f"{what} {text!r:.200}: names {part} twice, expected once")
        else:
            named[part] = name
    return ByPart(usual, named)


def as_text(given: str | Mapping[str, str]) -> str:
    """What :func:`by_part` reads, of a text or of part to name; ``""`` is the name of the rest."""
    if isinstance(given, str):
        return given
    return ",".join(f"{part}={name}" if part else name for part, name in given.items())


def part_of(config: ModelConfig, found: GroupId, group: LinearGroup) -> str:
    """The part of a model that a group is in: ``"attention"``, or ``"mtp.attention"``."""
    return f"{FURTHER}.{group.part}" if found.block >= config.num_layers else group.part


def parts_of(config: ModelConfig) -> list[str]:
    """The parts that a model has, in its order."""
    return list(dict.fromkeys(part_of(config, *found) for found in all_groups(config)))


@dataclass(frozen=True)
class AskedParts:
    """A scheme and algorithms as they were asked for, with their options.

    Attributes:
        schemes: names from ``SCHEMES``, or ``FLOAT``.
        algorithms: names from ``ALGORITHMS`` joined with ``+``, or ``"minmax"``.
        scheme_options: of those schemes that take them.
        algorithm_options: of those algorithms that take them.
    """

    schemes: ByPart
    algorithms: ByPart
    scheme_options: Mapping[str, Any] = field(default_factory=dict)
    algorithm_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether no part is named."""
        return not (self.schemes.named or self.algorithms.named)


def read_asked(
    scheme: str,
    algorithm: str,
    scheme_options: Mapping[str, Any] = NOTHING,
    algorithm_options: Mapping[str, Any] = NOTHING,
) -> AskedParts:
    """What two texts ask.

    Raises:
        MsQuantError: as :func:`by_part`.
    """
    schemes, algorithms = by_part("scheme", scheme), by_part("algorithm", algorithm)
    return AskedParts(schemes, algorithms, scheme_options, algorithm_options)


def choices(parts: Sequence[str], asked: AskedParts) -> dict[str, LayerChoice | None]:
    """What becomes of each part of a model; None stays float.

    Args:
        parts: those that it has.
        asked: what was asked of them.

    Raises:
        MsQuantError: a part that the model does not have is named, one has no scheme, or an option
            or an algorithm is of use nowhere.
    """
    _refuse_absent(parts, asked)
    for name in asked.schemes.names:
        if name != FLOAT:
            get_scheme(name)
    schemes = _schemes(parts, asked.schemes)
    quantized = {part: name for part, name in schemes.items() if name != FLOAT}
    if asked.whole and len(set(quantized.values())) == 1:  # all of it is meant for all of them
        (name,) = set(quantized.values())
        usual, options = asked.algorithms.usual, asked.algorithm_options
        one = LayerChoice(name, asked.scheme_options, (usual,), options)
        return {part: one if part in quantized else None for part in parts}
    used = {part: _algorithm(part, name, asked) for part, name in quantized.items()}
    _refuse_useless(quantized, used, asked)
    made: dict[tuple[str, str], LayerChoice] = {}
    for name, algorithm in zip(quantized.values(), used.values(), strict=True):
        _, settings = suiting(algorithm, get_scheme(name), asked.algorithm_options)
        options = taken_options(name, asked.scheme_options)
        made[name, algorithm] = LayerChoice(name, options, (algorithm,), settings)
    return {p: made[quantized[p], used[p]] if p in quantized else None for p in parts}


def notes(parts: Sequence[str], asked: AskedParts) -> list[str]:
    """What became otherwise than it was asked of the whole model, one sentence each."""
    name, schemes = asked.schemes.usual, _schemes(parts, asked.schemes)
    moved = [p for p in parts if not _is_further(p) and _is_moved(p, schemes[p], asked.schemes)]
    if not moved:
        return []
    smoothing = [n for n in _names(asked.algorithms.usual) if _smooths(n)]
    reaching = f" with {'+'.join(smoothing)}" if smoothing else ""
    return [
        f"the model has routed experts, which no runtime serves with static inputs: {name}"
        f"{reaching} is for attention, and {', '.join(moved)} MLPs become {IN_MLPS[name]} "
        "(--scheme PART=SCHEME,... says otherwise)"
    ]


def _schemes(parts: Sequence[str], asked: ByPart) -> dict[str, str]:
    """The name of the scheme of each part."""
    found, routed = {}, "experts" in parts
    for part in parts:
        name = asked.of(part) or (FLOAT if _is_further(part) else "")
        if part not in asked.named and routed and not part.endswith("attention"):
            name = IN_MLPS.get(name, name)
        found[part] = name
    missing = [part for part, name in found.items() if not name]
    if missing:
        raise BadArgumentError(
            f"scheme: nothing is said of {' and '.join(missing)}, expected PART=SCHEME of each "
            "part, or a scheme without a part for the rest (FLOAT leaves it as it is)"
        )
    return found


def _is_moved(part: str, scheme: str, asked: ByPart) -> bool:
    """Whether a part has another scheme than was asked of it and others at once."""
    return part not in asked.named and asked.whole(part) in IN_MLPS and scheme != asked.whole(part)


def _refuse_absent(parts: Sequence[str], asked: AskedParts) -> None:
    there = {*parts, *({FURTHER} if any(map(_is_further, parts)) else ())}
    for what, given in (("scheme", asked.schemes), ("algorithm", asked.algorithms)):
        for part in given.named:
            if part not in there:
                raise BadArgumentError(
                    f"{what} of {part}: the model has no such part, expected some of "
                    f"{', '.join(name for name in NAMES if name in there)}"
                )
    for part, names in asked.algorithms.named.items():
        for name in _names(names):
            if name in ALGORITHMS and ALGORITHMS[name].rotates:
                raise BadArgumentError(
                    f"algorithm of {part}: {name} rotates the whole model, expected it without "
                    "a part"
                )


def _algorithm(part: str, scheme: str, asked: AskedParts) -> str:
    """The algorithms of a part, joined: those that were asked of it, else of the whole model's
    those that suit it."""
    usual, own = asked.algorithms.usual or PLAIN, asked.algorithms.of(part)
    if own != asked.algorithms.usual or part in asked.algorithms.named:
        rotating = [n for n in _names(usual) if n in ALGORITHMS and ALGORITHMS[n].rotates]
        return "+".join([*rotating, *_names(own)]) or PLAIN
    names = _names(suiting(usual, get_scheme(scheme), {})[0])
    if _is_moved(part, scheme, asked.schemes):  # a search would read every expert
        names = [name for name in names if not _smooths(name)]
    return "+".join(names) or PLAIN


def _refuse_useless(
    quantized: Mapping[str, str], used: Mapping[str, str], asked: AskedParts
) -> None:
    """Refuses an algorithm or an option that no part can have."""
    if not quantized:
        return
    for part in asked.algorithms.named:
        if not any(known == part or known.startswith(f"{part}.") for known in quantized):
            raise BadArgumentError(
                f"algorithm of {part}: it stays float, expected a scheme of it: "
                f"--scheme {part}=SCHEME"
            )
    first = next(iter(quantized.values()))
    for option, value in asked.scheme_options.items():
        if not any(taken_options(name, {option: value}) for name in quantized.values()):
            get_scheme(first, **{option: value})
    done = dict.fromkeys(name for text in used.values() for name in _names(text))
    for name in _names(asked.algorithms.usual):
        if name not in done:
            get_algorithms(name, get_scheme(first))
            raise BadArgumentError(
                f"algorithm {name} is of use in no part that is not named, expected "
                f"--algorithm PART={name}"
            )
    for option, value in asked.algorithm_options.items():
        taken = (suiting(used[p], get_scheme(n), {option: value})[1] for p, n in quantized.items())
        if not any(taken):
            get_algorithms(next(iter(used.values())), get_scheme(first), {option: value})


def _names(text: str) -> list[str]:
    return [] if text in ("", PLAIN) else text.split("+")


def _smooths(name: str) -> bool:
    return name in ALGORITHMS and ALGORITHMS[name].smooths


def _is_further(part: str) -> bool:
    return part.startswith(FURTHER)
