"""The ``PTQConfig`` of MindSpore Golden Stick, by its public fields; nothing of it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from ms_quant.algorithms.clip import RATIOS
from ms_quant.errors import BadArgumentError
from ms_quant.recipe.bounded import BoundedPattern
from ms_quant.recipe.checks import checked
from ms_quant.recipe.patterns import REGEX, escape
from ms_quant.recipe.reading import Section, listed, refuse
from ms_quant.recipe.records import EVERYTHING, Recipe, Rule, Step
from ms_quant.schemes.table import DYNAMIC_CACHE, STATIC_CACHE

DTYPES = {"none": "", "int8": "int8", "qint4x2": "int4", "int4": "int4"}
"""How MindSpore's types are written, which calls qint4x2 Int4."""
SIZES = (64, 128, 256)


@dataclass(frozen=True)
class _Config:
    """The fields of a ``PTQConfig`` as plain values: names of enums, dtypes as ``"int8"`` or ""."""

    where: str
    weight: str
    act: str
    cache: str
    suppression: str
    recovery: str
    per_group: bool
    per_token: bool
    cache_per_token: bool
    group_size: int
    clip: bool
    blacklist: tuple[str, ...]
    arguments: Mapping[str, Any]

    def path(self, field: str) -> str:
        return f"{self.where}.{field}"


