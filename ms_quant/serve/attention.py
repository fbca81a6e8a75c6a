"""Which attention of a network becomes what in which step, and how runtimes are told so.

Marks of what is known of a runtime are those of docs/attention.md, "What runtimes are told".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ms_quant.errors import BadArgumentError, BadFileError, UnsupportedError
from ms_quant.files.atomic import write_json
from ms_quant.files.strict_json import read_json

VERSION, MAX_BYTES = 1, 16 << 20
CACHE_TYPES = {"FP8_DYNAMIC": "fp8", "MXFP8_DYNAMIC": "mxfp8", "MXFP4_DYNAMIC": "mxfp4"}
"""Kinds of quantized attention by vllm-omni's name."""
PRECISIONS = {"FLOAT": "bf16", "FP8_DYNAMIC": "fp8", "MIX": "mix"}
"""Kinds of quantized operands of sparse attention by vllm-omni's name."""
STRATEGIES = {"FP8_DYNAMIC": "FP8", "MXFP4_DYNAMIC": "MXFP4"}
"""Kinds by the strategies that MindIE-SD's policy of timesteps has."""
RAINFUSION = {"rf_v1": "v1", "rf_v2": "v2", "rf_v3": "v3"}
FEW_TOKENS, MANY = 4096, 1 << 30


