"""What will be done to which linear of a model, decided and checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from ms_quant.algorithms import get_algorithm
from ms_quant.algorithms.smooth import check_alpha
from ms_quant.budget import SEARCH_TOKENS
from ms_quant.errors import MsQuantError
from ms_quant.models.config import ModelConfig, block_prefix
from ms_quant.models.families import LinearGroup
from ms_quant.schemes import get_scheme
from ms_quant.spec import Scheme


@dataclass(frozen=True)
class Plan:
    """Attributes:
    config: the model.
    scheme: what its linears become.
    algorithm: name of the algorithm.
    alpha: smoothing strength, for algorithms that take one.
    dtype: type of what stays float in the output.
    float_groups: full path prefixes of the groups that stay float, such as
        ``"model.layers.0.down"``.
    search_tokens: searches look at this many of the calibration tokens, at most.
    """

    config: ModelConfig
    scheme: Scheme
    algorithm: str
    alpha: float
    dtype: np.dtype
    float_groups: frozenset[str] = frozenset()
    search_tokens: int = SEARCH_TOKENS

    def groups(self, index: int) -> list[LinearGroup]:
        """The groups of a block that are quantized."""
        prefix = block_prefix(index)
        groups = self.config.family.groups
        return [group for group in groups if f"{prefix}{group.name}" not in self.float_groups]

    def quantized(self) -> list[str]:
        """Full paths of the quantized linears, in model order."""
        return [
            f"{block_prefix(index)}{member}"
            for index in range(self.config.num_layers)
            for group in self.groups(index)
            for member in group.members
        ]

    def float_linears(self) -> list[str]:
        """Full paths of the decoder linears that stay float."""
        done = set(self.quantized())
        return [
            path
            for index in range(self.config.num_layers)
            for member in self.config.linear_shapes()
            if (path := f"{block_prefix(index)}{member}") not in done
        ]


def make_plan(
    config: ModelConfig,
    scheme: str,
    algorithm: str,
    *,
    alpha: float = 0.5,
    dtype: np.dtype,
    exclude: Sequence[str] = (),
) -> Plan:
    """Checks the choices against each other and the model.

    Args:
        config: the model.
        scheme: a name from ``SCHEMES``.
        algorithm: a name from ``ALGORITHMS``.
        alpha: smoothing strength, 0 to 1.
        dtype: bfloat16 or float16.
        exclude: glob patterns of linears that stay float. Serving runtimes fuse q/k/v and
            gate/up, so the whole group of a matched linear stays float.

    Raises:
        MsQuantError: an unknown name, a combination that no checkpoint can hold, a pattern that
            matches nothing, or nothing left to quantize.
    """
    chosen = get_scheme(scheme)
    get_algorithm(algorithm, chosen)
    check_alpha(alpha)
    floats, unmatched = set(), set(exclude)
    for index in range(config.num_layers):
        for group in config.family.groups:
            for member in group.members:
                path = f"{block_prefix(index)}{member}"
                matched = [pattern for pattern in exclude if fnmatchcase(path, pattern)]
                unmatched.difference_update(matched)
                if matched:
                    floats.add(f"{block_prefix(index)}{group.name}")
    if unmatched:
        raise MsQuantError(
            f"exclude pattern {min(unmatched)!r} matches no linear, expected something like "
            "'model.layers.0.*' or '*.down_proj'"
        )
    plan = Plan(config, chosen, algorithm, alpha, dtype, frozenset(floats))
    if not plan.quantized():
        raise MsQuantError("the exclude patterns match every linear, nothing is left to quantize")
    return plan
