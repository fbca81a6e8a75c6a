"""``linear_quant`` of modelslim_v1: a pair of quantizers becomes one of our schemes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ms_quant.recipe.reading import Section, refuse
from ms_quant.recipe.records import EVERYTHING, Rule
from ms_quant.schemes.table import VALUES

FLOAT = ("float", "per_tensor", True)
Kind = tuple[str, str, bool]
"""dtype, scope and whether it is symmetric."""

INT8_ROWS: Kind = ("int8", "per_channel", True)
INT8_TOKENS: Kind = ("int8", "per_token", True)
_MX8: Kind = ("mxfp8", "per_block", True)
_MX4: Kind = ("mxfp4", "per_block", True)
_DUAL: Kind = ("mxfp4", "dual_scale", True)
_FP8_ROWS: Kind = ("fp8_e4m3", "per_channel", True)
_SCOPES = ("per_channel", "per_group")

PAIRS: dict[tuple[Kind, Kind], str] = {  # weight, activation
    (INT8_ROWS, ("int8", "per_tensor", False)): "W8A8",
    (INT8_ROWS, INT8_TOKENS): "W8A8_DYNAMIC",
    (INT8_ROWS, ("int8", "pd_mix", False)): "W8A8_MIX",
    **{(("int8", s, even), FLOAT): "W8A16" for s in _SCOPES for even in (True, False)},
    **{(("int4", s, even), FLOAT): "W4A16" for s in _SCOPES for even in (True, False)},
    **{(("int4", s, True), INT8_TOKENS): "W4A8_DYNAMIC" for s in _SCOPES},
    (("int4", "per_channel", True), ("int4", "per_token", True)): "W4A4_DYNAMIC",
    (_FP8_ROWS, ("fp8_e4m3", "per_token", True)): "W8A8FP8_DYNAMIC",
    (_MX8, _MX8): "W8A8_MXFP8",
    (_MX4, _MX8): "W4A8_MXFP",
    (_MX4, _MX4): "W4A4_MXFP4",
    (_DUAL, _DUAL): "W4A4_MXFP4_DUALSCALE",
}
WEIGHT_METHODS = {
    "int8": ("minmax", "gptq", "ssz"),
    "int4": ("minmax", "gptq", "ssz"),
    "fp8_e4m3": ("minmax",),
    "mxfp8": ("minmax", "mse_round"),
    "mxfp4": ("minmax", "ceil_x", "fouroversix"),
}
RULES = {
    "mse_round": "mxfp8_msmodelslim_mse_round",
    "ceil_x": "mxfp4_msmodelslim_ceil_x",
    "fouroversix": "mxfp4_msmodelslim_fouroversix",
}


@dataclass(frozen=True)
class Quantizer:
    """``qconfig.act`` or ``qconfig.weight``.

    Attributes:
        kind: dtype, scope and whether it is symmetric.
        method: how ranges and codes are chosen.
        sizes: ``group_size`` and ``dual_block_size``, where they apply.
        settings: options of the method by their names here.
        where: its path.
        notes: what it says that changes nothing here.
    """

    kind: Kind
    method: str
    sizes: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)
    notes: tuple[str, ...] = ()

    @property
    def same_grid(self) -> tuple[Kind, dict[str, int]]:
        """What decides the grid of a weight."""
        return self.kind, self.sizes


def linear_quant(section: Section) -> tuple[Rule, Quantizer]:
    """The rule of a ``linear_quant`` processor, and what it does to weights.

    Raises:
        MsQuantError: names the key that has no counterpart here.
    """
    qconfig = Section(section.get("qconfig"), section.path("qconfig"), ("act", "weight"))
    return make_rule(section, qconfig, PAIRS)


def make_rule(
    section: Section, qconfig: Section, pairs: dict[tuple[Kind, Kind], str]
) -> tuple[Rule, Quantizer]:
    """The rule of a ``qconfig`` with the patterns beside it."""
    weight = read_weight(qconfig, "weight", (weight for weight, _ in pairs))
    act = read_act(qconfig, weight, [act for kind, act in pairs if kind == weight.kind])
    if act.sizes and act.sizes != weight.sizes:
        where, size = f"{act.where}.ext.dual_block_size", act.sizes["dual_block_size"]
        refuse(where, size, f"the weight's {weight.sizes['dual_block_size']}")
    algorithms, settings = _algorithms(weight, act)
    rule = Rule(
        pairs[weight.kind, act.kind],
        _options(weight, act),
        algorithms,
        settings,
        section.texts("include", EVERYTHING),
        section.texts("exclude", ()),
        section.where,
    )
    return rule, weight


def read_weight(parent: Section, key: str, possible: Iterable[Kind]) -> Quantizer:
    """The quantizer of weights under a key."""

    def methods(kind: Kind) -> tuple[str, ...]:
        if kind == _DUAL:
            return ("dualscale",)
        found = WEIGHT_METHODS[kind[0]]
        return found if kind[2] else tuple(name for name in found if name != "ssz")

    return _read(parent, key, possible, methods)


def read_act(parent: Section, weight: Quantizer, possible: list[Kind]) -> Quantizer:
    """The quantizer of activations under ``act``, which goes with a weight's."""

    def methods(kind: Kind) -> tuple[str, ...]:
        if kind == _DUAL:
            return ("dualscale",)
        return ("minmax", "histogram") if kind[:2] == ("int8", "per_tensor") else ("minmax",)

    if "act" not in parent and FLOAT in possible:
        return Quantizer(FLOAT, "none", where=parent.path("act"))
    section = Section(parent.get("act"), parent.path("act"))
    if section.get("dtype") == "float" and FLOAT in possible:
        section = Section(section.value, section.where, KEYS)
        section.one_of("method", ("none",), "none")
        return Quantizer(FLOAT, "none", where=section.where)
    return _read(parent, "act", possible, methods, f"beside {described(weight)} weights")


