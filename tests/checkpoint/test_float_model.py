"""Float checkpoints as people have them: names, heads, what is stored twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ms_quant.errors import MsQuantError
from ms_quant.formats.float_model import model_notes, open_float
from ms_quant.formats.inspection import inspect_checkpoint
from ms_quant.formats.opening import open_model
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.pipeline.request import QuantizeOptions
from ms_quant.pipeline.run import run_job
from ms_quant.serve.check import serve_check
from ms_quant.verify.checkpoint import verify_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, np.ndarray]


def without_prefix(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def headless(tensors: Tensors) -> None:
    tensors.pop(HEAD, None)


def bare(tensors: Tensors) -> None:
    headless(tensors)
    without_prefix(tensors)


def refusal(directory: Path) -> str:
    with pytest.raises(MsQuantError) as caught:
        open_float(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def quantized(source: Path, format: str) -> Path:
    output = source.with_name(f"{source.name}-{format}")
    options = QuantizeOptions(source, output, "W8A8_DYNAMIC", formats=(format,))
    run_job(options)
    assert verify_checkpoint(output, source).problems == ()
    return output


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["ascend", "compressed-tensors", "mindie-sd"])
def test_an_embedding_model_without_prefix_and_head(
    shards: int, tied: bool, format: str, tiny_model: Callable, load_tensors: Callable
) -> None:
    source = tiny_model(shards=shards, tied=tied, change=bare)
    config, checkpoint = open_float(source)
    assert (config.no_head, config.has_head, config.predicts) == (True, False, tied)
    assert EMBEDDING in checkpoint
    inspected = inspect_checkpoint(source)
    assert {linear["stored_as"] for linear in inspected["linears"]} == {"BF16"}
    stored = load_tensors(source)["layers.1.mlp.up_proj.weight"]
    found = checkpoint.read("model.layers.1.mlp.up_proj.weight")
    assert found.tobytes() == stored.tobytes()
    output = quantized(source, format)
    names = load_tensors(output)
    assert EMBEDDING in names and "model.norm.weight" in names  # as *ForCausalLM is loaded
    assert HEAD not in names
    assert open_model(output).config.no_head
    if format == "ascend":  # vllm-ascend asks for it while it builds a head that it then drops
        description = json.loads((output / "quant_model_description.json").read_text())
        assert description[HEAD] == "FLOAT"


def test_an_embedding_model_by_its_class_or_its_modules(tiny_model: Callable) -> None:
    by_class = tiny_model("class", architectures=["Qwen3Model"], change=headless)
    by_modules = tiny_model("modules", change=headless)
    (by_modules / "modules.json").write_text('[{"path": "", "type": "Transformer"}]')
    for source in (by_class, by_modules):
        assert open_float(source).config.no_head
    with_prefix = tiny_model("flat", change=without_prefix)  # a whole model whose prefix is gone
    assert open_float(with_prefix).config.has_head


def test_a_head_that_is_missing(tiny_model: Callable) -> None:
    message = refusal(tiny_model(change=headless))
    for part in (HEAD, "tie_word_embeddings true", "architectures ['Qwen3Model']"):
        assert part in message


def test_a_quantized_model_whose_head_was_lost(
    tiny_model: Callable, load_tensors: Callable, save_tensors: Callable
) -> None:
    output = quantized(tiny_model(), "compressed-tensors")
    (path,) = output.glob("*.safetensors")
    tensors = load_tensors(output)
    del tensors[HEAD]
    save_tensors(path, tensors)
    for name in ("ms_quant.json", f"{path.name}.index.json", "model.safetensors.index.json"):
        (output / name).unlink(missing_ok=True)
    assert any("'lm_head.weight' is missing" in p for p in verify_problems(output))


def verify_problems(directory: Path) -> list[str]:
    return serve_check(directory, "vllm-ascend")["problems"]


@pytest.mark.parametrize("dtype", [None, np.float32])
def test_a_tied_head_stored_a_second_time(dtype: type | None, tiny_model: Callable) -> None:
    def change(tensors: Tensors) -> None:
        table = tensors[EMBEDDING]
        tensors[HEAD] = table if dtype is None else table.astype(dtype)

    source = tiny_model(tied=True, change=change)
    config, checkpoint = open_float(source)
    assert any("stores the head a second time" in line for line in model_notes(config, checkpoint))
    quantized(source, "ascend")


@pytest.mark.parametrize("where", [(0, 0), (-1, -1)])
def test_a_tied_head_that_is_another_matrix(where: tuple, tiny_model: Callable) -> None:
    def change(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].copy()
        tensors[HEAD][where] += 1

    message = refusal(tiny_model(tied=True, change=change))
    for part in (HEAD, "in 1 of 5120 values", "by up to 1", "false", "or no such tensor"):
        assert part in message


def test_a_head_that_differs_is_found_by_everything_that_reads_a_source(
    tiny_model: Callable, save_tensors: Callable, load_tensors: Callable
) -> None:
    source = tiny_model(tied=True)
    output = quantized(source, "ascend")
    tensors = load_tensors(source)
    save_tensors(source / "model.safetensors", {**tensors, HEAD: 2 * tensors[EMBEDDING]})
    for call in (
        lambda: verify_checkpoint(output, source),
        lambda: open_model(source),
        lambda: run_job(QuantizeOptions(source, output, "W8A8_DYNAMIC")),
    ):
        with pytest.raises(MsQuantError, match=r"lm_head\.weight': differs from"):
            call()


def test_a_tied_table_under_the_head_s_name(tiny_model: Callable, load_tensors: Callable) -> None:
    def change(tensors: Tensors) -> None:
        tensors[HEAD] = tensors.pop(EMBEDDING)

    source = tiny_model(tied=True, change=change)
    output = quantized(source, "compressed-tensors")
    assert load_tensors(output)[EMBEDDING].tobytes() == load_tensors(source)[HEAD].tobytes()


def buffers(theta: float, dtype: type = np.float32) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        turns = (1 / theta ** (np.arange(0, 6, 2) / 6)).astype(dtype)
        for index in range(2):
            tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = turns

    return change


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rotary_buffers_of_old_exports(dtype: type, tiny_model: Callable) -> None:
    quantized(tiny_model("same", family="llama", change=buffers(1e4, dtype)), "ascend")
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    open_float(tiny_model("scaled", family="llama", change=buffers(1e4, dtype), **linear))
    message = refusal(tiny_model("other", family="llama", change=buffers(5e5, dtype)))
    for part in ("layers.0.self_attn.rotary_emb.inv_freq", "rope_theta 10000.0", "no such tensor"):
        assert part in message


def test_a_whole_model_beside_an_index(tiny_model: Callable, save_tensors: Callable) -> None:
    source = tiny_model(shards=2)
    save_tensors(source / "model.safetensors", {"x": np.zeros(3, np.float32)})
    assert "model.safetensors.index.json, which does not name it" in refusal(source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "model.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'x' is not a tensor of a qwen3 model" in refusal(source)


def test_tensors_that_an_index_leaves_out(
    tiny_model: Callable, save_tensors: Callable, load_tensors: Callable
) -> None:
    def index(*gone: str) -> None:
        shard_of = {name: "all.safetensors" for name in tensors if name not in gone}
        text = json.dumps({"weight_map": shard_of})
        (source / "model.safetensors.index.json").write_text(text)

    source = tiny_model(tied=True)
    tensors = load_tensors(source)
    tensors |= {HEAD: 2 * tensors[EMBEDDING], "other": np.zeros(3, np.float32)}
    (source / "model.safetensors").unlink()
    save_tensors(source / "all.safetensors", tensors)
    index(HEAD, "other")
    assert "holds tensor 'lm_head.weight', which the index leaves out" in refusal(source)
    tensors[HEAD] = tensors[EMBEDDING]
    save_tensors(source / "all.safetensors", tensors)
    index("other")
    notes = model_notes(*open_float(source))
    assert any("the index leaves out other, which are not read" in line for line in notes)


def test_shards_beside_a_whole_model(tiny_model: Callable, save_tensors: Callable) -> None:
    source = tiny_model()
    save_tensors(source / "model-00001-of-00002.safetensors", {"x": np.zeros(3, np.float32)})
    assert "has model.safetensors and shards such as model-00001-of" in refusal(source)


@pytest.mark.parametrize("shards", [1, 2])
def test_files_in_another_layout_are_noted(
    shards: int, tiny_model: Callable, save_tensors: Callable
) -> None:
    source = tiny_model(shards=shards)
    save_tensors(source / "consolidated.safetensors", {"x": np.zeros(3, np.float32)})
    notes = model_notes(*open_float(source))
    assert notes == [f"{source}: consolidated.safetensors are not read, nor copied"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "labels"), [("Sequence", {"num_labels": 1}), ("Token", {"id2label": {"0": "a"}})]
)
def test_a_classifier(
    kind: str, labels: dict, tied: bool, tiny_model: Callable, load_tensors: Callable
) -> None:
    def change(tensors: Tensors) -> None:
        headless(tensors)
        table = tensors[EMBEDDING]
        tensors["score.weight"] = table[:1].copy()
        if kind == "Token":
            tensors["score.bias"] = table[0, :1].copy()

    classes = [f"Qwen3For{kind}Classification"]
    source = tiny_model(tied=tied, architectures=classes, change=change, **labels)
    assert not open_float(source).config.predicts
    for format in ("ascend", "compressed-tensors"):
        output = quantized(source, format)
        stored = load_tensors(output)["score.weight"]
        assert stored.tobytes() == load_tensors(source)["score.weight"].tobytes()
        served = serve_check(output, "vllm-ascend")
        assert served["problems"] == []
        assert any("gives out labels" in line for line in served["notes"])
    convert_checkpoint(output, output.with_name("back"), "ascend")
    assert verify_checkpoint(output.with_name("back"), source).problems == ()


def test_a_classifier_of_another_size_or_without_its_head(tiny_model: Callable) -> None:
    def change(tensors: Tensors) -> None:
        tensors["score.weight"] = tensors[EMBEDDING][:3].copy()
        headless(tensors)

    classes = ["Qwen3ForSequenceClassification"]
    message = refusal(tiny_model("two", architectures=classes, change=change))
    assert "'score.weight' has shape [3, 16], expected [2, 16]" in message  # 2 is the default
    message = refusal(tiny_model("none", architectures=classes, change=headless))
    assert "expected 'score.weight' of shape [2, 16]" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"layers.9.x": np.zeros(2, np.float32)}),
    ],
)
def test_other_names_stay_refused(change: Callable, tiny_model: Callable) -> None:
    refusal(tiny_model(change=change))


@pytest.mark.parametrize("family", ["mistral", "smollm3", "seed_oss", "internlm3"])
@pytest.mark.parametrize("format", ["ascend", "compressed-tensors", "mindie-sd"])
def test_families_in_every_format(family: str, format: str, tiny_model: Callable) -> None:
    more = {"mistral": {"sliding_window": None}, "smollm3": {"no_rope_layers": [1, 0]}}
    quantized(tiny_model(family=family, **more.get(family, {})), format)
