"""Files beside a checkpoint that its record does not list: what a runtime reads, and the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ms_quant.job.output_directory import RECORD
from ms_quant.job.unlisted import is_read, unlisted_problems

READ = [
    "extra.safetensors",
    "model-00002-of-00002.SAFETENSORS",
    "consolidated.safetensors",
    "pytorch_model.bin",
    "consolidated.00.pth",
    "model.gguf",
    "modeling_qwen3.py",
    "rank_1/model.safetensors",
    "rank_0/x",
    "proof/block-00000.proof",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "adapter_config.json",
    "hf_quant_config.json",
    "preprocessor_config.json",
    "model.safetensors.index.json",
    "quantization_description.json",
    "quant_model_description_w8a8sc.json",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "additional_chat_templates/rag.jinja",
    "params.json",
]
NOT_READ = [
    "README.md",
    "README_zh.md",
    ".gitattributes",
    ".gitignore",
    "configuration.json",
    "configuration_info.json",
    ".msc",
    ".mdl",
    ".mv",
    ".DS_Store",
    "rank_0/.DS_Store",
    ".cache/huggingface/download/model.safetensors.metadata",
    ".cache/huggingface/download/model.safetensors",
    ".git/config.json",
    ".ipynb_checkpoints/config.json",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "figures/loss.png",
    "assets/config.json",
    "onnx/model.onnx",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "model.png",
    "eval_results.json",
    "all_results.json",
    "trainer_state.json",
    "log.txt",
    "Modelfile",
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / RECORD).write_text(json.dumps({"files": {"model.safetensors": {}}}))
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def add(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"x")


@pytest.mark.parametrize("name", READ)
def test_what_a_runtime_reads_is_a_problem(name: str, checkpoint: Path) -> None:
    add(checkpoint, name)
    notes: list[str] = []
    assert unlisted_problems(checkpoint, notes) == [
        f"{checkpoint / name}: not listed in {RECORD}, expected no other file that a runtime reads"
    ]
    assert notes == [] and is_read(name)


@pytest.mark.parametrize("name", NOT_READ)
def test_what_nothing_reads_is_a_note(name: str, checkpoint: Path) -> None:
    add(checkpoint, name)
    notes: list[str] = []
    assert unlisted_problems(checkpoint, notes) == []
    (note,) = notes
    assert name.partition("/")[0] in note and "read by no runtime" in note and not is_read(name)


def test_the_note_is_one_of_bounded_length(checkpoint: Path) -> None:
    add(checkpoint, *(f"picture-{k}.png" for k in range(300)), *(f".git/{k}" for k in range(99)))
    notes: list[str] = []
    assert unlisted_problems(checkpoint, notes) == []
    (note,) = notes
    assert ".git/, picture-0.png" in note and "and 293 more are not listed" in note
    assert len(note) < 500


def test_a_link_to_a_directory_is_seen(checkpoint: Path, tmp_path: Path) -> None:
    add(tmp_path / "elsewhere", "model.safetensors")
    (checkpoint / "rank_0").symlink_to(tmp_path / "elsewhere")
    (problem,) = unlisted_problems(checkpoint, [])
    assert "rank_0: not listed" in problem


def test_a_tokenizer_that_was_added_may_be_served(checkpoint: Path) -> None:
    add(checkpoint, "tokenizer.json", "README.md", "more.safetensors", "rank_0/y")
    notes: list[str] = []
    problems = unlisted_problems(checkpoint, notes, serving=True)
    assert [problem.partition(":")[0] for problem in problems] == [
        str(checkpoint / "more.safetensors"),
        str(checkpoint / "rank_0/y"),
    ]
    assert "tokenizer.json is not listed" in notes[0] and "README.md is not listed" in notes[1]