KEYS = ("dtype", "scope", "symmetric", "method", "ext")


def _read(
    parent: Section,
    key: str,
    possible: Iterable[Kind],
    methods: Callable[[Kind], tuple[str, ...]],
    why: str = "",
) -> Quantizer:
    section = Section(parent.get(key), parent.path(key), KEYS)
    kind = _kind(section, list(possible), why)
    method = section.one_of("method", methods(kind))
    sizes, settings, notes = _extras(section, kind, method)
    return Quantizer(kind, method, sizes, settings, section.where, notes)


def _kind(section: Section, possible: list[Kind], why: str) -> Kind:
    """The kind that a section names; the first key that leads nowhere is refused."""
    found: list[Any] = []
    for index, key in enumerate(("dtype", "scope", "symmetric")):
        left = [kind for kind in possible if list(kind[:index]) == found]
        names = dict.fromkeys(kind[index] for kind in left)
        found.append(section.one_of(key, names, why=why))
    return found[0], found[1], found[2]


EXTRAS = {
    "ssz": ("step",),
    "gptq": ("percdamp", "block_size"),
    "minmax": ("aggregation_type",),
}
"""Keys that ``ext`` may have for a method, beside sizes."""


def _extras(
    section: Section, kind: Kind, method: str
) -> tuple[dict[str, int], dict[str, Any], tuple[str, ...]]:
    """The sizes and options that ``ext`` holds, and notes on the rest."""
    size = {"per_group": "group_size", "dual_scale": "dual_block_size"}.get(kind[1])
    is_weight = section.where.endswith("weight")
    known = [size] if size else []
    known += ["axes"] if kind[0].startswith("mx") else []
    known += EXTRAS.get(method, ()) if method != "minmax" or not is_weight else ()
    where, notes = section.path("ext"), []
    given = Section(section.get("ext", None) or {}, where).value
    if is_weight and kind[1] == "per_channel" and "group_size" in given:
        notes.append(f"{where}.group_size: changes nothing, the scope is per_channel")
        given = {key: value for key, value in given.items() if key != "group_size"}
    if not known and given:
        refuse(where, given, f"nothing for {kind[0]} {kind[1]} by {method}")
    ext = Section(given, where, known)
    if "axes" in ext:
        ext.one_of("axes", (-1,))
    ext.one_of("aggregation_type", ("max",), "max")
    values = [value for value in VALUES[size] if value] if size else []
    sizes = {size: ext.one_of(size, values)} if size and (is_weight or size in ext) else {}
    return sizes, _settings(ext, method), tuple(notes)


def _settings(ext: Section, method: str) -> dict[str, Any]:
    """Options of a method, where it has any, with those of its defaults that are others here."""
    if method == "ssz":
        return {"ssz.steps": ext.integer("step", 20, least=1)}
    if method != "gptq":
        return {}
    damping = ext.number("percdamp", 0.01)
    if damping <= 0:
        refuse(ext.path("percdamp"), damping, "a number above 0")
    ext.integer("block_size", 128, least=1)  # columns whose updates are done together
    # scales of the weight as it was, and no other order of columns
    return {"gptq.damping": damping, "gptq.static_groups": True}


def _options(weight: Quantizer, act: Quantizer) -> dict[str, Any]:
    """Of the scheme."""
    options: dict[str, Any] = dict(weight.sizes)
    dtype, scope, symmetric = weight.kind
    if dtype == "int4" and act.kind == FLOAT and scope == "per_channel":
        options["group_size"] = 0
    if not symmetric:
        options["symmetric"] = False
    if weight.method in RULES:
        options["rule"] = RULES[weight.method]
    return options


def _algorithms(weight: Quantizer, act: Quantizer) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Of the rule, with the options that give the same numbers."""
    names = ["histogram"] if act.method == "histogram" else []
    names += [weight.method] if weight.method in ("gptq", "ssz") else []
    return tuple(names), weight.settings


def described(quantizer: Quantizer) -> str:
    """For a sentence."""
    dtype, scope, symmetric = quantizer.kind
    sizes = "".join(f" {name} {size}" for name, size in quantizer.sizes.items())
    return f"{dtype} {scope} {'symmetric' if symmetric else 'asymmetric'}{sizes}"
