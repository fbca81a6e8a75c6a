"""A network whose observations are merged, written and read, and how two of them are compared."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ms_quant.cells.observations import Observations
from ms_quant.statistics.stats_file import stats_arrays, stats_facts

ALL = "histogram+osl+gptq"


class Attention(nn.Cell):
    def __init__(self, size: int, names: str | list[str] = "qkv"):
        super().__init__()
        self.names = list(names)
        for name in [*self.names, "out"]:
            setattr(self, name, nn.Dense(size, size))

    def construct(self, x, context=None, factor=1.0, mask=None):
        other = x if context is None else context
        q, k, v = (
            getattr(self, name)(of) for name, of in zip(self.names, (x, other, other), strict=True)
        )
        scores = ms.ops.matmul(q, k.swapaxes(-1, -2)) * factor
        if mask is not None:
            scores = scores + mask["added"]
        return x + self.out(ms.ops.matmul(ms.ops.softmax(scores, -1), v))


class Net(nn.Cell):
    def __init__(self, names: str | list[str] = "qkv"):
        super().__init__()
        self.first, self.extra = nn.Dense(6, 8), nn.Dense(8, 8)
        self.blocks = nn.CellList([Attention(8, names) for _ in range(2)])
        rng = np.random.default_rng(0)
        for parameter in self.get_parameters():
            value = rng.integers(-2, 3, parameter.shape).astype("f4") / 8
            parameter.set_data(Tensor(value))

    def construct(self, x, context=None, extra=False):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, context, 0.5, mask={"added": ms.ops.zeros((1,), ms.float32)})
        return self.extra(x) if extra else x


def batch(seed: int, tokens: int = 64, channels: int = 6) -> Tensor:
    """Small integers: the sums over first's inputs are exact, in whatever order."""
    values = np.random.default_rng(seed).integers(-3, 4, (1, tokens, channels))
    return Tensor(values.astype("f4"))


def everything(observations: Observations) -> dict:
    """All of it, as values that can be compared."""
    stats = {group.paths[0]: group.stats for group in observations.groups}
    calls = {
        block: [
            (c.index, c.step, [plain(v) for v in (*c.arguments, *c.named.values())]) for c in kept
        ]
        for block, kept in observations.windows.items()
    }
    return {
        "arrays": stats_arrays(stats),
        "facts": stats_facts(stats),
        "calls": calls,
        "groups": [(group.paths, group.block) for group in observations.groups],
        "rest": [getattr(observations, n) for n in ("calls", "tokens", "chosen", "searched")],
    }


def plain(value):
    if isinstance(value, Tensor):
        return str(value.dtype), value.shape, value.asnumpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return value


def deep(value):
    if type(value) in (list, tuple):
        return type(value)(map(deep, value))
    return {k: deep(v) for k, v in value.items()} if isinstance(value, dict) else plain(value)


SUMS = ("sum_squares", "sum_abs", "products")


def assert_same(found: Observations, expected: Observations, *, exact_sums: bool = False) -> None:
    one, other = everything(found), everything(expected)
    arrays, wanted = one.pop("arrays"), other.pop("arrays")
    assert one == other
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        key = name.rpartition(".")[2]
        if key in SUMS and not exact_sums:
            np.testing.assert_allclose(array, wanted[name], rtol=1e-4, atol=1e-3, err_msg=name)
        else:
            np.testing.assert_array_equal(array, wanted[name], err_msg=name)
