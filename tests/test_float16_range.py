"""Activations against the largest number of float16, in calibration, smoothing and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slow_decoder import SlowDecoder

from ms_quant.budget import BUDGET
from ms_quant.data.calibration import load_tokens
from ms_quant.errors import MsQuantError
from ms_quant.evaluation.float16_forward import Float16Block, Float16OverflowError
from ms_quant.evaluation.perplexity import perplexity, token_losses
from ms_quant.files.atomic import write_json
from ms_quant.files.reader import Checkpoint
from ms_quant.files.sealed import seal
from ms_quant.formats.opening import open_model
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.config import load_config
from ms_quant.pipeline.request import prepare
from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.quantization.divided import DividedTensors
from ms_quant.recipe import load_recipe
from ms_quant.statistics.activation_range import LARGEST, BlockRanges, float16_facts, read_divided
from ms_quant.verify.checkpoint import verify_checkpoint

Tensors = dict[str, np.ndarray]
BLOCK = "model.layers.1."


def matmul(tensors: Tensors, name: str, index: Any, factor: float) -> None:
    """Multiplies a part of a tensor."""
    wide = tensors[name].astype(np.float32)
    wide[index] *= factor
    tensors[name] = wide.astype(tensors[name].dtype)


def large_gate_up(tensors: Tensors) -> None:
    """Channel 5 of the gated product of block 1 is some 10^5; its contribution stays small."""
    matmul(tensors, f"{BLOCK}mlp.gate_proj.weight", 5, 2**9)
    matmul(tensors, f"{BLOCK}mlp.up_proj.weight", 5, 2**9)
    matmul(tensors, f"{BLOCK}mlp.down_proj.weight", np.s_[:, 5], 2**-18)


def large_values(tensors: Tensors) -> None:
    """Channel 2 of the second value head of block 1 is some 10^5."""
    matmul(tensors, f"{BLOCK}self_attn.v_proj.weight", 8, 2**16)
    for head in (2, 3):  # that read it
        matmul(tensors, f"{BLOCK}self_attn.o_proj.weight", np.s_[:, 6 * head + 2], 2**-16)


def large_residual(tensors: Tensors) -> None:
    """Channel 7 of block 1's output is some 10^5."""
    matmul(tensors, f"{BLOCK}mlp.down_proj.weight", 7, 2**17)


def large_keys(tensors: Tensors) -> None:
    matmul(tensors, f"{BLOCK}self_attn.k_proj.weight", 4, 2**17)


@pytest.fixture
def quantize(tmp_path: Path, calib_text: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    def run(model: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        wanted = {"calib": calib_text, "samples": 4, "seq_len": 16, "dtype": "float16", **options}
        (made,) = run_job(QuantizeOptions(model, output, **wanted)).outputs
        return output, made.as_json()

    return run


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (large_residual, "model.layers.1: mlp.down_proj output reaches .* in channel 7 "),
        (large_keys, "model.layers.1: self_attn.k_proj output reaches .* in channel 4 "),
    ],
)
def test_what_float16_cannot_hold_is_refused(
    tiny_model: Callable[..., Path],
    quantize: Callable[..., Any],
    tmp_path: Path,
    change: Callable[[Tensors], None],
    place: str,
) -> None:
    model = tiny_model(change=change)
    with pytest.raises(MsQuantError, match=place + r".*at most 65,504.*bfloat16"):
        quantize(model)
    assert not [path for path in tmp_path.glob("out-*") if not path.suffix]
    output, result = quantize(model, dtype="bfloat16")  # which holds it
    assert "float16_range" not in result
    facts = float16_facts(json.loads((output / "ms_quant.json").read_text()), "")
    assert "model.layers.1" in facts["float16_range"]  # but the record says so


