"""Tokenizers as model directories have them: vocabulary and merges, special tokens, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from ms_quant.data.tokenizer import load_tokenizer
from ms_quant.errors import MsQuantError

ROOT = Path(__file__).parents[1]
SAMPLE = (ROOT / "models" / "text" / "calibration.txt").read_text()[:60_000]
TEXTS = ["I'll don't 12345", "  a\n\n\tb", "cafe\u0301", "量化", "<|endoftext|>a<|new|> b", ""]
END = "<|endoftext|>"


def byte_level(name: str) -> Tokenizer:
    """A small tokenizer as a fast one of the class saves it."""
    made = Tokenizer(models.BPE())
    if name == "Qwen2Tokenizer":
        made.normalizer = normalizers.NFC()
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
            r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        alone = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        raw = json.loads(made.to_str())
        raw["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, alone | {"trim_offsets": True}],
        }
        made = Tokenizer.from_str(json.dumps(raw))
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([SAMPLE], trainer)
    made.add_special_tokens([END])
    made.add_tokens(["<|new|>"])
    return made


def scatter(made: Tokenizer, directory: Path, **config: Any) -> None:
    """The files that a slow tokenizer has in place of tokenizer.json."""
    raw = json.loads(made.to_str())
    pairs = [p if isinstance(p, str) else " ".join(p) for p in raw["model"]["merges"]]
    (directory / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def added(made: Tokenizer) -> dict[str, int]:
    return {t: made.token_to_id(t) for t in (END, "<|new|>")}


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"])
@pytest.mark.parametrize("where", ["decoder", "file"])
def test_vocabulary_with_merges(tmp_path: Path, name: str, where: str) -> None:
    made = byte_level(name.removesuffix("Fast"))
    config: dict[str, Any] = {"tokenizer_class": name}
    if where == "decoder":
        config["added_tokens_decoder"] = {
            str(i): {"content": t, "special": t == END, "normalized": False}
            for t, i in added(made).items()
        }
    else:
        (tmp_path / "added_tokens.json").write_text(json.dumps(added(made)))
    scatter(made, tmp_path, **config)
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text).tolist() == made.encode(text).ids
        assert loaded.encode_prompt(text).tolist() == made.encode(text).ids
    assert loaded.eos_id == made.token_to_id(END)  # of the class
    assert loaded.vocab_size == made.get_vocab_size()
    assert loaded.decode(made.encode("a b").ids) == "a b"


def test_the_model_type_names_the_class(tmp_path: Path) -> None:
    made = byte_level("Qwen2Tokenizer")
    scatter(made, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert load_tokenizer(tmp_path).encode("12 34").tolist() == made.encode("12 34").ids


@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_a_class_that_may_split_in_another_way(tmp_path: Path, name: str | None) -> None:
    scatter(byte_level("GPT2Tokenizer"), tmp_path, tokenizer_class=name)
    with pytest.raises(
        MsQuantError, match=r"vocab\.json and merges\.txt of .*known of.*save_pretrained"
    ):
        load_tokenizer(tmp_path)


def test_added_tokens_after_a_gap(tmp_path: Path) -> None:
    made = byte_level("GPT2Tokenizer")
    scatter(made, tmp_path, tokenizer_class="GPT2Tokenizer")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|new|>": 9999}))
    with pytest.raises(MsQuantError, match=r"new\|>' has id 9999 after a gap"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("merges.txt", "a b c"), ("merges.txt", "zz yy"), ("vocab.json", '{"a": "b"}')],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, content: str) -> None:
    scatter(byte_level("GPT2Tokenizer"), tmp_path, tokenizer_class="GPT2Tokenizer")
    (tmp_path / name).write_text(content)
    with pytest.raises(MsQuantError, match=r"vocab\.json and merges\.txt do not fit"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken", "tekken.json", "vocab.json"])
def test_another_kind_of_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    with pytest.raises(MsQuantError, match=rf"has {name} but no tokenizer\.json.*\.npz"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "older", "expected"),
    [
        ({"eos_token": "a"}, None, "a"),
        ({"eos_token": {"content": "a"}}, None, "a"),
        ({}, {"eos_token": {"content": "b"}}, "b"),
        ({"eos_token": "a"}, {"eos_token": "b"}, "b"),
        ({"eos_token": "a", "added_tokens_decoder": {}}, {"eos_token": "b"}, "a"),
        ({"eos_token": None, "tokenizer_class": "Qwen2Tokenizer"}, None, None),
        ({"tokenizer_class": "Qwen2Tokenizer"}, None, END),
        ({}, None, None),
    ],
)
def test_special_tokens_are_those_of_transformers(
    tmp_path: Path, config: Any, older: Any, expected: str | None
) -> None:
    Tokenizer(models.WordLevel({"a": 0, "b": 1, END: 2}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if older is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    loaded = load_tokenizer(tmp_path)
    assert loaded.special.get("eos_token") == expected
    assert loaded.eos_id == (None if expected is None else ["a", "b", END].index(expected))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": {"eos_token_id": 1}}, 1),
        ({"config.json": {"eos_token_id": 1}, "generation_config.json": {"eos_token_id": [0]}}, 0),
        ({"config.json": {"eos_token_id": None}}, None),
    ],
)
def test_the_end_token_of_the_model_where_the_tokenizer_has_none(
    tmp_path: Path, files: Any, expected: int | None
) -> None:
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eos_id == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast"}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("processor", [False, True])
def test_what_texts_begin_with(
    tmp_path: Path, config: Any, expected: bool, processor: bool
) -> None:
    """Llama's class decides, as in transformers 4; else the post-processor does."""
    words = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    words.add_special_tokens(["<s>"])
    if processor:
        words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"} | config))
    if "Llama" not in config.get("tokenizer_class", ""):
        expected = processor
    assert load_tokenizer(tmp_path).first_ids.tolist() == [1] * expected
