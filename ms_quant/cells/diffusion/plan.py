"""What one attention of a diffusion network becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ms_quant.attention.fa_quant import KINDS
from ms_quant.attention.rules import SparseRule
from ms_quant.attention.schedule import StepWindow
from ms_quant.cells.diffusion.function import TEXT, Pictures
from ms_quant.errors import BadArgumentError
from ms_quant.timestep import TimestepPolicyConfig

FLOAT, STATIC = "FLOAT", "INT8"
STRATEGIES = {"FP8": "FP8_DYNAMIC", "MXFP4": "MXFP4_DYNAMIC", FLOAT: FLOAT}
"""What a policy's strategies of the target ``fa`` stand for."""


@dataclass(frozen=True)
class AttentionPlan:
    """What an attention becomes: quantized, sparse or both.

    Attributes:
        kind: how queries, keys and values are quantized, of ``ms_quant.attention.fa_quant.KINDS``;
            ``"FLOAT"`` for not at all.
        sparse: which pairs of tokens are left out; None for none.
        window: which steps are sparse, and when a mask is made anew.
        rotates: whether queries and keys are rotated before they are quantized, as MindIE-SD does.
            It helps the integer kinds and MXFP4, and not FP8. None: unless scales are static.
        latent_shape: frames, height and width of the picture's tokens, or of each of several
            pictures; None: the network says it.
        text: where the text stands among the tokens, of ``TEXT``; "": the network says it.
        float_steps: steps of the sampling loop in which the attention is the network's own.
    """

    kind: str = FLOAT
    sparse: SparseRule | None = None
    window: StepWindow = field(default_factory=StepWindow)
    rotates: bool | None = None
    latent_shape: Pictures | None = None
    text: str = ""
    float_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        steps = self.float_steps
        if not all(type(step) is int and step >= 0 for step in steps):
            raise BadArgumentError(f"attention: float_steps {steps!r:.80}, expected steps from 0")
        if self.kind not in (*KINDS, FLOAT):
            known = ", ".join((*KINDS, FLOAT))
            raise BadArgumentError(f"attention: kind {self.kind!r:.80}, expected one of {known}")
        if self.kind == FLOAT and self.sparse is None:
            raise BadArgumentError(
                "attention: FLOAT and not sparse, which is what it is, expected no plan for it"
            )
        if self.sparse is None and self.window != StepWindow():
            raise BadArgumentError(
                "attention: a window of steps without a sparse rule, expected one, or a "
                "timestep_policy for steps of quantized attention"
            )
        if self.text not in (*TEXT, ""):
            raise BadArgumentError(f"attention: text {self.text!r}, expected {', '.join(TEXT)}")

    @property
    def is_rotated(self) -> bool:
        """Whether queries and keys are rotated, and not as they come."""
        rotates = self.kind != STATIC if self.rotates is None else self.rotates
        return rotates and self.kind != FLOAT

    @property
    def label(self) -> str:
        """For tables: ``FP8_DYNAMIC``, ``rf_v2 0.8``, or both."""
        parts = [] if self.kind == FLOAT else [self.kind]
        if self.sparse is not None:
            parts.append(f"{self.sparse.kind} {self.sparse.sparsity:g}")
        return " + ".join(parts)

    @property
    def wish(self) -> dict[str, Any]:
        """As a user writes it in JSON, for :func:`attention_plan`."""
        found: dict[str, Any] = {"kind": self.kind}
        if self.sparse is not None:
            found["sparse"] = self.sparse.kind
            found |= {name: getattr(self.sparse, name) for name in sorted(_SPARSE)}
        found |= {name: getattr(self.window, own) for name, own in _WINDOW.items()}
        found |= {name: getattr(self, name) for name in ("rotates", "latent_shape", "text")}
        found["float_steps"] = self.float_steps
        usual = {**_USUAL, "sparsity": None}  # that of a rule is said
        said = {name: value for name, value in found.items() if value != usual.get(name)}
        return {name: _listed(value) for name, value in said.items()}

    def kind_at(self, step: int | None, policy: TimestepPolicyConfig | None) -> str:
        """How a step is quantized: as the policy says, where it says something of attention."""
        if self.kind == FLOAT or policy is None or step is None:
            return self.kind
        strategy = policy.chosen(step, "fa")
        return self.kind if strategy is None else STRATEGIES[strategy]


_SPARSE = {f.name for f in fields(SparseRule)} - {"kind"}
_OWN = ("kind", "rotates", "latent_shape", "text", "float_steps")
_WINDOW = {"start_step": "start", "end_step": "end", "mask_refresh_interval": "refresh"}
_USUAL = {
    **{f.name: f.default for f in fields(SparseRule) if f.name in _SPARSE},
    **{f.name: f.default for f in fields(AttentionPlan) if f.name in _OWN},
    **{name: getattr(StepWindow(), own) for name, own in _WINDOW.items()},
}


def attention_plan(wish: AttentionPlan | str | Mapping[str, Any], where: str) -> AttentionPlan:
    """A plan from what a user writes.

    Args:
        wish: a plan; the name of a kind or of a sparse rule; or a dict with ``kind``, ``sparse``
            (name of a rule), the rule's options such as ``sparsity``, ``start_step``, ``end_step``,
            ``mask_refresh_interval``, ``rotates``, ``latent_shape``, ``text`` and ``float_steps``.
        where: for errors.

    Raises:
        MsQuantError: it is none of these, or something in it is unknown.
    """
    if isinstance(wish, AttentionPlan):
        return wish
    if isinstance(wish, str):
        wish = {"kind": wish} if wish in (*KINDS, FLOAT) else {"sparse": wish}
    if not isinstance(wish, Mapping):
        raise BadArgumentError(
            f"{where}: {wish!r:.80}, expected a kind, a sparse rule, a dict of both, or an "
            "AttentionPlan"
        )
    known = {"sparse", *_OWN, *_WINDOW, *_SPARSE}
    unknown = [key for key in wish if key not in known]
    if unknown:
        listed = ", ".join(sorted(known))
        raise BadArgumentError(f"{where}: {unknown[0]!r:.80} is unknown, expected {listed}")
    options = {key: wish[key] for key in wish if key in _SPARSE}
    if options and "sparse" not in wish:
        raise BadArgumentError(f"{where}: {next(iter(options))} without sparse, expected a rule")
    options |= as_tuple(options, "block_shape", where)
    rule = SparseRule(wish["sparse"], **options) if wish.get("sparse") is not None else None
    window = StepWindow(**{to: wish[name] for name, to in _WINDOW.items() if name in wish})
    own: dict[str, Any] = {name: wish[name] for name in _OWN if name in wish}
    for name in ("latent_shape", "float_steps"):
        own |= as_tuple(own, name, where)
    return AttentionPlan(sparse=rule, window=window, **own)


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, tuple) else value


def as_tuple(options: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """An option that is a list or a range in JSON or in Python as a tuple, where it is given."""
    value = options.get(name)
    if value is None:
        return {}
    if not isinstance(value, tuple | list | range):
        raise BadArgumentError(f"{where}: {name} {value!r:.80}, expected a list of integers")
    parts = (tuple(part) if isinstance(part, list) else part for part in value)
    return {name: tuple(parts)}
