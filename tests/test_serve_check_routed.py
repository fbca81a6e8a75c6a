"""ms-quant serve-check of models with experts and latent attention: each rule by a broken copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from routed_models import QWEN, save_routed
from safetensors.numpy import load_file, save_file
from served_deepseek import ATTENTION, DENSE, EXPERTS, MTP, quantized, source

from ms_quant.job.output_directory import RECORD
from ms_quant.pipeline import building
from ms_quant.serve.check import serve_check

DYNAMIC, INT4 = "W8A8_DYNAMIC", "W4A8_DYNAMIC"
STATIC_ATTENTION = {"scheme": "W8A8", "include": ATTENTION}
REST = {"scheme": DYNAMIC, "include": [*DENSE, *EXPERTS]}
EXPERT = "model.layers.1.mlp.experts"
Rules = list[dict[str, Any]]
Change = Callable[[Path], None]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others make what planning here refuses."""
    monkeypatch.setattr(building, "check_parts", lambda *plan: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Quantized models by their rules, each made once."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("served")

    def one(format: str, rules: Rules, **changed: Any) -> Path:
        of_source, key = repr(changed), repr((format, rules, changed))
        if of_source not in made:
            made[of_source] = source(root / f"source-{len(made)}", **changed)
        if key not in made:
            made[key] = quantized(made[of_source], root / f"out-{len(made)}", format, rules)
        return made[key]

    return one


@pytest.fixture
def served(models: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What serve-check says of a changed copy."""

    def one(
        runtime: str,
        format: str,
        rules: Rules,
        change: Change | None = None,
        tp: int = 1,
        **changed: Any,
    ) -> dict[str, Any]:
        directory = models(format, rules, **changed)
        if change is not None:
            shutil.copytree(directory, tmp_path / "copy")
            directory = tmp_path / "copy"
            (directory / RECORD).unlink()
            change(directory)
        return serve_check(directory, runtime, tp)

    return one


@pytest.fixture
def mindformers(served: Callable[..., dict[str, Any]]) -> Callable[..., str]:
    def one(*rules: dict[str, Any], **more: Any) -> str:
        return "\n".join(served("vllm-mindspore", "golden-stick", list(rules), **more)["problems"])

    return one


@pytest.fixture
def ascend(served: Callable[..., dict[str, Any]]) -> Callable[..., str]:
    def one(*rules: dict[str, Any], **more: Any) -> str:
        return "\n".join(served("vllm-ascend", "ascend", list(rules), **more)["problems"])

    return one


def describe(name: str, **entries: Any) -> Change:
    """Changes entries of a description, by the ends of their names; None takes one out."""

    def change(directory: Path) -> None:
        path = directory / name
        found = json.loads(path.read_text())
        for end, value in entries.items():
            for key in [key for key in found if key.endswith(end)]:
                found[key] = value
                if value is None:
                    del found[key]
        path.write_text(json.dumps(found))

    return change


def store(change_tensors: Callable[[dict[str, Any]], None]) -> Change:
    def change(directory: Path) -> None:
        (path,) = directory.glob("*.safetensors")
        tensors = load_file(path)
        change_tensors(tensors)
        save_file(tensors, path)

    return change


def differ(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.input_scale"
    tensors[name] = tensors[name] * 2


GOLDEN, ASCEND = "quantization_description.json", "quant_model_description.json"


def test_mindformers_serves_deepseek(served):
    found = served("vllm-mindspore", "golden-stick", [STATIC_ATTENTION, REST])
    assert found["problems"] == []
    assert found["line"].startswith("VLLM_MS_MODEL_BACKEND=MindFormers vllm-mindspore serve ")
    assert "--quantization golden-stick" in found["line"]
    kinds = {(row["kind"], row["method"]) for row in found["loaded"]}
    assert {("fused_qkv_a_proj", "W8A8"), ("experts.gate_up_proj", DYNAMIC)} <= kinds
    assert any("divides the gains of 4 norms" in note for note in found["notes"])
    assert any("is 2, the runtime looks for 61" in note for note in found["notes"])


def test_mindformers_fuses_attention_that_is_static(mindformers):
    found = mindformers({"scheme": DYNAMIC, "include": [*ATTENTION, *DENSE, *EXPERTS]})
    assert "self_attn.q_a_proj: is W8A8_DYNAMIC, expected W8A8: with fewer than 16" in found
    assert found.endswith("(as are 3 more)")  # q_b_proj, and both in the other layer


def test_mindformers_needs_the_rank_of_queries(mindformers):
    found = mindformers(STATIC_ATTENTION, REST, q_lora_rank=None)
    assert "q_lora_rank is null, expected a rank" in found


def test_mindformers_has_no_float_experts(mindformers):
    found = mindformers(STATIC_ATTENTION, {"scheme": DYNAMIC, "include": DENSE})
    assert f"{EXPERT}.0.gate_proj: is FLOAT, expected W8A8_DYNAMIC or W4A8_DYNAMIC" in found


def test_mindformers_takes_the_type_of_the_first_expert(mindformers):
    found = mindformers(
        STATIC_ATTENTION,
        {
            "scheme": INT4,
            "options": {"group_size": 32},
            "include": [f"{EXPERT}.3.{{gate,up}}_proj"],
        },
        {**REST, "exclude": [f"{EXPERT}.3.{{gate,up}}_proj"]},
    )
    assert (
        f"{EXPERT}.3.gate_proj: is W4A8_DYNAMIC in groups of 32, {EXPERT}.0.gate_proj is "
        "W8A8_DYNAMIC, expected one scheme" in found
    )


def test_mindformers_reads_further_blocks_as_float(mindformers):
    found = mindformers(STATIC_ATTENTION, {**REST, "include": [*REST["include"], *MTP]})
    assert "model.layers.2.self_attn.q_a_proj: is W8A8_DYNAMIC, expected FLOAT" in found


def test_mindformers_finds_further_blocks_by_an_index(mindformers):
    def change(directory: Path) -> None:
        (directory / "model.safetensors.index.json").unlink()

    found = mindformers(STATIC_ATTENTION, REST, change=change)
    assert "no index names 'model.layers.2.input_layernorm.weight'" in found


def test_mindformers_has_int4_for_experts_only(mindformers):
    int4 = {"scheme": INT4, "options": {"group_size": 32}, "include": [*DENSE, *EXPERTS]}
    found = mindformers(STATIC_ATTENTION, int4)
    assert "model.layers.0.mlp.gate_proj: is W4A8_DYNAMIC, expected" in found
    assert f"{EXPERT}." not in found


@pytest.mark.parametrize("value", [None, 64])
def test_mindformers_reads_the_size_of_groups(mindformers, value):
    int4 = {"scheme": INT4, "options": {"group_size": 32}, "include": EXPERTS}
    change = describe(GOLDEN, group_size=value)
    dense = {"scheme": DYNAMIC, "include": DENSE}
    found = mindformers(STATIC_ATTENTION, dense, int4, change=change)
    assert f"group_size is {value}, expected 32" in found


@pytest.mark.parametrize("runtime", ["vllm-mindspore", "vllm-ascend"])
def test_fused_inputs_have_one_scale(served, runtime):
    format = "golden-stick" if runtime == "vllm-mindspore" else "ascend"
    change = store(differ)
    if format == "ascend":  # its scales are one number, whose product is stored beside them
        change = store(lambda t: differ(t))
    found = served(runtime, format, [STATIC_ATTENTION, REST], change=change)["problems"]
    text = "\n".join(found)
    assert "kv_a_proj_with_mqa.input_scale differs from model.layers.1.self_attn.q_a_proj" in text


def test_no_vllm_mindspore_loads_quantized_experts_of_others(tmp_path):
    directory = save_routed(tmp_path / "float", QWEN)
    rules = [{"scheme": DYNAMIC, "include": ["*"]}]
    output = quantized(directory, tmp_path / "out", "golden-stick", rules)
    found = "\n".join(serve_check(output, "vllm-mindspore")["problems"])
    assert "expected DeepseekV3ForCausalLM: no release of vllm-mindspore loads" in found
    output = quantized(directory, tmp_path / "ascend", "ascend", rules)
    assert serve_check(output, "vllm-ascend", 2)["problems"] == []


@pytest.mark.parametrize(
    ("runtime", "format"),
    [
        ("vllm-mindspore", "golden-stick"),
        ("vllm-ascend", "ascend"),
        ("vllm", "compressed-tensors"),
    ],
)
def test_no_runtime_has_static_experts(served, runtime, format):
    rules = [{"scheme": "W8A8", "include": [*ATTENTION, *EXPERTS]}]
    found = "\n".join(served(runtime, format, rules)["problems"])
    assert f"{EXPERT}.0.gate_proj: is W8A8, expected" in found


def test_vllm_ascend_serves_experts_of_int4(served):
    rules = [STATIC_ATTENTION, {"scheme": DYNAMIC, "include": [*DENSE, *MTP]}]
    rules.append({"scheme": INT4, "include": EXPERTS})
    found = served("vllm-ascend", "ascend", rules, tp=2)
    assert found["problems"] == []
    assert any("has 16 of the 32 channels of every expert" in note for note in found["notes"])
    assert not any("0.25" in note for note in found["notes"])  # other linears need an old one
    assert not any("MLAPO" in note for note in found["notes"])
    found = served("vllm-ascend", "ascend", [{"scheme": INT4, "include": [*DENSE, *EXPERTS]}])
    assert any("W4A8_DYNAMIC is served by vllm-ascend up to 0.25" in n for n in found["notes"])


def test_vllm_ascend_fuses_static_attention_only(served):
    rules = [{"scheme": DYNAMIC, "include": [*ATTENTION, *DENSE, *EXPERTS]}]
    found = served("vllm-ascend", "ascend", rules)
    assert found["problems"] == []
    assert any("q_a_proj is not W8A8: vllm-ascend's fused" in note for note in found["notes"])


def test_vllm_ascend_has_one_type_for_fused_linears(ascend):
    ends = {
        f"1.self_attn.kv_a_proj_with_mqa.{suffix}": "FLOAT"
        for suffix in ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias")
    }
    found = ascend(STATIC_ATTENTION, REST, change=describe(ASCEND, **ends))
    assert "kv_a_proj_with_mqa FLOAT; expected one scheme, the runtime fuses them" in found


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("1.self_attn.kv_b_proj", "take its float weight apart for attention"),
        ("1.mlp.gate", "chooses other experts"),
        ("2.eh_proj", "runtimes hold it in float"),
    ],
)
def test_what_is_never_quantized_is_float(ascend, name, reason):
    change = describe(ASCEND, **{f"{name}.weight": DYNAMIC})
    found = ascend(STATIC_ATTENTION, REST, change=change)
    if name.endswith("gate"):
        assert "are W8A8_DYNAMIC and FLOAT" in found  # its correction says otherwise
    assert f"{name} is W8A8_DYNAMIC, expected FLOAT: " in found and reason in found


def test_vllm_ascend_looks_up_the_first_expert(ascend):
    ends = {
        f"1.mlp.experts.0.up_proj.{suffix}": None
        for suffix in ("weight", "weight_scale", "weight_offset")
    }
    found = ascend(STATIC_ATTENTION, REST, change=describe(ASCEND, **ends))
    assert f"has no entry for {EXPERT}.0.up_proj.weight" in found


def test_vllm_ascend_takes_the_type_of_the_first_expert(ascend):
    down = [f"{EXPERT}.*.down_proj"]
    found = ascend({**REST, "exclude": down}, {"scheme": INT4, "include": down})
    assert f"{EXPERT}.0.down_proj: is W4A8_DYNAMIC, {EXPERT}.0.gate_proj is W8A8" in found


def test_vllm_ascend_takes_experts_of_int4_per_channel(ascend):
    found = ascend({"scheme": INT4, "options": {"group_size": 32}, "include": EXPERTS})
    assert f"{EXPERT}.0.gate_proj: has groups of 32, expected group_size 0" in found


def test_vllm_ascend_has_no_experts_with_float_inputs(ascend):
    found = ascend({"scheme": "W8A16", "include": EXPERTS})
    assert f"{EXPERT}.0.gate_proj: is W8A16, expected one of W8A8_DYNAMIC" in found


@pytest.mark.parametrize(
    ("size", "heads", "tp", "expected"),
    [
        (16, 16, 16, "16 outputs on 16 ranks, expected an even number on each"),
        (64, 32, 32, "is stored in 16 slices, tp is 32, expected a divisor"),
    ],
)
def test_experts_of_int4_are_cut_between_pairs(ascend, size, heads, tp, expected):
    found = ascend(
        {"scheme": INT4, "include": EXPERTS},
        tp=tp,
        moe_intermediate_size=size,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    assert expected in found


W4A16 = {"scheme": "W4A16", "options": {"group_size": 32}, "include": EXPERTS}


@pytest.mark.parametrize("runtime", ["vllm", "vllm-ascend"])
def test_vllm_serves_experts(served, runtime):
    dense = {"scheme": DYNAMIC, "include": [*ATTENTION, *DENSE]}
    found = served(runtime, "compressed-tensors", [dense, W4A16])
    assert found["problems"] == []
    assert found["line"].startswith("vllm serve ")


def test_vllm_cuts_down_proj_between_groups(served):
    found = served("vllm", "compressed-tensors", [W4A16], tp=2)["problems"]
    assert f"{EXPERT}.0.down_proj: 32 inputs on 2 ranks, expected groups of 32 on each" in found


def test_vllm_takes_the_scheme_of_the_first_expert(served):
    down = [f"{EXPERT}.*.down_proj"]
    rules = [{**W4A16, "exclude": down}, {"scheme": DYNAMIC, "include": down}]
    found = "\n".join(served("vllm", "compressed-tensors", rules)["problems"])
    assert f"{EXPERT}.0.down_proj: is W8A8_DYNAMIC, {EXPERT}.0.gate_proj is W4A16" in found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"group_size": 32, "symmetric": False}, "has zero points"),
        ({"group_size": 0}, "has one scale a channel"),
    ],
)
def test_only_new_versions_of_vllm_have_other_experts_of_int4(served, options, expected):
    rules = [{**W4A16, "options": options}]
    found = served("vllm", "compressed-tensors", rules)
    text = f"{EXPERT}.0.gate_proj: {expected}, expected symmetric weights in groups for weight-only"
    assert found["problems"] == []
    (note,) = [note for note in found["notes"] if note.startswith(text)]
    assert note.endswith("by versions before 0.31")
    (problem,) = served("vllm-ascend", "compressed-tensors", rules)["problems"]
    assert problem.startswith(text)
