"""What is asked of a serving check, and what it says."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DEVICES = ("310p", "910b")


@dataclass(frozen=True)
class ServeRequest:
    """Attributes:
    checkpoint: the directory to serve.
    runtime: one of ``RUNTIMES``.
    tp: tensor-parallel ranks.
    device: one of ``DEVICES``; "" where the user did not say.
    attention: file of what attention becomes by layer and step; None where it is not asked.
    """

    checkpoint: Path
    runtime: str
    tp: int
    device: str = ""
    attention: Path | None = None


@dataclass(frozen=True)
class Loaded:
    """Tensors of one kind that are loaded in one way.

    Attributes:
        kind: what the layer is called whatever block it is in, such as ``"qkv_proj"``.
        ranks: which ranks the row is of.
        method: how the runtime computes with it.
        weight: shape of the weight on a rank, and its type where the method does not tell.
        layers: how many there are on a rank.
        bytes: what a rank reads.
    """

    kind: str
    ranks: str
    method: str
    weight: str
    layers: int
    bytes: int


@dataclass
class Served:
    """What a runtime will do with a checkpoint.

    Attributes:
        format: what the checkpoint is.
        device: the device that was checked for; "" where there is none that matters.
        problems: why it would fail or load wrongly, one sentence each.
        notes: what to know about it, one sentence each.
        loaded: what would be loaded how.
        command: the command that serves it, in words; a call in Python is one word.
        environment: the variables that the command needs.
        attention: the runtime's own JSON for sparse attention; {} where it has none.
    """

    format: str
    device: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loaded: list[Loaded] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The command as one types it; Python code is one word."""
        if len(self.command) == 1:
            return self.command[0]
        words = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*words, shlex.join(self.command)])


def merged(rows: Iterable[Loaded]) -> list[Loaded]:
    """Rows that differ only in how many layers and bytes they are of, added up."""
    totals: dict[tuple[str, str, str, str], tuple[int, int]] = {}
    for row in rows:
        key = row.kind, row.ranks, row.method, row.weight
        layers, size = totals.get(key, (0, 0))
        totals[key] = layers + row.layers, size + row.bytes
    return [Loaded(*key, *counts) for key, counts in totals.items()]


def kind_of(path: str) -> str:
    """What a layer is called whatever block it is in."""
    return path.rpartition(".")[2]


def alike(rows: Iterable[Loaded], tp: int) -> list[Loaded]:
    """Rows that differ only in their rank as one."""
    ranks: dict[Loaded, list[str]] = {}
    for row in rows:
        ranks.setdefault(replace(row, ranks=""), []).append(row.ranks)
    return [
        replace(row, ranks=rank_text(tp) if len(found) == tp else ", ".join(found))
        for row, found in ranks.items()
    ]


def weight_text(shape: Iterable[int], dtype: object = "") -> str:
    """Such as ``"int8 768 x 384"``."""
    return f"{dtype} {' x '.join(map(str, shape))}".strip()


def rank_text(tp: int) -> str:
    """All ranks, of which a row says the same."""
    return "0" if tp == 1 else f"each of {tp}"
