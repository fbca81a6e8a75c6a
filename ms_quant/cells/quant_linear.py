"""QuantLinear: one Cell for every scheme."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_quant.cells import ascend
from ms_quant.cells.native import NativeLinear, native_linear
from ms_quant.cells.timesteps import current_step, is_static
from ms_quant.kernels import transforms
from ms_quant.models.decoder import repeat_rows
from ms_quant.models.direct import calls_directly, floats
from ms_quant.numerics.activation import (
    Activation,
    DualMxTokens,
    Float,
    PerToken,
    PhasedActivation,
)
from ms_quant.numerics.affine import LIMITS, QMAX, QMIN, SMALLEST_SCALE
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, folded_bias
from ms_quant.numerics.timestep import TimestepActivation
from ms_quant.numerics.timestep_linear import timestep_tables
from ms_quant.timestep import TimestepPolicyConfig

EXACT_K = 1024  # a float32 sum of this many products of int8 is exact: 1024 * 2**14 = 2**24
EXACT = 2**24


def _frozen(array: np.ndarray) -> Parameter:
    return Parameter(Tensor(np.ascontiguousarray(array)), requires_grad=False)


def _on_host(function: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
    """A NumPy function of a tensor's own memory; in PyNative only."""
    return Tensor.from_numpy(np.ascontiguousarray(function(x.asnumpy())))


