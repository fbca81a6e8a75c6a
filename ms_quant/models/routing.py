"""Which experts a token goes to, and with what weight: the routers of mixture-of-experts models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.models.config_values import count, flag, number, positive_int

MAX_EXPERTS = 4096  # what is done for every expert must end before its tensors are looked at
EXPERT_KEYS = "num_experts", "num_local_experts", "n_routed_experts"
"""What configs call the number of experts: transformers 5 writes what it reads by the second."""
Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Routing:
    """The routed experts of a model.

    Attributes:
        experts: how many there are in a block.
        per_token: how many a token goes to.
        size: inner channels of an expert.
        unit: what the config calls ``size``.
        scoring: what is made of the router's products. ``"sigmoid"`` comes with a bias of each
            expert, ``e_score_correction_bias``, that is for choosing only.
        normalized: whether the weights of a token's experts are divided by their sum.
        scale: what its weights are multiplied by, after that.
        groups: the experts are in so many groups, of which a token goes to ``groups_per_token``.
        shared: inner channels of the MLP that all tokens pass beside the routed ones; 0 for none.
        shared_gate: whether a float linear of one output says how much of that MLP is added.
        sparse: the blocks that have experts; the others have one dense MLP.
    """

    experts: int
    per_token: int
    size: int
    unit: str
    scoring: Scoring
    normalized: bool
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    shared: int = 0
    shared_gate: bool = False
    sparse: frozenset[int] = frozenset()

    def route(
        self, products: np.ndarray, correction: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The experts of each token and their weights.

        Args:
            products: float32 (tokens, experts), of the router.
            correction: float32 (experts,), added to scores where experts are chosen.

        Returns:
            Ascending int64 (tokens, per_token) and float32 (tokens, per_token).
        """
        scores = _softmax(products) if self.scoring == "softmax" else sigmoid(products)
        wanted = scores if correction is None else scores + correction
        wanted = self._in_groups(wanted)
        # Among equal ones the expert of the lower number comes first, on every machine.
        chosen = np.argsort(-wanted, axis=1, kind="stable")[:, : self.per_token]
        chosen.sort(axis=1)
        weights = np.take_along_axis(scores, chosen, axis=1)
        if self.normalized:
            tiny = np.float32(1e-20 if self.scoring == "sigmoid" else 0)
            weights = weights / (weights.sum(axis=1, keepdims=True) + tiny)
        return chosen, (weights * np.float32(self.scale)).astype(np.float32)

    def _in_groups(self, wanted: np.ndarray) -> np.ndarray:
        """What is wanted of the experts of a token's groups; minus infinity of all others.

        A group is worth the sum of its two best experts. Older runtimes fill in 0, which chooses
        otherwise where an expert that is kept has less.
        """
        if self.groups == 1:
            return wanted
        grouped = wanted.reshape(len(wanted), self.groups, self.experts // self.groups)
        worth = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        best = np.argsort(-worth, axis=1, kind="stable")[:, : self.groups_per_token]
        out = np.ones((len(wanted), self.groups, 1), bool)
        np.put_along_axis(out, best[:, :, None], False, axis=1)
        return np.where(out, np.float32(-np.inf), grouped).reshape(wanted.shape)


def _softmax(products: np.ndarray) -> np.ndarray:
    exponentials = np.exp(products - products.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), float32."""
    with np.errstate(over="ignore"):
        return (np.float32(1) / (np.float32(1) + np.exp(-x))).astype(np.float32)


def expert_count(raw: Mapping[str, Any], where: str) -> int:
    """How many experts a config has, by whichever key.

    Raises:
        MsQuantError: the keys differ, or there are too many.
    """
    given = {key: raw[key] for key in EXPERT_KEYS if raw.get(key) is not None}
    if len(set(map(repr, given.values()))) > 1:
        raise BadFileError(f"{where}: {given} differ, expected one number of experts")
    key = next(iter(given), EXPERT_KEYS[0])
    experts = positive_int(raw, key, where)
    if experts > MAX_EXPERTS:
        raise BadFileError(f"{where}: {key} is {experts}, expected at most {MAX_EXPERTS}")
    return experts


def read_qwen(raw: Mapping[str, Any], layers: int, where: str, shared: bool = False) -> Routing:
    """The experts of Qwen2-MoE and Qwen3-MoE.

    Args:
        raw: the content of ``config.json``, with defaults.
        layers: how many blocks the model has.
        where: the file, for errors.
        shared: whether there is an MLP that all tokens pass, with a gate.

    Raises:
        MsQuantError: a key has a wrong value.
    """
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(i) is not int or not 0 <= i < layers for i in dense):
        raise BadFileError(
            f"{where}: mlp_only_layers is {dense!r:.80}, expected numbers of the {layers} layers"
        )
    step = positive_int(raw, "decoder_sparse_step", where, default=1)
    sparse = {i for i in range(layers) if i not in set(dense) and (i + 1) % step == 0}
    routing = Routing(
        experts=expert_count(raw, where),
        per_token=positive_int(raw, "num_experts_per_tok", where),
        size=positive_int(raw, "moe_intermediate_size", where),
        unit="moe_intermediate_size",
        scoring="softmax",
        normalized=flag("norm_topk_prob", raw, where),
        shared=positive_int(raw, "shared_expert_intermediate_size", where) if shared else 0,
        shared_gate=shared,
        sparse=frozenset(sparse),
    )
    return _checked(routing, where)


def read_deepseek(raw: Mapping[str, Any], layers: int, where: str) -> Routing:
    """The experts of DeepSeek-V3 and Kimi-K2, and of the layers that predict further tokens.

    Args:
        raw, layers, where: as of :func:`read_qwen`.

    Raises:
        MsQuantError: a key has a wrong value, or the router is another.
    """
    for key, expected in {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}.items():
        if raw.get(key) not in (None, expected):
            raise UnsupportedError(
                f"{where}: {key} {raw[key]!r:.80} is not supported, expected {expected!r}"
            )
    first = count(raw, "first_k_dense_replace", where, layers)
    step = positive_int(raw, "moe_layer_freq", where, default=1)
    size, shared = positive_int(raw, "moe_intermediate_size", where), raw.get("n_shared_experts")
    sparse = {i for i in range(first, layers) if i % step == 0}
    extra = range(layers, layers + count(raw, "num_nextn_predict_layers", where, layers))
    routing = Routing(
        experts=expert_count(raw, where),
        per_token=positive_int(raw, "num_experts_per_tok", where),
        size=size,
        unit="moe_intermediate_size",
        scoring="sigmoid",
        normalized=flag("norm_topk_prob", raw, where),
        scale=number(raw, "routed_scaling_factor", where),
        groups=positive_int(raw, "n_group", where, default=1),
        groups_per_token=positive_int(raw, "topk_group", where, default=1),
        shared=size * count(raw, "n_shared_experts", where, MAX_EXPERTS) if shared else 0,
        sparse=frozenset([*sparse, *extra]),
    )
    return _checked(routing, where)


def _checked(routing: Routing, where: str) -> Routing:
    experts, groups, kept = routing.experts, routing.groups, routing.groups_per_token
    if experts % groups:
        raise BadFileError(
            f"{where}: n_group is {groups}, expected a divisor of the {experts} experts"
        )
    if kept > groups:
        raise BadFileError(f"{where}: topk_group is {kept}, expected at most n_group {groups}")
    if groups > 1 and experts // groups < 2:
        raise BadFileError(
            f"{where}: n_group is {groups}, expected groups of two or more of {experts} experts: "
            "a group is chosen by its two best"
        )
    most = experts // groups * kept
    if routing.per_token > most:
        raise BadFileError(
            f"{where}: num_experts_per_tok is {routing.per_token}, expected at most {most}"
            + (f", the experts of {kept} groups" if groups > 1 else "")
        )
    return routing
