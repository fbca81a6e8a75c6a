"""Blocks with experts are done one expert after the other: the same bytes, in bounded memory."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed import KILLED_AT_RENAME
from routed_models import DEEPSEEK, QWEN, routed_tensors, save_routed

from ms_quant.errors import MsQuantError
from ms_quant.pipeline.expert_report import expert_lines
from ms_quant.pipeline.request import QuantizeOptions
from ms_quant.pipeline.run import run_job
from ms_quant.quantization import routed
from ms_quant.quantization.work import BlockWork

DATA = {"samples": 12, "seq_len": 32}
EXPERT = "model.layers.1.mlp.experts.3."


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    """Windows of random tokens."""
    path = tmp_path / "tokens.npz"
    np.savez(path, tokens=np.random.default_rng(5).integers(0, 256, (12, 32)))
    return path


def ran(model: Path, output: Path, calib: Path | None, **more: Any) -> dict[str, Any]:
    """Quantizes; the record of what was done."""
    data = {} if calib is None else {"calib": calib, **DATA}
    scheme = more.pop("scheme", "W4A8_DYNAMIC")
    run_job(QuantizeOptions(model, output, scheme, **data, **more))
    return json.loads((output / "ms_quant.json").read_text())


CASES = {
    "gptq": {"algorithm": "gptq", "formats": ("ascend",)},
    "smoothed": {
        "scheme": "W8A8_DYNAMIC",
        "algorithm": "smoothquant",
        "formats": ("ascend",),
    },
    "float16": {"algorithm": "gptq", "formats": ("ascend",), "dtype": "float16"},
}


@pytest.mark.parametrize("raw", [DEEPSEEK, {**QWEN, "num_experts": 16}], ids=["latent", "qwen"])
@pytest.mark.parametrize("case", CASES)
def test_one_by_one_gives_what_the_whole_block_does(
    raw: dict[str, Any],
    case: str,
    tmp_path: Path,
    calib: Path,
    load_tensors: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routed, "FEW_TOKENS", 1)
    model = save_routed(tmp_path / "model", raw)
    found = ran(model, tmp_path / "one", calib, **CASES[case])
    monkeypatch.setattr(BlockWork, "by_experts", lambda self, index: False)
    whole = ran(model, tmp_path / "whole", calib, **CASES[case])
    one, other = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "whole")
    assert one.keys() == other.keys()
    different = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    assert not different
    assert found["chosen"] == whole["chosen"]
    assert found["activation_ranges"] == whole["activation_ranges"]


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("format", ["ascend", "compressed-tensors"])
def test_without_data_an_output_is_written_at_once(
    format: str, shard_bytes: int | None, tmp_path: Path, file_contents: Callable
) -> None:
    """The same files as by way of a job, experts one by one or whole blocks."""
    model = save_routed(tmp_path / "model", DEEPSEEK)
    more = {"scheme": "W8A8_DYNAMIC", "formats": (format,), "shard_bytes": shard_bytes}
    ran(model, tmp_path / "one", None, **more)
    assert not (tmp_path / "one.job").exists()
    ran(model, tmp_path / "other", None, keep_job=True, **more)
    assert len(list((tmp_path / "other.job").glob("block-*-expert-*"))) == 3 * 16
    assert file_contents(tmp_path / "one") == file_contents(tmp_path / "other")


def test_nan_in_an_expert_ends_it_with_its_name(
    tmp_path: Path, load_tensors: Callable, save_tensors: Callable
) -> None:
    model = save_routed(tmp_path / "model", DEEPSEEK)
    tensors, name = load_tensors(model), "model.layers.2.mlp.experts.7.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4] = np.nan
    save_tensors(model / "model.safetensors", tensors)
    with pytest.raises(MsQuantError, match=re.escape(name)):
        ran(model, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    tensors[name][3, 4] = 0
    save_tensors(model / "model.safetensors", tensors)
    ran(model, tmp_path / "out", None)
    assert [path.name for path in tmp_path.iterdir() if path.name != "model"] == ["out"]


def test_an_expert_that_no_token_goes_to_is_seen_on_others(
    tmp_path: Path, calib: Path, load_tensors: Callable, save_tensors: Callable
) -> None:
    model = save_routed(tmp_path / "model", DEEPSEEK)
    tensors = load_tensors(model)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].copy()
    tensors[name][3] = -9
    save_tensors(model / "model.safetensors", tensors)
    record = ran(model, tmp_path / "out", calib, algorithm="gptq", formats=("ascend",))
    routing = record["routing"]["block 1"]
    assert routing["none"] == [3] and 3 in routing["seen_on_others"] and routing["least"] == 0
    assert routing["tokens"] == 12 * 32 and routing["mean"] == 12 * 32 * 4 / 16
    made = load_tensors(tmp_path / "out")
    assert all(np.isfinite(t.astype(np.float32)).all() for n, t in made.items() if EXPERT in n)
    plain = tmp_path / "plain"
    ran(model, plain, None, formats=("ascend",))
    assert (
        load_tensors(plain)[f"{EXPERT}down_proj.weight"] != made[f"{EXPERT}down_proj.weight"]
    ).any()


def test_a_layer_for_further_tokens_is_calibrated(
    tmp_path: Path, calib: Path, load_tensors: Callable
) -> None:
    """Its experts see the tokens of each window but the last, after which none is known."""
    model = save_routed(tmp_path / "model", DEEPSEEK)
    more = {"scheme": "W4A8_DYNAMIC,mtp=W4A8_DYNAMIC", "formats": ("ascend",)}
    record = ran(model, tmp_path / "out", calib, algorithm="gptq,mtp=gptq", **more)
    routing = record["routing"]
    assert routing["block 2"]["tokens"] == 12 * 32 and routing["block 3"]["tokens"] == 12 * 31
    ran(model, tmp_path / "plain", None, **more)
    one, other = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "plain")
    for member in ("self_attn.q_b_proj", "mlp.experts.3.down_proj", "mlp.shared_experts.up_proj"):
        name = f"model.layers.3.{member}.weight"
        assert (one[name] != other[name]).any()


def test_every_expert_may_be_seen_on_all_tokens(
    tmp_path: Path, calib: Path, load_tensors: Callable
) -> None:
    model = save_routed(tmp_path / "model", QWEN)
    more = {"algorithm": "gptq", "formats": ("ascend",)}
    record = ran(model, tmp_path / "all", calib, all_tokens=True, **more)
    assert record["routing"]["block 0"]["seen_on_others"] == list(range(8))
    own = ran(model, tmp_path / "own", calib, **more)["routing"]["block 0"]["seen_on_others"]
    one, other = load_tensors(tmp_path / "all"), load_tensors(tmp_path / "own")
    changed = {
        expert: (one[name] != other[name]).any()
        for expert in range(8)
        for name in [f"model.layers.0.mlp.experts.{expert}.up_proj.weight"]
    }
    assert len(own) < 8 and changed == {expert: expert not in own for expert in range(8)}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (one[name] == other[name]).all()


def test_all_tokens_without_use_is_refused(tmp_path: Path, tiny_model: Callable) -> None:
    dense, model = tiny_model("dense"), save_routed(tmp_path / "model", QWEN)
    with pytest.raises(MsQuantError, match="all-tokens: the model has no routed experts"):
        ran(dense, tmp_path / "out", None, all_tokens=True, scheme="W8A8_DYNAMIC")
    with pytest.raises(MsQuantError, match="uses no calibration data, expected no --all-tokens"):
        ran(model, tmp_path / "out", None, all_tokens=True, scheme="W8A8_DYNAMIC")


def test_the_report_says_what_experts_saw() -> None:
    entry = {"tokens": 9, "least": 0, "mean": 4.5, "most": 8, "none": [1], "seen_on_others": [1, 2]}
    lines = expert_lines({"routing": {"block 3": entry}}, "x.json")
    assert lines == (
        "an expert saw 4 calibration tokens in the mean, and 0 in block 3 at the least",
        "2 experts were seen on tokens that do not go to them, too",
        "experts that no token went to, 1: block 3 expert 1",
    )
    assert expert_lines({}, "x.json") == ()
    for wrong in ([], {}, {"block 3": {**entry, "least": "0"}}, {"block 3": None}):
        with pytest.raises(MsQuantError, match=r"x\.json: routing"):
            expert_lines({"routing": wrong}, "x.json")


PROGRAM = (
    KILLED_AT_RENAME
    + """