class QuantLinear(nn.Cell):
    r"""A linear with a quantized weight and an input quantized as its scheme says.

    With integer weights per channel and integer inputs the products are summed exactly, as int32
    would, and the result is bit-equal to
    :meth:`ms_quant.numerics.linear.QuantizedLinear.forward`. With anything else the input and the
    weight are dequantized and multiplied in float32.

    On CPU integer weights have native kernels (docs/kernels.md), for which they are packed when
    the Cell is made: called on the tensors' own memory in PyNative, and as a custom operator in
    jit and graph mode. They have no gradient. Where there is no kernel or no library MindSpore's
    operators compute the same: exact sums as float32 matrix products over chunks of at most 1,024
    inputs, others with a weight that is dequantized once. Inputs in float8 or microscaling formats,
    and those of a Kronecker transform, are quantized in NumPy, which works in PyNative only.

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
    ):
        super().__init__()
        self.out_channels, self.in_channels = linear.weight.shape
        self.weight = _frozen(linear.weight)
        self.grid, self.activation = linear.grid, linear.activation
        activation = linear.activation
        self.phased = isinstance(activation, PhasedActivation)
        self.static = isinstance(activation, StaticActivation)
        self.by_step = isinstance(activation, TimestepActivation)
        self.timestep_policy = timestep_policy or TimestepPolicyConfig()
        self.integer = linear.integer
        self.folds_bias = False
        if self.static or self.phased:
            self._take_static(linear)
        if isinstance(activation, TimestepActivation):
            self._take_timesteps(linear, activation)
        if not self.static:
            for name, array in linear.grid.arrays().items():
                squeezed = array[:, 0] if linear.integer else array
                self.insert_param_to_cell(name, _frozen(squeezed))
        self.input_dtype = linear.input_dtype
        self._take_input(activation)
        self._take_extras(linear)
        self.has_bias = linear.bias is not None
        if linear.bias is not None:
            self.bias = _frozen(linear.bias)
        target = device_target or ms.get_context("device_target")
        self.operators = ascend.operators(linear) if target == "Ascend" else None
        self.matmul = ops.MatMul(transpose_b=True)
        self.row_max = ops.ReduceMax(keep_dims=True)
        self.native = native_linear(linear) if native and target == "CPU" else None
        if self.native is not None:  # graphs look for them here
            self.native_operator = self.native.operator
            self.native_weights, self.native_params = self.native.weights, self.native.params
            self.native_decode = self.native.decode_params
        if not linear.integer and self.operators is None and self.native is None:
            self.float_weight = Tensor.from_numpy(linear.grid.values(linear.weight))

    def _take_static(self, linear: QuantizedLinear) -> None:
        static = linear.static
        self.input_scale = _frozen(static.input_scale)
        self.input_offset = _frozen(np.full(self.in_channels, static.offset, np.int8))
        self.offset = float(static.offset)
        self.multiplied_in = static.multiplied_in and getattr(ms, static.multiplied_in.name)
        self.deq_scale = _frozen(linear.deq_scale)
        self.folds_bias = static.folds_bias
        bias = folded_bias(linear, "linear") if static.folds_bias else linear.quant_bias
        self._take_quant_bias(bias)

    def _take_timesteps(self, linear: QuantizedLinear, activation: TimestepActivation) -> None:
        self.check_step = activation.check
        for name, array in activation.arrays().items():
            self.insert_param_to_cell(name, _frozen(array))
        scale, bias = timestep_tables(linear, "linear")
        self.deq_scale = _frozen(scale)
        self.folds_bias = True
        self._take_quant_bias(bias)

    def _take_quant_bias(self, bias: np.ndarray) -> None:
        self.quant_bias = _frozen(bias)
        # One float32 addition of integers below 2**24 + 1 rounds their exact sum, as converting
        # the int32 sum would.
        largest = int(np.abs(bias.astype(np.int64)).max(initial=0))
        self.one_product = self.in_channels <= EXACT_K and largest <= EXACT

    def _take_input(self, activation: Activation) -> None:
        tokens = activation.prefill if isinstance(activation, PhasedActivation) else activation
        self.code_limits = tuple(map(float, LIMITS[8]))
        self.clip_ratio = 1.0
        if isinstance(tokens, PerToken):
            self.code_limits = tuple(map(float, LIMITS[tokens.bits]))
            self.clip_ratio = float(np.float32(tokens.clip))
        self.fake = None if isinstance(tokens, Float) else tokens.fake
        if isinstance(tokens, DualMxTokens):
            self.fake = partial(tokens.fake, dtype=self.input_dtype)

    def _take_extras(self, linear: QuantizedLinear) -> None:
        self.kronecker, self.has_branch = None, linear.branch is not None
        self.smooths, self.transforms = linear.smooth is not None, transforms(linear)
        narrow = getattr(ms, linear.input_dtype.name)
        self.smoothed_dtype = narrow if linear.rounds_smoothed else ms.float32
        self.smoothed_as = linear.input_dtype if linear.rounds_smoothed else np.dtype(np.float32)
        if linear.mul_scale is not None:
            self.mul_scale = _frozen(linear.mul_scale)
        if linear.kronecker is not None:
            self.left_trans = _frozen(linear.kronecker.left)
            self.right_trans = _frozen(linear.kronecker.right)
            self.kronecker = linear.kronecker.apply
        if linear.branch is not None:
            self.svd_lowrank_l1 = _frozen(linear.branch.l1)
            self.svd_lowrank_l2 = _frozen(linear.branch.l2)

    def __call__(self, *args, **kwargs):
        # Compiled networks do not come here: they take the operator in ``construct``.
        if self.native is None or not calls_directly(self):
            return super().__call__(*args, **kwargs)
        return self._direct(self.native, *args, **kwargs)

    def _direct(self, native: NativeLinear, x: Tensor, decode: bool = False) -> Tensor:
        if not self.transforms and (y := native.of_tensor(x, decode)) is not None:
            return y
        shape, array = x.shape[:-1] + (self.out_channels,), floats(x)
        rows = array.reshape(-1, self.in_channels)
        if self.transforms and self.smooths:
            with np.errstate(over="ignore"):
                rows = (rows * self.mul_scale.asnumpy()).astype(self.smoothed_as)
        if self.kronecker is not None:
            rows = self.kronecker(rows.astype(np.float32, copy=False))
        y = Tensor.from_numpy(native(rows, decode).reshape(shape))
        return y if x.dtype == ms.float32 else y.astype(x.dtype)

    def construct(self, x: Tensor, decode: bool = False) -> Tensor:
        shape = x.shape[:-1] + (self.out_channels,)
        rows = x.reshape(-1, self.in_channels)
        if rows.shape[0] == 0:
            return ops.zeros(shape, x.dtype)
        if self.operators is not None:
            if self.smooths:
                rows = rows * self.mul_scale.astype(rows.dtype)
            return ascend.forward(self, rows).reshape(shape)
        rows = rows.astype(ms.float32)
        if self.smooths and (self.native is None or self.transforms):
            rows = rows * repeat_rows(self.mul_scale, rows.shape[0])
            rows = rows.astype(self.smoothed_dtype).astype(ms.float32)
        if self.native is not None and self.kronecker is None:
            params = self.native_decode if decode else self.native_params
            y = self.native_operator(rows, self.native_weights, params)
            return y.reshape(shape).astype(x.dtype)
        static, step = self.static or (self.phased and decode), None
        if self.by_step:
            step = self._static_step()
            static = step is not None
        y = self._product(rows, static, step)
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
        self.check_step(step, self.weight.name)
        return step

    def _product(self, rows: Tensor, static: bool, step: int | None) -> Tensor:
        if self.kronecker is not None:
            rows = _on_host(self.kronecker, rows)
        if self.native is not None:
            return _on_host(self.native, rows)  # of a transform: per token, in PyNative
        if self.integer:
            return self._static(rows, step) if static else self._dynamic(rows)
        if self.fake is not None:
            rows = _on_host(self.fake, rows)
        return self.matmul(rows, self.float_weight)

    def _static(self, rows: Tensor, step: int | None) -> Tensor:
        count = rows.shape[0]
        if self.by_step:
            bias, deq_scale = self.quant_bias[step], self.deq_scale[step]
            offset = self.input_offset[step].astype(ms.float32)
            steps = rows / self.input_scale[step] + offset
        else:
            bias, deq_scale = self.quant_bias, self.deq_scale
            steps = self._steps(rows) + self.offset
        qx = ops.clip_by_value(ops.round(steps), float(QMIN), float(QMAX))
        if self.one_product:
            total = self._chunk(qx, 0) + repeat_rows(bias.astype(ms.float32), count)
        else:
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
        x_scale = self.row_max(ops.abs(rows), -1) * self.clip_ratio / largest
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
        if self.fake is None:
            kind = "float"
        return f"in={self.in_channels}, out={self.out_channels}, {kind} input"