@pytest.mark.parametrize("change", [large_gate_up, large_values])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exclude": ("model.layers.1.*",)},  # float linears are divided, too
        {"algorithm": "smoothquant", "formats": ("ascend",)},
        {"scheme": "W8A16", "algorithm": "awq", "formats": ("ascend",)},
        {"algorithm": "quarot"},
    ],
)
def test_what_dividing_a_linear_brings_down_is_divided(
    tiny_model: Callable[..., Path],
    quantize: Callable[..., Any],
    calib_text: Path,
    change: Callable[[Tensors], None],
    options: dict[str, Any],
) -> None:
    heads = {"head_dim": 8} if "quarot" in options.get("algorithm", "") else {}
    model = tiny_model(change=change, biases=not heads, **heads)
    if heads and change is large_values:
        pytest.skip("rotation mixes the channels of a head")
    output, result = quantize(model, **options)
    assert "divided by powers of two" in result["float16_warnings"][-1]
    assert verify_checkpoint(output, model).problems == ()
    record = json.loads((output / "ms_quant.json").read_text())
    largest = record["activation_ranges"][1]["largest"]
    assert max(value for value, _ in largest.values()) <= LARGEST
    tokens = load_tokens(calib_text, model, 4, 16, 0)
    found = perplexity(open_model(output), tokens, float16=True).loss
    with pytest.raises(Float16OverflowError, match=r"model\.layers\.1"):
        perplexity(open_model(model), tokens, float16=True)
    assert abs(found - perplexity(open_model(output), tokens).loss) < 0.05


