"""A float checkpoint as people have it, opened as the model that its config describes.

Hugging Face's names are what the rest of the house knows. A base model saved by itself lacks their
``model.``, as Qwen3-Embedding is published, and a tied table may stand under the head's name. What
a runtime would not read of a checkpoint is compared with what it reads before it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ms_quant.errors import BadFileError
from ms_quant.files.companion_files import code_notes
from ms_quant.files.encoded import EncodedCheckpoint
from ms_quant.files.reader import Checkpoint, row_chunks
from ms_quant.files.strict_json import read_json
from ms_quant.formats.float_source import open_source
from ms_quant.job.output_directory import MAX_RECORD_BYTES, RECORD
from ms_quant.models.config import ModelConfig, load_config
from ms_quant.models.families import CLASSIFIES, EMBEDS
from ms_quant.models.names import block_prefix
from ms_quant.models.rope import frequencies
from ms_quant.models.spellings import asks_tensors
from ms_quant.models.text_part import house_name, is_inner
from ms_quant.models.weights import check_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OF_CODE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
OUTER = ("lm_head.", "score.")
BUFFER = "rotary_emb.inv_freq"
BUFFER_TOLERANCE = 2**-7  # twice the rounding of bfloat16, in which some exports hold it
NO_HEAD = "none"


class FloatCheckpoint(NamedTuple):
    """Attributes:
    config: the model, and whether it has a head.
    checkpoint: its tensors, checked, by the names that the rest of the house knows.
    """

    config: ModelConfig
    checkpoint: Checkpoint


def open_float(directory: Path | str) -> FloatCheckpoint:
    """Opens and checks a float model, from headers but for what may stand in it twice.

    Raises:
        MsQuantError: the config or a shard is malformed, a tensor is missing, unknown, of another
            shape or type, or another matrix than the one that it should be the same as.
    """
    config, checkpoint = open_text(load_config(directory), directory, open_source)
    rename = None if config.outer else renaming(checkpoint.names, config.tied)
    if rename is not None:
        checkpoint = open_source(directory, rename)
    config = with_outputs(config, checkpoint)
    if config.has_head and HEAD not in checkpoint and EMBEDDING in checkpoint:
        raise BadFileError(
            f"{directory}: has no tensor {HEAD!r}, and config.json says tie_word_embeddings false; "
            "expected the head, or tie_word_embeddings true if the embedding is the head, or "
            f"architectures {[config.family.base + EMBEDS[0]]} if the model gives out its last "
            "hidden states"
        )
    check_model(checkpoint, config)
    if asks_tensors(config.raw, f"{directory}: config.json"):
        config = replace(config, dtype=OF_CODE[checkpoint.info(EMBEDDING).code])
    for name, path in left_out(checkpoint):
        if name == HEAD or name in config.parameter_shapes():
            raise BadFileError(
                f"{path}: holds tensor {name!r}, which the index leaves out, expected it in its "
                "weight_map: runtimes read whole files"
            )
    if config.tied and HEAD in checkpoint:
        check_same(checkpoint, HEAD, EMBEDDING)
    check_buffers(checkpoint, config)
    return FloatCheckpoint(config, checkpoint)


def open_text(
    config: ModelConfig, directory: Path | str, open_directory: Callable[..., Checkpoint]
) -> FloatCheckpoint:
    """Opens a checkpoint by the names that a text model has by itself, where it is in another."""
    checkpoint = open_directory(directory)
    if not config.outer:
        return FloatCheckpoint(config, checkpoint)
    if any(is_inner(name) for name in checkpoint.names):
        config = replace(config, inner=True)
        checkpoint = open_directory(directory, rename=house_name)
    others = [name for name in checkpoint.names if name.startswith(config.family.carried)]
    infos = ((name, checkpoint.info(name)) for name in others)
    carried = tuple((name, info.dtype.name, info.shape) for name, info in infos)
    return FloatCheckpoint(replace(config, carried=carried), checkpoint)


def renaming(names: Iterable[str], tied: bool) -> Callable[[str], str] | None:
    """From the names of a checkpoint to Hugging Face's, None where they are those."""
    found = set(names)
    plain = any(name.startswith(("embed_tokens.", "layers.")) for name in found)
    if plain and not any(name.startswith("model.") for name in found):
        return lambda name: name if name.startswith(OUTER) else f"model.{name}"
    if tied and HEAD in found and EMBEDDING not in found:
        return lambda name: EMBEDDING if name == HEAD else name
    return None