def from_ptq_config(config: Any, layer_policies: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a ``PTQConfig``.

    Args:
        config: anything with its fields; those that it lacks are as by default there.
        layer_policies: regular expression, matched from the beginning of a linear's path, to the
            config that its linears get instead; None leaves them float.

    Returns:
        Recipe: the same for :func:`ms_quant.quantize_checkpoint` and :func:`ms_quant.quantize`.

    Raises:
        MsQuantError: a field has a value, or a combination, that Golden Stick or this project does
            not have; names the field.

    Examples:
        >>> import ms_quant
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(weight_quant_dtype="int8", opname_blacklist=["lm_head"])
        >>> recipe = ms_quant.from_ptq_config(config)
        >>> recipe.rules[0].scheme
        'W8A16'
    """
    base = _read(config, "config")
    policies = {}
    for key, policy in (layer_policies or {}).items():
        where = f"layer_policies[{key!r}]"
        _check_regex(key, where)
        policies[key] = None if policy is None else _read(policy, where)
    patterns = tuple(f"{REGEX}{key}" for key in policies)
    rules, steps = _translate(base, EVERYTHING, patterns)
    for pattern, policy in zip(patterns, policies.values(), strict=True):
        if policy is None:
            continue
        if policy.cache and (policy.cache, policy.cache_per_token) != (
            base.cache,
            base.cache_per_token,
        ):
            refuse(policy.path("kvcache_quant_dtype"), policy.cache, "that of config")
        more = _translate(policy, (pattern,), ())
        rules, steps = rules + more[0], steps + more[1]
    cache = (DYNAMIC_CACHE if base.cache_per_token else STATIC_CACHE) if base.cache else ""
    if not rules:
        why = "a cache alone is not quantized" if cache else "nothing is quantized"
        refuse(base.path("weight_quant_dtype"), None, "int8 or qint4x2", why)
    return checked(Recipe(rules, steps, kv_cache=cache))


def _check_regex(key: Any, where: str) -> None:
    if not isinstance(key, str):
        raise BadArgumentError(f"{where} is no regular expression, expected a text")
    BoundedPattern(key, where)


def _translate(
    config: _Config, include: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[tuple[Rule, ...], tuple[Step, ...]]:
    """The rule and the step of one config; none if it quantizes only the cache."""
    _check_cache(config)
    if not config.weight:
        _check_nothing(config)
        return (), ()
    scheme, options = _scheme(config)
    settings = _arguments(config)
    exclude += tuple(f"*{escape(name)}*" for name in config.blacklist)
    patterns: dict[str, Any] = {"include": include, "exclude": exclude, "where": config.where}
    steps: tuple[Step, ...] = ()
    if config.suppression != "NONE":
        steps = (Step(ALGORITHMS[config.suppression], settings, **patterns),)
    algorithms: tuple[str, ...] = ()
    chosen: dict[str, Any] = {}
    if config.clip and config.suppression not in ("AWQ", "OUTLIER_SUPPRESSION_LITE"):
        algorithms = ("clip",)  # the two clip by themselves
    if config.recovery == "GPTQ":
        algorithms += ("gptq",)
        chosen = {f"gptq.{name}": value for name, value in settings.items()}
    return (Rule(scheme, options, algorithms, chosen, **patterns),), steps


ALGORITHMS = {"SMOOTH": "smoothquant", "AWQ": "awq", "OUTLIER_SUPPRESSION_LITE": "osl"}
SUPPRESSIONS = {  # of each scheme
    "W8A16": ("NONE", "AWQ"),
    "W4A16": ("NONE", "AWQ"),
    "W8A8": ("NONE", "SMOOTH", "OUTLIER_SUPPRESSION_LITE"),
    "W8A8_DYNAMIC": ("NONE", "SMOOTH"),
    "W4A8_DYNAMIC": ("NONE",),
}
RECOVERIES = {
    "W8A16": ("NONE", "GPTQ"),
    "W4A16": ("NONE", "GPTQ"),
    "W8A8": ("NONE",),
    "W8A8_DYNAMIC": ("NONE",),
    "W4A8_DYNAMIC": ("GPTQ",),
}


def _scheme(config: _Config) -> tuple[str, dict[str, Any]]:
    """The scheme and its options, if the fields go together."""
    name = _named(config)
    _member(config, "outliers_suppression", config.suppression, SUPPRESSIONS[name], name)
    _member(config, "precision_recovery", config.recovery, RECOVERIES[name], name)
    if config.suppression == "AWQ" and config.recovery == "GPTQ":
        refuse(config.path("precision_recovery"), "GPTQ", "NONE with AWQ")
    grouped = name in ("W8A16", "W4A16", "W4A8_DYNAMIC")
    if config.per_group and not grouped:
        field = config.path("weight_quant_granularity")
        refuse(field, "PER_GROUP", "PER_CHANNEL", f"beside int8 activations it is {name}")
    sizes = SIZES if config.per_group else (0,)
    if config.group_size not in sizes:
        kind = "PER_GROUP" if config.per_group else "PER_CHANNEL"
        why = f"weight_quant_granularity is {kind}"
        refuse(config.path("group_size"), config.group_size, listed(sizes), why)
    chosen = config.per_group or config.weight == "int4"
    return name, {"group_size": config.group_size} if chosen else {}


def _named(config: _Config) -> str:
    if not config.act:
        return "W8A16" if config.weight == "int8" else "W4A16"
    if config.weight == "int8":
        return "W8A8_DYNAMIC" if config.per_token else "W8A8"
    if not config.per_token:
        field = config.path("act_quant_granularity")
        refuse(field, "PER_TENSOR", "PER_TOKEN with qint4x2 weights")
    return "W4A8_DYNAMIC"


def _check_cache(config: _Config) -> None:
    """Refuses a quantized cache beside what does not go with it."""
    if not config.cache:
        return
    field = config.path("kvcache_quant_dtype")
    if config.weight == "int4":
        refuse(field, config.cache, "None with qint4x2 weights")
    if config.suppression in ("AWQ", "OUTLIER_SUPPRESSION_LITE"):
        refuse(field, config.cache, f"None with {config.suppression}")
    if config.recovery == "GPTQ":
        refuse(field, config.cache, "None with GPTQ")


def _check_nothing(config: _Config) -> None:
    """Refuses what asks for more where no weight is quantized."""
    if config.act:
        why = "weight_quant_dtype is None"
        refuse(config.path("act_quant_dtype"), config.act, "None", why)
    for field, value, idle in (
        ("outliers_suppression", config.suppression, "NONE"),
        ("precision_recovery", config.recovery, "NONE"),
        ("weight_clip", config.clip, False),
        ("group_size", config.group_size, 0),
        ("algo_args", dict(config.arguments), {}),
    ):
        if value != idle:
            refuse(config.path(field), value, str(idle), "weight_quant_dtype is None")


def _arguments(config: _Config) -> dict[str, Any]:
    """Options of the algorithm, by our names."""
    where = config.path("algo_args")
    if config.recovery == "GPTQ":
        return _gptq(config, where)
    if config.suppression == "AWQ":
        return _awq(Section(config.arguments, where, AWQ_ARGUMENTS))
    if config.suppression == "SMOOTH":
        section = Section(config.arguments, where, ("alpha",))
        return {"alpha": section.number("alpha", 0.5)}
    if config.arguments:
        refuse(where, dict(config.arguments), "{}", "nothing takes arguments")
    return {}


AWQ_ARGUMENTS = ("duo_scaling", "smooth_alpha", "weight_clip_ratio")
GPTQ_ARGUMENTS = ("block_size", "desc_act", "damp_percent", "static_groups")


def _gptq(config: _Config, where: str) -> dict[str, Any]:
    section = Section(config.arguments, where, GPTQ_ARGUMENTS)
    section.integer("block_size", 128, least=1)  # columns at a time, of the same numbers
    options = {
        "damping": section.number("damp_percent", 0.01),
        "act_order": section.flag("desc_act", False),
        "static_groups": section.flag("static_groups", False),
    }
    for name, key in (("act_order", "desc_act"), ("static_groups", "static_groups")):
        if config.act and not options[name]:
            refuse(f"{where}.{key}", False, "True", "W4A8_DYNAMIC needs it there")
    if options["act_order"] and config.per_group and not options["static_groups"]:
        refuse(f"{where}.static_groups", False, "True", "desc_act is True and PER_GROUP")
    return options


def _awq(section: Section) -> dict[str, Any]:
    count = 20
    if "smooth_alpha" in section:
        grid = section.get("smooth_alpha")
        count = len(grid) if isinstance(grid, list | tuple) else 0
        if not count or not _close(grid, [step / count for step in range(count)]):
            refuse(section.path("smooth_alpha"), grid, "[0, 1/n, 2/n, ..., (n - 1)/n]")
    if "weight_clip_ratio" in section:
        ratios = section.get("weight_clip_ratio")
        if not isinstance(ratios, list | tuple) or not _close(ratios, list(RATIOS)):
            refuse(section.path("weight_clip_ratio"), ratios, str(list(RATIOS)))
    return {"exponents": count, "duo_scaling": section.flag("duo_scaling", True)}


def _close(found: Any, expected: list[float]) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in found)
    return (
        numbers
        and len(found) == len(expected)
        and all(abs(a - b) < 1e-6 for a, b in zip(found, expected, strict=True))
    )


def _read(config: Any, where: str) -> _Config:
    """The fields as plain values."""
    get = _Fields(config, where)
    get.member("mode", ("QUANTIZE",), "QUANTIZE")
    get.member("backend", ("ASCEND", "NONE"), "ASCEND")
    suppression = get.member("outliers_suppression", ("NONE", *ALGORITHMS), "NONE")
    group_size = get.field("group_size", 0)
    clip = get.field("weight_clip", False)
    if type(group_size) is not int:
        refuse(f"{where}.group_size", group_size, "an integer")
    if type(clip) is not bool:
        refuse(f"{where}.weight_clip", clip, "True or False")
    act, cache = get.dtype("act_quant_dtype", ""), get.dtype("kvcache_quant_dtype", "")
    for name, value in (("act_quant_dtype", act), ("kvcache_quant_dtype", cache)):
        if value not in ("", "int8"):
            refuse(f"{where}.{name}", value, "int8 or None")
    tokens = ("PER_TENSOR", "PER_TOKEN")
    return _Config(
        where,
        get.dtype("weight_quant_dtype", "int8"),
        act,
        cache,
        suppression,
        get.member("precision_recovery", ("NONE", "GPTQ"), "NONE"),
        get.member("weight_quant_granularity", ("PER_CHANNEL", "PER_GROUP")) == "PER_GROUP",
        get.member("act_quant_granularity", tokens) == "PER_TOKEN",
        get.member("kvcache_quant_granularity", ("PER_CHANNEL", "PER_TOKEN")) == "PER_TOKEN",
        group_size,
        clip,
        get.names("opname_blacklist"),
        get.arguments("algo_args"),
    )


class _Fields:
    """The fields of a config, read one by one."""

    def __init__(self, config: Any, where: str) -> None:
        self.config, self.where = config, where

    def field(self, name: str, default: Any) -> Any:
        return getattr(self.config, name, default)

    def member(self, name: str, possible: tuple[str, ...], default: str = "") -> str:
        """The name of an enum's member."""
        value = self.field(name, default or possible[0])
        found = str(getattr(value, "name", value)).upper()
        if found not in possible:
            refuse(f"{self.where}.{name}", value, listed(possible))
        return found

    def dtype(self, name: str, default: str) -> str:
        value = self.field(name, default or None)
        found = getattr(value, "__name__", str(value)).lower().rpartition(".")[2]
        if found not in DTYPES:
            refuse(f"{self.where}.{name}", value, "int8, qint4x2 or None")
        return DTYPES[found]

    def names(self, name: str) -> tuple[str, ...]:
        value = self.field(name, None) or []
        texts = isinstance(value, list | tuple) and all(isinstance(x, str) and x for x in value)
        if not texts:
            refuse(f"{self.where}.{name}", value, "a list of parts of names")
        return tuple(value)

    def arguments(self, name: str) -> Mapping[str, Any]:
        value = self.field(name, None) or {}
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if not isinstance(value, Mapping):
            refuse(f"{self.where}.{name}", value, "a dict or a dataclass")
        return value


def _member(
    config: _Config, field: str, found: str, possible: tuple[str, ...], scheme: str
) -> None:
    if found not in possible:
        refuse(config.path(field), found, listed(possible), f"the dtypes say {scheme}")
