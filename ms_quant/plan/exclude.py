"""Patterns of linears that stay float: which match something, and what was meant by the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ms_quant.models.config import ModelConfig
from ms_quant.models.names import block_name, block_prefix, parse_linear

FLOATS = ("lm_head", "model.embed_tokens", "model.norm")
USUAL = "'model.layers.0.*' or '*.down_proj'"
MOST = 3
_BLOCK = re.compile(r"layers\.(\d{1,9})\.")


def float_paths(config: ModelConfig) -> list[str]:
    """Modules and tensors that are float in every plan: embedding, norms and head."""
    linears = {
        f"{block_prefix(block.index)}{path}"
        for block in config.stored_blocks
        for group in block.groups
        for path in group.members
    }
    names = [*config.parameter_shapes(), "lm_head.weight"]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    floats = [path for path in modules if path not in linears]
    return [*floats, *(f"{path}.weight" for path in floats)]


def matches(pattern: str, paths: Iterable[str]) -> bool:
    """Whether a glob pattern matches some path."""
    return any(fnmatchcase(path, pattern) for path in paths)


def float_notes(patterns: Sequence[str], linears: Sequence[str], config: ModelConfig) -> list[str]:
    """What patterns say that match nothing but what is float anyway."""
    idle = [p for p in patterns if not matches(p, linears) and matches(p, float_paths(config))]
    return [f"exclude {pattern!r}: it stays float anyway" for pattern in idle]


def no_match(pattern: str, linears: Sequence[str]) -> str:
    """What is wrong with a pattern that matches nothing, with the nearest that do."""
    text, last = f"pattern {pattern!r} matches no linear", parse_linear(linears[-1]).block
    block = _BLOCK.search(pattern)
    if block and int(block[1]) > last:
        return f"{text}, the last block is {block_name(last)}"
    near = list(dict.fromkeys(p for p in _variants(pattern) if matches(p, linears)))
    if not near and not pattern.startswith("re:"):
        endings = dict.fromkeys(f"*.{path.rpartition('.')[2]}" for path in linears)
        near = get_close_matches(pattern, [*FLOATS, *endings, *linears], MOST)
    return f"{text}, expected something like {' or '.join(map(repr, near[:MOST])) or USUAL}"


def _variants(pattern: str) -> Iterator[str]:
    """What people mean: a module stands for all in it, a tensor for its linear."""
    for path in (pattern.removesuffix(".weight").removesuffix(".bias"), pattern):
        for start in ("", "model.", "*."):
            for end in ("", ".*"):
                yield f"{start}{path}{end}"
    yield f"*{pattern}*"
