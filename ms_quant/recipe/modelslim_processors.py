"""The processors of modelslim_v1 that prepare linears, and those that do other things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ms_quant.algorithms.admm import MAX_SPARSITY
from ms_quant.errors import UnsupportedError
from ms_quant.models.families import FAMILIES
from ms_quant.recipe.modelslim_linear import (
    KEYS,
    Kind,
    Quantizer,
    linear_quant,
    make_rule,
    read_weight,
)
from ms_quant.recipe.reading import Section, items, refuse
from ms_quant.recipe.records import EVERYTHING, Rule, Step
from ms_quant.schemes.table import STATIC_CACHE

SUBGRAPHS = {
    "up-down": ("down",),
    "ov": ("o",),
    "norm-linear": ("qkv", "gate_up"),
    "linear-linear": (),  # no family here has two linears with nothing but a linear between
}
"""Their kinds of subgraphs, in the order in which they are smoothed, with our linear groups."""
PATTERNS = ("type", "include", "exclude")


@dataclass(frozen=True)
class Part:
    """What one processor says.

    Attributes:
        rules: of linears.
        steps: before rounding.
        kv_cache: name of the cache's scheme, or "".
        kv_cache_exclude: patterns of attention whose cache stays float.
        not_for: model types that it is not for, each with the reason.
        weights: how its rules quantize weights.
        searched: how a search of its steps quantizes weights, or None.
        searches_all: the search is of all weights, not of some.
        notes: what it says that changes nothing here.
    """

    rules: tuple[Rule, ...] = ()
    steps: tuple[Step, ...] = ()
    kv_cache: str = ""
    kv_cache_exclude: tuple[str, ...] = ()
    not_for: Mapping[str, str] = field(default_factory=dict)
    weights: tuple[Quantizer, ...] = ()
    searched: Quantizer | None = None
    searches_all: bool = True
    notes: tuple[str, ...] = ()


def read_part(value: Any, where: str) -> Part:
    """What an element of ``spec.process`` says.

    Raises:
        MsQuantError: it has no counterpart here; names the key.
    """
    kind = Section(value, where).get("type")
    if isinstance(kind, str) and kind in REFUSED:
        raise UnsupportedError(f"{where}.type: {kind} is not supported, {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in PROCESSORS:
        refuse(f"{where}.type", kind, f"one of {', '.join(PROCESSORS)}")
    known, read = PROCESSORS[kind]
    return read(Section(value, where, ("type", *known)))


def _linear(section: Section) -> Part:
    rule, weight = linear_quant(section)
    return Part(rules=(rule,), weights=(weight,), notes=weight.notes)


def _group(section: Section) -> Part:
    parts = []
    for where, value in items(section.get("configs"), section.path("configs")):
        Section(value, where).one_of("type", ("linear_quant",))
        parts.append(read_part(value, where))
    if not parts:
        refuse(section.path("configs"), [], "at least one linear_quant")
    return Part(
        rules=tuple(rule for part in parts for rule in part.rules),
        weights=tuple(weight for part in parts for weight in part.weights),
        notes=tuple(note for part in parts for note in part.notes),
    )


def _smooth(section: Section) -> Part:
    section.one_of("symmetric", (True,), True, "no shift of inputs is held here")
    groups = SUBGRAPHS["norm-linear"]
    return _smoothing(section, "smoothquant", {"alpha": _share(section, "alpha", 0.5)}, groups)


def _iter_smooth(section: Section) -> Part:
    section.one_of("symmetric", (True,), True, "no shift of inputs is held here")
    if section.number("scale_min", 1e-5) != 1e-5:
        refuse(section.path("scale_min"), section.get("scale_min"), "1e-05")
    options = {"alpha": _share(section, "alpha", 0.9)}
    return _smoothing(section, "smoothquant", options, _groups(section))


def _flex_smooth(section: Section) -> Part:
    given = [key for key in ("alpha", "beta") if section.get(key, None) is not None]
    options = {key: _share(section, key) for key in given}
    return _smoothing(section, "flexsmooth", options, _groups(section))


def _flex_awq(section: Section) -> Part:
    """The strength of inputs alone is searched, with weights as ``qconfig`` rounds them."""
    if section.get("beta", None) not in (None, 0):
        refuse(section.path("beta"), section.get("beta"), "0", "only alpha is searched")
    alpha = {} if section.get("alpha", None) is None else {"alpha": _share(section, "alpha")}
    qconfig = Section(section.get("qconfig"), section.path("qconfig"), ("act", "weight"))
    searched = read_weight(qconfig, "weight", INTEGERS)
    Section(qconfig.get("act", {}), qconfig.path("act"), KEYS)  # inputs are rounded as by the rule
    part = _smoothing(section, "flexsmooth", {**alpha, "beta": 0.0}, _groups(section))
    return replace(part, searched=searched, searches_all=False)


def _awq(section: Section) -> Part:
    options = {
        "exponents": section.integer("n_grid", 20, least=1),
        "duo_scaling": False,
        "clip": False,
    }
    searched = read_weight(section, "weight_qconfig", INTEGERS)
    return replace(_smoothing(section, "awq", options, _groups(section)), searched=searched)


def _svd(section: Section) -> Part:
    include = section.texts("include", EVERYTHING)
    options = {"rank": section.integer("rank", 32, least=1)}
    step = Step("svd", options, include, section.texts("exclude", ()), where=section.where)
    return Part(steps=(step,))


def _quarot(section: Section) -> Part:
    section.one_of("online", (False,), False, "nothing is rotated at run time")
    block, layers = section.get("block_size", -1), "down_proj_online_layers"
    if type(block) is not int or (block != -1 and not (block > 0 and block & (block - 1) == 0)):
        refuse(section.path("block_size"), block, "-1 or a power of 2")
    section.integer("max_tp_size", 4, least=1)
    notes = []
    for where, layer in items(section.get(layers, []), section.path(layers)):
        if type(layer) is not int or layer < 0:
            refuse(where, layer, "an integer of at least 0")
    if section.get(layers, None):
        notes.append(f"{section.path(layers)}: is of rotations at run time, and there are none")
    if section.flag("export_extra_info", True) and "export_extra_info" in section:
        path = section.path("export_extra_info")
        notes.append(f"{path}: optional/quarot.safetensors is not written")
    options = {} if block == -1 else {"block_size": block}
    return Part(steps=(Step("quarot", options, where=section.where),), notes=tuple(notes))


def _flatquant(section: Section) -> Part:
    for key, default in TRAINING.items():
        if section.get(key, default) != default:
            why = "the training here is another one"
            refuse(section.path(key), section.get(key), f"no {key}", why)
    rules = []
    for where, value in items(section.get("strategies"), section.path("strategies")):
        strategy = Section(value, where, ("qconfig", "include", "exclude"))
        qconfig = Section(strategy.get("qconfig"), f"{where}.qconfig", ("act", "weight"))
        rules.append(make_rule(strategy, qconfig, FLAT_PAIRS)[0])
    if not rules:
        refuse(section.path("strategies"), [], "at least one strategy")
    return Part(rules=tuple(rules))


def _float_sparse(section: Section) -> Part:
    sparsity = section.number("sparse_ratio", 0.3)
    if not 0 <= sparsity <= MAX_SPARSITY:
        refuse(section.path("sparse_ratio"), sparsity, f"a number from 0 to {MAX_SPARSITY}")
    patterns = _patterns(section)
    settings = {"admm.sparsity": sparsity}
    return Part(rules=(Rule("W16A16S", {}, ("admm",), settings, *patterns, section.where),))


def _dynamic_cache(section: Section) -> Part:
    if "qconfig" in section:
        qconfig = Section(section.get("qconfig"), section.path("qconfig"), KEYS)
        qconfig.one_of("dtype", ("int8",), "int8")
        qconfig.one_of("scope", ("per_channel",), "per_channel")
        qconfig.one_of("symmetric", (True,), True, "runtimes read codes back without an offset")
        qconfig.one_of("method", ("minmax",), "minmax")
        if qconfig.get("ext", None):
            refuse(qconfig.path("ext"), qconfig.get("ext"), "nothing")
    wholes = {"include": EVERYTHING, "exclude": ()}
    for (key, whole), found in zip(wholes.items(), _patterns(section), strict=True):
        if found != whole:
            why = "the caches of all layers are alike here"
            refuse(section.path(key), section.get(key), str(list(whole)), why)
    return Part(kv_cache=STATIC_CACHE)


def _fa3(section: Section) -> Part:
    """Static int8 with a scale for each head, what it is without a qconfig."""
    if "qconfig" in section:
        qconfig = Section(section.get("qconfig"), section.path("qconfig"), KEYS)
        why = "attention is read in int8 here, with static scales of heads"
        qconfig.one_of("dtype", ("int8",), "int8", why)
        qconfig.one_of("scope", ("per_head",), "per_head", why)
        qconfig.one_of("symmetric", (True,), True, why)
        qconfig.one_of("method", ("minmax",), "minmax", why)
        if qconfig.get("ext", None):
            refuse(qconfig.path("ext"), qconfig.get("ext"), "nothing")
    include, exclude = _patterns(section)
    if include != EVERYTHING:
        refuse(section.path("include"), list(include), "['*'] with exclude")
    reason = "fa3_quant is for latent attention here; possible is dynamic_cache"
    others = {name: reason for name, family in FAMILIES.items() if not family.latent}
    return Part(kv_cache=STATIC_CACHE, kv_cache_exclude=exclude, not_for=others)


def _patterns(section: Section) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Include and exclude of a processor whose empty ``include`` is everything."""
    found = (section.get(key, None) or [] for key in ("include", "exclude"))
    read = Section(dict(zip(("include", "exclude"), found, strict=True)), section.where)
    return read.texts("include", ()) or EVERYTHING, read.texts("exclude", ())