from ms_quant.pipeline.request import QuantizeOptions
from ms_quant.files import filling
from ms_quant.pipeline.run import run_job

filling.SAVED_SECONDS = 0
data = {"calib": Path(calib), "samples": 12, "seq_len": 32} if calib else {}
algorithm = "gptq" if calib else "minmax"
run_job(QuantizeOptions(Path(model), Path(output), "W4A8_DYNAMIC", algorithm, **data))
print(count)
"""
)


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_kill_loses_one_expert_at_most(
    calibrated: bool,
    tmp_path: Path,
    calib: Path,
    package_environment: dict[str, str],
    file_contents: Callable,
) -> None:
    raw = {**DEEPSEEK, "num_hidden_layers": 2, "n_routed_experts": 8, "num_nextn_predict_layers": 0}
    model = save_routed(tmp_path / "model", raw)

    def run(output: Path, last: int) -> subprocess.CompletedProcess[str]:
        data = str(calib) if calibrated else ""
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, str(model), data, str(output), str(last)],
            env=package_environment,
            capture_output=True,
            text=True,
        )

    first = run(tmp_path / "first", 0)
    assert first.returncode == 0, first.stderr
    expected, count = file_contents(tmp_path / "first"), int(first.stdout)
    output, done, kills = tmp_path / "out", 0, 0
    while (result := run(output, 6)).returncode:
        kills += 1
        assert result.returncode == -signal.SIGKILL, result.stderr
        experts = len(sorted((tmp_path / "out.job").glob("block-*-expert-*")))
        assert experts >= done
        done = experts
        assert kills < count, "it does not come to an end"
    assert kills > count // 8
    assert file_contents(output) == expected
    assert not (tmp_path / "out.job").exists()


MEASURED = """
import re, sys
from pathlib import Path
from ms_quant.errors import MsQuantError
from ms_quant.pipeline.request import QuantizeOptions
from ms_quant.pipeline.run import run_job

