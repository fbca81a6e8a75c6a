"""The backend of a tokenizer from the files of a model directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import read_json, require_file, without_mark

MAX_TOKENIZER_BYTES = 256 << 20
SPECIAL_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
WAYS_OUT = (
    "expected tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of "
    "transformers makes it where it can; or token ids as .npz in place of text"
)
# Of transformers' Qwen2Tokenizer.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
OF_MODEL_TYPE = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}
END_OF_TEXT = "<|endoftext|>"
CLASS_SPECIAL: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}


def load_backend(directory: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer proper of a model directory: ``tokenizer.json``, or a vocabulary with merges.

    Args:
        directory (Path): the model directory.
        config (Mapping): the content of its ``tokenizer_config.json``.

    Raises:
        MsQuantError: there is none that can be read; says what there is instead.
    """
    path = directory / "tokenizer.json"
    if path.exists():
        check_file(path, MAX_TOKENIZER_BYTES)
        try:
            return Tokenizer.from_buffer(without_mark(path.read_bytes()))
        except Exception as error:  # the library raises nothing more precise
            raise BadFileError(f"{path}: not a tokenizer ({error})") from error
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return _from_vocabulary(directory, config)
    known = ("*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt")
    others = sorted(found.name for pattern in known for found in directory.glob(pattern))
    if not others:
        raise BadFileError(
            f"{directory}: has no tokenizer, expected tokenizer.json, or token ids as .npz in "
            "place of text"
        )
    raise BadFileError(f"{directory}: has {', '.join(others)} but no tokenizer.json, {WAYS_OUT}")


def special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and so on to their text, where the model names them.

    As in transformers, ``special_tokens_map.json`` counts where ``tokenizer_config.json`` has no
    ``added_tokens_decoder``, and then what the class says where no file has the key.
    """
    defaults = CLASS_SPECIAL.get(tokenizer_class(directory, config) or "", {})
    said = {**defaults, **config, **_older_tokens(directory, config)}
    texts = {key: _content(said.get(key)) for key in SPECIAL_KEYS}
    return {key: text for key, text in texts.items() if isinstance(text, str) and text}


def additional_tokens(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """The special tokens without a name of their own."""
    found = {**config, **_older_tokens(directory, config)}.get("additional_special_tokens")
    texts = map(_content, found if isinstance(found, list) else [])
    return [text for text in texts if isinstance(text, str)]


def _older_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    path = directory / "special_tokens_map.json"
    return read_json(path) if path.is_file() and "added_tokens_decoder" not in config else {}


def begins_with_bos(directory: Path, config: Mapping[str, Any]) -> bool | None:
    """Whether the begin-of-sequence token stands before a text; None: the post-processor says.

    So it is in transformers 4, which servers for Ascend have; 5 asks the post-processor alone.
    """
    if tokenizer_class(directory, config) != "LlamaTokenizer":
        return None
    return config.get("add_bos_token", True) is True


def tokenizer_class(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The class that ``tokenizer_config.json`` names, without Fast, or that of the model type."""
    name = config.get("tokenizer_class")
    path = directory / "config.json"
    if name is None and path.is_file():
        model = read_json(path)
        name = model.get("tokenizer_class") or OF_MODEL_TYPE.get(str(model.get("model_type")))
    return name.removesuffix("Fast") if isinstance(name, str) else None


def check_file(path: Path, limit: int) -> None:
    """Refuses a file that is missing, empty or absurdly large.

    Raises:
        MsQuantError: one of these.
    """
    require_file(path)
    size = path.stat().st_size
    if not 0 < size <= limit:
        raise BadFileError(f"{path}: {size} bytes, expected between 1 and {limit}")


def _from_vocabulary(directory: Path, config: Mapping[str, Any]) -> Tokenizer:
    """A byte-level tokenizer of a class that is known to split text in one way."""
    name = tokenizer_class(directory, config)
    split = BYTE_LEVEL.get(name or "")
    if split is None:
        said = config.get("tokenizer_class") or name or "no tokenizer_class"
        raise BadFileError(
            f"{directory}: has vocab.json and merges.txt of {said}; how text is split is known of "
            f"{' and '.join(BYTE_LEVEL)}, {WAYS_OUT}"
        )
    vocabulary = read_json(directory / "vocab.json", MAX_TOKENIZER_BYTES)
    path = directory / "merges.txt"
    check_file(path, MAX_TOKENIZER_BYTES)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        merges = [(left, right) for left, right in rows]
        backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False))
    except Exception as error:  # the library raises nothing more precise
        raise BadFileError(f"{directory}: vocab.json and merges.txt do not fit ({error})") from None
    split(backend, config.get("add_prefix_space") is True)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, directory, config)
    return backend


def _gpt2(backend: Tokenizer, prefix_space: bool) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)


def _qwen2(backend: Tokenizer, prefix_space: bool) -> None:
    backend.normalizer = normalizers.NFC()
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    words = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_alone])


BYTE_LEVEL: Mapping[str, Callable[[Tokenizer, bool], None]] = {
    "GPT2Tokenizer": _gpt2,
    "Qwen2Tokenizer": _qwen2,
}


def _add_tokens(backend: Tokenizer, directory: Path, config: Mapping[str, Any]) -> None:
    """The added tokens, each with the id that its file gives it.

    Raises:
        MsQuantError: the library would give one another id.
    """
    special = special_tokens(directory, config)
    names = {*special.values(), *additional_tokens(directory, config)}
    path = directory / "added_tokens.json"
    older = read_json(path) if path.is_file() else {}
    entries: dict[int, Any] = {}
    for content, number in older.items():
        if type(number) is not int:
            raise BadFileError(f"{path}: {content!r:.40} is {number!r:.40}, expected an id")
        entries[number] = {"content": content, "special": content in names}
    decoder = config.get("added_tokens_decoder")
    for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if not number.isdecimal() or not isinstance(_content(entry), str):
            raise BadFileError(
                f"{directory}/tokenizer_config.json: added_tokens_decoder has {number!r:.40}, "
                "expected ids with a content each"
            )
        entries[int(number)] = entry
    for number, entry in sorted(entries.items()):
        content = _content(entry)
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        said = {
            k: entry[k] for k in flags if isinstance(entry, dict) and type(entry.get(k)) is bool
        }
        token = AddedToken(content, **{"normalized": not said.get("special", False), **said})
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(content) != number:
            raise BadFileError(
                f"{directory}: the added token {content!r:.40} has id {number} after a gap, "
                f"{WAYS_OUT}"
            )
    known = [AddedToken(text, special=True, normalized=False) for text in sorted(names) if text]
    have = {entry.content for entry in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([t for t in known if t.content not in have])


def _content(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else entry
