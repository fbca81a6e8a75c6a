"""``config.json`` of a Hugging Face decoder, checked and reduced to what this project uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.files.encoded import DECODED_METHODS
from ms_quant.files.strict_json import read_json
from ms_quant.models.block_spec import BlockSpec, Division
from ms_quant.models.config_keys import check_classes, check_keys
from ms_quant.models.config_values import count, flag, positive_int
from ms_quant.models.families import FAMILIES, Family
from ms_quant.models.latent_shape import LatentShape, read_latent
from ms_quant.models.names import block_prefix
from ms_quant.models.rope import check_rope, rotary_order, unknown_rope_keys, unrotated_layers
from ms_quant.models.routing import Routing
from ms_quant.models.sliding_window import check_windows, without_windows
from ms_quant.models.spellings import (
    ROPE_KEYS,
    canonical,
    read_dtype,
    read_rope,
    rope_spellings,
)
from ms_quant.models.text_part import stored_name, text_part, whole_config

FURTHER_LAYERS = "num_nextn_predict_layers"
_EXPERTS = "num_experts", "num_local_experts"
"""Old and new runtimes read one of them; DeepSeek's key is another in both."""
MAX_LAYERS = 4096  # what is done for every layer must end before its tensors are looked at


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    Attributes:
        rope: rotary parameters, always with ``rope_type`` and ``rope_theta``.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, as the config states it.
        eos_token_ids: the tokens that end a generation, as the config and beside it
            ``generation_config.json`` say.
        no_head: whether there is no ``lm_head``: the model gives out its last hidden states.
        labels: rows of the classifier ``score`` that stands in the place of the head; 0 is none.
        label_bias: whether that has a bias.
        unknown: keys of the config that are not known here, and not looked at.
        unrotated: layers whose attention has no rotary embedding.
        routing: its experts, if it has some.
        latent: the sizes of its attention, where that is multi-head latent attention;
            ``head_dim`` is that of queries and keys then.
        further_layers: how many blocks after the last one predict further tokens.
        carried: tensors of a larger model that it is in, as (name, type, shape): they stay as they
            are.
        inner: whether its tensors are stored under the names of a text model in a larger one.
        outer: the config of the larger model; ``raw`` is its own then.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position: int
    rope: dict[str, Any]
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    eos_token_ids: tuple[int, ...] = ()
    no_head: bool = False
    labels: int = 0
    label_bias: bool = False
    unknown: tuple[str, ...] = ()
    unrotated: tuple[int, ...] = ()
    routing: Routing | None = None
    latent: LatentShape | None = None
    further_layers: int = 0
    carried: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    inner: bool = False
    outer: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a float checkpoint of this model holds, name to shape."""
        shapes, after = self.outer_shapes()
        for block in self.stored_blocks:
            for name, shape in block.tensors.items():
                shapes[f"{block_prefix(block.index)}{name}"] = shape
        return shapes | after | {name: shape for name, _, shape in self.carried}

    def outer_shapes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """The tensors before and after the blocks, name to shape."""
        hidden = self.hidden_size
        before = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
        if self.has_head:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        if self.labels:
            shapes["score.weight"] = (self.labels, hidden)
        if self.label_bias:
            shapes["score.bias"] = (self.labels,)
        return dict(before), shapes

    def stored_name(self, name: str) -> str:
        """The name of a tensor or a module in files."""
        return stored_name(name) if self.inner else name

    def rotates(self, index: int) -> bool:
        """Whether the attention of a layer has a rotary embedding."""
        return index not in self.unrotated

    @property
    def rotary_size(self) -> int:
        """How many channels of a head have a rotary embedding."""
        if self.latent is not None:
            return self.latent.rope
        return int(self.head_dim * (self.rope.get("partial_rotary_factor") or 1))

    @cached_property
    def rotary_order(self) -> np.ndarray | None:
        """See :func:`~ms_quant.models.rope.rotary_order`."""
        return rotary_order(self.head_dim, self.rotary_size, self.family.interleaved)

    @property
    def longest(self) -> int:
        """How many positions it was made for, with what its rotary embedding extends them to."""
        if self.rope["rope_type"] not in ("linear", "dynamic", "yarn"):
            return self.max_position
        original = self.rope["original_max_position_embeddings"]
        return max(self.max_position, int(original * self.rope["factor"]))

    def beyond(self, positions: int) -> str | None:
        """A sentence where a text has more positions than the model was made for."""
        if positions <= self.longest:
            return None
        return f"the model was made for {self.longest} positions (max_position_embeddings)"

    @property
    def has_head(self) -> bool:
        """Whether there is a head of its own, ``lm_head.weight``."""
        return not (self.tied or self.no_head or self.labels)

    @property
    def predicts(self) -> bool:
        """Whether it gives out logits of the next token."""
        return not self.labels and (self.tied or not self.no_head)

    def block(self, index: int) -> BlockSpec:
        """What a block is made of."""
        if index not in self._blocks:
            self._blocks[index] = self.family.block(self, index)
        return self._blocks[index]

    @property
    def blocks(self) -> Iterator[BlockSpec]:
        """The blocks that a token passes, in order."""
        return (self.block(index) for index in range(self.num_layers))

    @property
    def num_blocks(self) -> int:
        """How many blocks a checkpoint holds, with those that predict further tokens."""
        return self.num_layers + self.further_layers

    @property
    def stored_blocks(self) -> Iterator[BlockSpec]:
        """The blocks that a checkpoint holds, in order."""
        return (self.block(index) for index in range(self.num_blocks))

    @cached_property
    def divisions(self) -> tuple[Division, ...]:
        """Every way in which some linear is divided over ranks, once."""
        found = {
            spec.division: None for block in self.stored_blocks for spec in block.linears.values()
        }
        return tuple(found)

    @cached_property
    def _blocks(self) -> dict[int, BlockSpec]:
        return {}


def load_config(model_dir: Path | str, without: str = "") -> ModelConfig:
    """Reads and checks ``config.json`` of a model directory.

    Args:
        model_dir: the directory.
        without: an entry that is not looked at.

    Raises:
        MsQuantError: a key is missing or has a wrong value, or the model type has no row in
            the family table.
    """
    model_dir = Path(model_dir)
    if not model_dir.is_dir():
        raise BadFileError(f"{model_dir}: no such model directory")
    path = model_dir / "config.json"
    raw = {key: value for key, value in read_json(path).items() if key != without}
    config = parse_config(raw, str(path))
    beside = model_dir / "generation_config.json"
    if not beside.is_file():
        return config
    more = _token_ids(read_json(beside).get("eos_token_id"), str(beside))
    return replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *more])))


def own_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of the model itself, where it is in a larger one."""
    family = FAMILIES.get(str(raw.get("model_type")))
    return text_part(raw, where) if family is not None and family.nested else dict(raw)