model, calib, output = sys.argv[1:]
data = {"calib": Path(calib), "samples": 12, "seq_len": 32} if calib else {}
algorithm = "gptq" if calib else "minmax"
run_job(QuantizeOptions(Path(model), Path(output), "W4A8_DYNAMIC", algorithm, **data))
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read there")
@pytest.mark.parametrize("calibrated", [True, False])
def test_memory_does_not_grow_with_the_number_of_experts_or_layers(
    calibrated: bool, tmp_path: Path, calib: Path, package_environment: dict[str, str]
) -> None:
    """An expert has 0.8 MB in float32, so that 64 of them in memory would show."""

    def peak(experts: int, layers: int) -> int:
        sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256}
        counts = {"n_routed_experts": experts, "num_hidden_layers": layers}
        raw = {**DEEPSEEK, **sizes, **counts, "num_nextn_predict_layers": 0}
        model = save_routed(tmp_path / f"model-{experts}-{layers}", raw)
        output = tmp_path / f"out-{experts}-{layers}"
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(model), str(calib) if calibrated else "", output],
            env=package_environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    few = peak(8, 2)
    assert peak(64, 2) <= 1.15 * few
    assert peak(8, 8) <= 1.15 * few


def test_random_weights_are_as_the_config_says() -> None:
    tensors = routed_tensors(QWEN)
    assert tensors["model.layers.0.mlp.experts.7.down_proj.weight"].shape == (64, 32)
