"""Calibration and evaluation data: a file becomes windows of token ids.

``data_files`` says what is read. Text becomes one stream with the end-of-sequence token between
records, cut into windows. Each window begins with the token that the model's tokenizer puts before
a text, if it does: serving does so, too. Ids are taken as they are. Of a large file as much is
tokenized as the windows need, see ``data_windows``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ms_quant.data.files import Kind, count_chars, find_kind
from ms_quant.data.messages import Conversation, is_empty
from ms_quant.data.records import Content, unused_keys
from ms_quant.data.sources import RecordSource, TextSource, holds_ids, record_reader
from ms_quant.data.token_ids import read_ids, unpacked_bytes
from ms_quant.data.tokenizer import ModelTokenizer, load_tokenizer, model_vocab_size
from ms_quant.data.windows import draw, needs_whole, stream
from ms_quant.errors import BadFileError, MsQuantError

__all__ = [
    "eval_windows",
    "few_tokens",
    "load_stream",
    "load_tokenizer",
    "load_tokens",
    "reading_bytes",
]

FEW_TOKENS, JUDGED_TOKENS = 16, 64  # fewer of all tokens say nothing
REPEATED = 0.98
TEXT_BYTES, TOKENIZER_COPIES = 64 << 20, 12
NO_IDS = np.zeros(0, np.int32)
Note = Callable[[str], object]
"""Told what to know of a file, one sentence each."""


def _unheard(_: str) -> None:
    pass


def load_tokens(
    path: Path | str,
    tokenizer_dir: Path | str,
    samples: int,
    seq_len: int,
    seed: int,
    note: Note = _unheard,
) -> np.ndarray:
    """Chooses calibration windows from a file.

    A file of up to 1 Mi characters (or 12 for each token asked for) becomes one stream of ids, cut
    into windows that do not overlap; ``samples`` of them are drawn without replacement and kept in
    the order of the file. Of a larger one a window is tokenized at each of ``samples`` drawn
    places, one in each of as many equal stretches of the file. A 2-D array of ids is cut row by
    row.

    Args:
        path (Path | str): text, JSON or Parquet records, or ids.
        tokenizer_dir (Path | str): the model directory.
        samples (int): how many windows to draw.
        seq_len (int): the length of a window.
        seed (int): of the draw.
        note (Callable): told of keys of records that are not used.

    Returns:
        numpy.ndarray, int32 of shape ``(n, seq_len)``; n is less than `samples` if the file has
        fewer windows, and then all are returned.

    Raises:
        MsQuantError: the file is of a kind that is not read, empty, malformed, too short for one
            window, nothing but one token, or holds ids that the model does not have.
    """
    if samples <= 0:
        raise BadFileError(f"samples is {samples}, expected a positive number")
    data = _open(Path(path), Path(tokenizer_dir))
    step = data.step(seq_len)
    windows = None
    if data.source is not None and not needs_whole(data.source, samples, step):
        windows = draw(data.source, data.encoder, samples, step, seed)
    if windows is None:
        windows = data.windows(step)
    if len(windows) > samples:
        chosen = np.random.default_rng(seed).choice(len(windows), samples, replace=False)
        windows = windows[np.sort(chosen)]
    return data.finish(windows, note)


def eval_windows(
    path: Path | str,
    tokenizer_dir: Path | str,
    seq_len: int,
    limit: int | None = None,
    note: Note = _unheard,
) -> np.ndarray:
    """The windows of a file, in order, without overlap; the rest of the stream is dropped.

    Args:
        path (Path | str): text, JSON or Parquet records, or ids.
        tokenizer_dir (Path | str): the model directory.
        seq_len (int): the length of a window.
        limit (int | None): only the first ones; no more is tokenized. Default: ``None``, all.
        note (Callable): told of keys of records that are not used.

    Returns:
        numpy.ndarray, int32 of shape ``(n, seq_len)``, n at least 1.

    Raises:
        MsQuantError: as :func:`load_tokens`.
    """
    data = _open(Path(path), Path(tokenizer_dir))
    return data.finish(data.windows(data.step(seq_len), limit), note)


def load_stream(path: Path | str, tokenizer_dir: Path | str) -> np.ndarray:
    """The ids of a whole file.

    Args:
        path (Path | str): text, JSON or Parquet records, or ids.
        tokenizer_dir (Path | str): the model directory.

    Returns:
        numpy.ndarray, int32 of one dimension, or of two where an ``.npz`` holds such an array.

    Raises:
        MsQuantError: the file is of a kind that is not read, empty or malformed, or holds ids that
            the model does not have.
    """
    return _open(Path(path), Path(tokenizer_dir)).stream()


def reading_bytes(path: Path, tokenizer_dir: Path) -> int:
    """About the most memory that reading a file takes, measured with ``benchmarks/data.py``."""
    if find_kind(path) is Kind.IDS:
        return 2 * unpacked_bytes(path)
    files = [tokenizer_dir / name for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    return TEXT_BYTES + TOKENIZER_COPIES * sum(f.stat().st_size for f in files if f.is_file())


def few_tokens(windows: np.ndarray) -> str | None:
    """A sentence where data are poor: few different tokens."""
    count = len(np.unique(windows))
    if windows.size < JUDGED_TOKENS or count >= FEW_TOKENS:
        return None
    return f"only {count} different token ids occur, expected data like what the model will read"


class _Encoder:
    """The ids of a text for one model, each of them one that it has."""

    def __init__(self, path: Path, directory: Path, tokenizer: ModelTokenizer | None):
        self.path, self.tokenizer = path, tokenizer
        self.written: dict[tuple[str, bool], bool] = {}
        if tokenizer is None:
            known = model_vocab_size(directory)
            self.vocab_size, self.first_ids = known or load_tokenizer(directory).vocab_size, NO_IDS
        else:
            self.vocab_size, self.first_ids = tokenizer.vocab_size, tokenizer.first_ids

    @property
    def between(self) -> np.ndarray:
        """The end-of-sequence token, or nothing where none is known or records are ids."""
        eos = None if self.tokenizer is None else self.tokenizer.eos_id
        return NO_IDS if eos is None else self.check(np.array([eos]))

    def encode(self, text: str, begins: bool) -> np.ndarray:
        """Ids of a text, without what every window begins with: a chat template may write it."""
        assert self.tokenizer is not None
        ids = self.check(self.tokenizer.encode(text))
        count = len(self.first_ids)
        return ids[count:] if begins and count and ids[:1] == self.first_ids else ids

    def read(self, content: Content, where: str) -> str | np.ndarray:
        """The text of a record, or its ids."""
        if isinstance(content, np.ndarray):
            return self.check(content)
        if isinstance(content, Conversation):
            assert self.tokenizer is not None
            if self.tokenizer.templates is None:
                raise BadFileError(
                    f"{where} is a conversation, {self.tokenizer.directory} has no chat template: "
                    "expected chat_template.jinja or a chat_template in tokenizer_config.json, or "
                    "records of text"
                )
            try:
                content = self.tokenizer.render(content.messages, tools=content.tools)
            except MsQuantError as error:
                raise BadFileError(f"{where}: {error}") from error
        try:
            content.encode()
        except UnicodeEncodeError:
            raise BadFileError(f"{where} holds half of a surrogate pair, expected text") from None
        return content

    def passed_over(self, content: Content) -> set[str]:
        """Keys of a conversation whose names its template does not have, and so does not write."""
        if not isinstance(content, Conversation) or self.tokenizer is None:
            return set()
        found = {k for message in content.messages for k, v in message.items() if not is_empty(v)}
        names = {key: f"messages[].{key}" for key in found - {"role", "content"}}
        names |= {"tools": "tools"} if content.tools else {}
        tools = content.tools is not None
        return {name for key, name in names.items() if not self._writes(key, tools)}

    def _writes(self, key: str, tools: bool) -> bool:
        """Whether the chat template has the name of a key, as a word."""
        if (key, tools) not in self.written:
            assert self.tokenizer is not None
            word = re.compile(rf"\b{re.escape(key)}\b")
            self.written[key, tools] = bool(word.search(self.tokenizer.template(tools)))
        return self.written[key, tools]

    def check(self, ids: np.ndarray) -> np.ndarray:
        """The ids as int32.

        Raises:
            MsQuantError: the model has no such id.
        """
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            text = self.tokenizer and self.tokenizer.backend.id_to_token(wrong)
            raise BadFileError(
                f"{self.path}: holds the token id {wrong}{f' ({text})' if text else ''}, expected "
                f"ids from 0 to {self.vocab_size - 1}, which the model's embedding has"
            )
        return ids.astype(np.int32, copy=False)


@dataclass(frozen=True)
class _Data:
    """A data file and the model that reads it.

    Attributes:
        path: the file.
        encoder: text to ids of the model.
        source: its texts, or ids record by record; None where `ids` are given as an array.
        ids: of one or two dimensions.
    """

    path: Path
    encoder: _Encoder
    source: TextSource | RecordSource | None = None
    ids: np.ndarray | None = None

    def stream(self, limit: int | None = None) -> np.ndarray:
        """All ids, or a few more than `limit`."""
        if self.source is None:
            assert self.ids is not None
            return self.ids
        pieces, held = [NO_IDS], 0
        for piece in stream(self.source, self.encoder):
            pieces.append(piece)
            held += len(piece)
            if limit is not None and held >= limit:
                break
        return np.concatenate(pieces)

    def step(self, seq_len: int) -> int:
        """How many tokens of the data a window has."""
        first = len(self.encoder.first_ids)
        if seq_len <= first:
            raise BadFileError(f"seq_len is {seq_len}, expected at least {first + 1}")
        return seq_len - first

    def windows(self, step: int, limit: int | None = None) -> np.ndarray:
        """The windows of the stream, without what each begins with."""
        ids = np.atleast_2d(self.stream(None if limit is None else limit * step))
        length = ids.shape[1] if ids.size else 0
        if length < step:
            seq_len = step + len(self.encoder.first_ids)
            raise BadFileError(
                f"{self.path}: {length} tokens, expected at least {step} for a window of seq_len "
                f"{seq_len}"
            )
        return ids[:, : length - length % step].reshape(-1, step)[:limit]

    def finish(self, windows: np.ndarray, note: Note) -> np.ndarray:
        """The windows with what each begins with, if they are no repetition of one token.

        Notes what the records hold beyond them.

        Raises:
            MsQuantError: they are.
        """
        found, counts = np.unique(windows, return_counts=True)
        share = counts.max() / windows.size
        if windows.size >= JUDGED_TOKENS and (len(found) < 3 or share >= REPEATED):
            raise BadFileError(
                f"{self.path}: {share:.0%} of its tokens are the id {found[counts.argmax()]}, "
                f"expected data like what the model will read"
            )
        if isinstance(self.source, RecordSource) and (said := unused_keys(self.source.unused)):
            note(f"{self.path}: {said}")
        first = np.tile(self.encoder.first_ids, (len(windows), 1))
        return np.concatenate([first, windows], axis=1)


def _open(path: Path, directory: Path) -> _Data:
    kind = find_kind(path)
    if kind is Kind.IDS:
        encoder = _Encoder(path, directory, None)
        return _Data(path, encoder, ids=encoder.check(read_ids(path)))
    size = 0 if kind is Kind.PARQUET else count_chars(path)
    read = record_reader(path, kind)
    if read is None:
        return _Data(
            path, _Encoder(path, directory, load_tokenizer(directory)), TextSource(path, size)
        )
    tokenizer = None if holds_ids(read) else load_tokenizer(directory)
    encoder = _Encoder(path, directory, tokenizer)
    return _Data(path, encoder, RecordSource(path, size, read, encoder.read, encoder.passed_over))
