"""How far off each attention of a network is in each mode, and what is better left float."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadArgumentError, BadFileError
from ms_quant.files.atomic import write_json
from ms_quant.files.strict_json import read_json

VERSION = 1
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class AttentionError:
    """One call of one attention, computed in one mode beside the float network.

    Attributes:
        layer: path of the Cell.
        step: of the sampling loop; None where none was set.
        mode: name of what was computed.
        heads: relative L2 error of each head's output.
        density: the share of pairs that were computed.
    """

    layer: str
    step: int | None
    mode: str
    heads: tuple[float, ...]
    density: float = 1.0

    @property
    def error(self) -> float:
        """The mean over heads."""
        return float(np.mean(self.heads))


@dataclass(frozen=True)
class FloatParts:
    """What to leave float so that no layer and no step that is left is off by more than a limit.

    Attributes:
        mode: what the others become.
        layers: paths that stay float, in the order of the network.
        steps: that stay float, ascending.
    """

    mode: str
    layers: tuple[str, ...]
    steps: tuple[int, ...]

    def vllm_omni(self) -> dict[str, str]:
        """The options of vllm-omni that leave these float, by their names on the command line.

        Layers are named by the first number in their path.

        Raises:
            MsQuantError: a path has no number.
        """
        numbers = sorted({_number(path) for path in self.layers})
        named = {
            "--diffusion-kv-cache-skip-layers": numbers,
            "--diffusion-kv-cache-skip-steps": self.steps,
        }
        return {option: ranges(values) for option, values in named.items() if values}


@dataclass(frozen=True)
class AttentionSensitivity:
    """Errors of every call that was measured.

    Attributes:
        calls: in the order in which they were made.
    """

    calls: tuple[AttentionError, ...]

    @cached_property
    def modes(self) -> tuple[str, ...]:
        """Names, in the order in which they were given."""
        return tuple(dict.fromkeys(call.mode for call in self.calls))

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Paths, in the order in which they were called."""
        return tuple(dict.fromkeys(call.layer for call in self.calls))

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Those that were set, ascending."""
        return tuple(sorted({call.step for call in self.calls if call.step is not None}))

    def by_layer(self, mode: str) -> tuple[float, ...]:
        """The error of each layer, in the mean over calls and heads."""
        return tuple(_mean(c for c in self._of(mode) if c.layer == path) for path in self.layers)

    def by_step(self, mode: str) -> tuple[float, ...]:
        """The error of each step, in the mean over calls and heads."""
        return tuple(_mean(c for c in self._of(mode) if c.step == step) for step in self.steps)

    def by_head(self, mode: str, layer: str) -> tuple[float, ...]:
        """The error of each head of a layer, in the mean over calls."""
        found = [call.heads for call in self._of(mode) if call.layer == layer]
        if not found:
            raise BadArgumentError(f"layer: {layer!r}, expected one of {', '.join(self.layers)}")
        return tuple(np.mean(found, axis=0).tolist())

    def density(self, mode: str) -> float:
        """The share of pairs that were computed, in the mean over calls."""
        return float(np.mean([call.density for call in self._of(mode)]))

    def keep_float(self, mode: str, most: float) -> FloatParts:
        """Which layers and steps to leave float.

        The worst layer or step, by its mean error, is left float until none that is left is off by
        more than ``most``.

        Args:
            mode: one of ``modes``.
            most: relative L2 error, such as 0.05.

        Raises:
            MsQuantError: there is no such mode, or the limit is not positive.
        """
        if not most > 0:
            raise BadArgumentError(f"most: {most}, expected a relative error above 0")
        left, layers, steps = list(self._of(mode)), set[str](), set[int]()
        while left:
            by = [(_mean(c for c in left if c.layer == path), path) for path in self.layers]
            at = [(_mean(c for c in left if c.step == step), step) for step in self.steps]
            layer, step = max(by), max(at, default=(0.0, -1))
            if max(layer[0], step[0]) <= most:
                break
            if layer[0] >= step[0]:
                layers.add(layer[1])
            else:
                steps.add(step[1])
            left = [c for c in left if c.layer not in layers and c.step not in steps]
        kept = tuple(path for path in self.layers if path in layers)
        return FloatParts(mode, kept, tuple(sorted(steps)))

    def save(self, path: Path | str) -> None:
        """Writes all of it as JSON, for programs."""
        content = {"version": VERSION, "calls": [asdict(call) for call in self.calls]}
        write_json(Path(path), content)

    @classmethod
    def load(cls, path: Path | str) -> AttentionSensitivity:
        """Reads what :meth:`save` wrote.

        Raises:
            MsQuantError: it is no such file.
        """
        value = read_json(Path(path), MAX_BYTES)
        calls = value.get("calls") if value.get("version") == VERSION else None
        if not isinstance(calls, list) or not calls:
            raise BadFileError(f"{path}: is no analysis of attention, version {VERSION}")
        return cls(tuple(_call(item, f"{path}: calls[{i}]") for i, item in enumerate(calls)))

    def __str__(self) -> str:
        lines = []
        for mode in self.modes:
            errors = dict(zip(self.layers, self.by_layer(mode), strict=True))
            lines.append(f"{mode}: density {self.density(mode):.2f}, relative error of outputs")
            worst = sorted(errors, key=lambda path: -errors[path])
            width = max(map(len, worst))
            for path in worst:
                heads = self.by_head(mode, path)
                head = int(np.argmax(heads))
                lines.append(
                    f"  {path.ljust(width)}  {errors[path]:.2e}  head {head}: {heads[head]:.2e}"
                )
            for step, error in zip(self.steps, self.by_step(mode), strict=True):
                lines.append(f"  step {step}: {error:.2e}")
        return "\n".join(lines)

    def _of(self, mode: str) -> list[AttentionError]:
        if mode not in self.modes:
            raise BadArgumentError(f"mode: {mode!r}, expected one of {', '.join(self.modes)}")
        return [call for call in self.calls if call.mode == mode]


def ranges(numbers: Sequence[int]) -> str:
    """ "0-2,5" of 0, 1, 2, 5, ascending."""
    parts = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


def _number(path: str) -> int:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    if found is None:
        raise BadArgumentError(f"layers: {path} has no number, by which vllm-omni names layers")
    return int(found[1])


def _mean(calls: Any) -> float:
    found = [call.error for call in calls]
    return float(np.mean(found)) if found else 0.0


def _call(item: Any, where: str) -> AttentionError:
    try:
        heads = tuple(map(float, item["heads"]))
        step = item["step"]
        made = AttentionError(str(item["layer"]), step, str(item["mode"]), heads, item["density"])
        right = heads and (step is None or type(step) is int) and 0 <= float(made.density) <= 1
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise BadFileError(f"{where}: is malformed, expected layer, step, mode, heads and density")
    return made
