"""What the project promises about the model in its tree, measured on it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ms_quant.data.calibration import eval_windows
from ms_quant.models.config import load_config
from ms_quant.pipeline.run import QuantizeOptions, run_job
from sparse_compress.codec.fractal import unsupported_reason
from sparse_compress.layouts.partition import fused_shape
from sparse_compress.pipeline.request import SparseOptions
from sparse_compress.pipeline.run import run
from sparse_compress.verify.checkpoint import verify

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "stdlib-qwen3-6m"
TEXT = ROOT / "models" / "text"
WINDOWS = 64  # 16,384 tokens of the held-out text


@pytest.fixture(scope="module", autouse=True)
def fast_launches():
    import mindspore

    mindspore.runtime.launch_blocking()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return eval_windows(TEXT / "heldout.txt", MODEL, 256)[:WINDOWS]


def perplexity(directory: Path, tokens: np.ndarray, **options: str) -> float:
    from ms_quant.evaluation.perplexity import perplexity as measure
    from ms_quant.formats.opening import open_model

    return measure(open_model(directory), tokens, **options).perplexity


@pytest.fixture(scope="module")
def exact(tokens) -> float:
    return perplexity(MODEL, tokens)


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> Path:
    path = ROOT / "tools" / "inject_outliers.py"
    spec = importlib.util.spec_from_file_location("inject_outliers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    target = tmp_path_factory.mktemp("twin") / "model"
    module.inject(MODEL, target, channels=4, factor=32)
    return target


def quantized(model: Path, output: Path, scheme: str, algorithm: str, **options: int) -> Path:
    data_free = algorithm == "minmax" and scheme in ("W8A8_DYNAMIC", "W8A16")
    calib = None if data_free else TEXT / "calibration.txt"
    choices = {"algorithm_options": options}
    run_job(QuantizeOptions(model, output, scheme, algorithm, **choices, calib=calib))
    return output


def test_the_model_learned_and_uses_its_context(tokens):
    from ms_quant.evaluation.perplexity import token_losses
    from ms_quant.formats.opening import open_model

    card = json.loads((MODEL / "training.json").read_text())
    losses = token_losses(open_model(MODEL), eval_windows(TEXT / "heldout.txt", MODEL, 256))
    measured = float(np.exp(losses.mean()))
    assert measured <= 25
    assert measured < 0.6 * card["trigram_perplexity"]
    # The card counts the first token of each window too (after the window before), so it differs.
    assert measured == pytest.approx(card["heldout_perplexity"], rel=0.02)
    assert losses[:, 127:].mean() < losses[:, :32].mean()


def test_calibration_and_heldout_share_no_file():
    calibration, heldout = (
        set((TEXT / f"{name}.files.txt").read_text().split()) for name in ("calibration", "heldout")
    )
    assert calibration and heldout and not calibration & heldout


def test_the_model_meets_the_unzip_limits_on_both_ranks():
    config = load_config(MODEL)
    for group in config.block(0).groups:
        n, k = fused_shape(group, 2)
        assert unsupported_reason(n, k) is None
        assert n % 128 == 0 and k % 64 == 0 and k > 256
    assert (MODEL / "model.safetensors").stat().st_size <= 16 << 20


@pytest.mark.parametrize(
    ("scheme", "algorithm"), [("W8A8", "osl"), ("W8A8_DYNAMIC", "minmax"), ("W8A16", "minmax")]
)
def test_quantization_costs_less_than_half_a_percent(tmp_path, tokens, exact, scheme, algorithm):
    made = quantized(MODEL, tmp_path / "made", scheme, algorithm)
    assert perplexity(made, tokens) == pytest.approx(exact, rel=0.005)


@pytest.mark.parametrize(
    ("scheme", "algorithm", "options", "limit"),
    [
        ("W4A16", "gptq", {}, 0.01),  # in groups of 128
        ("W4A4_FLATQUANT_DYNAMIC", "minmax", {"steps": 40}, 0.05),
    ],
)
def test_what_four_bits_cost(tmp_path, tokens, exact, scheme, algorithm, options, limit):
    made = quantized(MODEL, tmp_path / "made", scheme, algorithm, **options)
    assert exact < perplexity(made, tokens) < (1 + limit) * exact


def test_what_a_cache_in_int8_costs(tmp_path, tokens):
    request = QuantizeOptions(
        MODEL,
        tmp_path / "made",
        "W8A16",
        kv_cache="C8",
        calib=TEXT / "calibration.txt",
    )
    run_job(request)
    exact = perplexity(request.output, tokens, kv_cache="float")
    for kind in ("C8", "C8_DYNAMIC"):
        assert perplexity(request.output, tokens, kv_cache=kind) == pytest.approx(exact, rel=0.002)


def test_smoothing_recovers_what_outlier_channels_cost(tmp_path, tokens, exact, twin):
    assert perplexity(twin, tokens) == pytest.approx(exact, rel=1e-6)
    plain = perplexity(quantized(twin, tmp_path / "plain", "W8A8", "minmax"), tokens)
    assert plain > 1.02 * exact
    for algorithm in ("smoothquant", "osl"):
        made = quantized(twin, tmp_path / algorithm, "W8A8", algorithm)
        assert perplexity(made, tokens) == pytest.approx(exact, rel=0.01)


def test_sparse_compression_pays_and_activation_aware_pruning_is_no_worse(tmp_path, tokens, exact):
    plain = quantized(MODEL, tmp_path / "plain", "W8A8", "minmax")
    plain_bytes = sum(path.stat().st_size for path in plain.glob("*.safetensors"))
    found = {}
    for pruning in ("activation", "magnitude"):
        options = SparseOptions(
            MODEL, tmp_path / pruning, TEXT / "calibration.txt", sparsity=0.5, pruning=pruning
        )
        result = run(options)
        assert result.ratio < 0.90
        assert result.tensor_bytes < plain_bytes
        found[pruning] = perplexity(tmp_path / pruning, tokens)
    assert found["activation"] <= found["magnitude"]
    assert exact < found["activation"] < 10 * exact


def test_rounding_for_a_size_reaches_it_at_a_fraction_of_what_pruning_costs(
    tmp_path, tokens, exact
):
    options = SparseOptions(
        MODEL, tmp_path / "made", TEXT / "calibration.txt", target_ratio=0.45, samples=32
    )
    result = run(options)
    assert 0.44 < result.ratio <= 0.45
    assert perplexity(tmp_path / "made", tokens) < 1.015 * exact
    verified = verify(tmp_path / "made", MODEL)
    assert verified.problems == ()
    assert verified.checked["measured"] == 21