def with_outputs(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The config with what a model gives out in the end: logits, labels or hidden states.

    A classifier is told by its class. A model that gives out its hidden states has no head, and a
    class, the names of a base model, the files of sentence-transformers or, where it was made
    here, a record that say so: else a head is missing.
    """
    config = _with_further_layers(config, checkpoint)
    classes = [name for name in config.raw.get("architectures") or () if isinstance(name, str)]
    classifier = next((name for name in classes if name.endswith(CLASSIFIES)), "")
    if classifier:
        token = classifier.endswith(CLASSIFIES[1])
        return replace(config, labels=_labels(config.raw), label_bias=token)
    if HEAD in checkpoint:
        return config
    directory = checkpoint.directory
    embeds = (
        (checkpoint.renamed and not config.inner)
        or any(name.endswith(EMBEDS) for name in classes)
        or (directory / "modules.json").is_file()
        or recorded_head(directory) == NO_HEAD
    )
    return replace(config, no_head=embeds)


def recorded_head(directory: Path) -> Any:
    """What the record of a checkpoint of ours says of its head, None where it says nothing."""
    path = directory / RECORD
    record = read_json(path, MAX_RECORD_BYTES).get("record") if path.exists() else None
    return record.get("head") if isinstance(record, dict) else None


def _with_further_layers(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The config without layers that predict further tokens where there is no tensor of any.

    transformers reads and writes none, and leaves their number in ``config.json``.
    """
    further = range(config.num_layers, config.num_blocks)
    prefixes = tuple(block_prefix(index) for index in further)
    if prefixes and not any(name.startswith(prefixes) for name in checkpoint.names):
        return replace(config, further_layers=0)
    return config


def _labels(raw: dict[str, Any]) -> int:
    """How many labels a classifier has, as transformers reads its config."""
    names, count = raw.get("id2label"), raw.get("num_labels")
    if isinstance(names, dict) and names:
        return len(names)
    return count if type(count) is int and count > 0 else 2


def model_notes(config: ModelConfig, checkpoint: Checkpoint) -> list[str]:
    """What to know of a float model that is fit to be quantized, one sentence each."""
    directory, notes = checkpoint.directory, list[str]()
    if isinstance(checkpoint, EncodedCheckpoint):
        notes += checkpoint.notes()
    if config.unknown:
        notes.append(
            f"{directory / 'config.json'}: the keys {', '.join(config.unknown):.300} are not known "
            "here and were not looked at"
        )
    read = {path.name for path in checkpoint.files()}
    others = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in read)
    others = [name for name in others if not name.startswith("adapter_")]  # said already
    if others:
        notes.append(f"{directory}: {', '.join(others):.300} are not read, nor copied")
    unnamed = [name for name, _ in left_out(checkpoint)]
    if unnamed:
        notes.append(
            f"{directory}: the index leaves out {', '.join(unnamed):.300}, which are not read"
        )
    if config.tied and HEAD in checkpoint:
        notes.append(f"{directory}: stores the head a second time, equal; it is left out")
    if config.carried:
        notes.append(
            f"{directory}: {len(config.carried)} tensors such as {config.carried[0][0]} are not of "
            "the text model; they stay as they are"
        )
    if checkpoint.renamed and not config.inner:
        notes.append(
            f"{directory}: its tensors have no `model.` or stand under the head's name; the output "
            "has the names of the whole model, which runtimes read for either"
        )
    if not config.predicts:
        what = "labels" if config.labels else "its last hidden states"
        notes.append(f"{directory}: gives out {what}, so there is no perplexity of it")
    return notes + code_notes(directory)


def left_out(checkpoint: Checkpoint) -> list[tuple[str, Path]]:
    """Tensors that the files hold and their index does not name."""
    named = checkpoint.stored().keys()
    return [
        (name, path)
        for path in checkpoint.files()
        for name in sorted(checkpoint.shard(path.name).tensors.keys() - named)
    ]


def check_same(checkpoint: Checkpoint, name: str, other: str) -> None:
    """Refuses a stored head that is not the embedding to which it is tied; in bounded memory.

    Raises:
        MsQuantError: they differ; says how much, and the two ways out.
    """
    if _same_bits(checkpoint, name, other):
        return
    wrong, largest = 0, 0.0
    pieces = zip(checkpoint.float32_chunks(name), checkpoint.float32_chunks(other), strict=True)
    for (_, found), (_, expected) in pieces:
        if not np.array_equal(found, expected):
            difference = np.abs(found.astype(np.float64) - expected)
            wrong += int(np.count_nonzero(difference))
            largest = max(largest, float(difference.max()))
    if wrong:
        total = int(np.prod(checkpoint.info(name).shape))
        raise BadFileError(
            f"{checkpoint.place(name)}: differs from {other!r} in {wrong} of {total} values, by up "
            f"to {largest:.3g}, but config.json says tie_word_embeddings true, by which it would "
            "not be read; expected tie_word_embeddings false if this head was trained apart, or no "
            "such tensor if the embedding is the head"
        )


def _same_bits(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors of one shape are stored alike, which is soon known."""
    if checkpoint.info(name).dtype != checkpoint.info(other).dtype:
        return False
    pieces = (row_chunks(checkpoint.file_of(part), part) for part in (name, other))
    return all(
        np.array_equal(found.view(np.uint8), expected.view(np.uint8))
        for (_, found), (_, expected) in zip(*pieces, strict=True)
    )


def check_buffers(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuses stored rotary frequencies that are not those of the config.

    Runtimes compute them from the config and do not read the buffers of old exports.

    Raises:
        MsQuantError: a buffer differs by more than its rounding; names it and the two ways out.
    """
    expected = list(_known_frequencies(config))
    for name in checkpoint.names:
        if not name.endswith(BUFFER):
            continue
        found = checkpoint.read_float32(name)
        if not any(
            found.shape == known.shape
            and np.allclose(found, known, rtol=BUFFER_TOLERANCE, atol=2.0**-24)
            for known in expected
        ):
            raise BadFileError(
                f"{checkpoint.place(name)}: is not what rope_theta {config.rope['rope_theta']!r} "
                "and the rotary type of config.json give, and no runtime reads it; expected "
                "rotary keys of config.json that give it if they were lost, or no such tensor"
            )


def _known_frequencies(config: ModelConfig) -> Iterator[np.ndarray]:
    """As they are, and as exports of scaled models hold them: not scaled yet."""
    for rope in (config.rope, {**config.rope, "rope_type": "default"}):
        yield frequencies(rope, config.rotary_size, 0, config.max_position)[0]