def _smoothing(
    section: Section, algorithm: str, options: dict[str, Any], groups: tuple[str, ...]
) -> Part:
    """A step whose patterns name what the smoothing is folded into, not what it is for."""
    include, exclude = _patterns(section)
    chosen = (include, exclude) != (EVERYTHING, ())
    return Part(
        steps=(Step(algorithm, options, include, exclude, groups, chosen, where=section.where),)
    )


def _groups(section: Section) -> tuple[str, ...]:
    """Our linear groups of the chosen subgraphs, in the order of their smoothing."""
    where = section.path("enable_subgraph_type")
    chosen = section.texts("enable_subgraph_type", SUBGRAPHS)
    for name in chosen:
        if name not in SUBGRAPHS:
            refuse(where, name, f"some of {', '.join(SUBGRAPHS)}")
    groups = tuple(group for name in SUBGRAPHS if name in chosen for group in SUBGRAPHS[name])
    if not groups:
        refuse(where, list(chosen), "some of up-down, ov, norm-linear", "nothing to smooth")
    return groups


def _share(section: Section, key: str, *default: float) -> float:
    value = section.number(key, *default)
    if not 0 <= value <= 1:
        refuse(section.path(key), section.get(key), "a number from 0 to 1")
    return value


INTEGERS: tuple[Kind, ...] = tuple(
    (dtype, scope, even)
    for dtype in ("int8", "int4")
    for scope in ("per_channel", "per_group")
    for even in (True, False)
)
FLAT_PAIRS: dict[tuple[Kind, Kind], str] = {
    (("int4", "per_channel", True), ("int4", "per_token", True)): "W4A4_FLATQUANT_DYNAMIC"
}
TRAINING = {
    "epochs": 10,
    "cali_bsz": 4,
    "flat_lr": 1e-3,
    "diag_alpha": 0.3,
    "tran_type": "svd",
}
"""Of flatquant there. What spells its defaults asks for nothing."""

