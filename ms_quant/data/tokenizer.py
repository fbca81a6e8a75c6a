"""The tokenizer of a model directory and its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ms_quant.data.chat_template import choose_template, find_templates
from ms_quant.data.template_process import render_template
from ms_quant.data.tokenizer_files import (
    additional_tokens,
    begins_with_bos,
    load_backend,
    special_tokens,
)
from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import read_json
from ms_quant.models.config import own_config
from ms_quant.models.spellings import canonical


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer with the parts of ``tokenizer_config.json`` that text data needs.

    Attributes:
        directory: where it was read from.
        backend: the tokenizer proper.
        special: ``bos_token``, ``eos_token``, ... to their text.
        vocab_size: one more than the largest id the model takes.
        templates: the chat templates by name, if there are any.
        eos_id: the end-of-sequence token, if one is known.
        add_bos: whether texts begin with the begin-of-sequence token, where the model says so;
            else its post-processor does.
        additional: special tokens without a name.
    """

    directory: Path
    backend: Tokenizer
    special: dict[str, str]
    vocab_size: int
    templates: dict[str, str] | None = None
    eos_id: int | None = None
    add_bos: bool | None = None
    additional: tuple[str, ...] = ()

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text as int32, without special tokens."""
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of some ids, without special tokens."""
        return self.backend.decode([int(i) for i in ids])

    @property
    def first_ids(self) -> np.ndarray:
        """int32 ids that the tokenizer puts before every text that a server encodes.

        The begin-of-sequence token, or none: whether there is one the tokenizer's post-processor
        says. Models that have it show their largest activations there.
        """
        bos = self.backend.token_to_id(self.special.get("bos_token", ""))
        added = self.add_bos
        if added is None:
            added = self.backend.encode("", add_special_tokens=True).ids[:1] == [bos]
        return np.array([bos] if added and bos is not None else [], np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids of a text as a server sees it."""
        return np.concatenate([self.first_ids, self.encode(text)])

    def template(self, tools: bool) -> str:
        """The chat template of a conversation with tools or without, "" where there is none.

        Raises:
            MsQuantError: several have names, and none of them is the default.
        """
        return choose_template(self.templates, tools, self.directory) if self.templates else ""

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> str:
        """Writes a conversation as text with the chat template of the model.

        Args:
            messages (list[dict]): ``role`` and ``content`` of each message.
            add_generation_prompt (bool): end with the beginning of the assistant's answer.
            tools (list | None): what the assistant may call.
            names (Mapping | None): what else the template may use, such as ``enable_thinking``.

        Returns:
            str, at most 64 Mi characters.

        Raises:
            MsQuantError: there is no chat template, or it fails or refuses the messages.
        """
        if self.templates is None:
            raise BadFileError(
                f"{self.directory}: has no chat template, expected chat_template.jinja or a "
                "chat_template in tokenizer_config.json"
            )
        names = {
            **(names or {}),
            **self.special,
            **({"additional_special_tokens": list(self.additional)} if self.additional else {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render_template(self.template(tools is not None), names)
        except ValueError as error:
            raise BadFileError(f"{self.directory}: the chat template failed ({error})") from error


def load_tokenizer(directory: Path | str) -> ModelTokenizer:
    """Reads ``tokenizer.json``, or a vocabulary with merges, and what stands beside it.

    Args:
        directory (Path | str): the model directory. ``vocab_size`` of its ``config.json`` counts
            where there is one, as the embedding may be larger than the vocabulary.

    Returns:
        ModelTokenizer, without the truncation and padding that the file may ask for.

    Raises:
        MsQuantError: a file is missing or malformed.
    """
    directory = Path(directory)
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    backend = load_backend(directory, config)
    backend.no_truncation()
    backend.no_padding()
    vocab_size = model_vocab_size(directory)
    if vocab_size is None:
        vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    special = special_tokens(directory, config)
    return ModelTokenizer(
        directory,
        backend,
        special,
        vocab_size,
        find_templates(directory, config),
        _eos_id(directory, backend, special.get("eos_token")),
        begins_with_bos(directory, config),
        tuple(additional_tokens(directory, config)),
    )


def model_vocab_size(directory: Path) -> int | None:
    """``vocab_size`` of a model directory's ``config.json``, if it has one."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    value = canonical(own_config(read_json(path), str(path))).get("vocab_size")
    return value if type(value) is int and value > 0 else None


def _eos_id(directory: Path, backend: Tokenizer, token: str | None) -> int | None:
    """Of the tokenizer's token; else the first that the model's configuration names."""
    found = None if token is None else backend.token_to_id(token)
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if found is None and path.is_file():
            value = own_config(read_json(path), str(path)).get("eos_token_id")
            first = value[0] if isinstance(value, list) and value else value
            found = first if type(first) is int and first >= 0 else None
    return found
