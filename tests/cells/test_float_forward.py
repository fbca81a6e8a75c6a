"""bfloat16 and float16 networks on a CPU: calibrated in float32, left as they were, and with what
is made for the type that they run in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Parameter, Tensor, mint, nn, ops

import ms_quant
from ms_quant.cells import QuantLinear
from ms_quant.cells.as_linear import as_linear
from ms_quant.cells.tree import host_array
from ms_quant.errors import MsQuantError
from ms_quant.numerics.storage import DTYPES
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

pytestmark = pytest.mark.usefixtures("blocking_mindspore")
NARROW = {"bfloat16": ms.bfloat16, "float16": ms.float16}


@pytest.fixture(autouse=True)
def unset() -> Iterator[None]:
    yield
    TimestepManager.set_timestep_idx_max(None)
    TimestepManager.set_timestep_idx(None)


class Attention(nn.Cell):
    """A block as diffusion networks have them: a convolution, norms, attention with a constant, a
    modulation; the type is kept under a name, and inputs are cast to it."""

    def __init__(self, dtype: Any = ms.float32):
        super().__init__()
        self.dtype = dtype
        self.patch = nn.Conv2d(3, 16, 2, stride=2, pad_mode="valid", has_bias=True, dtype=dtype)
        self.norm, self.group = nn.LayerNorm([16], dtype=dtype), nn.GroupNorm(4, 16, dtype=dtype)
        self.qkv = nn.Dense(16, 48, has_bias=False, dtype=dtype)
        self.out = mint.nn.Linear(16, 16, dtype=dtype)
        self.time = nn.SequentialCell(nn.Dense(16, 32, dtype=dtype), nn.SiLU())
        self.shift = Parameter(Tensor(np.ones((1, 16)), dtype), name="shift")
        self.rotation = [Tensor(np.eye(16), dtype)]
        self.softmax, self.gelu = nn.Softmax(-1), nn.GELU()
        rng = np.random.default_rng(0)
        for p in self.get_parameters():
            values = rng.standard_normal(p.shape).astype("f4") * 0.3
            p.set_data(Tensor(values).astype(p.dtype))

    def construct(self, image, time):
        x = self.group(self.patch(image.astype(self.dtype)))
        x = x.reshape(x.shape[0], 16, -1).swapaxes(1, 2) + self.shift
        q, k, v = ops.split(self.qkv(self.norm(x)), 16, axis=-1)
        scores = ops.matmul(ops.matmul(q, self.rotation[0]), k.swapaxes(1, 2))
        x = x + self.out(ops.matmul(self.softmax(scores), v))
        scale, gate = ops.split(self.time(time.astype(self.dtype)), 16, axis=-1)
        return self.gelu(x * scale[:, None] + gate[:, None])


def inputs(dtype: Any = ms.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    shapes = (2, 3, 8, 8), (2, 16)
    image, time = (Tensor(rng.standard_normal(s).astype("f4")).astype(dtype) for s in shapes)
    return image, time


def bits(network: nn.Cell) -> dict[str, bytes]:
    return {p.name: host_array(p).tobytes() for p in network.get_parameters()}


def steps(dtype: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for t in range(3):
        TimestepManager.set_timestep_idx(t)
        yield inputs(dtype, t)


def policy() -> TimestepPolicyConfig:
    made = TimestepPolicyConfig()
    made.register([1, 2], "static", "w8a8_static_linear")
    return made


LINEARS = {"qkv", "out", "time.0"}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("W8A8", {}),
    ("W8A8_PER_CHANNEL", {"algorithm": "smoothquant"}),
    ("W8A8_DYNAMIC", {"algorithm": "awq+gptq"}),
    ("W8A8_TIMESTEP", {"algorithm": "smoothquant"}),
    ("W4A16", {"algorithm": "gptq", "group_size": 0}),
    ("W4A4_MXFP4", {"algorithm": "smoothquant"}),
]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("scheme", "options"), RUNS)
def test_a_narrow_network_is_calibrated_and_left_as_it_was(
    scheme: str, options: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    kind = NARROW[dtype]
    more = {"timestep_policy": policy()} if scheme == "W8A8_TIMESTEP" else {}
    network, before = Attention(kind), bits(Attention(kind))
    network = ms_quant.quantize(network, scheme, calibration=steps(kind), **options, **more)
    after = bits(network)
    assert {name for name in before if name.rpartition(".")[0] not in LINEARS} <= after.keys()
    for name, value in before.items():
        if name.rpartition(".")[0] not in LINEARS:
            assert after[name] == value, name
    assert network.dtype == network.rotation[0].dtype == network.shift.dtype == kind
    cells = {n: c for n, c in network.cells_and_names() if isinstance(c, QuantLinear)}
    assert cells.keys() == LINEARS
    assert {cell.input_dtype for cell in cells.values()} == {DTYPES[dtype]}

    # The same network in float32 with the same values, for the same type: the same numbers.
    twin, twins = Attention(), dict(Attention(kind).parameters_and_names())
    for name, p in twin.parameters_and_names():
        p.set_data(twins[name].astype(ms.float32))
    wide = [tuple(x.astype(ms.float32) for x in call) for call in steps(kind)]

    def again() -> Iterator[tuple[Tensor, ...]]:
        for t, call in enumerate(wide):
            TimestepManager.set_timestep_idx(t)
            yield call

    twin = ms_quant.quantize(twin, scheme, calibration=again(), dtype=kind, **options, **more)
    expected = dict(twin.cells_and_names())
    for name, cell in cells.items():
        for p, q in zip(cell.get_parameters(), expected[name].get_parameters(), strict=True):
            np.testing.assert_array_equal(host_array(p), host_array(q))
    if scheme != "W8A8":
        paths = [ms_quant.save_quantized(n, tmp_path / n.cls_name[:1]) for n in (network, twin)]
        assert paths[0] == paths[1]  # no linear is float: their files are the same


def test_dtype_makes_scales_for_another_type_than_the_network_has() -> None:
    for scheme in ("W8A16", "W8A8_DYNAMIC", "W4A4_DYNAMIC"):
        exact = {}
        for dtype in (None, "float32", "bfloat16", ms.float16):
            network = ms_quant.quantize(nn.SequentialCell(nn.Dense(32, 40)), scheme, dtype=dtype)
            scale = network[0].weight_scale.asnumpy()
            name = str(dtype or "float32").lower()
            exact[name] = (scale.astype(DTYPES[name]).astype("f4") == scale).all()
            assert (scale.astype(DTYPES["bfloat16"]).astype("f4") == scale).all() == (
                name == "bfloat16"
            )
        assert all(exact.values())
    for wrong in ("int8", 16, np.float16):
        with pytest.raises(MsQuantError, match=r"^dtype is .*, expected one of bfloat16, float16,"):
            ms_quant.quantize(nn.SequentialCell(nn.Dense(32, 40)), "W8A16", dtype=wrong)


def test_the_type_of_to_float_is_the_type_that_a_linear_runs_in() -> None:
    """Mixed precision: float32 parameters, products in bfloat16, which a CPU does not have."""
    network = Attention().to_float(ms.bfloat16)
    kept = network.patch.mixed_precision_type
    network = ms_quant.quantize(network, "W8A8_PER_CHANNEL", calibration=[inputs()])
    assert network.qkv.input_dtype == DTYPES["bfloat16"]
    assert network.patch.mixed_precision_type == kept is not None


class Casts(nn.Cell):
    def __init__(self, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.change = nn.Dense(8, 4, dtype=ms.bfloat16), change

    def construct(self, x):
        return self.linear(self.change(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x: x.astype(ms.bfloat16),
            MsQuantError,
            r"^Casts: calibration on a CPU runs a bfloat16 or float16 network in float32, and th",
        ),
        (lambda x: x[:, :5], ValueError, "."),  # its own mistake
    ],
)
def test_a_network_that_fails_is_as_it_was(
    change: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    network = Casts(change)
    before = bits(network)
    with pytest.raises(error, match=message) as found:
        ms_quant.quantize(network, "W8A8", calibration=[np.ones((2, 8), "f4")])
    assert error is not MsQuantError or "\n" not in str(found.value)
    assert bits(network) == before and network.linear.weight.dtype == ms.bfloat16
    assert network.linear.cls_name == "Dense"


def test_arguments_of_all_kinds_are_widened() -> None:
    class Nested(nn.Cell):
        def __init__(self):
            super().__init__()
            self.linear = nn.Dense(8, 4, dtype=ms.bfloat16)

        def construct(self, items, scale=None):
            return self.linear(items[0] * items[1]["a"] * scale)

    narrow = Tensor(np.ones((2, 8), "f4")).astype(ms.bfloat16)
    call = {"items": [narrow, {"a": narrow}], "scale": narrow}
    network = ms_quant.quantize(Nested(), "W8A8", calibration=[call])
    assert isinstance(network.linear, QuantLinear) and narrow.dtype == ms.bfloat16


def test_a_sampling_loop_may_call_the_network() -> None:
    """As in the example of ``quantize``: each step's input is what the network made of the last."""
    network = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 8))
    for p in network.get_parameters():
        p.set_dtype(ms.bfloat16)

    def sampling() -> Iterator[Tensor]:
        latent = Tensor(np.random.default_rng(0).standard_normal((4, 8)), ms.bfloat16)
        for index in range(3):
            TimestepManager.set_timestep_idx(index)
            yield latent
            latent = (latent - 0.1 * network(latent)).astype(ms.bfloat16)

    network = ms_quant.quantize(
        network, "W8A8_TIMESTEP", calibration=sampling(), timestep_policy=policy()
    )
    assert network[2].input_dtype == DTYPES["bfloat16"]


