"""The quantization types of the mindie-sd format: their names, what each needs, the file names.

docs/mindie_sd_format.md states them, and why what is refused is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from ms_quant.errors import BadFileError
from ms_quant.formats.mindie_sd.attention_types import ATTENTION_TYPES
from ms_quant.numerics.mx import DUAL_BLOCK
from ms_quant.numerics.storage import DTYPES
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.support import store, support_of
from ms_quant.schemes.table import get_scheme

NAME, GLOBAL_TYPE = "mindie-sd", "model_quant_type"
FLOAT = "FLOAT"
MODE = 0o640  # the runtime refuses files that others than these may read or write


@dataclass(frozen=True)
class Type:
    """What the runtime makes of a type, beside its tensors.

    Attributes:
        scheme: the scheme of ours that computes the same.
        options: the one choice of the scheme's options that the runtime reads.
        smooths: whether it multiplies the input by ``div.mul_scale``; else it ignores the tensor.
        needs_bias: whether it fails if the model's linear has no bias.
        drops_bias: whether it leaves a bias out.
        even_blocks: whether it fails if K / 32, rounded up, is odd.
    """

    scheme: str
    options: tuple[tuple[str, object], ...] = ()
    smooths: bool = True
    needs_bias: bool = False
    drops_bias: bool = False
    even_blocks: bool = False

    @cache  # noqa: B019 - there are few types, and they live as long as this
    def make(self) -> Scheme:
        """The scheme with the options, as the format holds it."""
        options: dict[str, Any] = dict(self.options)
        scheme = get_scheme(self.scheme, **options)
        return store(scheme, DTYPES["bfloat16"], NAME)[0] if support_of(self.scheme) else scheme


_WHOLE = (("group_size", 0), ("symmetric", True))
TYPES: dict[str, Type] = {  # a later one names the file of a network that has several
    "W8A16": Type("W8A16", _WHOLE, smooths=False),
    "W4A16": Type("W4A16", _WHOLE, smooths=False),
    "W8A8_DYNAMIC": Type("W8A8_DYNAMIC"),
    "W8A8": Type("W8A8"),
    "W8A8_PER_CHANNEL": Type("W8A8_PER_CHANNEL"),
    "W8A8_PER_TENSOR": Type("W8A8_PER_TENSOR"),
    "W8A8_TIMESTEP": Type("W8A8_TIMESTEP"),
    "W8A8_MXFP8": Type("W8A8_MXFP8", needs_bias=True),
    "W4A4_DYNAMIC": Type("W4A4_DYNAMIC", smooths=False, drops_bias=True),
    "W4A4_MXFP4": Type("W4A4_MXFP4"),
    "W4A4_MXFP4_DUALSCALE": Type(
        "W4A4_MXFP4_DUALSCALE",
        (("dual_block_size", DUAL_BLOCK),),
        needs_bias=True,
        even_blocks=True,
    ),
}
STATIC_PAIRS = frozenset(
    f"W8A8_PER_{pair}" for pair in ("CHANNEL_PER_TOKEN", "CHANNEL_PER_TENSOR", "TENSOR_PER_TOKEN")
)
_UNDEFINED = (
    "MindIE-SD leaves such layers float and defines no tensors for them, expected plain {0} with "
    "the algorithm's result in its codes"
)
_ATTENTION = "is a type of attention, expected one of a linear"
SERVED_ATTENTION = ("FP8_DYNAMIC", "MXFP8_DYNAMIC", "MXFP4_DYNAMIC")
REFUSED = {
    "W4A16_AWQ": _UNDEFINED.format("W4A16"),
    "W4A16_GPTQ": _UNDEFINED.format("W4A16"),
    "W8A16_GPTQ": _UNDEFINED.format("W8A16"),
    "W4A8_AWQ": _UNDEFINED.format("W4A16 or W8A8_DYNAMIC"),
    "W4A4_MXFP4_SVD": "MindIE-SD supports no low-rank branch, expected W4A4_MXFP4",
    "W4A4_MXFP4_DYNAMIC": "MindIE-SD reads this type under the name W4A4_MXFP4 only",
    **dict.fromkeys(ATTENTION_TYPES, _ATTENTION),
    "C8": "keys and values in int8 are not read by MindIE-SD, expected types of linears only",
}


def check_type(value: object, where: str) -> str:
    """The name of a type that linears can have, in upper case; ``FLOAT`` among them.

    Args:
        value: as a description has it, in any case.
        where: file and key, for the error.

    Raises:
        MsQuantError: it is none, or one that the runtime does not serve.
    """
    if not isinstance(value, str):
        found = f"{value!r:.80} ({type(value).__name__})"
        raise BadFileError(f"{where} is {found}, expected the name of a quantization type")
    name = value.upper()
    if name in REFUSED:
        raise BadFileError(f"{where} is {value!r}: {REFUSED[name]}")
    if name in STATIC_PAIRS:  # the runtime takes the static path for all of them
        return "W8A8"
    if name not in TYPES and name != FLOAT:
        known = ", ".join([*TYPES, FLOAT])
        raise BadFileError(f"{where} is {value!r:.80}, expected one of {known}")
    return name


def check_model_type(value: object, where: str, attention: bool = False) -> str:
    """What a description calls the whole model: a type of linears, spelled as MindIE-SD does.

    Args:
        attention: whether it may be a type of attention, where that alone is quantized.

    Raises:
        MsQuantError: it is none, or one that the runtime fails on.
    """
    if attention and value in ATTENTION_TYPES:
        return str(value)
    name = check_type(value, where)
    if name == FLOAT or value != str(value).upper():
        raise BadFileError(
            f"{where} is {value!r:.80}, which MindIE-SD fails on, expected one of "
            f"{', '.join(TYPES)} in upper case"
        )
    return str(value)


def description_name(type: str, rank: int | None = None) -> str:
    """The file name of a description."""
    return f"quant_model_description_{_suffix(type, rank)}.json"


def weights_name(type: str, rank: int | None = None) -> str:
    """The file name of the weights that belong to it."""
    return f"quant_model_weight_{_suffix(type, rank)}.safetensors"


def _suffix(type: str, rank: int | None) -> str:
    return type.lower() if rank is None else f"{type.lower()}_{rank}"


def model_type(types: set[str]) -> str:
    """What a network of linears of these types is called."""
    return max(types, key=list(TYPES).index)
