"""Files that go with a model's tensors: which, how much of them, and what else is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files import companion_files as module
from ms_quant.files.companion_files import code_notes, companion_files
from ms_quant.formats.inspection import inspect_checkpoint
from ms_quant.pipeline.convert import convert_checkpoint
from ms_quant.pipeline.request import QuantizeOptions
from ms_quant.pipeline.run import run_job
from ms_quant.verify.checkpoint import verify_checkpoint

COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.txt",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "generation_config.json",
    "configuration.json",
    "sentence_bert_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENCE.md",
    "Notice.txt",
    "NOTICE",
    "USE_POLICY.md",
    "additional_chat_templates/tool_use.jinja",
)
LEFT = (
    "README.md",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "optimizer.pt",
    "pytorch_model.bin",
    "params.json",
    "trainer_state.json",
    ".gitattributes",
    "modeling_x.py",
    "onnx/model.onnx",
    "1_Pooling/config.json",
    "license_server.py",
)


def put(directory: Path, name: str, content: str = "{}") -> Path:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(content)
    return directory / name


def modules(directory: Path, *paths: object, kind: str = "models.Pooling") -> None:
    items = [
        {"path": "", "type": "models.Transformer"},
        *({"path": p, "type": kind} for p in paths),
    ]
    put(directory, "modules.json", json.dumps(items))


def test_what_is_copied_and_what_is_not(tmp_path: Path) -> None:
    for name in (*COPIED, *LEFT):
        put(tmp_path, name)
    assert companion_files(tmp_path) == tuple(sorted(COPIED))


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_custom_code_is_copied_where_a_config_names_it(where: str, tmp_path: Path) -> None:
    put(tmp_path, "modeling_x.py"), put(tmp_path, "helpers.py"), put(tmp_path, "inner/a.py")
    assert companion_files(tmp_path) == ()
    put(tmp_path, where, json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    code = {name for name in companion_files(tmp_path) if name.endswith(".py")}
    assert code == {"modeling_x.py", "helpers.py"}  # one imports the other


def test_notes_say_what_custom_code_is(tmp_path: Path) -> None:
    named = {"AutoModel": "a.LlamaModel", "AutoConfig": "org/repo--b.C", "AutoTokenizer": ["t.T"]}
    put(tmp_path, "config.json", json.dumps({"auto_map": named})), put(tmp_path, "a.py")
    found = "\n".join(code_notes(tmp_path))
    assert "neither read nor run" in found
    assert "org/repo--b.C is in another repository" in found
    assert "AutoTokenizer t.T, but there is no t.py" in found
    assert "no a.py" not in found


def test_pooling_directories_are_copied_with_their_structure(tmp_path: Path) -> None:
    modules(tmp_path, "1_Pooling", "2_Dense", "3_Normalize")
    put(tmp_path, "1_Pooling/config.json"), put(tmp_path, "2_Dense/model.safetensors")
    put(tmp_path, "2_Dense/.hidden")
    expected = ("1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json")
    assert companion_files(tmp_path) == expected


@pytest.mark.parametrize("path", ["../other", "/etc", "a/b", ".", "..", ".git", 5, None, "a\0b"])
def test_modules_elsewhere_are_refused(path: object, tmp_path: Path) -> None:
    modules(tmp_path, path)
    with pytest.raises(MsQuantError, match="expected the name of a directory of the model"):
        companion_files(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[1]", "[", '[{"path": ""}, 5]'])
def test_a_malformed_list_of_modules(content: str, tmp_path: Path) -> None:
    put(tmp_path, "modules.json", content)
    with pytest.raises(MsQuantError, match=r"modules\.json: "):
        companion_files(tmp_path)


def test_a_model_inside_of_its_modules(tmp_path: Path) -> None:
    modules(tmp_path, "0_Transformer", kind="sentence_transformers.models.Transformer")
    with pytest.raises(MsQuantError, match="the model itself is in 0_Transformer"):
        companion_files(tmp_path)


def test_directories_that_lead_elsewhere(tmp_path: Path) -> None:
    put(tmp_path, "outside/secret"), put(tmp_path, "model/config.json")
    modules(tmp_path / "model", "1_Pooling")
    (tmp_path / "model/1_Pooling").symlink_to(tmp_path / "outside")
    with pytest.raises(MsQuantError, match="is a symbolic link"):
        companion_files(tmp_path / "model")
    (tmp_path / "model/1_Pooling").unlink()
    put(tmp_path, "model/1_Pooling/deep/file")
    with pytest.raises(MsQuantError, match="deep: is a directory, expected only files"):
        companion_files(tmp_path / "model")


def test_files_of_a_hub_s_cache_are_links(tmp_path: Path) -> None:
    blob = put(tmp_path, "blobs/1", "text")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/tokenizer.json").symlink_to(blob)
    (tmp_path / "snapshot/vocab.json").symlink_to(tmp_path / "blobs/absent")
    assert companion_files(tmp_path / "snapshot") == ("tokenizer.json",)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "config.json", json.dumps({"auto_map": {"AutoModel": "a.M"}}))
    put(tmp_path, "a.py", "x" * 100)
    monkeypatch.setattr(module, "MAX_CODE_BYTES", 99)
    with pytest.raises(MsQuantError, match=r"a\.py: 100 bytes, expected at most 99"):
        companion_files(tmp_path)
    monkeypatch.setattr(module, "MAX_CODE_BYTES", 100)
    monkeypatch.setattr(module, "MAX_FILES", 0)
    with pytest.raises(MsQuantError, match="has 1 files beside its tensors, expected at most 0"):
        companion_files(tmp_path)


def test_outputs_hold_and_compare_them(tiny_model: Callable) -> None:
    source = tiny_model(family="qwen2", auto_map={"AutoModel": "modeling_q.Qwen2Model"})
    put(source, "modeling_q.py", "raise SystemExit('never run')")
    modules(source, "1_Pooling"), put(source, "1_Pooling/config.json", '{"a": 1}')
    put(source, "1_Pooling/model.safetensors", "never read")
    output, other = source.with_name("out"), source.with_name("other")
    run_job(QuantizeOptions(source, output, "W8A8_DYNAMIC", formats=("ascend",)))
    convert_checkpoint(output, other, "compressed-tensors")
    assert inspect_checkpoint(output)["files"] == 1
    for directory in (output, other):
        assert (directory / "1_Pooling/config.json").read_text() == '{"a": 1}'
        assert (directory / "modeling_q.py").is_file()
        assert verify_checkpoint(directory, source).problems == ()
    put(source, "1_Pooling/config.json", '{"a": 2}')
    path = output / "1_Pooling/config.json"
    assert verify_checkpoint(output, source).problems == (f"{path}: differs from the source's",)


def test_an_interrupted_output_with_directories_goes_on(tiny_model: Callable) -> None:
    source = tiny_model()
    modules(source, "1_Pooling"), put(source, "1_Pooling/config.json")
    options = QuantizeOptions(source, source.with_name("out"), "W8A8_DYNAMIC", formats=("ascend",))
    run_job(options)
    partial = options.output.rename(options.output.with_name("out.partial"))
    value = json.loads((partial / "ms_quant.json").read_text())
    (partial / "ms_quant.json").write_text(json.dumps({"record": value["record"]}))
    run_job(options)
    assert verify_checkpoint(options.output, source).problems == ()
