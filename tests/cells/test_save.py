"""Saving a network for MindIE-SD: the files by hand, and what no file of it can hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindspore")

from mindspore import Tensor, mint, nn

import ms_quant
from ms_quant.cells import QuantLinear
from ms_quant.cells.as_linear import as_linear
from ms_quant.errors import MsQuantError
from ms_quant.numerics.activation import Float, PerToken, PerTokenFloat8, StaticActivation
from ms_quant.numerics.float_grid import DualMxFormat, Float8Format
from ms_quant.numerics.grid import AffineFormat
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.schemes.table import SCHEMES

TRAINED = "W4A4_FLATQUANT_DYNAMIC"  # takes long
pytestmark = [
    pytest.mark.usefixtures("blocking_mindspore"),
    pytest.mark.filterwarnings("ignore:.*gives the quantized linears alone"),
    pytest.mark.filterwarnings("ignore:.*is made for float32"),
]


def net(bias: bool = True, seed: int = 0) -> nn.Cell:
    made = nn.SequentialCell(
        nn.Dense(8, 6, has_bias=bias), nn.LayerNorm([6]), mint.nn.Linear(6, 2, bias=False)
    )
    rng = np.random.default_rng(seed)
    for p in made.get_parameters():
        p.set_data(Tensor(rng.standard_normal(p.shape).astype("f4")))
    return made


def data(seed: int = 0, columns: int = 8) -> Tensor:
    return Tensor(np.random.default_rng(seed).standard_normal((9, columns)).astype("f4"))


def test_files_by_hand(tmp_path: Path, load_tensors: Callable) -> None:
    float_weight = net()[0].weight.asnumpy()
    network = ms_quant.quantize(net(), "W8A8_DYNAMIC", include=["2"])
    path = ms_quant.save_quantized(network, tmp_path / "new" / "one")
    assert path == str(tmp_path / "new" / "one" / "quant_model_description_w8a8_dynamic.json")
    assert json.loads(Path(path).read_text()) == {
        "model_quant_type": "W8A8_DYNAMIC",
        "0.weight": "FLOAT",
        "0.bias": "FLOAT",
        "2.weight": "W8A8_DYNAMIC",
        "2.weight_scale": "W8A8_DYNAMIC",
    }
    tensors = load_tensors(tmp_path / "new" / "one")
    assert set(tensors) == {"0.weight", "0.bias", "2.weight", "2.weight_scale"}
    np.testing.assert_array_equal(tensors["0.weight"], float_weight)
    np.testing.assert_array_equal(tensors["2.weight"], network[2].weight.asnumpy())
    np.testing.assert_array_equal(
        tensors["2.weight_scale"][:, 0], network[2].weight_scale.asnumpy()
    )


def test_smoothed_and_static_entries(tmp_path: Path, load_tensors: Callable) -> None:
    network = ms_quant.quantize(
        net(), "W8A8_PER_CHANNEL", calibration=[data()], algorithm="smoothquant", include=["0"]
    )
    path = Path(ms_quant.save_quantized(network, tmp_path, rank=3))
    assert path.name == "quant_model_description_w8a8_per_channel_3.json"
    assert (tmp_path / "quant_model_weight_w8a8_per_channel_3.safetensors").is_file()
    kind = "W8A8_PER_CHANNEL"
    assert json.loads(path.read_text()) == {
        "model_quant_type": kind,
        "0.div.mul_scale": "FLOAT",
        "0.linear.weight": kind,
        "0.linear.input_scale": kind,
        "0.linear.input_offset": kind,
        "0.linear.deq_scale": kind,
        "0.linear.quant_bias": kind,
        "0.linear.bias": "FLOAT",
        "2.weight": "FLOAT",
    }
    stored = load_tensors(tmp_path)
    np.testing.assert_array_equal(stored["0.linear.bias"], net()[0].bias.asnumpy())
    np.testing.assert_array_equal(stored["0.div.mul_scale"], network[0].mul_scale.asnumpy())


@pytest.mark.parametrize("scheme", ["W8A8_MXFP8", "W8A8_PER_CHANNEL", "W8A8_PER_TENSOR"])
def test_the_same_network_gives_the_same_bytes(scheme: str, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        inputs = [data()] if SCHEMES[scheme].needs_calibration else None
        network = ms_quant.quantize(net(), scheme, calibration=inputs, include=["0"])
        path = ms_quant.save_quantized(network, tmp_path / name)
        found.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert found[0] == found[1] and len(found[0]) == 2
    fresh = ms_quant.quantize(net(), path)
    ms_quant.save_quantized(fresh, tmp_path / "c")  # what was loaded is saved as it was
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == found[0]


def test_parameters_that_were_loaded_later_are_saved(tmp_path: Path) -> None:
    network = ms_quant.quantize(net(), "W8A8_PER_CHANNEL", calibration=[data()], include=["0"])
    network[0].deq_scale.set_data(network[0].deq_scale * 2)
    network[0].input_offset.set_data(network[0].input_offset - 1)
    path = ms_quant.save_quantized(network, tmp_path)
    fresh = ms_quant.quantize(net(), path)
    np.testing.assert_array_equal(fresh[0].deq_scale.asnumpy(), network[0].deq_scale.asnumpy())
    found, expected = (n[0].input_offset.asnumpy() for n in (fresh, network))
    np.testing.assert_array_equal(found, expected)


def cell(weight: Any, activation: Any, bias: bool = False, **more: Any) -> QuantLinear:
    values = np.random.default_rng(0).standard_normal((6, 64)).astype("f4")
    grid = weight.fit(values, "w")
    given = np.ones(6, "f4") if bias else None
    return QuantLinear(QuantizedLinear(grid.round(values), grid, given, activation, **more))


ONES = np.ones(64, np.float32)
REFUSALS: list[tuple[Callable[[], nn.Cell], str]] = [
    (lambda: cell(AffineFormat(4, 32), Float()), r"0: has weights in groups, MindIE-SD reads sym"),
    (lambda: cell(AffineFormat(8, symmetric=False), Float()), r"0: has asymmetric weights"),
    (lambda: cell(AffineFormat(4), PerToken(8)), r"0: has a weight on a grid of int4 and an input"),
    (lambda: cell(AffineFormat(8), PerToken(8, 0.5)), r"0: has a clip_ratio of 0\.5, MindIE-SD re"),
    (lambda: cell(Float8Format(), PerTokenFloat8()), r"Float8Grid and an input of PerTokenFloat8"),
    (lambda: cell(AffineFormat(8), Float(), smooth=ONES), r"0: MindIE-SD ignores mul_scale of a W"),
    (lambda: cell(AffineFormat(4), PerToken(4), smooth=ONES), r"ignores mul_scale of a W4A4_DYNA"),
    (lambda: cell(AffineFormat(4), PerToken(4), True), r"0: MindIE-SD drops the bias of a W4A4_D"),
    (
        lambda: cell(AffineFormat(8), StaticActivation(np.float32(1), 0, ONES)),
        r"0: scheme W8A8 has an input scale for each channel .* expected W8A8_PER_CHANNEL",
    ),
    (
        lambda: cell(SCHEMES["W4A8_MXFP"].weight, SCHEMES["W4A8_MXFP"].activation),
        r"0: has a weight on a MxGrid and an input of MxTokens, expected one of MindIE-SD's types",
    ),
    (
        lambda: cell(
            DualMxFormat("mxfp4_msmodelslim", 32), SCHEMES["W4A4_MXFP4_DUALSCALE"].activation
        ),
        r"0: has a weight on a DualMxGrid of 32 and an input of DualMxTokens",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSALS)
def test_what_the_runtime_would_not_compute_is_refused(
    make: Callable[[], nn.Cell], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MsQuantError, match=message):
        ms_quant.save_quantized(nn.SequentialCell(make()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("W4A4_MXFP4_SVD", {"rank": 2}, "0: has a branch, MindIE-SD reads none, expected none"),
        ("W8A8_MIX", {}, "0: has a weight on a grid of int8 and an input of PhasedActivation"),
    ],
)
def test_other_schemes_are_refused(
    scheme: str, options: dict, message: str, tmp_path: Path
) -> None:
    calibration = None if options else [data()]
    network = ms_quant.quantize(net(), scheme, calibration=calibration, include=["0"], **options)
    with pytest.raises(MsQuantError, match=message):
        ms_quant.save_quantized(network, tmp_path)


def test_arguments(tmp_path: Path) -> None:
    network = ms_quant.quantize(net(), "W8A16")
    with pytest.raises(MsQuantError, match="dtype is 'int8', expected 'bfloat16', 'float16' or No"):
        ms_quant.save_quantized(network, tmp_path, dtype="int8")
    for rank in (-1, True, "0"):
        with pytest.raises(MsQuantError, match=f"rank is {rank!r}, expected an int of at least 0"):
            ms_quant.save_quantized(network, tmp_path, rank=rank)
    with pytest.raises(MsQuantError, match="holds no QuantLinear, nothing to save"):
        ms_quant.save_quantized(net(), tmp_path)
    with pytest.raises(MsQuantError, match="QuantLinear: is a linear itself, expected a network"):
        ms_quant.save_quantized(ms_quant.quantize(nn.Dense(4, 2), "W8A16"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_refused_save_keeps_the_old_files(tmp_path: Path) -> None:
    network = ms_quant.quantize(net(), "W8A8_DYNAMIC")
    ms_quant.save_quantized(network, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(
        MsQuantError, match=r"0\.bias: 6 of 6 values are not exact in bfloat16.*dtype=.bf"
    ):
        ms_quant.save_quantized(network, tmp_path, dtype="bfloat16")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("umask", "mode"), [(0, 0o640), (0o022, 0o640), (0o077, 0o600)])
def test_nobody_else_may_read_the_files(umask: int, mode: int, tmp_path: Path) -> None:
    """MindIE-SD refuses files of more than 0640; what the user's umask takes is not given back."""
    network = ms_quant.quantize(net(), "W8A8_DYNAMIC")
    target = tmp_path / "new"
    target.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    (target / "quant_model_weight_w8a8_dynamic.safetensors").symlink_to(elsewhere)
    before = os.umask(umask)
    try:
        ms_quant.save_quantized(network, target)
    finally:
        os.umask(before)
    files = list(target.iterdir())
    assert len(files) == 2 and not any(path.is_symlink() for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}
    assert elsewhere.read_text() == "kept"