@dataclass(frozen=True)
class FloatParts:
    """What attention becomes, and which layers and steps stay float.

    Attributes:
        mode: what the others become, by its name.
        layers: paths that stay float, in the order of the network.
        steps: that stay float, ascending.
        wish: what the others become, as ``attention`` of :func:`ms_quant.quantize` takes it: kind,
            sparse rule and its options; {} where only the name is known.
        measured: paths of all layers that this is about, in the order of the network.
        count: how many steps the sampling loop has; 0 where that is not known.
    """

    mode: str
    layers: tuple[str, ...]
    steps: tuple[int, ...]
    wish: Mapping[str, Any] = field(default_factory=dict)
    measured: tuple[str, ...] = ()
    count: int = 0

    def attention(self) -> dict[str, dict[str, Any] | None]:
        """The argument ``attention`` of :func:`ms_quant.quantize` that makes a network so.

        Raises:
            MsQuantError: only the name of the mode is known, or every layer stays float.
        """
        if not self.wish or not set(self.measured) - set(self.layers):
            raise BadArgumentError(
                f"{self.mode}: every layer stays float or the mode is known by name alone, "
                "expected an analysis that leaves a layer"
            )
        made = {**self.wish, **({"float_steps": list(self.steps)} if self.steps else {})}
        return {path: None if path in self.layers else dict(made) for path in self.measured}

    def sparse_steps(self) -> tuple[int, int | None]:
        """The longest run of steps none of which stays float, for runtimes that have one window.

        Returns:
            Its first step and the first step after it; None after the last of the loop.
        """
        edges = [-1, *self.steps]
        end = self.count or MANY
        gaps = zip(edges, [*edges[1:], end], strict=True)
        before, after = max(gaps, key=lambda gap: gap[1] - gap[0])
        return before + 1, None if after == end else after

    def vllm_omni(self) -> dict[str, str]:
        """The options of vllm-omni for this, by their names on the command line.

        Layers are named by the first number in their path.

        Raises:
            MsQuantError: a path has no number, or vllm-omni has nothing that computes so.
        """
        if self.wish.get("sparse"):
            text = json.dumps(self.vllm_omni_config())
            return {"--diffusion-attention-config": text}
        named = {
            "--diffusion-kv-cache-skip-layers": ranges(self._numbers()),
            "--diffusion-kv-cache-skip-steps": ranges(self.steps),
        }
        found = {option: text for option, text in named.items() if text}
        if not self.wish:
            return found
        kind = self.wish.get("kind")
        if kind not in CACHE_TYPES:
            raise UnsupportedError(
                f"attention in {kind}: vllm-omni has no such type, expected "
                f"{', '.join(CACHE_TYPES)}, or a sparse rule"
            )
        return {"--diffusion-kv-cache-dtype": CACHE_TYPES[kind], **found}

    def vllm_omni_config(self) -> dict[str, Any]:
        """vllm-omni's JSON for sparse attention.

        Raises:
            MsQuantError: a path has no number, or vllm-omni has nothing that computes so.
        """
        rule, kind = self.wish.get("sparse"), self.wish.get("kind", "FLOAT")
        if rule not in ("rf_v2", "rf_v3") or kind not in PRECISIONS:
            raise UnsupportedError(
                f"attention {rule} in {kind}: vllm-omni has no such rule, expected rf_v2 or rf_v3 "
                f"in one of {', '.join(PRECISIONS)}"
            )
        start, end = self.sparse_steps()
        sparse: dict[str, Any] = {"sparsity": self.wish.get("sparsity", 0.5), "start_step": start}
        if end is not None:
            sparse["end_step"] = end
        sparse["precision"] = PRECISIONS[kind]
        if self.layers:
            sparse["skip_layers"] = ranges(self._numbers())
        return {
            "default": {"backend": "RAINFUSION_ATTN", "block_sparse": sparse},
            "per_role": {"cross": {"backend": "TORCH_SDPA"}},
        }

    def vllm_omni_notes(self) -> list[str]:
        """What of vllm-omni's options is not certain, or not as it was measured."""
        notes = []
        numbers = [_number(path) for path in self.measured if path not in self.layers]
        if set(numbers) & set(self._numbers()):
            notes.append(
                "layers are named by their number alone, which a layer that stays float shares "
                "with one that does not: both stay float"
            )
        if not self.wish.get("sparse"):
            if self.wish.get("kind") not in (None, "FP8_DYNAMIC"):
                notes.append(f"{self.wish['kind']} of attention is in vllm-omni's documents only")
            return notes
        notes.append(
            f"attention over fewer than {FEW_TOKENS} tokens of video stays dense in vllm-omni"
        )
        notes += self._widened()
        if self.layers:
            notes.append("the place and spelling of skip_layers in that JSON are inferred")
        if self.sparse_steps()[1] is not None:
            notes.append("that end_step is the first dense step of the end is inferred")
        return notes

    def mindie_sd_policy(self) -> list[str]:
        """Lines of Python that make the policy of MindIE-SD; none where no step is float.

        Raises:
            MsQuantError: its policy has no strategy for such attention.
        """
        kind = self.wish.get("kind", "FLOAT")
        if kind == "FLOAT" or not self.steps or len(self.layers) == len(self.measured) > 0:
            return []
        if kind not in STRATEGIES:
            raise UnsupportedError(
                f"attention in {kind} with steps in float: MindIE-SD's policy has no strategy for "
                f"it, expected one of {', '.join(STRATEGIES)}"
            )
        return [
            f"policy = TimestepPolicyConfig(fa_default_strategy={STRATEGIES[kind]!r})",
            f"policy.register({list(self.steps)}, 'FLOAT', target='fa')",
        ]

    def mindie_sd_config(self) -> dict[str, Any]:
        """The configuration of RainFusion in MindIE-SD's models.

        Raises:
            MsQuantError: they have no such rule, or cannot leave layers or last steps dense.
        """
        rule = self.wish.get("sparse")
        start, end = self.sparse_steps()
        if rule not in RAINFUSION:
            raise UnsupportedError(
                f"attention {rule}: MindIE-SD's models have no such rule, expected one of "
                f"{', '.join(RAINFUSION)}"
            )
        if self.layers or end is not None:
            which = ", ".join(self.layers) or f"step {end} and later"
            raise UnsupportedError(
                f"attention {rule} that stays dense in {which}: MindIE-SD's models have first "
                "dense steps alone, expected those, or a runtime such as vllm-omni"
            )
        return {
            "sparsity": self.wish.get("sparsity", 0.5),
            "skip_timesteps": start,
            "type": RAINFUSION[rule],
            "grid_size": None,
            "atten_mask_all": None,
            "mask_refresh_interval": self.wish.get("mask_refresh_interval", 0),
        }

    def mindie_sd_notes(self) -> list[str]:
        """What of MindIE-SD's configuration is not as it was measured, or not certain."""
        rule, notes = self.wish.get("sparse"), self._widened()
        if rule == "rf_v1" and self.wish.get("mode") != "arm2":
            notes.append("its models choose masks as mode arm2 does: measure that")
        if rule == "rf_v1":
            notes.append("MindIE-SD's repository has no RainFusion 1: it is in older models alone")
        if rule and self.wish.get("kind", "FLOAT") != "FLOAT":
            notes.append("its models take RainFusion where both are asked for, and no FA quant")
        return notes

    def _widened(self) -> list[str]:
        start, end = self.sparse_steps()
        dense = start + (0 if end is None else self.count - end)
        if dense <= len(self.steps):
            return []
        return [
            f"{dense} steps stay dense and not {len(self.steps)}: the runtime has one window of "
            "sparse steps"
        ]

    def _numbers(self) -> list[int]:
        return sorted({_number(path) for path in self.layers})

    def save(self, path: Path | str) -> None:
        """Writes it as JSON, for ``ms-quant serve-check --attention``."""
        content = {
            "version": VERSION,
            "mode": self.mode,
            "attention": dict(self.wish),
            "layers": list(self.measured),
            "steps": self.count,
            "float_layers": list(self.layers),
            "float_steps": list(self.steps),
        }
        write_json(Path(path), content)

    @classmethod
    def load(cls, path: Path | str) -> FloatParts:
        """Reads what :meth:`save` wrote, or what is written by hand like it.

        Raises:
            MsQuantError: it is no such file.
        """
        value = read_json(Path(path), MAX_BYTES)
        wish, count = value.get("attention"), value.get("steps", 0)
        if value.get("version") != VERSION or not isinstance(wish, dict) or not wish:
            raise BadFileError(
                f"{path}: is no plan of attention, expected version {VERSION} and 'attention'"
            )
        lists = {key: value.get(key, []) for key in ("float_layers", "float_steps", "layers")}
        for key, found in lists.items():
            kind = int if key == "float_steps" else str
            if not isinstance(found, list) or not all(type(item) is kind for item in found):
                raise BadFileError(f"{path}: {key} is {found!r:.80}, expected a list of {kind}")
        if type(count) is not int or count < 0:
            raise BadFileError(f"{path}: steps is {count!r:.80}, expected how many there are")
        steps = tuple(sorted(set(lists["float_steps"])))
        if steps and (steps[0] < 0 or (count and steps[-1] >= count)):
            last = f" to {count - 1}" if count else ""
            raise BadFileError(
                f"{path}: float_steps {list(steps)!r:.80}, expected steps from 0{last}"
            )
        sparsity = wish.get("sparsity", 0)
        if not isinstance(sparsity, int | float) or not 0 <= sparsity <= 1:
            raise BadFileError(f"{path}: sparsity is {sparsity!r:.80}, expected 0 to 1")
        layers = tuple(lists["float_layers"])
        measured = tuple(lists["layers"])
        return cls(str(value.get("mode", "")), layers, steps, wish, measured, count)


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
