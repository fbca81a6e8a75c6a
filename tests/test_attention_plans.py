"""What runtimes are told of a plan of attention, and what they cannot be told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusion_models import save_pipeline, save_tensors

import ms_quant
from ms_quant.diffusers.serving import serve_check_directory
from ms_quant.errors import MsQuantError
from ms_quant.serve.attention import FloatParts
from ms_quant.serve.check import serve_check

LAYERS = tuple(f"blocks.{n}.attn1" for n in range(2))
SPARSE = {"sparse": "rf_v3", "sparsity": 0.8}


def parts(wish: dict[str, Any], layers=(), steps=(), count=40, measured=LAYERS) -> FloatParts:
    return FloatParts("m", tuple(layers), tuple(steps), wish, measured, count)


def test_vllm_omni_takes_skip_lists_for_quantized_attention():
    made = parts({"kind": "FP8_DYNAMIC"}, [LAYERS[1]], [0, 1, 2, 39])
    assert made.vllm_omni() == {
        "--diffusion-kv-cache-dtype": "fp8",
        "--diffusion-kv-cache-skip-layers": "1",
        "--diffusion-kv-cache-skip-steps": "0-2,39",
    }
    assert made.vllm_omni_notes() == []
    other = parts({"kind": "MXFP4_DYNAMIC"})
    assert other.vllm_omni() == {"--diffusion-kv-cache-dtype": "mxfp4"}
    assert other.vllm_omni_notes() == [
        "MXFP4_DYNAMIC of attention is in vllm-omni's documents only"
    ]
    with pytest.raises(
        MsQuantError, match="INT8_DYNAMIC: vllm-omni has no such type, expected FP8"
    ):
        parts({"kind": "INT8_DYNAMIC"}).vllm_omni()


def test_vllm_omni_takes_json_for_sparse_attention():
    made = parts({**SPARSE, "kind": "MIX"}, [LAYERS[0]], [*range(15), 38, 39])
    (option, text), *others = made.vllm_omni().items()
    assert (option, others) == ("--diffusion-attention-config", [])
    assert json.loads(text) == {
        "default": {
            "backend": "RAINFUSION_ATTN",
            "block_sparse": {
                "sparsity": 0.8,
                "start_step": 15,
                "end_step": 38,
                "precision": "mix",
                "skip_layers": "0",
            },
        },
        "per_role": {"cross": {"backend": "TORCH_SDPA"}},
    }
    with pytest.raises(MsQuantError, match="time_blocks in FLOAT: vllm-omni has no such rule"):
        parts({"sparse": "time_blocks"}).vllm_omni()


@pytest.mark.parametrize(
    ("steps", "window"),
    [
        ((), (0, None)),
        (range(15), (15, None)),
        ((0, 39), (1, 39)),
        ((0, 1, 9), (10, None)),
        ((0, 30), (1, 30)),
    ],
)
def test_the_longest_run_of_sparse_steps_is_the_window(steps, window):
    made = parts(SPARSE, steps=steps)
    assert made.sparse_steps() == window
    start, end = window
    dense = start + (0 if end is None else 40 - end)
    wider = f"{dense} steps stay dense and not {len(steps)}: the runtime has one window of"
    said = [note.startswith(wider) for note in made.vllm_omni_notes() if "one window" in note]
    assert said == ([] if dense == len(steps) else [True])


def test_layers_of_one_number_stay_float_together():
    both = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"
    made = parts({"kind": "FP8_DYNAMIC"}, both[:1], measured=both)
    assert "which a layer that stays float shares" in made.vllm_omni_notes()[0]
    with pytest.raises(MsQuantError, match="attn has no number, by which vllm-omni names layers"):
        parts({"kind": "FP8_DYNAMIC"}, ["attn"]).vllm_omni()


def test_mindie_sd_takes_a_policy_for_steps_and_a_dict_for_rainfusion():
    assert parts({"kind": "FP8_DYNAMIC"}, steps=[0, 1]).mindie_sd_policy() == [
        "policy = TimestepPolicyConfig(fa_default_strategy='FP8')",
        "policy.register([0, 1], 'FLOAT', target='fa')",
    ]
    with pytest.raises(MsQuantError, match="MXFP8_DYNAMIC with steps in float: MindIE-SD's policy"):
        parts({"kind": "MXFP8_DYNAMIC"}, steps=[0]).mindie_sd_policy()
    assert parts(SPARSE, steps=range(15)).mindie_sd_config() == {
        "sparsity": 0.8,
        "skip_timesteps": 15,
        "type": "v3",
        "grid_size": None,
        "atten_mask_all": None,
        "mask_refresh_interval": 0,
    }
    with pytest.raises(MsQuantError, match="that stays dense in step 39 and later: MindIE"):
        parts(SPARSE, steps=[39]).mindie_sd_config()
    with pytest.raises(MsQuantError, match=r"that stays dense in blocks\.1\.attn1: MindIE"):
        parts(SPARSE, [LAYERS[1]]).mindie_sd_config()
    assert "mode arm2" in parts({"sparse": "rf_v1"}).mindie_sd_notes()[0]


def test_it_goes_to_a_file_and_back(tmp_path):
    made, path = parts(SPARSE, [LAYERS[1]], [0, 1]), tmp_path / "plan.json"
    made.save(path)
    assert FloatParts.load(path) == made
    content = json.loads(path.read_text())
    for key, value, said in [
        ("version", 2, "is no plan of attention, expected version 1"),
        ("attention", {}, "is no plan of attention"),
        ("float_steps", ["a"], r"float_steps is \['a'\], expected a list of"),
        ("float_layers", "x", "float_layers is 'x', expected a list of"),
        ("float_steps", [40], r"float_steps \[40\], expected steps from 0 to 39"),
        ("attention", {"sparse": "rf_v3", "sparsity": 2}, "sparsity is 2, expected 0 to 1"),
        ("steps", -1, "steps is -1"),
    ]:
        path.write_text(json.dumps({**content, key: value}))
        with pytest.raises(MsQuantError, match=rf"plan\.json.*{said}"):
            FloatParts.load(path)


# serve-check


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipes")
    ms_quant.quantize_pipeline(save_pipeline(root / "wan", transformer="wan"), root / "made")
    return root / "made"


def test_serve_check_adds_the_options_of_vllm_omni(made, tmp_path, ms_quant_command: Callable):
    plan = tmp_path / "plan.json"
    parts({"kind": "FP8_DYNAMIC"}, LAYERS[:1], range(3), measured=LAYERS[:1]).save(plan)
    run = ms_quant_command("serve-check", made, "--runtime", "vllm-omni", "--attention", plan)
    assert run.stdout.endswith(
        f"vllm serve {made} --omni --diffusion-kv-cache-dtype fp8 --diffusion-kv-cache-skip-layers "
        "0 --diffusion-kv-cache-skip-steps 0-2\n"
    )
    parts(SPARSE, measured=LAYERS[:1]).save(plan)
    found = serve_check_directory(made, "vllm-omni", attention=plan)
    assert found["problems"] == []
    assert found["command"][-2] == "--diffusion-attention-config"
    assert json.loads(found["command"][-1]) == found["attention"]
    assert "fewer than 4096 tokens" in " ".join(found["notes"])
    parts(SPARSE, measured=["blocks.99.attn1"]).save(plan)
    problems = serve_check_directory(made, "vllm-omni", attention=plan)["problems"]
    assert "blocks.99.attn1 is in none of the transformers, expected paths" in problems[0]
    with pytest.raises(MsQuantError, match="with runtime vllm, expected vllm-omni or mindie-sd"):
        serve_check(made, "vllm", attention=plan)


def network(directory: Path, steps: list[int] = (), **entries: str) -> Path:  # type: ignore[assignment]
    """What save_quantized writes of a linear and an attention."""
    directory.mkdir(exist_ok=True)
    rotation = np.eye(16, dtype=np.float32)
    tensors = {
        "blocks.0.ff.weight": np.ones((16, 16), np.int8),
        "blocks.0.ff.weight_scale": np.ones((16, 1), np.float32),
        "blocks.0.attn1.q_rot": rotation,
        "blocks.0.attn1.k_rot": rotation,
    }
    described: dict[str, Any] = {"model_quant_type": "W8A8_DYNAMIC"}
    described |= {name: "FLOAT" if name.endswith("rot") else "W8A8_DYNAMIC" for name in tensors}
    described |= {"blocks.0.attn1.quant_type": "FP8_DYNAMIC", **entries}
    if steps:
        described["metadata"] = {"attention_float_steps": {"blocks.0.attn1": steps}}
    weights = directory / "quant_model_weight_w8a8_dynamic.safetensors"
    save_tensors(weights, tensors)
    path = directory / "quant_model_description_w8a8_dynamic.json"
    path.write_text(json.dumps(described))
    weights.chmod(0o640)
    path.chmod(0o640)
    return path


def test_serve_check_prints_the_call_of_mindie_sd(tmp_path, ms_quant_command: Callable):
    path = network(tmp_path / "out", [0, 1])
    run = ms_quant_command("serve-check", path.parent, "--runtime", "mindie-sd")
    assert run.stdout.endswith(
        "policy = TimestepPolicyConfig(fa_default_strategy='FP8')\n"
        "policy.register([0, 1], 'FLOAT', target='fa')\n"
        f"quantize(model, '{path}', dtype=torch.bfloat16, timestep_config=policy)\n"
    )
    found = serve_check(path.parent, "mindie-sd")
    rows = {row["kind"]: (row["method"], row["bytes"]) for row in found["loaded"]}
    assert rows == {"ff": ("W8A8_DYNAMIC", 320), "attn1": ("attention FP8_DYNAMIC", 2048)}
    assert "attention" not in found
    plan = tmp_path / "plan.json"
    parts(SPARSE, steps=range(15)).save(plan)
    found = serve_check(path.parent, "mindie-sd", attention=plan)
    assert found["attention"]["skip_timesteps"] == 15 and found["problems"] == []
    flags = "--use_rainfusion --sparsity 0.8 --sparse_start_step 15 --rainfusion_type v3"
    assert any(flags in note for note in found["notes"])


def problems_of(directory: Path, plan: FloatParts | None = None) -> str:
    file = directory / "plan.json"
    if plan is not None:
        plan.save(file)
    attention = None if plan is None else file
    return "\n".join(serve_check(directory, "mindie-sd", attention=attention)["problems"])


def test_mindie_sd_refuses_what_it_cannot_be_told(tmp_path):
    assert "holds none, expected the files of one network" in problems_of(tmp_path)
    path = network(tmp_path, [0])
    fp8, own = {"kind": "FP8_DYNAMIC"}, LAYERS[:1]
    assert problems_of(tmp_path, parts(fp8, steps=[0], measured=own)) == ""
    other_steps = problems_of(tmp_path, parts(fp8, steps=[0, 1], measured=own))
    assert "expected one for all: MindIE-SD's policy does not tell layers apart" in other_steps
    assert "blocks.1.attn1 is FLOAT, which the plan" in problems_of(tmp_path, parts(fp8))
    assert "time_blocks: MindIE-SD's models have no" in problems_of(
        tmp_path, parts({"sparse": "time_blocks"})
    )
    path.chmod(0o644)
    assert "has mode 644, expected at most 640" in problems_of(tmp_path)
    path = network(tmp_path, **{"blocks.0.attn1.quant_type": "INT8_DYNAMIC"})
    assert "blocks.0.attn1: attention in INT8_DYNAMIC, expected FP8_DYN" in problems_of(tmp_path)
