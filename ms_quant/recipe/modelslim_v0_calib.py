"""``calib_cfg`` of modelslim_v0: bits and flags become one of our schemes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.recipe.reading import Section, refuse
from ms_quant.schemes import VALUES

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
    _refuse_sparse(section, bits)
    grouped = _is_grouped(section, bits)
    _check_weights(section, bits, grouped)
    notes = _check_rest(section)
    dynamic, pdmix = section.flag("is_dynamic", False), section.flag("pdmix", False)
    scheme = _scheme(section, bits, dynamic, pdmix)
    static = scheme in ("W8A8", "W8A8_MIX")
    histogram = _histogram(section, static)
    return WeightConfig(
        scheme,
        _options(section, scheme, grouped),
        ("histogram",) if histogram and static else (),
        section.texts("disable_names", ()),
        section.flag("use_kvcache_quant", False),
        EIGHT_BITS if bits[0] == 8 or bits == (4, 4) else ("float",),
        pdmix,
        histogram,
        tuple(notes),
    )


def _static(pdmix: bool) -> str:
    return "W8A8_MIX" if pdmix else "W8A8"


def _refuse_sparse(section: Section, bits: tuple[int, int]) -> None:
    """Refuses W8A8S, which has its own command here and other numbers."""
    sparse = section.flag("co_sparse", False) and not section.flag("is_lowbit", False)
    low = section.flag("is_lowbit", False) and not section.flag("is_dynamic", False)
    if sparse or (bits == (4, 8) and low):
        key = "co_sparse" if sparse else "is_lowbit"
        raise MsQuantError(
            f"{section.path(key)}: makes sparse W8A8S weights, expected none of them here; "
            "sparse-compress run makes such weights in its own way"
        )


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


def _check_rest(section: Section) -> list[str]:
    """Refuses what would change numbers in a way of its own; gives notes on the rest."""
    if section.number("pr", 1.0) != 1:
        refuse(section.path("pr"), section.get("pr"), "1.0", "others draw at random")
    section.one_of("disable_last_linear", (True,), True, "lm_head stays float here")
    section.one_of("use_fa_quant", (False,), False, "attention is not quantized here")
    section.integer("fa_amp", 0)
    given = [key for key in (*SPARSE, "percdamp") if section.get(key, None) not in (None, False)]
    where = f"{section.where}: " if given else ""
    return [f"{where}{', '.join(given)} change nothing without sparse weights"] if given else []


def _scheme(section: Section, bits: tuple[int, int], dynamic: bool, pdmix: bool) -> str:
    if pdmix and (bits != (8, 8) or dynamic):
        refuse(section.path("pdmix"), True, "false", "it is of static w_bit 8 a_bit 8 only")
    if dynamic and bits[1] == 16:
        refuse(section.path("is_dynamic"), True, "false", "activations stay float")
    if bits == (4, 4) and not dynamic:
        refuse(section.path("is_dynamic"), False, "true", "beside w_bit 4 a_bit 4")
    if bits == (4, 8) and not section.flag("is_lowbit", False):
        refuse(section.path("is_lowbit"), False, "true", "beside w_bit 4 a_bit 8")
    if bits == (8, 8):
        return "W8A8_DYNAMIC" if dynamic else _static(pdmix)
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