def parse_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    raw = canonical(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"{where}: model_type {model_type!r:.80} is not supported, expected one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family, outer = FAMILIES[model_type], dict[str, Any]()
    if family.nested:
        outer, raw = raw, canonical(text_part(raw, where))
    _refuse_unsupported(raw, where)
    unknown = check_keys(raw, family.own_keys, family.qk_norm, where)
    rope = read_rope(with_defaults(raw, family), where)
    unknown += [f"{key} (rotary)" for key in unknown_rope_keys(rope)]
    check_classes(raw, family, where)
    for key in family.required:
        if raw.get(key) is None:
            raise BadFileError(f"{where}: the key {key!r} is missing, which has no known default")
    given, raw = raw, with_defaults(raw, family)
    heads = positive_int(raw, "num_attention_heads", where)
    hidden = positive_int(raw, "hidden_size", where)
    kv_heads = positive_int(raw, "num_key_value_heads", where, default=heads)
    latent = read_latent(raw, where) if family.latent else None
    if latent is None:
        head_dim = positive_int(raw, "head_dim", where, default=hidden // heads)
    else:
        head_dim, kv_heads = latent.query, heads
    if heads % kv_heads:
        raise BadFileError(
            f"{where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if latent is None and head_dim % 2:
        raise BadFileError(f"{where}: head_dim {head_dim} is odd, the rotary embedding needs pairs")
    max_position = positive_int(raw, "max_position_embeddings", where, default=2048)
    layers = _layers(raw, where)
    unrotated = unrotated_layers(raw, layers, family.skips_rotation, where)
    first = (0 if unrotated else layers) if family.skips_rotation else None
    check_windows(raw, layers, max_position, family.flagged_window, where, first)
    routing = family.routing(raw, layers, where) if family.routing else None
    further = count(raw, FURTHER_LAYERS, where, layers) if family.latent else 0
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=_dense_size(raw, layers, routing, where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=positive_int(raw, "vocab_size", where),
        rms_norm_eps=_epsilon(raw.get("rms_norm_eps", 1e-6), where),
        max_position=max_position,
        rope=check_rope(rope, max_position, where, head_dim if family.partial_rotary else 0),
        tied=flag("tie_word_embeddings", raw, where),
        qkv_bias=flag(family.qkv_bias, raw, where),
        o_bias=flag(family.o_bias, raw, where),
        mlp_bias=flag(family.mlp_bias, raw, where),
        qk_norm=family.qk_norm,
        dtype=_dtype(raw, where),
        eos_token_ids=_token_ids(raw.get("eos_token_id"), where),
        unknown=tuple(unknown),
        unrotated=unrotated,
        routing=routing,
        latent=latent,
        further_layers=further,
        outer=outer,
        raw=given,
    )


def with_defaults(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A config with what transformers takes for the keys that are absent.

    What stands in the rotary object is not absent.
    """
    defaults = dict(family.defaults)
    inner = [raw[key] for key in ROPE_KEYS if isinstance(raw.get(key), dict)]
    for key in ("rope_theta", "partial_rotary_factor"):
        if raw.get(key) is not None or any(key in rope for rope in inner):
            defaults.pop(key, None)
    absent = {k: v for k, v in defaults.items() if k not in raw}
    return {**raw, **absent}


def written_config(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` that old and new runtimes read alike, but for the type of the weights.

    What is said in two places is said in both, no layer seems to have a window, and tokens that
    end a generation are there if ``generation_config.json`` has them alone.
    """
    raw, family = config.raw, config.family
    whole = with_defaults(raw, family)
    rope = rope_spellings(raw, read_rope(whole, "config.json"))
    written = {**raw, **rope, **without_windows(whole, family.flagged_window)}
    if raw.get("eos_token_id") is None and config.eos_token_ids:
        first, *others = config.eos_token_ids
        written["eos_token_id"] = [first, *others] if others else first
    if config.routing is not None and any(key in raw for key in _EXPERTS):
        written |= dict.fromkeys(_EXPERTS, config.routing.experts)
    if raw.get(FURTHER_LAYERS) != config.further_layers and family.latent:
        written[FURTHER_LAYERS] = config.further_layers
    return whole_config(config.outer, raw, written) if config.outer else written


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        if method not in DECODED_METHODS:
            raise BadFileError(
                f"{where}: has a quantization_config with quant_method {method!r:.80}, expected a "
                f"float checkpoint or one in {' or '.join(DECODED_METHODS)}; dequantize the model "
                "first"
            )
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise UnsupportedError(f"{where}: hidden_act {act!r:.80} is not supported, expected 'silu'")


def _dense_size(raw: Mapping[str, Any], layers: int, routing: Routing | None, where: str) -> int:
    """Inner channels of a dense MLP; a model without one need not say them."""
    none = routing is not None and routing.sparse.issuperset(range(layers))
    return positive_int(raw, "intermediate_size", where, default=1 if none else None)


def _layers(raw: dict[str, Any], where: str) -> int:
    layers = positive_int(raw, "num_hidden_layers", where)
    if layers > MAX_LAYERS:
        raise BadFileError(f"{where}: num_hidden_layers is {layers}, expected at most {MAX_LAYERS}")
    return layers


def _epsilon(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise BadFileError(
            f"{where}: rms_norm_eps is {value!r:.80}, expected a small positive number"
        )
    return float(value)


def _dtype(raw: dict[str, Any], where: str) -> str:
    value = read_dtype(raw, where)
    value = "float32" if value is None else value
    if value not in ("bfloat16", "float16", "float32"):
        raise UnsupportedError(
            f"{where}: dtype {value!r:.80} is not supported, expected bfloat16, float16 or float32"
        )
    return value


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadFileError(f"{where}: eos_token_id is {value!r:.80}, expected an integer or a list")
    return tuple(ids)
