"""Whole quantized networks in one file, and MindSpore's own checkpoints of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Parameter, Tensor, nn

import ms_quant
from ms_quant.cells import QuantLinear
from ms_quant.cells.whole import KEY
from ms_quant.errors import MsQuantError
from ms_quant.formats.mindie_sd.types import TYPES
from ms_quant.numerics.linear import int8_linear
from ms_quant.schemes.table import SCHEMES, get_scheme
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig, kept_timesteps

pytestmark = pytest.mark.usefixtures("blocking_mindspore")


def _script() -> ModuleType:
    """whole_networks.py, which another process runs, too."""
    path = Path(__file__).with_name("whole_networks.py")
    spec = importlib.util.spec_from_file_location("whole_networks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nets = _script()
CHECKPOINTS = [
    *((scheme, "ckpt") for scheme in SCHEMES),
    *((scheme, "safetensors") for scheme in nets.SEVERAL),
]


def small(seed: int = 0) -> nn.Cell:
    network = nn.SequentialCell(nn.Dense(8, 6), nn.LayerNorm([6]), nn.Dense(6, 4, has_bias=False))
    rng = np.random.default_rng(seed)
    for p in network.get_parameters():
        p.set_data(Tensor(rng.standard_normal(p.shape).astype("f4")))
    return network


def data() -> Tensor:
    return Tensor(np.random.default_rng(0).standard_normal((5, 8)).astype("f4"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_of_a_network_comes_back(scheme: str, tmp_path: Path) -> None:
    with kept_timesteps():
        network = nets.quantized(scheme)
        path = ms_quant.save_quantized(network, tmp_path / "new", format="network")
        assert path == str(tmp_path / "new" / "quantized_network.safetensors")
        assert [file.name for file in (tmp_path / "new").iterdir()] == [Path(path).name]
        TimestepManager.set_timestep_idx_max(5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fresh = ms_quant.quantize(nets.Net(1), path, timestep_policy=nets.policy_of(scheme))
        assert TimestepManager.get_timestep_idx_max() == (2 if scheme == "W8A8_TIMESTEP" else 5)
        expected = {n: p.asnumpy() for n, p in network.parameters_and_names()}
        found = {n: p.asnumpy() for n, p in fresh.parameters_and_names()}
        assert list(found) == list(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, name)
        assert fresh.again is fresh.gate and isinstance(fresh.gate, QuantLinear)
        for step in range(2):
            TimestepManager.set_timestep_idx(step)
            y = network(nets.inputs()).asnumpy()
            np.testing.assert_array_equal(fresh(nets.inputs()).asnumpy(), y)
        again = ms_quant.save_quantized(fresh, tmp_path / "again", format="network")
        assert Path(again).read_bytes() == Path(path).read_bytes()


@pytest.mark.parametrize(("scheme", "format"), CHECKPOINTS)
def test_mindspores_own_checkpoint(scheme: str, format: str, tmp_path: Path) -> None:
    """Every scheme, into a network that has computed already."""
    with kept_timesteps():
        network, other = nets.quantized(scheme), nets.quantized(scheme, 1)
        TimestepManager.set_timestep_idx(1)
        other(nets.inputs())
        ms.save_checkpoint(network, str(tmp_path / "network"), format=format)
        held = ms.load_checkpoint(str(tmp_path / f"network.{format}"), format=format)
        assert ms.load_param_into_net(other, held, strict_load=True) == ([], [])
        other.scale.assign_value(network.scale)  # MindSpore saves no buffers
        expected = network(nets.inputs()).asnumpy()
        np.testing.assert_array_equal(other(nets.inputs()).asnumpy(), expected)


def test_another_process_computes_the_same(tmp_path: Path, package_environment: dict) -> None:
    """In every mode, from every file: tests/cells/whole_networks.py."""
    command = [sys.executable, nets.__file__, str(tmp_path / "saved")]
    for _ in ("saves", "loads"):
        done = subprocess.run(
            command, env=package_environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.split()[0] in nets.SEVERAL]
    assert lines == [f"{s} whole network.ckpt network.safetensors" for s in nets.SEVERAL]


def test_what_the_linears_files_leave_is_told(tmp_path: Path) -> None:
    network = ms_quant.quantize(small(), "W8A8_DYNAMIC", exclude=["2"])
    path = ms_quant.save_quantized(network, tmp_path)
    expected = (
        r"quant_model_description_w8a8_dynamic.json: gives the quantized linears alone; 3 other "
        r"parameters such as '1.gamma' stay as the network has them. Load those, too, or write all "
        r"with save_quantized\(..., format=\"network\"\)"
    )
    with pytest.warns(UserWarning, match=expected) as caught:
        ms_quant.quantize(small(1), path)
    assert len(caught) == 1 and caught[0].filename == __file__
    network = nn.SequentialCell(nn.Dense(8, 6), nn.ReLU())
    path = ms_quant.save_quantized(ms_quant.quantize(network, "W8A8_DYNAMIC"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ms_quant.quantize(nn.SequentialCell(nn.Dense(8, 6), nn.ReLU()), path)


def test_a_network_of_two_schemes_and_one_that_was_changed(tmp_path: Path) -> None:
    network = ms_quant.quantize(small(), "W8A8_DYNAMIC", include=["0"])
    network = ms_quant.quantize(network, "W4A16", group_size=0)
    network[0].bias[2] = 7
    network[2].weight.set_data(Tensor(np.full((4, 6), -3, np.int8)))
    expected = network(data()).asnumpy()
    fresh = ms_quant.quantize(
        small(1), ms_quant.save_quantized(network, tmp_path, format="network")
    )
    np.testing.assert_array_equal(fresh(data()).asnumpy(), expected)


def test_bfloat16_parameters_and_other_types(tmp_path: Path) -> None:
    def made() -> nn.Cell:
        network = small(3)
        network.insert_param_to_cell("half", Parameter(Tensor([1.5, 2], ms.bfloat16)))
        network.insert_param_to_cell("count", Parameter(Tensor([1, 2], ms.int64)))
        network.insert_param_to_cell("mask", Parameter(Tensor([True, False])))
        return network

    network = ms_quant.quantize(made(), "W8A16")
    network.half.set_data(Tensor([3, 0.25], ms.bfloat16))
    network.count.set_data(Tensor([8, 9], ms.int64))
    network.mask.set_data(Tensor([False, True]))
    fresh = ms_quant.quantize(made(), ms_quant.save_quantized(network, tmp_path, format="network"))
    assert fresh.half.astype(ms.float32).asnumpy().tolist() == [3, 0.25]
    assert fresh.half.dtype == ms.bfloat16
    assert fresh.count.asnumpy().tolist() == [8, 9]
    assert fresh.mask.asnumpy().tolist() == [False, True]


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC", "W8A8_MIX", "W8A8_MXFP8"])
def test_linears_made_for_bfloat16(scheme: str, tmp_path: Path) -> None:
    """Their inputs are rounded where the runtime rounds them."""
    algorithm = "minmax" if scheme == "W8A8_MIX" else "smoothquant"
    network = ms_quant.quantize(
        small(), scheme, calibration=[data()], algorithm=algorithm, dtype="bfloat16"
    )
    expected = network(data()).asnumpy()
    path = ms_quant.save_quantized(network, tmp_path, format="network")
    np.testing.assert_array_equal(ms_quant.quantize(small(1), path)(data()).asnumpy(), expected)
    ms_quant.quantize(small(1), path, dtype="bfloat16")
    with pytest.raises(
        MsQuantError, match="0 is made for bfloat16, expected no other dtype than t"
    ):
        ms_quant.quantize(small(1), path, dtype="float16")


@pytest.mark.filterwarnings("ignore:.*gives the quantized linears alone")
@pytest.mark.parametrize("scheme", sorted(TYPES))
def test_linears_of_mindie_sds_files(scheme: str, tmp_path: Path) -> None:
    def made(seed: int) -> nn.Cell:
        network = nn.SequentialCell(nn.Dense(64, 64, has_bias=scheme != "W4A4_DYNAMIC"), nn.ReLU())
        weight = np.random.default_rng(seed).standard_normal((64, 64))
        network[0].weight.set_data(Tensor(weight.astype("f4")))
        return network

    def inputs() -> Iterator[Tensor]:
        TimestepManager.set_timestep_idx(0)
        yield Tensor(np.random.default_rng(2).standard_normal((5, 64)).astype("f4"))

    with kept_timesteps():
        policy = TimestepPolicyConfig("static") if scheme == "W8A8_TIMESTEP" else None
        ours = "W8A8_PER_CHANNEL" if scheme == "W8A8" else scheme
        options = dict(TYPES[ours].options)
        network = ms_quant.quantize(
            made(0),
            ours,
            calibration=inputs(),
            dtype="bfloat16",
            timestep_policy=policy,
            for_format="mindie-sd",
            **options,
        )
        path = ms_quant.save_quantized(network, tmp_path)
        loaded = ms_quant.quantize(made(1), path, timestep_policy=policy)
        (x,) = inputs()
        expected = loaded(x).asnumpy()
        whole = ms_quant.save_quantized(loaded, tmp_path, format="network")
        fresh = ms_quant.quantize(made(1), whole, timestep_policy=policy)
        np.testing.assert_array_equal(fresh(x).asnumpy(), expected)


@pytest.fixture
def saved(tmp_path: Path, load_tensors: Callable, save_tensors: Callable):
    """``saved(scheme, change, meta)``: the path of a file, its tensors or header changed."""

    def save(scheme: str, change: Callable | None = None, meta: Any = None) -> Path:
        network = ms_quant.quantize(small(), scheme, calibration=[data()], group_size=0)
        path = Path(ms_quant.save_quantized(network, tmp_path / "saved", format="network"))
        tensors = load_tensors(path.parent)
        if change is not None:
            change(tensors)
        save_tensors(path, tensors)
        body = path.read_bytes()
        length = int.from_bytes(body[:8], "little")
        header = json.loads(body[8 : 8 + length])
        linears = {name: {"scheme": scheme, "group_size": 0, "symmetric": True} for name in "02"}
        stated = {"version": 1, "linears": linears} if meta is None else meta
        header["__metadata__"] = {KEY: stated if isinstance(stated, str) else json.dumps(stated)}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body[8 + length :])
        return path

    return save


def put(name: str, array: Any) -> Callable[[dict], None]:
    return lambda tensors: tensors.__setitem__(name, np.asarray(array))


def test_files_are_read_as_they_are_changed(saved: Callable) -> None:
    path = saved("W8A16", put("1.beta", np.arange(6, dtype="f4")))
    network = ms_quant.quantize(small(1), path)
    assert network[1].beta.asnumpy().tolist() == list(range(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.gamma"), "lacks 1 tensors such as '1.gamma', expected those of the ne"),
        (put("1.more", np.float32([1])), "holds also 1 tensors such as '1.more', expected those o"),
        (put("0.more", np.float32([1])), "holds also 1 tensors such as '0.more', expected those o"),
        (lambda t: t.pop("0.weight_scale"), "has no tensor '0.weight_scale'"),
        (put("0.weight", np.zeros((6, 8), "f4")), r"'0.weight' is float32 \[6, 8\], expected int8"),
        (
            put("0.weight", np.zeros((6, 9), "i1")),
            r"int8 \[6, 9\], expected int8 \[6, 8\] as the n",
        ),
        (put("0.weight", np.full((6, 8), 8, "i1")), r"'0.weight' holds codes 8..8, expected -8..7"),
        (
            put("0.weight_scale", np.ones((6, 2), "f4")),
            r"'0.weight_scale' is float32 \[6, 2\], exp",
        ),
        (put("0.weight_scale", np.full((6, 1), np.nan, "f4")), "'0.weight_scale' holds NaN or inf"),
        (put("0.bias", np.zeros(7, "f4")), r"'0.bias' is float32 \[7\], expected float32 \[6\]"),
        (put("1.beta", np.zeros(6, "f8")), r"'1.beta' is float64 \[6\], expected float32 \[6\]"),
        (
            put("0.left_trans", np.zeros((3, 3), "f4")),
            r"0.left_trans is \[3, 3\], expected a squar",
        ),
        (put("0.left_trans", np.zeros((2, 4), "f4")), "has no tensor '0.clip_ratio'"),
        (put("0.svd_lowrank_l1", np.zeros((10**6, 0), "f4")), r"'0.svd_lowrank_l1' is float32"),
    ],
)
def test_tensors_that_are_not_the_networks_are_refused(
    saved: Callable, change: Callable, message: str
) -> None:
    path = saved("W4A16", change)
    network = small(1)
    before = network(data()).asnumpy()
    with pytest.raises(MsQuantError, match=message) as refusal:
        ms_quant.quantize(network, path)
    assert str(path) in str(refusal.value)
    np.testing.assert_array_equal(network(data()).asnumpy(), before)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("no json", r"not valid JSON"),
        ([1], "expected linears of version 1"),
        ({"version": 2, "linears": {"0": {}}}, "expected linears of version 1"),
        ({"version": 1, "linears": {}}, "expected linears of version 1"),
        ({"version": 1, "linears": {"0": 5}}, "'0': 5, expected a scheme and its options"),
        ({"version": 1, "linears": {"0": {"scheme": "W3"}}}, "'0': scheme 'W3' is unknown"),
        ({"version": 1, "linears": {"0": {"scheme": "W8A16", "x": 1}}}, "'0': .*x"),
        (
            {"version": 1, "linears": {"0": {"scheme": "W8A16", "group_size": [1]}}},
            "group_size is .1., expected one of",
        ),
        (
            {"version": 1, "linears": {"1": {"scheme": "W8A16"}}},
            "holds '1' as a quantized linear, the network has no linear there",
        ),
    ],
)
def test_a_header_that_says_nothing_is_refused(saved: Callable, meta: Any, message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        ms_quant.quantize(small(1), saved("W8A16", meta=meta))


def test_what_cannot_be_saved_or_loaded(tmp_path: Path, save_tensors: Callable) -> None:
    path = tmp_path / "quantized_network.safetensors"
    with pytest.raises(MsQuantError, match="SequentialCell: holds no QuantLinear, nothing to save"):
        ms_quant.save_quantized(small(), tmp_path, format="network")
    network = ms_quant.quantize(small(), "W8A8_DYNAMIC")
    with pytest.raises(
        MsQuantError, match="rank: given with format 'network', expected it for MindIE-SD"
    ):
        ms_quant.save_quantized(network, tmp_path, format="network", rank=0)
    network[2] = QuantLinear(int8_linear(np.ones((4, 6), np.int8), np.ones(4, np.float32)))
    with pytest.raises(
        MsQuantError, match="2: is a QuantLinear made by hand, expected those of qu"
    ):
        ms_quant.save_quantized(network, tmp_path, format="network")
    assert not path.exists()
    save_tensors(path, {"a": np.zeros(3, "f4")})
    with pytest.raises(
        MsQuantError, match=r"ms_quant\.network in the header: missing, expected a f"
    ):
        ms_quant.quantize(small(), path)
    with pytest.raises(
        MsQuantError, match=r"calibration: given with .*safetensors, which says all"
    ):
        ms_quant.quantize(small(), str(path), calibration=[data()])
    with pytest.raises(
        MsQuantError, match=r"net.ckpt: is MindSpore's checkpoint, which does not s"
    ):
        ms_quant.quantize(small(), "net.ckpt")


def batches():
    raise AssertionError("calibration has begun")
    yield


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("W8A8", {"algorithm": "osl"}, "0: scheme W8A8 has an input scale for each channel"),
        ("W4A8_DYNAMIC", {}, "0: MindIE-SD serves no scheme W4A8_DYNAMIC, expected one of"),
        ("W16A16S", {}, "0: MindIE-SD serves no scheme W16A16S"),
        ("W4A16", {"group_size": 32}, "group_size is 32, MindIE-SD reads scheme W4A16 only with"),
        ("W4A4_DYNAMIC", {}, "0: MindIE-SD drops the bias of a W4A4_DYNAMIC linear"),
        (
            "W8A16",
            {"algorithm": "awq", "group_size": 0},
            "0: MindIE-SD ignores mul_scale of a W8A16",
        ),
        (
            "W4A4_MXFP4_SVD",
            {},
            "puts a transform or a branch beside the weight, MindIE-SD reads no",
        ),
    ],
)
def test_what_mindie_sd_cannot_hold_is_refused_before_calibration(
    scheme: str, options: dict, message: str
) -> None:
    network = nn.SequentialCell(nn.Dense(64, 64))
    with pytest.raises(MsQuantError, match=message):
        ms_quant.quantize(network, scheme, calibration=batches(), for_format="mindie-sd", **options)
    assert isinstance(network[0], nn.Dense)


def test_what_mindie_sd_holds_is_quantized_for_it(tmp_path: Path) -> None:
    network = ms_quant.quantize(
        small(), "W8A8_PER_CHANNEL", calibration=[data()], for_format="mindie-sd"
    )
    ms_quant.save_quantized(network, tmp_path)
    with pytest.raises(MsQuantError, match="for_format is 'onnx', expected 'mindie-sd' or None"):
        ms_quant.quantize(small(), "W8A16", for_format="onnx")
    with pytest.raises(
        MsQuantError, match="for_format: given with Dense, which is a linear itself"
    ):
        ms_quant.quantize(nn.Dense(4, 4), "W8A16", for_format="mindie-sd")


def test_a_refusal_after_calibration_names_the_file_that_holds_it(tmp_path: Path) -> None:
    network = ms_quant.quantize(small(), "W8A8", calibration=[data()])
    with pytest.raises(
        MsQuantError, match=r"W8A8_PER_CHANNEL; save_quantized\(..., format=.network.\) h"
    ):
        ms_quant.save_quantized(network, tmp_path)
    assert Path(ms_quant.save_quantized(network, tmp_path, format="network")).exists()
    assert get_scheme("W8A8").name in SCHEMES


def test_the_documents_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "networks.md"
    networks, _, _ = page.read_text().partition("## A decoder from a checkpoint")
    parts = networks.split("```python\n")[1:]
    code = "".join(part.partition("```")[0] for part in parts)
    monkeypatch.chdir(tmp_path)
    made: list[nn.Cell] = []

    def build() -> nn.Cell:
        made.append(small(len(made)))
        return made[-1]

    found: dict[str, Any] = {"build": build, "batches": [data()]}
    exec(code, found)
    np.testing.assert_array_equal(made[-2](data()).asnumpy(), made[-1](data()).asnumpy())
    assert found["network"] is made[-1] and found["path"] in code.replace("# ", "")
