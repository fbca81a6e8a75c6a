"""The MLPs of decoders as Cells: one for all tokens, or experts among which a router chooses."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_quant import kernels
from ms_quant.cells.direct import (
    as_type,
    calls_directly,
    floats,
    has_kernels,
    threads,
    wants_gradient,
)
from ms_quant.cells.layers import Softmax, SwiGLU, dense, project
from ms_quant.models import experts
from ms_quant.models.block_spec import LinearSpec
from ms_quant.models.config import ModelConfig
from ms_quant.models.routing import Routing, sigmoid

TINY = 1e-20  # what sums of sigmoid scores are kept from zero by


class MLP(nn.Cell):
    """down(silu(gate(x)) * up(x)).

    Args:
        linears: those of a block, by path.
        path: its path in the block.
    """

    def __init__(self, linears: Mapping[str, LinearSpec], path: str = "mlp"):
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            spec = linears[f"{path}.{name}"]
            setattr(self, name, dense(spec.in_features, spec.out_features, spec.bias))
        self.swiglu = SwiGLU()

    def construct(self, x: Tensor, decode: bool = False) -> Tensor:
        gate, up = project(self.gate_proj, x, decode), project(self.up_proj, x, decode)
        return project(self.down_proj, self.swiglu(gate, up), decode)


class _Scores(nn.Cell):
    """What becomes of the products of rows with a float weight, in float32.

    It is no Dense: nothing takes it for a linear that can be quantized.

    Args:
        hidden: channels of a row.
        outputs: rows of the weight.
    """

    def __init__(self, hidden: int, outputs: int):
        super().__init__()
        self.weight = Parameter(np.zeros((outputs, hidden), np.float32))
        self.hidden, self.product = hidden, ops.MatMul(transpose_b=True)

    def __call__(self, x: Tensor) -> Tensor:
        if not (has_kernels() and calls_directly(self)):
            return super().__call__(x)
        rows = floats(x).reshape(-1, self.hidden)
        with np.errstate(all="ignore"):
            y = self.of_arrays(kernels.matmul(rows, floats(self.weight), None, threads()))
        return as_type(y, x.dtype)

    def construct(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.hidden).astype(ms.float32)
        return self.of_tensors(self.product(rows, self.weight.astype(ms.float32))).astype(x.dtype)


class SharedGate(_Scores):
    """How much of the MLP for all tokens is added, (rows, 1)."""

    def of_arrays(self, products: np.ndarray) -> np.ndarray:
        return sigmoid(products)

    def of_tensors(self, products: Tensor) -> Tensor:
        return ops.sigmoid(products)


class Router(_Scores):
    """The weights of all experts for each token, (rows, experts); 0 for those not chosen.

    Args:
        hidden: channels of a row.
        routing: how many experts there are, and how a token finds its own.
    """

    def __init__(self, hidden: int, routing: Routing):
        super().__init__(hidden, routing.experts)
        self.routing, self.sigmoid = routing, routing.scoring == "sigmoid"
        if self.sigmoid:  # moved by how often experts are chosen, not by a gradient
            zeros = np.zeros(routing.experts, np.float32)
            self.e_score_correction_bias = Parameter(zeros, requires_grad=False)
        self.softmax = Softmax()

    def of_arrays(self, products: np.ndarray) -> np.ndarray:
        correction = floats(self.e_score_correction_bias) if self.sigmoid else None
        weights = np.zeros_like(products)
        np.put_along_axis(weights, *self.routing.route(products, correction), axis=1)
        return weights

    def of_tensors(self, products: Tensor) -> Tensor:
        """:meth:`Routing.route` in operators whose shapes do not depend on values."""
        routing = self.routing
        scores = ops.sigmoid(products) if self.sigmoid else self.softmax(products)
        wanted = scores
        if self.sigmoid:
            wanted = scores + self.e_score_correction_bias.astype(scores.dtype)
        if routing.groups > 1:
            wanted = self.in_groups(wanted)
        weights = scores * largest(wanted, routing.per_token)
        if routing.normalized:
            total = weights.sum(1, keepdims=True)
            weights = weights / (total + TINY if self.sigmoid else total)
        return weights * routing.scale

    def in_groups(self, wanted: Tensor) -> Tensor:
        routing, rows = self.routing, wanted.shape[0]
        grouped = wanted.reshape(rows, routing.groups, -1)
        worth = ops.topk(grouped, 2)[0].sum(2)
        kept = largest(worth, routing.groups_per_token).reshape(rows, -1, 1)
        kept = ops.broadcast_to(kept, grouped.shape).reshape(wanted.shape)
        return ops.select(kept > 0, wanted, ops.full_like(wanted, float("-inf")))


def largest(x: Tensor, count: int) -> Tensor:
    """1 at the largest values of each row, else 0; of equal ones at the first, which MindSpore's
    ``topk`` does not promise."""
    marks, none = ops.zeros_like(x), ops.full_like(x, float("-inf"))
    on, off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
    for _ in range(count):
        mark = ops.one_hot(ops.argmax(x, 1), x.shape[1], on, off)
        marks = marks + mark
        x = ops.select(mark > 0, none, x)
    return marks


class Experts(nn.Cell):
    """Experts among which a router chooses for each token, and an MLP for all tokens beside them.

    In PyNative on CPU an expert computes the tokens that go to it alone, and is not called if none
    do. Compiled, with a gradient, or on Ascend shapes must not depend on values: every expert
    computes all tokens, and its outputs are multiplied by weights that are mostly 0. That costs
    as many times more as there are experts for each that a token goes to (32 times in
    DeepSeek-V3), and a graph grows with the number of experts. MindSpore's GroupedMatmul, which
    would compute them in one operator on Ascend, is not called here.

    Args:
        config: the model's shape.
        index: the layer.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)
    """

    def __init__(self, config: ModelConfig, index: int = 0):
        super().__init__()
        spec, hidden = config.block(index), config.hidden_size
        branch = spec.branches[1]
        assert isinstance(branch, experts.Experts)
        self.hidden, self.gate = hidden, Router(hidden, branch.routing)
        self.experts = nn.CellList([MLP(spec.linears, e.path) for e in branch.experts])
        self.routes = False  # graphs are made of ``construct`` alone
        self.shared_name = self.gate_name = ""
        if branch.shared is not None:
            self.shared_name = branch.shared.path.rpartition(".")[2]
            setattr(self, self.shared_name, MLP(spec.linears, branch.shared.path))
        if branch.gate:
            self.gate_name = branch.gate.rpartition(".")[2]
            setattr(self, self.gate_name, SharedGate(hidden, 1))

    def __call__(self, x: Tensor, decode: bool = False) -> Tensor:
        pynative = ms.get_context("mode") == ms.PYNATIVE_MODE
        on_cpu = ms.get_context("device_target") == "CPU"
        self.__dict__["routes"] = pynative and on_cpu and not wants_gradient()
        try:
            return super().__call__(x, decode)
        finally:
            self.__dict__["routes"] = False

    def routed(self, x: Tensor, decode: bool) -> Tensor:
        """The same as ``construct`` of the tokens that go to each expert alone."""
        rows, weights = floats(x).reshape(-1, self.hidden), floats(self.gate(x))
        y = np.zeros_like(rows)
        with np.errstate(all="ignore"):
            for expert, weight in zip(self.experts, weights.T, strict=True):
                tokens = np.flatnonzero(weight)
                if len(tokens):
                    made = floats(expert(as_type(rows[tokens], x.dtype), decode))
                    y[tokens] += weight[tokens, None] * made
            if self.shared_name:
                y += floats(self.shared(x, decode)).reshape(rows.shape)
        return as_type(y.reshape(x.shape), x.dtype)

    def construct(self, x: Tensor, decode: bool = False) -> Tensor:
        if self.routes:
            return self.routed(x, decode)
        rows = x.reshape(-1, self.hidden)
        every = ops.ones((1, self.hidden), x.dtype)
        weights = ops.split(self.gate(x), 1, 1)
        y = ops.zeros_like(rows)
        for expert, weight in zip(self.experts, weights):  # noqa: B905, graphs know no strict
            y = y + expert(rows, decode) * ops.matmul(weight, every)
        if self.shared_name:
            y = y + self.shared(rows, decode)
        return y.reshape(x.shape)

    def shared(self, x: Tensor, decode: bool) -> Tensor:
        """What the MLP for all tokens gives, times what its gate says."""
        y = getattr(self, self.shared_name)(x, decode)
        if self.gate_name:
            opened = getattr(self, self.gate_name)(x)
            every = ops.ones((1, self.hidden), x.dtype)
            y = y * ops.matmul(opened, every).reshape(y.shape)
        return y
