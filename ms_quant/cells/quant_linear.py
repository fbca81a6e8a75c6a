"""QuantLinear: one Cell for every scheme."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_quant.cells import ascend
from ms_quant.cells.as_linear import activation_of, as_linear
from ms_quant.cells.direct import calls_directly, floats
from ms_quant.cells.layers import repeat_rows
from ms_quant.cells.native import NativeLinear, native_linear
from ms_quant.cells.parameters import make_parameters, refuse_replacing, tensors_of
from ms_quant.cells.timesteps import WIDE, current_step, is_static, is_wide, takes_wide
from ms_quant.cells.tree import host_array
from ms_quant.kernels import WatchedArrays, transforms
from ms_quant.numerics.activation import DualMxTokens, Float, PerToken, PhasedActivation
from ms_quant.numerics.affine import LIMITS, QMAX, QMIN, SMALLEST_SCALE
from ms_quant.numerics.float_grid import FloatGrid
from ms_quant.numerics.grid import AffineGrid
from ms_quant.numerics.linear import Kronecker, QuantizedLinear, StaticActivation
from ms_quant.numerics.storage import DTYPES
from ms_quant.numerics.timestep import TimestepActivation
from ms_quant.schemes.records import Scheme
from ms_quant.timestep import TimestepPolicyConfig

EXACT_K = 1024  # a float32 sum of this many products of int8 is exact: 1024 * 2**14 = 2**24
_FLOAT_TYPES = {"fp16": ms.float16, "bf16": ms.bfloat16, "fp32": ms.float32}
_FOLLOWING = {
    *("kept", "watched", "clips", "host_weight", "native"),
    *("native_operator", "native_arrays", "native_record", "native_phases"),
}
"""What ``_follow`` makes, which a copy makes of its own."""


def _on_host(function: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
    """A NumPy function of a tensor's own memory; in PyNative only."""
    return Tensor.from_numpy(np.ascontiguousarray(function(x.asnumpy())))


@dataclass(frozen=True)
class Made:
    """How a quantized linear was found.

    Attributes:
        algorithm: names joined with ``+``.
        error: squared error over squared output, or over the squared weight.
        on_outputs: whether it is that of outputs.
    """

    algorithm: str
    error: float
    on_outputs: bool


