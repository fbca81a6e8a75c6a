"""How far off each attention of a network is in each mode, and what is better left float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from ms_quant.errors import BadArgumentError, BadFileError
from ms_quant.files.atomic import write_json
from ms_quant.files.strict_json import read_json
from ms_quant.serve.attention import FloatParts

VERSION = 1
MAX_BYTES = 256 << 20
MOST = 0.05
FIRST = 15 / 40
"""The share of the steps that stay float at first: MindIE-SD's launchers begin at step 15 of 40."""


@dataclass(frozen=True)
class AttentionError:
    """One call of one attention, computed in one mode beside the float network.

    Attributes:
        layer: path of the Cell.
        step: of the sampling loop; None where none was set.
        mode: name of what was computed.
        heads: relative L2 error of each head's output.
        density: the share of pairs that were computed.
        densities: the same of each head; () where it was not recorded.
        kinds: what each head computed, such as ``"temporal"``; () where all compute the same.
    """

    layer: str
    step: int | None
    mode: str
    heads: tuple[float, ...]
    density: float = 1.0
    densities: tuple[float, ...] = ()
    kinds: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The mean over heads."""
        return float(np.mean(self.heads))


@dataclass(frozen=True)
class AttentionSensitivity:
    """Errors of every call that was measured.

    Attributes:
        calls: in the order in which they were made.
        wishes: each mode as ``attention`` of :func:`ms_quant.quantize` takes it.
    """

    calls: tuple[AttentionError, ...]
    wishes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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

    def heat_map(self, mode: str) -> dict[str, Any]:
        """Error, density and kind of each head of each layer, over all steps, as plain JSON.

        Returns:
            ``mode``; ``layers``, paths; and of each layer a row with a value of each head:
            ``errors`` and ``densities``, means over calls, and ``kinds``, what the head was most
            often, "" where all heads compute the same.
        """
        calls = {path: [c for c in self._of(mode) if c.layer == path] for path in self.layers}
        return {
            "mode": mode,
            "layers": list(calls),
            "errors": [list(self.by_head(mode, path)) for path in calls],
            "densities": [_densities(found) for found in calls.values()],
            "kinds": [_kinds(found) for found in calls.values()],
        }

    def recommend(self, mode: str, most: float = MOST) -> FloatParts:
        """What to do with a network: the first steps float, and what is off by more than a limit.

        The first 15 of 40 steps, or that share of them, decide what is in the picture; sampling
        multiplies what is wrong there. ``attention()`` of what is returned goes to
        :func:`ms_quant.quantize`, and ``save`` writes it for ``serve-check --attention``.

        Args:
            mode: one of ``modes``.
            most: relative L2 error of a layer or step that is left. Default: ``0.05``.

        Raises:
            MsQuantError: there is no such mode, or the limit is not positive.
        """
        return self.keep_float(mode, most, FIRST)

    def keep_float(self, mode: str, most: float, first: float = 0.0) -> FloatParts:
        """Which layers and steps to leave float.

        The worst layer or step, by its mean error, is left float until none that is left is off by
        more than ``most``.

        Args:
            mode: one of ``modes``.
            most: relative L2 error, such as 0.05.
            first: the share of the steps that stay float at first, whatever they are off by.

        Raises:
            MsQuantError: there is no such mode, the limit is not positive, or the share is not
                from 0 to less than 1.
        """
        if not most > 0:
            raise BadArgumentError(f"most: {most}, expected a relative error above 0")
        if not 0 <= first < 1:
            raise BadArgumentError(f"first: {first}, expected a share of the steps, 0 to below 1")
        layers, steps = set[str](), set(self.steps[: round(first * len(self.steps))])
        left = [call for call in self._of(mode) if call.step not in steps]
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
        count = self.steps[-1] + 1 if self.steps else 0
        wish = self.wishes.get(mode, {})
        return FloatParts(mode, kept, tuple(sorted(steps)), wish, self.layers, count)

    def save(self, path: Path | str) -> None:
        """Writes all of it as JSON, for programs."""
        wishes = {mode: dict(wish) for mode, wish in self.wishes.items()}
        calls = [asdict(call) for call in self.calls]
        write_json(Path(path), {"version": VERSION, "modes": wishes, "calls": calls})

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
        wishes = value.get("modes", {})
        if not isinstance(wishes, dict) or not all(isinstance(w, dict) for w in wishes.values()):
            raise BadFileError(f"{path}: modes is malformed, expected a dict of each")
        found = (_call(item, f"{path}: calls[{i}]") for i, item in enumerate(calls))
        return cls(tuple(found), wishes)

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
                lines += self._heads_of(mode, path)
            for step, error in zip(self.steps, self.by_step(mode), strict=True):
                lines.append(f"  step {step}: {error:.2e}")
        return "\n".join(lines)

    def _heads_of(self, mode: str, path: str) -> list[str]:
        """What the heads of a layer compute, where they differ."""
        calls = [call for call in self._of(mode) if call.layer == path]
        pairs = list(zip(_kinds(calls), _densities(calls), strict=True))
        if len(set(pairs)) < 2:
            return []
        texts = [f"{n} {kind} {density:.2f}" for n, (kind, density) in enumerate(pairs)]
        return wrap(
            f"heads: {', '.join(texts)}", 78, initial_indent=4 * " ", subsequent_indent=6 * " "
        )

    def _of(self, mode: str) -> list[AttentionError]:
        if mode not in self.modes:
            raise BadArgumentError(f"mode: {mode!r}, expected one of {', '.join(self.modes)}")
        return [call for call in self.calls if call.mode == mode]


def _mean(calls: Any) -> float:
    found = [call.error for call in calls]
    return float(np.mean(found)) if found else 0.0


def _densities(calls: Sequence[AttentionError]) -> list[float]:
    """The share of pairs that each head computed, in the mean over calls."""
    rows = [call.densities or (call.density,) * len(call.heads) for call in calls]
    found: list[float] = np.mean(rows, axis=0).tolist()
    return found


def _kinds(calls: Sequence[AttentionError]) -> list[str]:
    """What each head was most often."""
    rows = [call.kinds or ("",) * len(call.heads) for call in calls]
    return [Counter(head).most_common(1)[0][0] for head in zip(*rows, strict=True)]


def _call(item: Any, where: str) -> AttentionError:
    try:
        heads = tuple(map(float, item["heads"]))
        step = item["step"]
        densities = tuple(map(float, item.get("densities", ())))
        kinds = tuple(map(str, item.get("kinds", ())))
        own = str(item["layer"]), step, str(item["mode"]), heads, item["density"]
        made = AttentionError(*own, densities, kinds)
        sizes = {len(part) for part in (densities, kinds)} <= {0, len(heads)}
        right = heads and sizes and (step is None or type(step) is int)
        right = right and all(0 <= float(n) <= 1 for n in (made.density, *densities))
    except (KeyError, TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise BadFileError(f"{where}: is malformed, expected layer, step, mode, heads and density")
    return made
