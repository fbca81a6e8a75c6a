"""Keys of quant_model_description.json as versions of msModelSlim write them, and old tensors.

Each is put into a checkpoint that msModelSlim 26.1.0 itself wrote.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.formats.opening import QuantizedModel
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.serve.check import serve_check
from ms_quant.verify.checkpoint import verify_checkpoint
from ms_quant.verify.result import VERDICTS

GOLDEN = Path(__file__).parents[1] / "golden" / "others"
STATIC, W4A8 = "msmodelslim_w8a8_qwen2_bf16", "msmodelslim_w4a8_dynamic_qwen3_bf16"
RIGHT, SEEN, WRONG = VERDICTS
LAYER = "model.layers.0"
K_PROJ = f"{LAYER}.self_attn.k_proj"
FILE = "quant_model_description.json"
Tensors = dict[str, np.ndarray]


@pytest.fixture
def edited(tmp_path: Path, load_tensors: Any, save_tensors: Any) -> Any:
    """A golden checkpoint with other keys, None for none, and other tensors."""

    def make(
        keys: dict[str, Any] | None = None,
        tensors: Callable[[Tensors, dict[str, Any]], None] | None = None,
        name: str = STATIC,
    ) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(GOLDEN / name, path)
        description = json.loads((path / FILE).read_text()) | (keys or {})
        description = {key: value for key, value in description.items() if value is not DROPPED}
        if tensors is not None:
            found = load_tensors(path)
            tensors(found, description)
            save_tensors(next(path.glob("*.safetensors")), found)
        (path / FILE).write_text(json.dumps(description))
        return path

    return make


DROPPED = object()
READ: list[tuple[dict[str, Any], str]] = [
    ({"version": DROPPED}, ""),
    ({"version": "2.0.0"}, ""),
    ({"model_quant_type": "FLOAT"}, ""),
    ({"model_quant_type": DROPPED, "group_size": DROPPED, "metadata": DROPPED}, ""),
    ({"optional": DROPPED}, ""),
    ({"group_size": 32}, ""),
    ({"fa_quant_type": None, "kv_quant_type": None, "reduce_quant_type": None}, ""),
    ({"kv_cache_type": None, "is_quarot": False, "max_supported_tp": 4}, ""),
    ({"indexer_quant_type": ""}, ""),
    ({"is_quarot": True}, "is_quarot is True: a rotation in the weights"),
    (
        {"optional": {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safet"}}}},
        "optional.quarot: a rotation in the weights, which changes no output",
    ),
    ({"tool": "x" * 500}, "tool is 'xxx"),
    ({f"{K_PROJ}.bias": "W8A8"}, "k_proj.bias is 'W8A8', the other tensors FLOAT"),
]


@pytest.mark.parametrize(("keys", "note"), READ)
def test_keys_that_are_read(edited: Any, keys: dict[str, Any], note: str) -> None:
    path = edited(keys)
    found = verify_checkpoint(path)
    assert (found.verdict, found.problems) == (SEEN, ())
    assert len(found.notes) == bool(note) and note in "".join(found.notes)
    assert all(len(text) < 300 for text in found.notes)
    assert QuantizedModel(path).linear(K_PROJ) is not None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"fa_quant_type": "FAKQuant"}, r"fa_quant_type is 'FAKQuant', which is not read here"),
    ({"reduce_quant_type": "per_channel"}, r"reduce_quant_type is 'per_channel', which is not"),
    ({"indexer_quant_type": "INT8_DYNAMIC"}, r"indexer_quant_type is 'INT8_DYNAMIC', which is"),
    ({"kv_cache_type": "FP8"}, r"kv_cache_type is 'FP8', expected 'C8'"),
    ({"metadata": {"quarot": {"max_tp_size": 4}}}, r"metadata\.quarot is .* at run time are not r"),
    ({"metadata": {"flat": 1}}, r"metadata is \{'flat': 1\}, expected nothing or 'quarot'"),
    ({"optional": [1]}, r"optional is \[1\], expected nothing or 'quarot'"),
    ({f"{LAYER}.self_attn.quant_type": "FP8_DYNAMIC"}, r"quant_type is 'FP8_DYNAMIC'"),
    ({f"{LAYER}.self_attn.q_rot": "FLOAT"}, r"self_attn\.q_rot is a rotation at run time, which"),
    ({"model.norm.weight": "W8A8"}, r"model\.norm\.weight is 'W8A8', expected 'FLOAT'"),
    ({"model.norm.bias": "FLOAT"}, r"names 'model\.norm\.bias', expected only the model's tensors"),
    ({f"{K_PROJ}.weight": "W8A8_PDMIX"}, r"k_proj\.weight is 'W8A8_PDMIX', expected one of FLOAT"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_keys_that_change_numbers_are_refused_by_name(
    edited: Any, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    path = edited(keys)
    found = verify_checkpoint(path)
    assert found.verdict == WRONG
    assert any(re.search(message, problem) for problem in found.problems), found.problems
    for use in (
        lambda: QuantizedModel(path),
        lambda: convert_checkpoint(path, tmp_path / "out", "mindie-sd"),
    ):
        with pytest.raises(MsQuantError):
            use()


def test_w4a8_without_its_version_is_refused(edited: Any) -> None:
    """Older checkpoints do not pack its weights, and nothing else tells."""
    found = verify_checkpoint(edited({"version": DROPPED}, name=W4A8))
    assert "version is None, expected '1.0.0' with W4A8_DYNAMIC" in found.problems[0]


def test_w4a8_calls_its_model_float(edited: Any) -> None:
    assert json.loads((GOLDEN / W4A8 / FILE).read_text())["model_quant_type"] == "FLOAT"
    assert verify_checkpoint(edited(name=W4A8)).verdict == SEEN


TABLES = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")


@pytest.mark.parametrize("missing", [TABLES, TABLES[:1], TABLES[1:2], TABLES[2:]])
def test_a_float_tensor_without_a_name_is_a_defect_but_can_be_read(
    edited: Any, tmp_path: Path, missing: tuple[str, ...]
) -> None:
    path = edited(dict.fromkeys(missing, DROPPED))
    found = verify_checkpoint(path)
    assert found.verdict == WRONG and len(found.problems) == len(missing)
    for name, problem in zip(sorted(missing), found.problems, strict=True):
        assert f"does not name {name!r}, expected 'FLOAT'" in problem
        assert ("KeyError" in problem) == (name != "model.norm.weight")
    assert serve_check(path, "vllm-ascend")["problems"]
    assert QuantizedModel(path).linear(K_PROJ) is not None
    convert_checkpoint(path, tmp_path / "out", "mindie-sd")
    assert verify_checkpoint(tmp_path / "out").problems == ()


def old_scales(tensors: Tensors, description: dict[str, Any]) -> None:
    """Version 0 stores the weight's scales beside the product, in the model's type."""
    for name in [n for n in tensors if n.endswith("_proj.deq_scale")]:
        path = name.removesuffix(".deq_scale")
        scale = tensors[name] / tensors[f"{path}.input_scale"]
        tensors[f"{path}.weight_scale"] = scale[:, None].astype(ml_dtypes.bfloat16)
        tensors[f"{path}.weight_offset"] = np.zeros((len(scale), 1), ml_dtypes.bfloat16)
        for suffix in ("weight_scale", "weight_offset"):
            description[f"{path}.{suffix}"] = "W8A8"


def narrow_types(tensors: Tensors, description: dict[str, Any]) -> None:
    for name in tensors:
        if name.endswith((".input_scale", ".input_offset", "_proj.bias")):
            narrow = tensors[name].astype(ml_dtypes.bfloat16)
            assert (narrow.astype(np.float32) == tensors[name]).all()
            tensors[name] = narrow


def wide_deq_scale(tensors: Tensors, description: dict[str, Any]) -> None:
    """As models that are not bfloat16 have it, and those whose type the tool did not find."""
    for name in tensors:
        if name.endswith("deq_scale"):
            tensors[name] = tensors[name].view(np.int32).astype(np.int64)


@pytest.mark.parametrize("change", [old_scales, narrow_types, wide_deq_scale])
def test_tensors_of_other_versions_mean_the_same(edited: Any, change: Any) -> None:
    path = edited(tensors=change)
    found = verify_checkpoint(path)
    assert (found.verdict, found.problems) == (SEEN, ())
    x = np.random.default_rng(0).standard_normal((3, 32), np.float32)
    for name in QuantizedModel(path).plan.quantized():
        one, other = QuantizedModel(path).linear(name), QuantizedModel(GOLDEN / STATIC).linear(name)
        assert one is not None and other is not None
        np.testing.assert_array_equal(one.forward(x), other.forward(x))


def wrong_scale(tensors: Tensors, description: dict[str, Any]) -> None:
    old_scales(tensors, description)
    tensors[f"{K_PROJ}.weight_scale"] *= 2


def shifted(tensors: Tensors, description: dict[str, Any]) -> None:
    old_scales(tensors, description)
    tensors[f"{K_PROJ}.weight_offset"][1] = 3


def unknown(tensors: Tensors, description: dict[str, Any]) -> None:
    tensors[f"{LAYER}.mlp.down_proj.kronecker_rotation_m"] = np.eye(4, dtype="f4")


def not_finite(tensors: Tensors, description: dict[str, Any]) -> None:
    tensors[f"{K_PROJ}.deq_scale"][0] = np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_scale, r"k_proj\.weight_scale: 16 of 16 scales times input_scale are not deq_scale"),
        (shifted, r"k_proj\.weight_offset: 1 of 16 offsets are not 0"),
        (unknown, r"unknown tensor 'model\.layers\.0\.mlp\.down_proj\.kronecker_rotation_m'"),
        (not_finite, r"k_proj\.deq_scale: 1 of 16 scales are not positive and finite"),
    ],
)
def test_tensors_that_contradict_each_other_are_wrong(
    edited: Any, change: Any, message: str
) -> None:
    found = verify_checkpoint(edited(tensors=change))
    assert found.verdict == WRONG
    assert any(re.search(message, problem) for problem in found.problems), found.problems
