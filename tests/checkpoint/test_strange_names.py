"""Tensors of another kind than the config says: one sentence with the cause."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files.reader import Checkpoint
from ms_quant.files.strange_names import QUANTIZED, WRAPPERS
from ms_quant.models.config import load_config
from ms_quant.models.weights import check_model

Tensors = dict[str, np.ndarray]
ONE = np.ones(1, np.float32)
Q = "model.layers.0.self_attn.q_proj"


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        new = {rename(name): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(new)

    return change


def prefixed(prefix: str) -> Callable[[Tensors], None]:
    return renamed(lambda name: prefix + name)


def under(prefix: str) -> Callable[[Tensors], None]:
    return renamed(lambda name: name.replace("model.", prefix, 1) if "model." in name else name)


def more(*endings: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{Q}{ending}": ONE for ending in endings})


def packed(ending: str, *others: str) -> Callable[[Tensors], None]:
    """The weights of linears under another name, as packed formats have them."""

    def change(tensors: Tensors) -> None:
        renamed(lambda n: n.replace("_proj.weight", f"_proj{ending}"))(tensors)
        more(*others)(tensors)

    return change


def narrowed(dtype: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name] = tensors[name].astype(np.float32).astype(dtype)

    return change


def without_head(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors.update(dict.fromkeys(names, ONE))

    return change


@functools.cache
def float8() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prefixed("_orig_mod."), r"'_orig_mod\.' in their names.*torch\.compile"),
        (prefixed("module."), r"'module\.' in their names.*DataParallel"),
        (prefixed("base_model.model."), r"expected 'lm_head.weight'; it is left by PEFT"),
        (prefixed("module._orig_mod."), r"'_orig_mod\.'.*torch\.compile"),
        (
            renamed(lambda n: n.replace("self_attn.", "_orig_mod.self_attn.")),
            r".*'_orig_mod\.' in their names, expected 'model.layers.0.self_attn",
        ),
        (under("model.language_model."), "inside of a vision-language model"),
        (under("language_model.model."), "inside of a vision-language model"),
        (under("transformer."), r"tensors begin with 'transformer\.'"),
        (under("backbone."), r"tensors begin with 'backbone\.' .* another class"),
        (under(""), r"no tensor begins with 'model\.'.*AutoModelForCausalLM|base model"),
        (more(".lora_A.default.weight"), r"adapter \(LoRA\) that is not merged"),
        (packed(".base_layer.weight"), r"adapter \(LoRA\) that is not merged"),
        (packed(".qweight", ".qzeros", ".scales", ".g_idx"), "is quantized .*as of GPTQ"),
        (packed(".qweight", ".qzeros", ".scales"), "is quantized .*as of AWQ or GPTQ"),
        (packed(".weight_packed", ".weight_scale", ".weight_shape"), "llm-compressor"),
        (packed(".weight_packed", ".weight_scale", ".weight_global_scale"), "NVFP4"),
        (more(".weight_scale_inv"), "FP8 in blocks"),
        (more(".weight_scale", ".deq_scale", ".quant_bias"), "msModelSlim or Golden Stick"),
        (more(".weight_scale"), "is quantized"),
        (more(".scales", ".biases"), "MLX"),
        (more(".weight.quant_state.bitsandbytes__nf4", ".weight.absmax"), "bitsandbytes"),
        (more(".SCB"), "bitsandbytes"),
        (packed(".weight._data", ".weight._scale"), "quanto"),
        (packed(".W_q"), "HQQ"),
        (more(".modules_to_save.default.weight"), r"adapter \(LoRA\) that is not merged"),
        (narrowed(np.int8), r"14 tensors such as .* are I8; expected the float checkpoint"),
        (narrowed(np.uint8), "14 tensors such as .* are U8"),
        (narrowed(float8()), "14 tensors such as .* are F8_E4M3"),
        (
            renamed(
                lambda n: n.replace("model.layers.0.self_attn.q_proj", "layers.0.attention.wq")
            ),
            "Meta's or Mistral's original layout",
        ),
        (renamed(lambda n: n.replace("model.layers.", "blk.")), "the names of GGUF"),
        (renamed(lambda n: n.replace("model.layers.", "transformer.h.")), "another kind of model"),
        (renamed(lambda n: n.replace("q_proj", "qkv_proj")), "fused q"),
        (without_head(), "no 'lm_head.weight'.*base or embedding model"),
        (without_head("score.weight"), r"classifier or reward model \('score.weight'\)"),
    ],
)
def test_the_cause_is_named(
    change: Callable[[Tensors], None], message: str, tiny_model: Callable[..., Path]
) -> None:
    directory = tiny_model(change=change)
    with pytest.raises(MsQuantError, match=message) as found:
        check_model(Checkpoint(directory), load_config(directory))
    assert str(found.value).startswith(f"{directory}: ") and "\n" not in str(found.value)


def test_the_document_has_every_row() -> None:
    rows = (Path(__file__).parents[2] / "docs" / "sources.md").read_text().splitlines()
    cells = [tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in rows if "|" in row]
    what = [row[1] for row in cells]
    assert [who for who in what if who.startswith("quantized by")][:-1] == [
        f"quantized by {who}" for _, who in QUANTIZED
    ]
    named = [row for row in cells if row[0].strip("`") in dict(WRAPPERS)]
    assert [(name.strip("`"), who) for name, who in named] == [
        (part, text.partition(":")[0]) for part, text in WRAPPERS
    ]


def test_missing_shards_are_counted(tiny_model: Callable[..., Path]) -> None:
    directory = tiny_model(shards=4)
    first, second, *_ = sorted(directory.glob("model-*.safetensors"))
    first.unlink()
    second.unlink()
    with pytest.raises(MsQuantError, match=f"{first}: no such file.*2 of its 4 files are missing"):
        Checkpoint(directory)
