"""What a diffusion transformer is made of, as far as its files are concerned: frozen records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ms_quant.errors import BadFileError, short

Letters = Mapping[str, tuple[tuple[str, ...], str | float]]
Sizes = Mapping[str, int]
"""Letters to numbers: d, the width of the residual stream; f, that inside an MLP; and so on."""


@dataclass(frozen=True)
class Stack:
    """Blocks that repeat.

    Attributes:
        path: where they are; block i is ``PATH.i``.
        count: the key of ``config.json`` that says how many there are.
        groups: linears that the runtime fuses, which are of one kind then; path in the block to
            (out, in), as sums of letters of :data:`Sizes`.
        added: groups that are there when ``config.json`` has a value for a key: (key, group).
        floats: modules and tensors that stay float.
        optional: those of them that a model may lack.
        kept: why its linears stay float, too; "" where they are quantized.
    """

    path: str
    count: str
    groups: tuple[Mapping[str, tuple[str, str]], ...] = field(default=(), hash=False)
    added: tuple[tuple[str, Mapping[str, tuple[str, str]]], ...] = field(default=(), hash=False)
    floats: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    kept: str = ""

    def groups_of(self, config: Mapping[str, Any]) -> list[Mapping[str, tuple[str, str]]]:
        """The groups that a model with this config has."""
        return [*self.groups, *(g for key, g in self.added if config.get(key) is not None)]


@dataclass(frozen=True)
class Family:
    """A class of diffusers' transformers.

    Attributes:
        name: the class, ``_class_name`` in ``config.json``.
        letters: letter to the keys whose product it is, and a factor's key or number, or "".
        stacks: its blocks.
        floats: modules and tensors beside them, which stay float.
        optional: those of them that a model may lack.
        fused: what vllm-omni calls a fused linear, by the last parts of its members' paths.
        renamed: ends of paths that vllm-omni spells otherwise, the longest first.
        native: whether vllm-omni has a network of its own for it.
    """

    name: str
    letters: Letters = field(hash=False)
    stacks: tuple[Stack, ...]
    floats: tuple[str, ...]
    optional: tuple[str, ...] = ()
    fused: Mapping[tuple[str, ...], str] = field(default_factory=dict, hash=False)
    renamed: tuple[tuple[str, str], ...] = ()
    native: bool = True

    def sizes(self, config: Mapping[str, Any], where: str) -> Sizes:
        """What the letters stand for.

        Raises:
            MsQuantError: ``config.json`` does not say it.
        """
        found, added = {}, {key for stack in self.stacks for key, _ in stack.added}
        for letter, (keys, factor) in self.letters.items():
            if added.intersection(keys) and config.get(keys[0]) is None:
                continue
            product = 1.0
            for key in keys:
                product *= _number(config, key, where)
            if isinstance(factor, str) and factor:
                product *= _number(config, factor, where)
            elif isinstance(factor, float):
                product *= factor
            found[letter] = int(product)
        return found

    def blocks(self, config: Mapping[str, Any], where: str) -> Iterator[tuple[Stack, str]]:
        """Each block's stack and path."""
        for stack in self.stacks:
            for index in range(int(_number(config, stack.count, where))):
                yield stack, f"{stack.path}.{index}"

    def runtime_name(self, path: str) -> str:
        """What vllm-omni calls a linear that it does not fuse."""
        for end, other in self.renamed:
            if path.endswith(end):
                return path.removesuffix(end) + other
        return path

    def fused_name(self, members: tuple[str, ...]) -> str:
        """What vllm-omni calls what it makes of the linears of a group; "" if it does not fuse."""
        name = self.fused.get(tuple(path.rpartition(".")[2] for path in members), "")
        return f"{members[0].rpartition('.')[0]}.{name}" if name else ""


def size_of(text: str, sizes: Sizes) -> int:
    """``"d+f"`` in numbers."""
    return sum(sizes[letter] for letter in text.split("+"))


MAX_SIZE = 1 << 24


def _number(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_SIZE:
        raise BadFileError(f"{where}: {key} is {short(value)}, expected a positive number")
    return float(value)
