"""How vllm-omni holds a quantized linear: a table of its methods for checkpoints on disk.

docs/vllm_omni_format.md states them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.errors import BadArgumentError, MsQuantError, UnsupportedError
from ms_quant.formats.ascend import tensors as ascend
from ms_quant.formats.ascend.codes import E4M3, codes_of
from ms_quant.formats.format import Part
from ms_quant.models.block_spec import LinearGroup
from ms_quant.numerics import minifloat
from ms_quant.numerics.float_grid import DualMxGrid
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.plan.layer import LayerPlan, layer_plan
from ms_quant.schemes.support import store, support_of
from ms_quant.schemes.table import SCHEMES, get_scheme

FORMAT, ASCEND, MX, DUAL = "vllm-omni", "ascend", 32, 512
UINT8, FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)
E2M1_IN_E4M3 = minifloat.encode(
    minifloat.decode(np.arange(16, dtype=np.uint8), minifloat.E2M1), minifloat.E4M3
)
"""The code of E4M3 that stands for the value of each code of E2M1."""
Parts = dict[str, Part]


@dataclass(frozen=True)
class Method:
    """A ``quant_method`` of a checkpoint that vllm-omni reads.

    Attributes:
        name: as it says.
        flag: the key of ``quantization_config`` that says that the weights are quantized already;
            "" where the method says it.
        multiple: what the inputs of a linear must be a multiple of.
        devices: what computes it, in words.
    """

    name: str
    flag: str = ""
    multiple: int = 1
    devices: str = ""


A5 = "Ascend 950 (float8 and float4 are types of no earlier one)"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("mxfp8", "is_checkpoint_mxfp8_serialized", MX, A5),
        Method("mxfp4", "is_checkpoint_mxfp4_serialized", MX, A5),
        Method("mxfp4_dualscale", "is_checkpoint_serialized", DUAL, A5),
        Method(ASCEND, devices="as the scheme's operators"),
    )
}
SCHEME_METHODS = {
    "W8A8_MXFP8": METHODS["mxfp8"],
    "W4A4_MXFP4": METHODS["mxfp4"],
    "W4A4_MXFP4_DUALSCALE": METHODS["mxfp4_dualscale"],
}
DEFAULT_SCHEME = "W8A8_MXFP8"


def _held(name: str) -> bool:
    """Whether vllm-ascend's linear methods read it, and it is made from weights alone."""
    scheme = SCHEMES[name]
    served = any(row.format == ASCEND and row.served_by for row in support_of(name))
    current = any("up to" not in text for r in support_of(name) for text in r.served_by)
    return served and current and not scheme.needs_calibration and not scheme.algorithm


ASCEND_SCHEMES = tuple(
    name
    for name in SCHEMES
    if name not in SCHEME_METHODS and name != "W4A8_DYNAMIC" and _held(name)
)
HELD = (*SCHEME_METHODS, *ASCEND_SCHEMES)
"""The schemes that a checkpoint for vllm-omni can be of."""


def method_of(scheme: str) -> Method:
    """The method whose checkpoints hold a scheme of ``HELD``."""
    return SCHEME_METHODS.get(scheme, METHODS[ASCEND])


@dataclass(frozen=True)
class Storage:
    """A scheme as one method holds it.

    Attributes:
        method: the method.
        layer: the scheme and the type of scales.
    """

    method: Method
    layer: LayerPlan

    @property
    def weight(self) -> Any:
        """What weights are rounded to."""
        return self.layer.scheme.weight

    def check(self, path: str, columns: int) -> None:
        """Refuses a linear that the method cannot compute.

        Raises:
            MsQuantError: its inputs cannot be divided so.
        """
        if columns % self.method.multiple:
            raise UnsupportedError(
                f"{path}: {columns} inputs, expected a multiple of {self.method.multiple} for "
                f"{self.method.name}; --float-undivided leaves such linears float"
            )
        try:
            self.weight.check_columns(columns, path)
            codes_of(self.layer.scheme, self.layer.dtype).check(2, columns, path)
        except MsQuantError as error:
            raise UnsupportedError(
                f"{error}; --float-undivided leaves such linears float"
            ) from None

    def parts(self, group: LinearGroup, path: str) -> Parts:
        """Suffix to tensor of a linear, without its bias."""
        shape = group.linears[path].shape
        if self.method.name == ASCEND:
            return ascend.parts(self.layer, group, shape)
        return _NATIVE[self.method.name](*shape)


def storage_of(scheme: str, options: Mapping[str, Any], dtype: np.dtype) -> Storage:
    """How a scheme is held.

    Args:
        scheme: its name.
        options: of its weights.
        dtype: what the runtime computes in.

    Raises:
        MsQuantError: no method holds it.
    """
    get_scheme(scheme, **options)
    if scheme not in HELD:
        raise UnsupportedError(
            f"scheme {scheme}: no {FORMAT} checkpoint that is made from weights alone can hold it, "
            f"expected one of {', '.join(HELD)}"
        )
    method = method_of(scheme)
    if options.get("dual_block_size", DUAL) != DUAL:
        raise BadArgumentError(
            f"dual_block_size is {options['dual_block_size']}, expected {DUAL} of a {FORMAT} "
            "checkpoint"
        )
    base = "mindie-sd" if scheme == "W4A4_MXFP4_DUALSCALE" else ASCEND
    store(get_scheme(scheme, **options), dtype, base)
    return Storage(method, layer_plan(scheme, "minmax", dtype, options=options, format=base))


def _mxfp8(rows: int, columns: int) -> Parts:
    return {
        "weight": Part(E4M3, (rows, columns), lambda x: x.weight.view(E4M3)),
        "weight_scale": _exponents(rows, columns),
    }


def _mxfp4(rows: int, columns: int) -> Parts:
    """Values of E2M1 as numbers of E4M3: the runtime casts them to its packed type itself."""
    return {
        "weight": Part(E4M3, (rows, columns), lambda x: E2M1_IN_E4M3[x.weight].view(E4M3)),
        "weight_scale": _exponents(rows, columns),
    }


def _dual(rows: int, columns: int) -> Parts:
    long = (rows, -(-columns // DUAL), 1)
    return {
        **_mxfp4(rows, columns),
        "weight_dual_scale": Part(FLOAT32, long, _dual_scale),
        "mul_scale": Part(FLOAT32, (columns,), lambda x: np.ones(columns, np.float32)),
    }


def _exponents(rows: int, columns: int) -> Part:
    return Part(UINT8, (rows, -(-columns // MX)), lambda x: ascend.exponents(x.grid))


def _dual_scale(linear: QuantizedLinear) -> np.ndarray:
    assert isinstance(linear.grid, DualMxGrid)
    return linear.grid.scales[..., None]


_NATIVE: dict[str, Callable[[int, int], Parts]] = {
    "mxfp8": _mxfp8,
    "mxfp4": _mxfp4,
    "mxfp4_dualscale": _dual,
}