class QuantLinear(nn.Cell):
    r"""A linear with a quantized weight and an input quantized as its scheme says.

    With integer weights per channel and integer inputs the products are summed exactly, as int32
    would, and the result is bit-equal to
    :meth:`ms_quant.numerics.linear.QuantizedLinear.forward`. With anything else the input and the
    weight are dequantized and multiplied in float32.

    On CPU integer weights have native kernels (docs/kernels.md), for which they are packed in the
    first call: called on the tensors' own memory in PyNative, and as a custom operator in jit and
    graph mode. They have no gradient. Where there is no kernel or no library MindSpore's operators
    compute the same: exact sums as float32 matrix products over chunks of at most 1,024 inputs,
    others with a weight that is dequantized. Inputs in float8 or microscaling formats, and those of
    a Kronecker transform, are quantized in NumPy, which works in PyNative only.

    Every call computes with the parameters as they are then, whatever changed them:
    ``load_checkpoint``, ``set_data``, ``ops.assign``, a slice, an array that ``asnumpy`` gave. Each
    keeps its memory, type and shape; another Parameter in its place is refused. ``to_float`` casts
    the input, not what is computed with.

    W8A8_TIMESTEP asks ``TimestepManager`` for the timestep and the policy for its strategy in each
    call, in PyNative only. A step that is not set is refused, as MindIE-SD's policy refuses it.

    A smoothing vector and its product with the input are rounded to the type of inputs that the
    linear was made for, whatever the type of `x`, and so is the quotient of a dual scale.

    On Ascend MindSpore's quantization operators are called for W8A8 and W8A8_DYNAMIC; other schemes
    have no operator here yet and are refused.

    .. math::
        y = (\mathrm{int8}(x / s_{in} + z) W^T + b_q) \cdot s_{deq} + b

    Args:
        linear (QuantizedLinear): the weight in codes, how the input is quantized, and the bias.
        device_target (str, optional): ``"CPU"`` or ``"Ascend"``. Default: ``None``, the current
            device target.
        timestep_policy (TimestepPolicyConfig, optional): which timesteps are static and which are
            dynamic; only read for W8A8_TIMESTEP, and in each call. Default: ``None``, all are
            dynamic.
        native (bool, optional): whether to use native kernels on CPU where there are some. Default:
            ``True``.
        scheme (Scheme, optional): the scheme of `linear`, for files of whole networks. Default:
            ``None``, not known.
        made (Made, optional): how its numbers were found, for :func:`ms_quant.summary`. Default:
            ``None``, not known.

    Inputs:
        - **x** (Tensor) - float, of shape :math:`(*, in)`.
        - **decode** (bool, optional) - the phase, for schemes whose input is quantized in another
          way when a generation goes on token by token. Default: ``False``.

    Outputs:
        Tensor of shape :math:`(*, out)`, of the type of `x`.

    Raises:
        MsQuantError: the scheme has no Ascend operator here; when called, no timestep is set, or
            a static one that has no parameters.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import numpy as np
        >>> from mindspore import Tensor
        >>> from ms_quant.cells import QuantLinear
        >>> from ms_quant.numerics.linear import quantize_linear
        >>> weight = np.eye(4, dtype=np.float32)
        >>> linear = quantize_linear(weight, None, None, np.dtype(np.float32))
        >>> print(QuantLinear(linear)(Tensor(np.ones((1, 4), np.float32))).shape)
        (1, 4)
    """

    def __init__(
        self,
        linear: QuantizedLinear,
        device_target: str | None = None,
        timestep_policy: TimestepPolicyConfig | None = None,
        native: bool = True,
        scheme: Scheme | None = None,
        made: Made | None = None,
    ):
        super().__init__()
        self.scheme, self.made = scheme, made
        self.out_channels, self.in_channels = linear.weight.shape
        self.grid, self.activation = linear.grid, linear.activation
        activation = linear.activation
        self.phased = isinstance(activation, PhasedActivation)
        self.static = isinstance(activation, StaticActivation)
        self.by_step = isinstance(activation, TimestepActivation)
        self.timestep_policy = timestep_policy or TimestepPolicyConfig()
        self.widens = takes_wide(activation, self.timestep_policy)
        self.integer = linear.integer
        has_static = self.static or self.phased
        self.folds_bias = self.by_step or (has_static and linear.static.folds_bias)
        multiplied_in = linear.static.multiplied_in if has_static else None
        self.multiplied_in = multiplied_in and getattr(ms, multiplied_in.name)
        tokens = activation.prefill if isinstance(activation, PhasedActivation) else activation
        bits = tokens.bits if isinstance(tokens, PerToken) else 8
        self.code_limits = tuple(map(float, LIMITS[bits]))
        self.affine = isinstance(linear.grid, AffineGrid)
        self.has_zero_point = "weight_zero_point" in linear.grid.arrays()
        self.compiles = isinstance(tokens, Float) and isinstance(
            linear.grid, AffineGrid | FloatGrid
        )
        self.has_bias, self.smooths = linear.bias is not None, linear.smooth is not None
        self.transforms, self.has_branch = transforms(linear), linear.branch is not None
        self.has_kronecker, self.input_dtype = linear.kronecker is not None, linear.input_dtype
        self.smoothed_as = linear.input_dtype if linear.rounds_smoothed else DTYPES["float32"]
        self.smoothed_dtype = getattr(ms, self.smoothed_as.name)
        computes = self.integer or self.compiles
        self.asks_python = self.by_step or self.has_kronecker or self.widens or not computes
        self.in_pynative = False
        self.matmul = ops.MatMul(transpose_b=True)
        self.row_max = ops.ReduceMax(keep_dims=True)
        self.float_type = None
        target = device_target or ms.get_context("device_target")
        self.operators = ascend.operators(linear) if target == "Ascend" else None
        self.uses_kernels = native and target == "CPU"
        kept, watched = make_parameters(tensors_of(linear), target != "Ascend")
        for name, parameter in kept.items():
            self.insert_param_to_cell(name, parameter)
        self._follow(linear, kept, watched)

    def _follow(
        self, linear: QuantizedLinear, kept: dict[str, Parameter], watched: WatchedArrays | None
    ) -> None:
        """Computes with these parameters, whatever their values become."""
        self.kept, self.watched = kept, watched
        self.clips = "clip_ratio" in kept
        self.host_weight: Tensor | None = None
        self.native: NativeLinear | None = None
        if self.uses_kernels and watched is not None:
            self.native = native_linear(linear, watched)
        if self.native is not None:  # graphs look for them here
            found = {"native_operator": self.native.operator, "native_arrays": tuple(kept.values())}
            self.__dict__.update(found)  # neither a primitive nor parameters of its own
            self.native_record, self.native_phases = self.native.record, self.native.phases

    def __deepcopy__(self, memo: dict) -> QuantLinear:
        tensors = {name: host_array(parameter) for name, parameter in self.kept.items()}
        kept, watched = make_parameters(tensors, self.watched is not None)
        for name, parameter in kept.items():
            parameter.name = self.kept[name].name
            memo[id(self.kept[name])] = parameter
        base, state = nn.Cell.__getstate__(self)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        left = {name: value for name, value in state.items() if name not in _FOLLOWING}
        twin.__setstate__((base, copy.deepcopy(left, memo)))
        twin._follow(as_linear(self), kept, watched)
        return twin

    def __setattr__(self, name: str, value: object) -> None:
        refuse_replacing(self.__dict__.get("kept", {}), name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        refuse_replacing(self.__dict__.get("kept", {}), name, None)
        super().__delattr__(name)

    def insert_param_to_cell(self, param_name: str, param: Parameter, *args, **kwargs) -> None:
        refuse_replacing(self.__dict__.get("kept", {}), param_name, param)
        super().insert_param_to_cell(param_name, param, *args, **kwargs)

    def add_flags(self, **flags: bool) -> QuantLinear:
        """``to_float`` casts the input, and with it the output; what is between stays float32."""
        asked = [name for name in _FLOAT_TYPES if flags.get(name)]
        if asked:
            self.float_type = _FLOAT_TYPES[asked[0]]
            flags |= {name: name == "fp32" for name in _FLOAT_TYPES}
        return super().add_flags(**flags)

    def __call__(self, *args, **kwargs):
        # Compiled networks do not come here: they take the operator in ``construct``.
        indirect = self.float_type is not None or self.widens or not calls_directly(self)
        if self.native is None or indirect:
            # A graph is made of ``construct`` alone, or, of this Cell itself, in graph mode.
            self.__dict__["in_pynative"] = ms.get_context("mode") == ms.PYNATIVE_MODE
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.__dict__["in_pynative"] = False
        return self._direct(self.native, *args, **kwargs)

    def _direct(self, native: NativeLinear, x: Tensor, decode: bool = False) -> Tensor:
        if not self.transforms and (y := native.of_tensor(x, decode)) is not None:
            return y
        shape, array = x.shape[:-1] + (self.out_channels,), floats(x)
        rows = array.reshape(-1, self.in_channels)
        if self.transforms and self.smooths:
            with np.errstate(over="ignore"):
                rows = (rows * self.mul_scale.asnumpy()).astype(self.smoothed_as)
        if self.has_kronecker:
            rows = self._transform(rows.astype(np.float32, copy=False))
        y = Tensor.from_numpy(native(rows, decode).reshape(shape))
        return y if x.dtype == ms.float32 else y.astype(x.dtype)

    def construct(self, x: Tensor, decode: bool = False) -> Tensor:
        if self.float_type is not None:
            x = x.astype(self.float_type)
        shape = x.shape[:-1] + (self.out_channels,)
        rows = x.reshape(-1, self.in_channels)
        if rows.shape[0] == 0:
            return ops.zeros(shape, x.dtype)
        if self.operators is not None:
            if self.smooths:
                rows = rows * self.mul_scale.astype(rows.dtype)
            return ascend.forward(self, rows).reshape(shape)
        rows = rows.astype(ms.float32)
        wide = self.widens and is_wide(self.timestep_policy, current_step(self.weight.name))
        if self.smooths and (self.native is None or self.transforms or wide):
            rows = rows * repeat_rows(self.mul_scale, rows.shape[0])
            rows = rows.astype(self.smoothed_dtype).astype(ms.float32)
        if self.native is not None and not self.has_kronecker and not self.widens:
            phase = self.native_phases[1 if decode else 0]
            y = self.native_operator(rows, self.native_record, phase, *self.native_arrays)
            return y.reshape(shape).astype(x.dtype)
        if self.asks_python and not self.in_pynative:
            raise RuntimeError(
                "QuantLinear: inputs of this scheme are quantized in NumPy or by the timestep, "
                "expected a call of the Cell in PyNative mode, without jit"
            )
        static, step = self.static or (self.phased and decode), None
        if self.by_step:
            step = self._static_step()
            static = step is not None
        y = self._product(rows, static, step, wide)
        if self.has_branch:
            y = y + self.matmul(self.matmul(rows, self.svd_lowrank_l1), self.svd_lowrank_l2)
        if self.has_bias and not (static and self.folds_bias):
            y = y + repeat_rows(self.bias, rows.shape[0])
        return y.reshape(shape).astype(x.dtype)

    def _static_step(self) -> int | None:
        """The timestep that this context is in, None where it is dynamic."""
        step = current_step(self.weight.name)
        if not is_static(self.timestep_policy, step):
            return None
        tables = self.input_scale.asnumpy()[:, 0], self.input_offset.asnumpy()[:, 0]
        TimestepActivation(*tables).check(step, self.weight.name)
        return step

    def _transform(self, rows: np.ndarray) -> np.ndarray:
        return Kronecker(self.left_trans.asnumpy(), self.right_trans.asnumpy()).apply(rows)

    def _fake(self, rows: np.ndarray) -> np.ndarray:
        activation = activation_of(self)
        if isinstance(activation, DualMxTokens):
            return activation.fake(rows, dtype=self.input_dtype)
        return activation.fake(rows)

    def _host_weight(self) -> Tensor:
        """What the codes stand for, made once for the values that there are; in PyNative only."""
        assert self.watched is not None
        self.weight.data_ptr()  # waits for assignments
        if self.host_weight is None or self.watched.changed():
            self.watched.watch()
            linear = as_linear(self)
            self.host_weight = Tensor.from_numpy(linear.grid.values(linear.weight))
        return self.host_weight

    def _values(self) -> Tensor:
        """The same by MindSpore's operators, from the parameters in each call."""
        codes = self.weight.astype(ms.float32)
        if not self.affine:
            return codes
        shape = self.weight_scale.shape + (1,)
        codes = codes.reshape(self.weight_scale.shape + (-1,))
        if self.has_zero_point:
            codes = codes - self.weight_zero_point.astype(ms.float32).reshape(shape)
        return (codes * self.weight_scale.reshape(shape)).reshape(self.weight.shape)

    def _product(self, rows: Tensor, static: bool, step: int | None, wide: bool) -> Tensor:
        if self.has_kronecker:
            rows = _on_host(self._transform, rows)
        if wide:
            return self.matmul(_on_host(WIDE.fake, rows), self._host_weight())
        if self.native is not None:
            return _on_host(self.native, rows)  # of a transform: per token, in PyNative
        if self.integer:
            return self._static(rows, step) if static else self._dynamic(rows)
        if self.compiles:
            return self.matmul(rows, self._values())
        return self.matmul(_on_host(self._fake, rows), self._host_weight())

    def _static(self, rows: Tensor, step: int | None) -> Tensor:
        count = rows.shape[0]
        if self.by_step:
            bias, deq_scale = self.quant_bias[step], self.deq_scale[step]
            offset = self.input_offset[step].astype(ms.float32)
            steps = rows / self.input_scale[step] + offset
        else:
            bias, deq_scale = self.quant_bias, self.deq_scale
            offset = repeat_rows(self.input_offset.astype(ms.float32), count)
            steps = self._steps(rows) + offset
        qx = ops.clip_by_value(ops.round(steps), float(QMIN), float(QMAX))
        total = (self._sum(qx) + bias).astype(ms.float32)
        return total * repeat_rows(deq_scale, count)

    def _steps(self, rows: Tensor) -> Tensor:
        if self.multiplied_in is None:
            return rows / repeat_rows(self.input_scale, rows.shape[0])
        held = self.input_scale.astype(self.multiplied_in).astype(ms.float32)
        reciprocal = (1.0 / held).astype(self.multiplied_in).astype(ms.float32)
        return rows * repeat_rows(reciprocal, rows.shape[0])

    def _dynamic(self, rows: Tensor) -> Tensor:
        smallest, largest = self.code_limits
        x_scale = self.row_max(ops.abs(rows), -1)
        if self.clips:
            x_scale = x_scale * self.clip_ratio
        x_scale = x_scale / largest
        x_scale = ops.select(x_scale >= float(SMALLEST_SCALE), x_scale, ops.ones_like(x_scale))
        steps = rows / ops.matmul(x_scale, ops.ones((1, self.in_channels), rows.dtype))
        qx = ops.clip_by_value(ops.round(steps), smallest, largest)
        total = self._chunk(qx, 0)
        if self.in_channels > EXACT_K:
            total = self._sum(qx).astype(ms.float32)
        total = total * ops.matmul(x_scale, ops.ones((1, self.out_channels), rows.dtype))
        return total * repeat_rows(self.weight_scale, rows.shape[0])

    def _chunk(self, qx: Tensor, start: int) -> Tensor:
        """Exact float32 products over at most EXACT_K inputs from ``start``."""
        stop = min(start + EXACT_K, self.in_channels)
        if start == 0 and stop == self.in_channels:
            return self.matmul(qx, self.weight.astype(ms.float32))
        return self.matmul(qx[:, start:stop], self.weight[:, start:stop].astype(ms.float32))

    def _sum(self, qx: Tensor) -> Tensor:
        total = self._chunk(qx, 0).astype(ms.int32)
        for start in range(EXACT_K, self.in_channels, EXACT_K):
            total = total + self._chunk(qx, start).astype(ms.int32)
        return total

    def extend_repr(self) -> str:
        kind = "static" if self.static else "phased" if self.phased else "dynamic"
        kind = "timestep" if self.by_step else kind
        kind = "float" if isinstance(self.activation, Float) else kind
        return f"in={self.in_channels}, out={self.out_channels}, {kind} input"
