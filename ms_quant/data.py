"""Calibration and evaluation data: a file becomes windows of token ids.

Three kinds of file, told apart by suffix: ``.npz`` holds ids, ``.jsonl`` holds one record a line,
anything else is UTF-8 text. Text becomes one stream with the end-of-sequence token between records,
cut into windows. Each window begins with the token that the model's tokenizer puts before a text,
if it does: serving does so, too. Ids of an ``.npz`` are taken as they are.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.tokenizer import ModelTokenizer, check_file, load_tokenizer, model_vocab_size

__all__ = ["eval_windows", "load_stream", "load_tokenizer", "load_tokens"]

MAX_FILE_BYTES = 4 << 30
MAX_RECORD_CHARS = 64 << 20
CHUNK_CHARS = 4 << 20  # the tokenizers library needs some 200 bytes of memory a token
ANSWER_KEYS = ("answer", "completion", "response")


def load_tokens(
    path: Path | str, tokenizer_dir: Path | str, samples: int, seq_len: int, seed: int
) -> np.ndarray:
    """Chooses calibration windows from a file.

    The file becomes one stream of ids, cut into windows that do not overlap; ``samples`` of them
    are drawn without replacement and kept in the order of the file. A 2-D array of ids is cut row
    by row.

    Args:
        path (Path | str): ``.npz``, ``.jsonl`` or text.
        tokenizer_dir (Path | str): the model directory.
        samples (int): how many windows to draw.
        seq_len (int): the length of a window.
        seed (int): of the draw.

    Returns:
        numpy.ndarray, int32 of shape ``(n, seq_len)``; n is less than `samples` if the file has
        fewer windows, and then all are returned.

    Raises:
        MsQuantError: the file is empty, malformed, too short for one window, or holds ids that the
            model does not have.
    """
    if samples <= 0:
        raise MsQuantError(f"samples is {samples}, expected a positive number")
    windows = eval_windows(path, tokenizer_dir, seq_len)
    if len(windows) <= samples:
        return windows
    chosen = np.random.default_rng(seed).choice(len(windows), samples, replace=False)
    return windows[np.sort(chosen)]


def eval_windows(path: Path | str, tokenizer_dir: Path | str, seq_len: int) -> np.ndarray:
    """All windows of a file, in order, without overlap; the rest of the stream is dropped.

    Args:
        path (Path | str): ``.npz``, ``.jsonl`` or text.
        tokenizer_dir (Path | str): the model directory.
        seq_len (int): the length of a window.

    Returns:
        numpy.ndarray, int32 of shape ``(n, seq_len)``, n at least 1.

    Raises:
        MsQuantError: as :func:`load_tokens`.
    """
    stream, first = _load(Path(path), Path(tokenizer_dir))
    step = seq_len - len(first)
    if step <= 0:
        raise MsQuantError(f"seq_len is {seq_len}, expected at least {len(first) + 1}")
    ids = np.atleast_2d(stream)
    length = ids.shape[1] if ids.size else 0
    if length < step:
        raise MsQuantError(
            f"{path}: {length} tokens, expected at least {step} for a window of seq_len {seq_len}"
        )
    windows = ids[:, : length - length % step].reshape(-1, step)
    return np.concatenate([np.tile(first, (len(windows), 1)), windows], axis=1)


def load_stream(path: Path | str, tokenizer_dir: Path | str) -> np.ndarray:
    """The ids of a whole file.

    Args:
        path (Path | str): ``.npz``, ``.jsonl`` or text.
        tokenizer_dir (Path | str): the model directory.

    Returns:
        numpy.ndarray, int32 of one dimension, or of two where an ``.npz`` holds such an array.

    Raises:
        MsQuantError: the file is empty or malformed, or holds ids that the model does not have.
    """
    return _load(Path(path), Path(tokenizer_dir))[0]


def _load(path: Path, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """The stream, and the ids that each window begins with."""
    check_file(path, MAX_FILE_BYTES)
    if path.suffix == ".npz":
        vocab_size = model_vocab_size(directory) or load_tokenizer(directory).vocab_size
        return _check_ids(_read_npz(path), vocab_size, path), np.zeros(0, np.int32)
    tokenizer = load_tokenizer(directory)
    read = _record_ids if path.suffix == ".jsonl" else _text_ids
    try:
        pieces = list(read(path, tokenizer))
    except UnicodeDecodeError:
        raise MsQuantError(f"{path}: not UTF-8, expected text, .jsonl or .npz") from None
    ids = np.concatenate([np.zeros(0, np.int32), *pieces])
    return _check_ids(ids, tokenizer.vocab_size, path), tokenizer.first_ids


def _text_ids(path: Path, tokenizer: ModelTokenizer) -> Iterator[np.ndarray]:
    with path.open(encoding="utf-8-sig") as file:
        while chunk := file.read(CHUNK_CHARS):
            yield tokenizer.encode(chunk + file.readline(CHUNK_CHARS))


def _record_ids(path: Path, tokenizer: ModelTokenizer) -> Iterator[np.ndarray]:
    first = True
    for where, line in _lines(path):
        text = _record_text(line, where, tokenizer)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise MsQuantError(f"{where} holds half of a surrogate pair, expected text") from None
        ids = tokenizer.encode(text)
        if len(tokenizer.first_ids) and ids[:1] == tokenizer.first_ids:
            ids = ids[1:]  # a chat template may write what every window begins with
        if not first:
            if tokenizer.eos_id is None:
                raise MsQuantError(
                    f"{tokenizer.directory}: tokenizer_config.json names no known eos_token, "
                    "expected one to put between records"
                )
            yield np.array([tokenizer.eos_id], np.int32)
        first = False
        yield ids


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(MAX_RECORD_CHARS + 1):
            number += 1
            if len(line) > MAX_RECORD_CHARS:
                raise MsQuantError(
                    f"{path}: line {number} is longer than {MAX_RECORD_CHARS} characters"
                )
            if line.strip():
                yield f"{path}: line {number}", line


def _record_text(line: str, where: str, tokenizer: ModelTokenizer) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MsQuantError(f"{where} is not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise MsQuantError(f"{where} is a JSON {type(record).__name__}, expected an object")
    kinds = [key for key in ("text", "prompt", "messages") if key in record]
    answers = [key for key in ANSWER_KEYS if key in record]
    if len(kinds) != 1 or len(answers) != (kinds == ["prompt"]):
        raise MsQuantError(
            f"{where} has the keys {sorted(record)!r:.120}, expected either text, or prompt and "
            f"one of {', '.join(ANSWER_KEYS)}, or messages"
        )
    if kinds == ["messages"]:
        return tokenizer.render(_check_messages(record["messages"], where))
    texts = [record[key] for key in kinds + answers]
    if not all(isinstance(text, str) for text in texts):
        raise MsQuantError(f"{where}: {' and '.join(kinds + answers)}, expected strings")
    return _join(texts)


def _join(texts: list[str]) -> str:
    """Prompt and answer touch where one of them brings white space, else on a new line."""
    if len(texts) == 2 and not texts[0][-1:].isspace() and not texts[1][:1].isspace():
        return "\n".join(texts)
    return "".join(texts)


def _check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    good = isinstance(value, list) and all(
        isinstance(item, dict) and all(isinstance(item.get(k), str) for k in ("role", "content"))
        for item in value
    )
    if not good or not value:
        raise MsQuantError(f"{where}: messages, expected a list of objects with role and content")
    return value


def _read_npz(path: Path) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_FILE_BYTES:
            raise MsQuantError(f"{path}: {size} bytes unpacked, expected at most {MAX_FILE_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            if "tokens" not in names and len(names) != 1:
                raise MsQuantError(f"{path}: has the arrays {names}, expected one named tokens")
            ids = arrays["tokens" if "tokens" in names else names[0]]
    except MsQuantError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise MsQuantError(f"{path}: not a readable .npz file ({error})") from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise MsQuantError(
            f"{path}: found {getattr(ids, 'dtype', 'bytes')} of shape "
            f"{list(getattr(ids, 'shape', []))}, expected integers of one or two dimensions"
        )
    return ids


def _check_ids(ids: np.ndarray, vocab_size: int, path: Path) -> np.ndarray:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise MsQuantError(
            f"{path}: holds the token id {wrong}, expected ids from 0 to {vocab_size - 1}"
        )
    return ids.astype(np.int32, copy=False)