def test_the_divided_model_computes_the_same_bits(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model(change=large_gate_up, biases=True)
    config = load_config(model)
    rng = np.random.default_rng(0)
    divided = {
        "mlp.up_proj": rng.integers(0, 4, 24).astype(np.int32),
        "self_attn.v_proj": rng.integers(0, 4, 12).astype(np.int32),
    }
    source = Checkpoint(model)
    ours = DividedTensors(source, config, [{}, divided])
    x = rng.standard_normal((2, 5, 16), np.float32)
    outputs = []
    for tensors in (source, ours):
        block = BlockForward.load(config, 1, tensors.read_float32)
        outputs.append(block(x, Positions(config, 5)))
    assert np.array_equal(outputs[0].view(np.uint32), outputs[1].view(np.uint32))
    for name in source.names:
        whole = ours.read_float32(name)
        for chunks in (ours.float32_chunks(name, 32), ours.float_chunks(name)):
            assert np.array_equal(np.concatenate([part for _, part in chunks]), whole)
        part = ours.float_chunks(name, slice(1, 3))
        assert np.array_equal(np.concatenate([rows for _, rows in part]), whole[1:3])
        changed = name.startswith(BLOCK) and any(
            path in name for path in ("up_proj", "v_proj", "o_proj.weight", "down_proj.weight")
        )
        exact = source.read_float32(name)
        assert np.array_equal(whole, exact) != changed


def test_smoothing_never_enlarges_beyond_float16(
    tiny_model: Callable[..., Path], quantize: Callable[..., Any], calib_text: Path
) -> None:
    """SmoothQuant at strength 0 divides an input by 1 / max|w|: here up_proj's rows by 1e-4."""

    def large_weights(tensors: Tensors) -> None:
        matmul(tensors, f"{BLOCK}mlp.gate_proj.weight", 5, 2**-14)
        matmul(tensors, f"{BLOCK}mlp.up_proj.weight", 5, 2**6)
        matmul(tensors, f"{BLOCK}mlp.down_proj.weight", np.s_[:, 5], 2**14)

    model = tiny_model(change=large_weights)
    choices = {"algorithm_options": {"alpha": 0.0}}
    output, _ = quantize(model, algorithm="smoothquant", formats=("ascend",), **choices)
    perplexity(open_model(output), load_tokens(calib_text, model, 4, 16, 0), float16=True)


def test_near_the_end_is_warned_of(
    tiny_model: Callable[..., Path], quantize: Callable[..., Any], calib_text: Path
) -> None:
    model = tiny_model()
    output, result = quantize(model)
    assert "float16_warnings" not in result
    largest = json.loads((output / "ms_quant.json").read_text())["activation_ranges"][1]["largest"]
    value, channel = largest["mlp.down_proj output"]
    found = 0.7 * LARGEST / value
    louder = tiny_model(
        "louder",
        dtype="float32",
        change=lambda t: matmul(t, f"{BLOCK}mlp.down_proj.weight", channel, found),
    )
    _, result = quantize(louder)
    (warning,) = result["float16_warnings"]
    assert f"in channel {channel}" in warning and "other text may overflow" in warning
    assert "model.layers.1: " in result["float16_range"] and "70 %" in result["float16_range"]


def test_without_calibration_it_says_so(
    tiny_model: Callable[..., Path], quantize: Callable[..., Any]
) -> None:
    none = {"calib": None, "samples": None, "seq_len": None}
    _, result = quantize(tiny_model(change=large_residual), scheme="W8A8_DYNAMIC", **none)
    assert result["float16_range"].startswith("not looked at")


@pytest.mark.parametrize("algorithm", ["minmax", "quarot"])
def test_data_of_a_scheme_without_calibration_check_the_range(
    tiny_model: Callable[..., Path], quantize: Callable[..., Any], algorithm: str
) -> None:
    """The output differs in nothing but what is known of the activations."""
    asked = {"scheme": "W8A8_DYNAMIC", "algorithm": algorithm}
    none = {"calib": None, "samples": None, "seq_len": None}
    model = tiny_model(head_dim=8)
    checked, result = quantize(model, **asked)
    plain, _ = quantize(model, **asked, **none)
    assert result["float16_range"].startswith("model.layers.")
    for path in plain.glob("*.safetensors"):
        assert (checked / path.name).read_bytes() == path.read_bytes()


def test_a_scheme_without_calibration_is_refused_or_divided(
    tiny_model: Callable[..., Path], quantize: Callable[..., Any]
) -> None:
    with pytest.raises(
        MsQuantError, match=r"model\.layers\.1: mlp.down_proj output .*at most 65,504"
    ):
        quantize(tiny_model("large", change=large_residual), scheme="W8A8_DYNAMIC")
    model = tiny_model(change=large_gate_up)
    output, result = quantize(model, scheme="W8A8_DYNAMIC")
    assert "divided by powers of two" in result["float16_warnings"][-1]
    assert verify_checkpoint(output, model).problems == ()


def test_what_data_are_for_is_said(tiny_model: Callable[..., Path], calib_text: Path) -> None:
    model = tiny_model()
    asked = QuantizeOptions(model, model.with_name("out"), "W8A8_DYNAMIC", dtype="float16")
    checked = prepare(replace(asked, calib=calib_text, samples=3, seq_len=8, seed=1))
    (said,) = checked.notes
    assert said.startswith(f"{calib_text}: scheme W8A8_DYNAMIC with minmax is not calibrated; the")
    assert checked.tokens is not None and checked.tokens.shape == (3, 8)
    for name in ("samples", "seq_len", "seed"):
        option = name.replace("_", "-")
        with pytest.raises(MsQuantError, match=f"no --{option} unless --calib FILE gives some"):
            prepare(replace(asked, **{name: 2}))
    with pytest.raises(MsQuantError, match=r"expected no --calib$"):
        prepare(replace(asked, dtype="bfloat16", calib=calib_text))
    recipe = load_recipe(
        {
            "apiversion": "ms_quant_v1",
            "rules": [{"scheme": "W8A8_DYNAMIC"}],
            "samples": 2,
            "seq_len": 4,
        }
    )
    checked = prepare(replace(asked, recipe=recipe, calib=calib_text))
    assert checked.tokens is not None and checked.tokens.shape == (2, 4)


def test_ranges_are_those_of_the_activations() -> None:
    rng = np.random.default_rng(1)
    batches = [rng.standard_normal((2, 3, 7), np.float32) for _ in range(4)]
    batches[2][1, 2, 4] = -90
    ranges = BlockRanges(3)
    for batch in batches:
        ranges.add("there", batch)
    ranges.add("there", np.empty((0, 7), np.float32))
    every = np.abs(np.concatenate(batches)).reshape(-1, 7).max(axis=0)
    assert np.array_equal(ranges.absmax["there"], every)
    assert ranges.facts({}) == {"largest": {"there": [90.0, 4]}}
    assert str(ranges.extremes()[0]) == "model.layers.3: there reaches 90 in channel 4"
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(MsQuantError, match=r"model\.layers\.3: there holds NaN or infinite"):
            ranges.add("there", np.full((1, 7), wrong, np.float32))


@pytest.mark.parametrize("tied", [False, True])
def test_float16_forward_is_float16_between_operators(
    tiny_model: Callable[..., Path], tied: bool
) -> None:
    """Against the same arithmetic, operator by operator, in NumPy alone."""
    model = open_model(tiny_model(tied=tied, biases=True))
    rng = np.random.default_rng(0)
    x = (20 * rng.standard_normal((1, 6, 16))).astype(np.float16).astype(np.float32)
    ours = Float16Block.of(model, 1, BUDGET)(x, Positions(model.config, 6))

    def half(y: np.ndarray) -> np.ndarray:
        return y.astype(np.float16).astype(np.float64)

    tensors = {name: half(model.tensor(name)) for name in model.config.parameter_shapes()}
    expected = SlowDecoder(model.config, tensors, rounded=half).block(1, x[0].astype(np.float64))
    # A sum on the other side of a tie moves a value by one step of float16, and what follows.
    assert np.abs(ours[0] - expected).max() <= 4 * np.spacing(np.float16(np.abs(expected).max()))
    assert np.array_equal(ours, ours.astype(np.float16).astype(np.float32))


def test_float16_losses_are_near_float32(tiny_model: Callable[..., Path], calib_text: Path) -> None:
    model = tiny_model()
    tokens = load_tokens(calib_text, model, 4, 16, 0)
    exact = token_losses(open_model(model), tokens)
    narrow = token_losses(open_model(model), tokens, float16=True)
    assert 0 < np.abs(exact - narrow).max() < 0.05


def test_eval_shows_the_damage(
    tiny_model: Callable[..., Path], calib_text: Path, ms_quant_command: Callable[..., Any]
) -> None:
    model = tiny_model(change=large_residual)
    run = ms_quant_command("eval", model, "--text", calib_text, "--seq-len", 16, "--windows", 2,
                           "--float16", "--json")  # fmt: skip
    assert run.returncode == 1
    result = json.loads(run.stdout)
    assert result["perplexity"] > 1 and "channel 7" in result["float16_overflow"]
    assert "1 problem" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "entries",
    [
        7,
        [{}],
        [{}, {"divided": 3}],
        [{}, {"divided": {"mlp.gate_proj": {"1": 2}}}],
        [{}, {"divided": {"mlp.up_proj": [1]}}],
        [{}, {"divided": {"mlp.up_proj": {"24": 2}}}],
        [{}, {"divided": {"mlp.up_proj": {"-1": 2}}}],
        [{}, {"divided": {"mlp.up_proj": {"1": 2000}}}],
        [{}, {"divided": {"mlp.up_proj": {"1": True}}}],
        [{}, {"divided": {"mlp.up_proj": {"x": 2}}}],
    ],
)
def test_forged_divisions_are_refused(tiny_model: Callable[..., Path], entries: Any) -> None:
    with pytest.raises(MsQuantError, match=r"^here"):
        read_divided(entries, load_config(tiny_model()), "here")


def test_a_forged_division_fails_verification(
    tiny_model: Callable[..., Path], quantize: Callable[..., Any]
) -> None:
    model = tiny_model(change=large_gate_up)
    output, _ = quantize(model)
    path = output / "ms_quant.json"
    record = json.loads(path.read_text())
    record["activation_ranges"][1]["divided"]["mlp.up_proj"] = {"4": 3}
    del record["sha256"]
    write_json(path, seal(record))
    problems = verify_checkpoint(output, model).problems
    assert any("up_proj" in problem for problem in problems)


@pytest.mark.parametrize(
    "facts", [3, [4], [{"largest": {"x": [1]}}], [{"largest": {"x": ["", 0]}}]]
)
def test_forged_ranges_are_refused(facts: Any) -> None:
    with pytest.raises(MsQuantError, match=r"^here: activation_ranges"):
        float16_facts({"activation_ranges": facts}, "here")
