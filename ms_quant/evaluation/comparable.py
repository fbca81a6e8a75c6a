"""Whether the losses of two checkpoints may be compared: one vocabulary, the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ms_quant.data.calibration import eval_windows
from ms_quant.data.tokenizer import load_tokenizer
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.evaluation.head import require_head
from ms_quant.formats.opening import ServedModel

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "added_tokens.json"),
)
NAMES = ("the model", "against")


def require_same_text(
    model: ServedModel, against: ServedModel, length: int, names: tuple[object, object] = NAMES
) -> None:
    """Refuses a model that cannot predict the windows of another as that does.

    Args:
        model: the model.
        against: the other.
        length: tokens of a window.
        names: what to call the two.

    Raises:
        MsQuantError: the other predicts no tokens or has another vocabulary, or a window has more
            positions than one of the two was made for.
    """
    name, other = names
    try:
        require_head(against)
    except MsQuantError as error:
        raise BadArgumentError(f"{other}: {error}") from None
    size, expected = against.config.vocab_size, model.config.vocab_size
    if size != expected:
        raise BadArgumentError(
            f"{other}: has a vocabulary of {size} tokens, expected the {expected} of {name}: their "
            "losses are not of the same choices"
        )
    most = {name: model.config.longest, other: against.config.longest}
    short = [which for which in most if most[which] < length]
    if len(short) == 1:
        longest = min(most.values())
        raise BadArgumentError(
            f"{short[0]}: was made for {longest} positions (max_position_embeddings), the other "
            f"model for {max(most.values())}: windows have {length} tokens, expected at most "
            f"{longest}"
        )


def require_one_tokenizer(
    directory: Path, against: Path, text: Path | None, tokens: np.ndarray, windows: int | None
) -> str | None:
    """Refuses a model whose tokenizer makes other tokens of the text.

    Args:
        directory: where the tokenizer of the model is.
        against: where that of the other is.
        text: the file; None where ids were given.
        tokens: what the model's tokenizer made of it.
        windows: how many windows were asked for.

    Returns:
        A sentence where the tokenizers cannot be compared, as one of the two has none.

    Raises:
        MsQuantError: an id or the text is not the same in the two.
    """
    for place in (directory, against):
        if not _has_tokenizer(place):
            return f"{place}: has no tokenizer to compare with that of the other model"
    if _files(directory) == _files(against):
        return None
    ours, theirs = (_texts(place) for place in (directory, against))
    differing = [number for number in ours if theirs.get(number, ours[number]) != ours[number]]
    if differing:
        first = min(differing)
        raise BadArgumentError(
            f"{against}: has another vocabulary, its token {first} is {theirs[first]!r:.40}, "
            f"expected {ours[first]!r:.40} as in {directory}"
        )
    if text is None:
        return None
    found = eval_windows(text, against, tokens.shape[1], windows)
    if not np.array_equal(found, tokens):
        raise BadArgumentError(
            f"{against}: its tokenizer makes other tokens of {text} than that of {directory}, "
            f"{_first_difference(found, tokens)}"
        )
    return None


def _first_difference(found: np.ndarray, tokens: np.ndarray) -> str:
    if found.shape != tokens.shape:
        return f"{len(found)} windows, expected {len(tokens)}"
    window, at = np.argwhere(found != tokens)[0]
    return f"{found[window, at]} at token {at} of window {window}, expected {tokens[window, at]}"


def _has_tokenizer(directory: Path) -> bool:
    names = {name for name in TOKENIZER_FILES if (directory / name).is_file()}
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


def _files(directory: Path) -> list[bytes | None]:
    places = [directory / name for name in TOKENIZER_FILES]
    return [place.read_bytes() if place.is_file() else None for place in places]


def _texts(directory: Path) -> Mapping[int, str]:
    """The text of every token by its id."""
    vocabulary = load_tokenizer(directory).backend.get_vocab(with_added_tokens=True)
    return {number: text for text, number in vocabulary.items()}
