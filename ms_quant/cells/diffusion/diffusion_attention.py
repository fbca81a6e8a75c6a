"""Quantized and sparse attention of diffusion networks as one Cell."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from ms_quant.attention.fa_quant import Scales, decoded, fa_quant
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.layouts import from_heads_first, heads_first
from ms_quant.attention.mask import BlockMask
from ms_quant.attention.rotation import check_pair, walsh_rotation
from ms_quant.attention.rules import make_mask
from ms_quant.attention.sparse import attend
from ms_quant.cells.diffusion import ascend
from ms_quant.cells.diffusion.dense import float_attention
from ms_quant.cells.diffusion.function import AttentionCall, Pictures, pictures
from ms_quant.cells.diffusion.masks import padding
from ms_quant.cells.diffusion.plan import FLOAT, STATIC, AttentionPlan
from ms_quant.cells.diffusion.state import HeadDensities, MaskCaches
from ms_quant.cells.direct import as_type, floats
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.timestep import TimestepManager, TimestepPolicyConfig

DENSE_STEP, PAIRS = "dense step", "mask of pairs"
UNSET = (
    "no timestep is set and some are {}, expected TimestepManager.set_timestep_idx(t) before the "
    "network is called"
)


@dataclass(frozen=True)
class _Asked:
    """What one call is given.

    Raises:
        MsQuantError: an operand has not four axes.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: str
    mask: Tensor | None
    scale: float | None
    call: AttentionCall

    def __post_init__(self) -> None:
        for name, x in zip("qkv", self.operands, strict=True):
            if x.ndim != 4:
                raise BadArgumentError(
                    f"{name}: shape {x.shape}, expected four axes in {self.layout}"
                )

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def padding(self) -> tuple[np.ndarray | None, bool]:
        """What the mask keeps, as :func:`ms_quant.cells.diffusion.masks.padding` says it."""
        host = None if self.mask is None else self.mask.asnumpy()
        return padding(host, self.q.shape[0], self.k.shape[2 if self.layout == "BNSD" else 1])

    def on_host(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Operands as float32, heads first."""
        q, k, v = (
            heads_first(floats(x), self.layout, name)
            for name, x in zip("qkv", self.operands, strict=True)
        )
        return q, k, v


class DiffusionAttention(nn.Cell):
    r"""Attention with quantized queries, keys and values, over some pairs of tokens, or both.

    It stands in the place of a network's own attention (:func:`ms_quant.quantize` puts it there),
    and is usable alone. It runs in PyNative, and has no gradient.

    Args:
        plan (AttentionPlan): what it computes.
        timestep_policy (TimestepPolicyConfig, optional): where it says something of the target
            ``fa``, it says how each step is quantized. Default: ``None``.
        rotations (tuple[numpy.ndarray], optional): q_rot and k_rot of a file, (size, size).
            Default: ``None``, random signs times Walsh's matrix where the plan rotates.
        scales (tuple[numpy.ndarray], optional): of queries, keys and values, for kind ``INT8``.
            Default: ``None``.
        head_size (int, optional): channels of a head. Default: ``None``, those of the first call.
        device_target (str, optional): ``"CPU"`` or ``"Ascend"``. Default: ``None``, the current
            one.

    Inputs:
        - **q**, **k**, **v** (Tensor) - float, of shape :math:`(B, N, S, D)` or, in layout
          ``"BSND"``, :math:`(B, S, N, D)`.
        - **layout** (str, optional) - ``"BNSD"`` or ``"BSND"``. Default: ``"BNSD"``.
        - **mask** (Tensor, optional) - bool, true where a key counts, or float, added to scores. If
          it says anything else than which keys are padding, the attention is dense. Default:
          ``None``.
        - **scale** (float, optional) - multiplies scores. Default: ``None``, 1 / sqrt(D).
        - **call** (AttentionCall, optional) - where it is called, and what its tokens are. Sparse
          attention needs the latent shape. Default: ``AttentionCall()``.

    Outputs:
        Tensor of the shape and type of `q`.

    Raises:
        MsQuantError: shapes do not go together, a head's size that the rotation cannot have, sparse
            attention without a latent shape, a step that is needed and not set, or an output that
            is NaN or inf; names the layer and the step.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import numpy as np
        >>> from mindspore import Tensor
        >>> from ms_quant.cells.diffusion import AttentionPlan, DiffusionAttention
        >>> q, k, v = (Tensor(np.random.randn(1, 2, 300, 64).astype(np.float32)) for _ in range(3))
        >>> print(DiffusionAttention(AttentionPlan("FP8_DYNAMIC"))(q, k, v).shape)
        (1, 2, 300, 64)
    """

    def __init__(
        self,
        plan: AttentionPlan,
        timestep_policy: TimestepPolicyConfig | None = None,
        rotations: tuple[np.ndarray, np.ndarray] | None = None,
        scales: Scales | None = None,
        head_size: int | None = None,
        device_target: str | None = None,
    ):
        super().__init__()
        if plan.kind == STATIC and scales is None:
            raise BadArgumentError(
                "attention: INT8 has static scales of queries, keys and values, expected some, "
                "calibration inputs, or INT8_DYNAMIC"
            )
        self.plan, self.timestep_policy, self.scales = plan, timestep_policy, scales
        self.label, self.calls = plan.label, Counter[str]()
        self.masks, self.head_size = MaskCaches(plan.window), head_size
        self.last_mask = HeadDensities()
        target = device_target or ms.get_context("device_target")
        self.operators = ascend.operators(plan) if target == "Ascend" else None
        if rotations is not None:
            self._set_rotations(*rotations)
        elif head_size is not None:
            self._rotate_heads_of(head_size)

    def _set_rotations(self, q_rot: np.ndarray, k_rot: np.ndarray) -> None:
        check_pair(q_rot, k_rot, len(q_rot))
        for name, value in (("q_rot", q_rot), ("k_rot", k_rot)):
            parameter = Parameter(Tensor(np.asarray(value, np.float32)), name, requires_grad=False)
            self.insert_param_to_cell(name, parameter)

    def _rotate_heads_of(self, size: int) -> None:
        self.head_size = size
        if self.plan.is_rotated and "q_rot" not in self._params:
            rotation = walsh_rotation(size)
            self._set_rotations(rotation, rotation)

    def construct(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: str = "BNSD",
        mask: Tensor | None = None,
        scale: float | None = None,
        call: AttentionCall = AttentionCall(),  # noqa: B008 - it is frozen
    ) -> Tensor:
        step = TimestepManager.get_timestep_idx()
        try:
            return self._compute(_Asked(q, k, v, layout, mask, scale, call), step)
        except MsQuantError as error:
            where = call.path or "attention"
            at = "" if step is None else f", step {step}"
            raise type(error)(f"{where}{at}: {error}") from None

    def _compute(self, asked: _Asked, step: int | None) -> Tensor:
        kind, sparse = self._kind(step), self._is_sparse(step)
        if kind == FLOAT and not sparse:
            return self._own(asked, DENSE_STEP)
        kept, all_said = asked.padding()
        if not all_said:
            return self._own(asked, PAIRS)
        if kind != FLOAT:
            self._rotate_heads_of(asked.q.shape[-1])
        if self.operators is not None:
            ascend.check_kind(kind)
            self.calls[kind] += 1
            return ascend.forward(self, *asked.operands, asked.layout, kept, asked.scale)
        if sparse:
            out = self._sparse(asked, kept, kind, step)
        else:
            given, scales = (*asked.on_host(), *self._rotations()), self._scales(kind)
            out = fa_quant(*given, kind, scale=asked.scale, kept=kept, scales=scales)
        self.calls[self._named(kind, sparse)] += 1
        return _as_given(out, asked.layout, asked.q)

    def _kind(self, step: int | None) -> str:
        policy = self.timestep_policy
        if step is None and policy is not None and policy.says("fa") and self.plan.kind != FLOAT:
            raise BadArgumentError(
                "no timestep is set, expected TimestepManager.set_timestep_idx(t) before the "
                "network is called"
            )
        return FLOAT if self._is_own(step) else self.plan.kind_at(step, policy)

    def _is_own(self, step: int | None) -> bool:
        """Whether a step is the network's own.

        Raises:
            MsQuantError: some are, and no step is set.
        """
        if step is None and self.plan.float_steps:
            raise BadArgumentError(UNSET.format("float"))
        return step in self.plan.float_steps

    def _is_sparse(self, step: int | None) -> bool:
        if self.plan.sparse is None:
            return False
        window = self.plan.window
        if step is None:
            if window.start or window.end is not None or window.refresh:
                raise BadArgumentError(UNSET.format("dense"))
            return True
        if step not in window or self._is_own(step):
            self.masks.cache.clear()
            return False
        return True

    def _own(self, asked: _Asked, reason: str) -> Tensor:
        """The network's own attention, or dense attention where it has none."""
        self.calls[f"{FLOAT} ({reason})"] += 1
        layout, mask, scale, call = asked.layout, asked.mask, asked.scale, asked.call
        if call.original is None and self.operators is not None:
            return ascend.dense(self.operators, *asked.operands, layout, mask, scale)
        return float_attention(*asked.operands, layout=layout, mask=mask, scale=scale, call=call)

    def _rotations(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        if "q_rot" not in self._params:
            return None, None
        return self.q_rot.asnumpy(), self.k_rot.asnumpy()

    def _scales(self, kind: str) -> Scales | None:
        return self.scales if kind == STATIC else None

    def _sparse(
        self, asked: _Asked, kept: np.ndarray | None, kind: str, step: int | None
    ) -> np.ndarray:
        plan, call, scale, (q, k, v) = self.plan, asked.call, asked.scale, asked.on_host()
        rule = plan.sparse
        assert rule is not None
        grid = _grid(plan.latent_shape or call.latent_shape, plan.text or call.text, q.shape[2])

        def make() -> BlockMask:
            made = make_mask(rule, q, k, grid, scale=scale, kept=kept)
            self.last_mask = HeadDensities.of(made)
            return made

        key = grid, q.shape[:2], None if kept is None else kept.tobytes()
        mask = make() if step is None else self.masks.cache.at(step, make, key)
        assert mask is not None
        prepare = None
        if kind != FLOAT:
            prepare = decoded(kind, *self._rotations(), scales=self._scales(kind))
        return attend(q, k, v, mask, scale=scale, kept=kept, prepare=prepare)

    def _named(self, kind: str, sparse: bool) -> str:
        rule = self.plan.sparse
        parts = [] if kind == FLOAT else [kind]
        return " + ".join(parts + ([rule.kind] if sparse and rule is not None else []))

    def extend_repr(self) -> str:
        return self.label


def _grid(latent_shape: Pictures | None, text: str, tokens: int) -> TokenGrid:
    """Which tokens are of which place of which frame.

    Raises:
        MsQuantError: nothing says it, or it does not multiply to the tokens.
    """
    if latent_shape is None:
        raise BadArgumentError(
            "sparse attention does not know which tokens are of which frame, expected "
            "latent_shape=(frames, height, width) of the tokens of the picture"
        )
    shapes = pictures(latent_shape)
    covered = sum(int(np.prod(shape)) for shape in shapes)
    others, said = tokens - covered, " + ".join(" x ".join(map(str, s)) for s in shapes)
    if others < 0:
        raise BadArgumentError(
            f"{tokens} tokens for a latent shape of {said}, expected {covered} or more"
        )
    if others > 0 and text not in ("first", "last"):
        raise BadArgumentError(
            f"{tokens} tokens for a latent shape of {said}, which leaves {others}, expected none, "
            "or text='first' or 'last' to say where the text is"
        )
    start, spans = 0 if text == "last" else others, []
    for shape in shapes:
        spans.append({"start": start, "latent_shape": shape})
        start += int(np.prod(shape))
    return TokenGrid.of_spans(spans, tokens)


def _as_given(out: np.ndarray, layout: str, q: Tensor) -> Tensor:
    """An output in the layout and type that queries have.

    Raises:
        MsQuantError: it is not finite.
    """
    bad = out.size - int(np.count_nonzero(np.isfinite(out)))
    if bad:
        raise BadArgumentError(
            f"the output has NaN or inf in {bad} of {out.size} values, expected finite ones; leave "
            "this layer or this step FLOAT"
        )
    return as_type(np.ascontiguousarray(from_heads_first(out, layout)), q.dtype)
