"""The whole way at TP 1, 2 and 4, read back with the safetensors library and the codec alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  so that the safetensors library knows bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file

from ms_quant.errors import MsQuantError
from ms_quant.files import reader
from ms_quant.files.reader import Checkpoint
from sparse_compress.codec import decompress_matrix, matrix_info
from sparse_compress.pipeline.estimate import estimate
from sparse_compress.pipeline.request import SparseOptions, check
from sparse_compress.pipeline.run import run
from sparse_compress.verify.checkpoint import verify

LAYER = "model.layers.0"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
HEAD_DIM, HIDDEN, INTER, VOCAB = 64, 320, 1280, 310


def rank(output: Path, number: int) -> dict[str, np.ndarray]:
    """What the runtime reads: every safetensors file of a rank directory."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted((output / f"rank_{number}").glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def source_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {
        name: array.astype(np.float32)
        for name, array in load_file(directory / "model.safetensors").items()
    }


def decoded(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    n, k = len(tensors[f"{name}.deq_scale"]), len(tensors[f"{name}.input_scale"])
    return decompress_matrix(tensors[f"{name}.weight"], tensors[f"{name}.index"], matrix_info(n, k))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_round_trip(make: Callable[..., Any], tp: int) -> None:
    made = make(tp=tp)
    result = verify(made.output, made.source)
    assert result.problems == ()
    assert result.checked["recomputed"] == (6 if tp == 4 else 7)
    assert made.summary["format"] == f"W8A8SC TP{tp}"
    assert made.summary["ratio"] < 0.9
    reasons = made.summary["uncompressed"]
    assert list(reasons) == ([f"{ATTENTION}.o_proj"] if tp == 4 else [])
    assert all("k = 192 input channels" in reason for reason in reasons.values())


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_hold_the_parts_of_the_unsplit_checkpoint(make: Callable[..., Any], tp: int) -> None:
    whole = rank(make(tp=1).output, 0)
    qkv, gate_up = decoded(whole, f"{ATTENTION}.qkv_proj"), decoded(whole, f"{MLP}.gate_up_proj")
    down = decoded(whole, f"{MLP}.down_proj")
    q, k, v = np.split(qkv, [12 * HEAD_DIM, 14 * HEAD_DIM])
    gate, up = np.split(gate_up, 2)
    for number in range(tp):
        part = rank(make(tp=tp).output, number)
        kv = number * 2 // tp  # two heads; at TP 4 two ranks share one
        heads = slice(number * 12 // tp * HEAD_DIM, (number + 1) * 12 // tp * HEAD_DIM)
        kv_head = slice(kv * HEAD_DIM, (kv + 1) * HEAD_DIM)
        expected = np.concatenate([q[heads], k[kv_head], v[kv_head]])
        np.testing.assert_array_equal(decoded(part, f"{ATTENTION}.qkv_proj"), expected)
        inter = slice(number * INTER // tp, (number + 1) * INTER // tp)
        expected = np.concatenate([gate[inter], up[inter]])
        np.testing.assert_array_equal(decoded(part, f"{MLP}.gate_up_proj"), expected)
        np.testing.assert_array_equal(decoded(part, f"{MLP}.down_proj"), down[:, inter])
        for suffix in ("deq_scale", "quant_bias"):
            scales = np.split(whole[f"{MLP}.gate_up_proj.{suffix}"], 2)
            expected = np.concatenate([scale[inter] for scale in scales])
            np.testing.assert_array_equal(part[f"{MLP}.gate_up_proj.{suffix}"], expected)
        for suffix in ("input_scale", "input_offset"):
            name = f"{MLP}.down_proj.{suffix}"
            np.testing.assert_array_equal(part[name], whole[name][inter])
            name = f"{ATTENTION}.qkv_proj.{suffix}"
            np.testing.assert_array_equal(part[name], whole[name])
        name = f"{MLP}.down_proj.quant_bias"
        np.testing.assert_array_equal(part[name], whole[name] * (number == 0))
        name = f"{MLP}.down_proj.deq_scale"
        np.testing.assert_array_equal(part[name], whole[name])


def test_tensors_and_types_of_a_rank(make: Callable[..., Any]) -> None:
    tensors = rank(make(tp=2).output, 1)
    found = {name: (str(array.dtype), array.shape) for name, array in tensors.items()}
    c = {name: found.pop(f"{name}.weight") for name in list(linears())}
    assert all(dtype == "int8" and len(shape) == 1 for dtype, shape in c.values())
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (n, k) in linears().items():
        tiles = -(-n // 128) * -(-k // 256)
        expected[f"{name}.index"] = ("int8", (8 * tiles,))
        expected[f"{name}.deq_scale"] = ("int64", (n,))
        expected[f"{name}.quant_bias"] = ("int32", (n,))
        expected[f"{name}.input_scale"] = ("float16", (k,))
        expected[f"{name}.input_offset"] = ("int8", (k,))
    for name in ("model.embed_tokens", "lm_head"):
        expected[f"{name}.weight"] = ("float16", (160, HIDDEN))
    for name in ("model.norm", f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"):
        expected[f"{name}.weight"] = ("float16", (HIDDEN,))
    for name in ("q_norm", "k_norm"):
        expected[f"{ATTENTION}.{name}.weight"] = ("float16", (HEAD_DIM,))
    assert found == expected


def linears() -> dict[str, tuple[int, int]]:
    """(n, k) of the fused linears at TP 2."""
    return {
        f"{ATTENTION}.qkv_proj": (8 * HEAD_DIM, HIDDEN),
        f"{ATTENTION}.o_proj": (HIDDEN, 6 * HEAD_DIM),
        f"{MLP}.gate_up_proj": (INTER, HIDDEN),
        f"{MLP}.down_proj": (HIDDEN, INTER // 2),
    }


def test_description_and_config(make: Callable[..., Any]) -> None:
    output = make(tp=2).output
    expected: dict[str, Any] = {"device_type": "310P"}
    for number in range(2):
        tensors = rank(output, number)
        expected[f"rank_{number}"] = {}
        for name in linears():
            expected[f"rank_{number}"] |= {
                f"{name}.weight": "W8A8S",
                f"{name}.weight.shape": list(tensors[f"{name}.weight"].shape),
                f"{name}.index.shape": list(tensors[f"{name}.index"].shape),
            }
    assert json.loads((output / "quant_model_description_w8a8sc.json").read_text()) == expected
    config = json.loads((output / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert "quantization_config" not in config
    assert list(output.glob("*.safetensors")) == []
    assert list((output / "proof").glob("*.safetensors")) == []
    assert (output / "tokenizer.json").exists()


def test_scales_and_biases_are_the_documented_formulas(make: Callable[..., Any]) -> None:
    tensors = rank(make(tp=1).output, 0)
    for name in linears():
        weight = decoded(tensors, name).astype(np.int64)
        offset = int(tensors[f"{name}.input_offset"][0])
        expected = -offset * weight.sum(axis=1)
        np.testing.assert_array_equal(tensors[f"{name}.quant_bias"], expected)
        bits = tensors[f"{name}.deq_scale"]
        scale = bits.astype(np.int32).view(np.float32)
        assert ((scale > 0) & np.isfinite(scale) & (bits < 1 << 31)).all()
        assert (weight == 0).mean() >= 0.5


def test_the_embedding_is_padded_and_split(make: Callable[..., Any]) -> None:
    made = make(tp=2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        joined = np.concatenate([rank(made.output, number)[name] for number in range(2)])
        expected = source_tensors(made.source)[name].astype(np.float16)
        np.testing.assert_array_equal(joined[:VOCAB], expected)
        assert not joined[VOCAB:].any()


def test_a_tied_head_is_not_stored(make: Callable[..., Any]) -> None:
    made = make({"tied": True})
    assert "lm_head.weight" not in rank(made.output, 0)
    assert verify(made.output, made.source).problems == ()


def test_qkv_bias_is_split_and_stays_float(make: Callable[..., Any]) -> None:
    made = make({"family": "qwen2"})
    assert verify(made.output, made.source).problems == ()
    source, part = source_tensors(made.source), rank(made.output, 1)
    half = 6 * HEAD_DIM
    expected = np.concatenate(
        [
            source[f"{ATTENTION}.q_proj.bias"][half:],
            source[f"{ATTENTION}.k_proj.bias"][HEAD_DIM:],
            source[f"{ATTENTION}.v_proj.bias"][HEAD_DIM:],
        ]
    )
    np.testing.assert_array_equal(part[f"{ATTENTION}.qkv_proj.bias"], expected.astype(np.float16))


def test_a_bias_of_a_row_parallel_linear_is_on_the_first_rank(make: Callable[..., Any]) -> None:
    made = make({"family": "llama", "biases": True})
    assert verify(made.output, made.source).problems == ()
    source = source_tensors(made.source)
    for name in (f"{ATTENTION}.o_proj.bias", f"{MLP}.down_proj.bias"):
        first, second = (rank(made.output, number)[name] for number in range(2))
        np.testing.assert_array_equal(first, source[name].astype(np.float16))
        assert not second.any()


def test_excluded_linears_are_plain_slices_of_the_source(make: Callable[..., Any]) -> None:
    made = make(exclude=("*.k_proj", "*.down_proj"))
    assert verify(made.output, made.source).problems == ()
    assert made.summary["uncompressed"] == {
        f"{ATTENTION}.qkv_proj": "excluded by '*.k_proj'",
        f"{MLP}.down_proj": "excluded by '*.down_proj'",
    }
    source, part = source_tensors(made.source), rank(made.output, 1)
    half = 6 * HEAD_DIM
    expected = [
        source[f"{ATTENTION}.q_proj.weight"][half:],
        source[f"{ATTENTION}.k_proj.weight"][HEAD_DIM:],
        source[f"{ATTENTION}.v_proj.weight"][HEAD_DIM:],
    ]
    np.testing.assert_array_equal(
        part[f"{ATTENTION}.qkv_proj.weight"], np.concatenate(expected).astype(np.float16)
    )
    expected_down = source[f"{MLP}.down_proj.weight"][:, INTER // 2 :].astype(np.float16)
    np.testing.assert_array_equal(part[f"{MLP}.down_proj.weight"], expected_down)


@pytest.mark.parametrize(
    "options",
    [
        {"pruning": "magnitude", "algorithm": "smoothquant"},
        {"algorithm": "osl", "sparsity": 0.6, "tp": 1},
        {"sparsity": 0.0, "exclude": ("*.o_proj", "*.down_proj")},
    ],
)
def test_other_choices_are_proven_too(make: Callable[..., Any], options: dict[str, Any]) -> None:
    made = make(**options)
    assert verify(made.output, made.source).problems == ()
    weights = made.summary["weights"]
    assert weights["pruned"] == int(options.get("sparsity", 0.5) * 10) * weights["size"] // 10
    assert weights["zeros"] == weights["pruned"] + weights["source_zeros"] + weights["rounded"]


def test_weights_that_code_too_badly_stay_float(make: Callable[..., Any]) -> None:
    """At no sparsity, 320 rows in tiles of 128 take more bytes than the runtimes accept."""
    made = make(sparsity=0.0)
    reasons = made.summary["uncompressed"]
    assert list(reasons) == [f"{ATTENTION}.o_proj", f"{MLP}.down_proj"]
    assert all("the runtimes accept at most" in reason for reason in reasons.values())
    assert verify(made.output, made.source).problems == ()


def test_the_same_request_gives_the_same_bytes(
    make: Callable[..., Any], tmp_path: Path, file_contents: Callable[..., dict[str, bytes]]
) -> None:
    made = make(tp=2)
    again = replace(made.options, output=tmp_path / "again")
    assert run(again).finished_before is False
    assert file_contents(again.output) == file_contents(made.output)
    assert run(again).finished_before is True
    assert not again.output.with_name("again.job").exists()


@pytest.mark.parametrize("moment", [("quantize", 0.9), ("compress", 0.3), ("compress", 1.0)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    make: Callable[..., Any],
    tmp_path: Path,
    file_contents: Callable[..., dict[str, bytes]],
    moment: tuple[str, float],
) -> None:
    made = make(tp=2)
    options = replace(made.options, output=tmp_path / "again")

    def stop(step: str, part: float) -> None:
        if (step, part) >= moment and step == moment[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(options, stop)
    assert not options.output.exists()
    steps = []
    run(options, lambda step, part: steps.append(step))
    assert ("quantize" in steps) is (moment[0] == "quantize")
    assert file_contents(options.output) == file_contents(made.output)


def test_an_output_made_with_other_arguments_is_refused(make: Callable[..., Any]) -> None:
    options = replace(make(tp=2).options, sparsity=0.4)
    with pytest.raises(MsQuantError, match=r"was made with sparsity = 0\.5, now sparsity is 0\.4"):
        run(options)


def refused(options: SparseOptions, match: str) -> None:
    with pytest.raises(MsQuantError, match=match):
        run(options)
    assert sorted(options.output.parent.glob(f"{options.output.name}*")) == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tp": 5}, "tp is 5, expected a divisor of num_attention_heads, which is 12"),
        ({"tp": 0}, "tp is 0, expected at least 1"),
        ({"sparsity": 1.0}, "sparsity is 1.0, expected"),
        ({"pruning": "random"}, "pruning 'random' is unknown"),
        ({"algorithm": "best"}, "algorithm 'best' is unknown"),
        ({"exclude": ("*.w1",)}, r"exclude pattern '\*\.w1' matches no linear"),
        ({"exclude": ("*_proj",)}, r"no linear can be compressed at tp 2; .*excluded by '\*_proj'"),
        ({"calib": Path("missing.txt")}, r"missing\.txt: no such file"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    make: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    options = replace(make(tp=2).options, output=tmp_path / "out")
    refused(replace(options, **changes), match)


def test_a_model_too_narrow_for_the_hardware_is_refused(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    options = SparseOptions(tiny_model(), tmp_path / "out", calib_text)
    refused(options, r"no linear can be compressed at tp 2; .*qkv_proj: k = 16 input channels")


def test_a_value_that_float16_cannot_hold_is_refused_by_name(
    tiny_model: Callable[..., Path], make: Callable[..., Any], tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"][3] = 1e6

    made = make(tp=2)
    config = json.loads((made.source / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    model = tiny_model(layers=1, change=enlarge, **{size: config[size] for size in sizes})
    options = replace(made.options, model=model, output=tmp_path / "out")
    refused(options, r"'model\.norm\.weight': 1 of 320 values do not fit float16")


def test_a_value_that_float16_cannot_hold_is_counted_over_the_whole_tensor(
    tiny_model: Callable[..., Path], make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.embed_tokens.weight"][[0, -1], 0] = 1e6, -2e6

    monkeypatch.setattr(reader, "CHUNK_ELEMENTS", 1 << 11)
    made = make(tp=2)
    config = json.loads((made.source / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    model = tiny_model(layers=1, change=enlarge, **{size: config[size] for size in sizes})
    options = replace(made.options, model=model, output=model.with_name("out"))
    refused(options, r"embed_tokens\.weight': 2 of \d+ values do not fit .* is 1\.99885e\+06")


def test_tables_are_written_a_few_rows_at_a_time(
    make: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_contents: Callable[..., dict[str, bytes]],
) -> None:
    made = make(tp=2)
    monkeypatch.setattr(reader, "CHUNK_ELEMENTS", 500)  # a row of the embedding is 640 bytes
    again = replace(made.options, output=tmp_path / "again")
    read = Checkpoint.read_float32

    def not_whole(checkpoint: Checkpoint, name: str) -> np.ndarray:
        assert name not in ("model.embed_tokens.weight", "lm_head.weight")
        return read(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "read_float32", not_whole)
    run(again)
    assert file_contents(again.output) == file_contents(made.output)


def test_directories_that_overlap_are_refused(make: Callable[..., Any]) -> None:
    made = make(tp=2)
    options = replace(made.options, output=made.source / "out")
    refused(options, "out: the output directory lies in the model directory")


@pytest.mark.parametrize("algorithm", ["minmax", "osl"])
def test_a_strength_that_nothing_uses_is_refused(
    make: Callable[..., Any], tmp_path: Path, algorithm: str
) -> None:
    options = replace(make(tp=2).options, output=tmp_path / "out", algorithm=algorithm, alpha=0.5)
    refused(options, f"algorithm {algorithm} takes no option 'alpha'")


@pytest.mark.parametrize(
    ("family", "sentences"),
    [
        ("qwen2", []),
        ("qwen3", []),
        ("llama", ["vllm-mindspore serves W8A8SC only for qwen2 and qwen3, not llama"]),
    ],
)
def test_families_that_the_runtime_does_not_serve_are_named(
    make: Callable[..., Any], family: str, sentences: list[str]
) -> None:
    options = make({"family": family, "biases": family == "llama"}).options
    assert check(options).not_served_by == sentences
    assert list(run(options).not_served_by) == sentences


def test_the_plan_of_a_dry_run(make: Callable[..., Any], tmp_path: Path) -> None:
    options = replace(make(tp=2).options, output=tmp_path / "out", tp=4)
    plan = estimate(check(options))
    assert list(tmp_path.glob("out*")) == []
    assert (plan["tp"], plan["sparsity"], plan["format"]) == (4, 0.5, "W8A8SC TP4")
    assert plan["compressed"] == [
        f"{ATTENTION}.qkv_proj",
        f"{MLP}.gate_up_proj",
        f"{MLP}.down_proj",
    ]
    assert list(plan["uncompressed"]) == [f"{ATTENTION}.o_proj"]
    assert "k = 192 input channels" in plan["uncompressed"][f"{ATTENTION}.o_proj"]
    assert "load-format sparse_quant" in plan["served_by"][0] and plan["not_served_by"] == []
    assert plan["estimated_seconds"] >= 0 and plan["memory_bytes"] > 0
    made = run(options)
    assert 0 < made.tensor_bytes <= plan["output_bytes"] < plan["disk_bytes"]
    assert made.uncompressed == plan["uncompressed"]


def test_a_kept_job_serves_another_number_of_ranks(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    whole = make(tp=1)
    job = tmp_path / "job"
    run(replace(whole.options, output=tmp_path / "one", tp=1, job=job, keep_job=True))
    steps = []
    two = replace(whole.options, output=tmp_path / "two", tp=2, job=job)
    run(two, lambda step, part: steps.append(step))
    assert "quantize" not in steps
    assert verify(two.output, whole.source).problems == ()