_SUBGRAPH = (*PATTERNS[1:], "enable_subgraph_type")
PROCESSORS: dict[str, tuple[tuple[str, ...], Callable[[Section], Part]]] = {
    "linear_quant": (("qconfig", "include", "exclude"), _linear),
    "group": (("configs",), _group),
    "smooth_quant": (("alpha", "symmetric", "include", "exclude"), _smooth),
    "iter_smooth": (("alpha", "scale_min", "symmetric", *_SUBGRAPH), _iter_smooth),
    "flex_smooth_quant": (("alpha", "beta", *_SUBGRAPH), _flex_smooth),
    "flex_awq_ssz": (("alpha", "beta", "qconfig", *_SUBGRAPH), _flex_awq),
    "awq": (("weight_qconfig", "n_grid", *_SUBGRAPH), _awq),
    "svd_res": (("rank", "include", "exclude"), _svd),
    "quarot": (
        ("online", "block_size", "down_proj_online_layers", "max_tp_size", "export_extra_info"),
        _quarot,
    ),
    "flatquant": (("strategies", *TRAINING), _flatquant),
    "float_sparse": (("sparse_ratio", "include", "exclude"), _float_sparse),
    "dynamic_cache": (("qconfig", "include", "exclude"), _dynamic_cache),
    "fa3_quant": (("qconfig", "include", "exclude"), _fa3),
}
"""Type to the keys it may have besides ``type`` and what reads it."""

REFUSED = {
    "kv_smooth": "keys are not smoothed here; possible is dynamic_cache without it",
    "online_quarot": "nothing is rotated at run time; possible is quarot with online: false",
    "adapt_rotation": "rotations are not trained here; possible are quarot and flatquant",
    "autoround_quant": "rounding is not trained here; possible is linear_quant with gptq or ssz",
    "load": "it is no processor of a recipe; possible is ms-quant quantize on a float checkpoint",
}
