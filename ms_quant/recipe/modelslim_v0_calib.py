"""``calib_cfg`` of modelslim_v0: bits and flags become one of our schemes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ms_quant.recipe.reading import Section, refuse
from ms_quant.schemes.table import VALUES

SPARSE = ("fraction", "nonuniform", "co_sparse", "do_smooth", "use_sigma", "sigma_factor")
KEYS = (
    *("w_bit", "a_bit", "w_sym", "mm_tensor", "w_method", "act_method", "is_dynamic", "pdmix"),
    *("group_size", "is_lowbit", "open_outlier", *SPARSE, "pr", "percdamp"),
    *("disable_names", "disable_last_linear", "use_kvcache_quant", "use_fa_quant", "fa_amp"),
    "dev_id",
)
BITS = ((8, 8), (8, 16), (4, 16), (4, 8), (4, 4))
"""Of weights and activations."""
EIGHT_BITS = ("w8a8", "w8a8_dynamic", "w8a16", "float")
"""What linears may be beside those of a config of 8 bits."""


@dataclass(frozen=True)
class WeightConfig:
    """What ``calib_cfg`` says.

    Attributes:
        scheme: of linears for which nothing else is said.
        options: of its weights.
        algorithms: that choose its ranges.
        settings: of the algorithms, by full name.
        disabled: names of linears that stay float.
        caches: whether keys and values are quantized.
        mixed: the kinds that ``mix_cfg`` may name.
        pdmix: whether static activations are dynamic in prefill.
        histogram: whether static ranges come from a histogram.
        notes: what it says that changes nothing here.
    """

    scheme: str
    options: dict[str, Any]
    algorithms: tuple[str, ...]
    settings: dict[str, Any]
    disabled: tuple[str, ...]
    caches: bool
    mixed: tuple[str, ...]
    pdmix: bool
    histogram: bool
    notes: tuple[str, ...] = ()

    def kind(self, name: str, where: str) -> tuple[str, tuple[str, ...]]:
        """The scheme and the algorithms of a kind of ``mix_cfg``."""
        if self.pdmix and name != "w8a8":
            refuse(where, name, "w8a8 or float", "pdmix is of w8a8 only")
        if name == "w8a8":
            return _static(self.pdmix), ("histogram",) if self.histogram else ()
        return {"w8a8_dynamic": "W8A8_DYNAMIC", "w8a16": "W8A16"}[name], ()


def read_config(section: Section) -> WeightConfig:
    """What a ``calib_cfg`` says.

    Raises:
        MsQuantError: a key has no counterpart here; names it.
    """
    section = Section(section.value, section.where, KEYS)
    bits = section.one_of("w_bit", (8, 4), 8), section.one_of("a_bit", (8, 16, 4), 8)
    if bits not in BITS:
        refuse(section.path("a_bit"), bits[1], "8 or 16 beside w_bit 8")
    sparse = _is_sparse(section, bits)
    bits = (4, 8) if sparse else bits
    grouped = not sparse and _is_grouped(section, bits)
    _check_weights(section, bits, grouped)
    notes = _check_rest(section, sparse)
    scheme = _scheme(section, bits, sparse)
    static = scheme in ("W8A8", "W8A8_MIX", "W8A8S")
    histogram = _histogram(section, static)
    algorithms = ("histogram",) if histogram and static else ()
    return WeightConfig(
        scheme,
        _options(section, scheme, grouped),
        (*algorithms, "low_bits") if sparse else algorithms,
        _outliers(section) if sparse else {},
        section.texts("disable_names", ()),
        section.flag("use_kvcache_quant", False),
        EIGHT_BITS if bits[0] == 8 or bits == (4, 4) else ("float",),
        section.flag("pdmix", False),
        histogram,
        tuple(notes),
    )


def _static(pdmix: bool) -> str:
    return "W8A8_MIX" if pdmix else "W8A8"


def _is_sparse(section: Section, bits: tuple[int, int]) -> bool:
    """Whether weights are W8A8S: of four bits but for outliers, for a compressor."""
    if section.flag("is_lowbit", False):
        return bits == (4, 8) and not section.flag("is_dynamic", False)
    return section.flag("co_sparse", False)


def _outliers(section: Section) -> dict[str, Any]:
    """How outliers are told from the rest."""
    low = section.flag("is_lowbit", False)
    section.one_of("open_outlier", (True,), True, "of weights without outliers groups are scaled")
    section.one_of("do_smooth", (False,), False, "its search is not documented")
    section.one_of("nonuniform", (False,), False, "codes are steps of equal size here")
    fraction, sigma = section.number("fraction", 0.01), section.number("sigma_factor", 3.0)
    if low and section.flag("use_sigma", False):
        if not 3 <= sigma <= 4:
            refuse(section.path("sigma_factor"), sigma, "a number from 3 to 4")
        return {"low_bits.sigma": sigma}
    if not 0.01 <= fraction <= 0.1:
        refuse(section.path("fraction"), fraction, "a number from 0.01 to 0.1")
    return {"low_bits.fraction": fraction} | ({} if low else {"low_bits.whole": True})


def _is_grouped(section: Section, bits: tuple[int, int]) -> bool:
    """Whether weights have a scale for each group of inputs: plain low bits without outliers."""
    low, outliers = section.flag("is_lowbit", False), section.flag("open_outlier", True)
    if low and bits not in ((8, 16), (4, 16), (4, 8)):
        refuse(section.path("is_lowbit"), True, "false", f"beside w_bit {bits[0]} a_bit {bits[1]}")
    if low and outliers:
        why = "how outliers are kept beside such weights is not documented"
        refuse(section.path("open_outlier"), True, "false", why)
    return low


def _check_weights(section: Section, bits: tuple[int, int], grouped: bool) -> None:
    if section.flag("mm_tensor", True) and not grouped:
        why = "its default is true: one scale for a whole weight"
        refuse(section.path("mm_tensor"), section.get("mm_tensor", True), "false", why)
    section.one_of("w_method", ("MinMax",), "MinMax", "others have no documented numbers")
    if not section.flag("w_sym", True) and bits[1] != 16:
        refuse(section.path("w_sym"), False, "true", "beside quantized activations")


def _check_rest(section: Section, sparse: bool) -> list[str]:
    """Refuses what would change numbers in a way of its own; gives notes on the rest."""
    if section.number("pr", 1.0) != 1:
        refuse(section.path("pr"), section.get("pr"), "1.0", "others draw at random")
    section.one_of("disable_last_linear", (True,), True, "lm_head stays float here")
    section.one_of("use_fa_quant", (False,), False, "attention is not quantized here")
    section.integer("fa_amp", 0)
    given = [key for key in SPARSE if section.get(key, None) not in (None, False)]
    if sparse or not given:
        return []
    return [f"{section.where}: without sparse weights nothing is done with {', '.join(given)}"]


def _scheme(section: Section, bits: tuple[int, int], sparse: bool) -> str:
    dynamic, pdmix = section.flag("is_dynamic", False), section.flag("pdmix", False)
    if sparse and dynamic:
        refuse(section.path("is_dynamic"), True, "false", "sparse weights have static inputs")
    if pdmix and (bits != (8, 8) or dynamic):
        refuse(section.path("pdmix"), True, "false", "it is of static w_bit 8 a_bit 8 only")
    if dynamic and bits[1] == 16:
        refuse(section.path("is_dynamic"), True, "false", "activations stay float")
    if bits == (4, 4) and not dynamic:
        refuse(section.path("is_dynamic"), False, "true", "beside w_bit 4 a_bit 4")
    if bits == (4, 8) and not sparse and not section.flag("is_lowbit", False):
        refuse(section.path("is_lowbit"), False, "true", "beside w_bit 4 a_bit 8")
    if bits == (8, 8):
        return "W8A8_DYNAMIC" if dynamic else _static(pdmix)
    if sparse:
        return "W8A8S"
    return {
        (8, 16): "W8A16",
        (4, 16): "W4A16",
        (4, 8): "W4A8_DYNAMIC",
        (4, 4): "W4A4_FLATQUANT_DYNAMIC",
    }[bits]


def _histogram(section: Section, static: bool) -> bool:
    method = section.one_of("act_method", (1, 2, 3), 1)
    if method == 3 and static:
        why = "how it chooses between 1 and 2 is not documented"
        refuse(section.path("act_method"), 3, "1 (minmax) or 2 (histogram)", why)
    return method == 2


def _options(section: Section, scheme: str, grouped: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if grouped:
        sizes = [size for size in VALUES["group_size"] if size]
        options["group_size"] = section.one_of("group_size", sizes, 64)
    elif scheme == "W4A16":
        options["group_size"] = 0
    if not section.flag("w_sym", True):
        options["symmetric"] = False
    return options