@pytest.mark.parametrize("scheme", ["W8A8_MXFP8", "W4A4_MXFP4_DUALSCALE"])
def test_microscaling_needs_a_bias_in_the_network(scheme: str, tmp_path: Path) -> None:
    network = ms_quant.quantize(net(bias=False), scheme, include=["0"])
    with pytest.raises(MsQuantError, match=f"^0: MindIE-SD fails on a {scheme} linear without a b"):
        ms_quant.save_quantized(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if scheme == "W8A8_MXFP8":
        ms_quant.save_quantized(ms_quant.quantize(net(), scheme, include=["0"]), tmp_path)
        return
    wide = nn.SequentialCell(nn.Dense(96, 4))
    with pytest.raises(MsQuantError, match=r"0: MindIE-SD reads the scales .* in pairs, 96 in"):
        ms_quant.save_quantized(ms_quant.quantize(wide, scheme), tmp_path / "out")
    even = ms_quant.quantize(nn.SequentialCell(nn.Dense(40, 4)), scheme, dtype="float16")
    ms_quant.save_quantized(even, tmp_path)
    with pytest.raises(MsQuantError, match=r"products .* rounded as float16, expected bfloat16: "):
        ms_quant.save_quantized(even, tmp_path / "out", dtype="bfloat16")


def test_a_scale_that_is_made_for_another_type(tmp_path: Path, load_tensors: Callable) -> None:
    """float16 ends where float32 does not: such a scale is raised, or refused by name."""
    small = nn.SequentialCell(nn.Dense(8, 2))
    small[0].weight.set_data(Tensor(np.float32([[1e-3] * 8, [1e-9] * 8])))
    path = ms_quant.save_quantized(
        ms_quant.quantize(small, "W8A8_DYNAMIC", dtype="float16"), tmp_path
    )
    scale = load_tensors(tmp_path)["0.weight_scale"]
    assert scale.dtype == np.float16  # below its normal numbers, above 1e-3 / 127
    np.testing.assert_array_equal(scale, np.float16([[133 * 2.0**-24], [2.0**-24]]))
    assert ms_quant.quantize(nn.SequentialCell(nn.Dense(8, 2)), path)[0].input_dtype == np.float16
    for name, value in (("weight", 1e9), ("bias", 1e5)):
        large = nn.SequentialCell(nn.Dense(8, 2))
        getattr(large[0], name).set_data(
            Tensor(np.full(getattr(large[0], name).shape, value, "f4"))
        )
        with pytest.raises(MsQuantError, match=rf"0\.{name}.*does not fit float16"):
            ms_quant.quantize(large, "W8A8_DYNAMIC", dtype="float16")


@pytest.mark.parametrize("scheme", [n for n in SCHEMES if n not in ("W8A8_TIMESTEP", TRAINED)])
def test_a_cell_tells_what_it_computes(scheme: str) -> None:
    wide = nn.SequentialCell(nn.Dense(128, 6))
    needs = SCHEMES[scheme].needs_calibration or SCHEMES[scheme].algorithm == "admm"
    calibration = [data(columns=128)] if needs else None
    network = ms_quant.quantize(wide, scheme, calibration=calibration)
    x = np.random.default_rng(1).standard_normal((5, 128)).astype("f4")
    found = as_linear(network[0]).forward(x)
    np.testing.assert_allclose(network[0](Tensor(x)).asnumpy(), found, rtol=1e-5, atol=1e-5)