def test_a_network_that_is_quantized_in_two_turns() -> None:
    """A linear that is quantized already rounds its products while the others are calibrated."""
    found = []
    for turns in ([["*"]], [["0"], ["1"]]):
        network = nn.SequentialCell(nn.Dense(8, 16), nn.Dense(16, 8))
        rng = np.random.default_rng(0)
        for p in network.get_parameters():
            p.set_data(Tensor(rng.standard_normal(p.shape).astype("f4")))
        more = {"calibration": [rng.standard_normal((4, 8)).astype("f4")], "dtype": "bfloat16"}
        for include in turns:
            more["algorithm"] = "smoothquant"
            ms_quant.quantize(network, "W8A8_DYNAMIC", include=include, **more)
        found.append(network)
    first, last = (net[0] for net in found)
    x = Tensor(rng.standard_normal((4, 8)).astype("f4"))
    np.testing.assert_array_equal(first(x).asnumpy(), last(x).asnumpy())
    assert last.smoothed_dtype == ms.bfloat16


@pytest.mark.parametrize("mode", ["pynative", "jit", "graph"])
@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "W8A8_PER_CHANNEL"])
def test_products_are_rounded_in_every_mode(scheme: str, mode: str) -> None:
    """x * mul_scale to the type that the network runs in, with kernels and without."""
    for dtype, native in [(d, n) for d in NARROW for n in (True, False)]:
        data = np.random.default_rng(3).standard_normal((5, 16)).astype("f4")
        network = nn.SequentialCell(nn.Dense(16, 6))
        network = ms_quant.quantize(
            network, scheme, calibration=[data], algorithm="smoothquant", dtype=dtype
        )
        linear = as_linear(network[0])
        expected = linear.forward(data)
        cell = QuantLinear(linear, native=native)
        assert (linear.smoothed(data) != data * linear.mul_scale).any()
        if mode == "graph":
            ms.set_context(mode=ms.GRAPH_MODE)
        try:
            called = ms.jit(cell) if mode == "jit" else cell
            found = called(Tensor(data)).asnumpy()
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
        np.testing.assert_array_equal(found, expected)
