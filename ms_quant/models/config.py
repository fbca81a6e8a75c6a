"""``config.json`` of a Hugging Face decoder, checked and reduced to what this project uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ms_quant.errors import MsQuantError
from ms_quant.models.families import FAMILIES, Family
from ms_quant.models.rope import check_rope
from ms_quant.strict_json import read_json

MAX_LAYERS = 4096  # what is done for every layer must end before its tensors are looked at

# What transformers takes when the key is absent, where it is not the same for every family.
_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder.

    Attributes:
        rope: rotary parameters, always with ``rope_type`` and ``rope_theta``.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, as the config states it.
        eos_token_ids: the tokens that end a generation.
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
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a float checkpoint of this model holds, name to shape."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for index in range(self.num_layers):
            for name, shape in self.block_shapes().items():
                shapes[f"{block_prefix(index)}{name}"] = shape
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one block, names relative to the block."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        biases = {"self_attn.o_proj": self.o_bias}
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            biases[path] = self.qkv_bias
        for path in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            biases[path] = self.mlp_bias
        for path, (out_features, in_features) in self.linear_shapes().items():
            shapes[f"{path}.weight"] = (out_features, in_features)
            if biases[path]:
                shapes[f"{path}.bias"] = (out_features,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["post_attention_layernorm.weight"] = (hidden,)
        return shapes

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear of a block, names relative to the block."""
        hidden, inter = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }


def block_prefix(index: int) -> str:
    return f"model.layers.{index}."


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
        raise MsQuantError(f"{model_dir}: no such model directory")
    path = model_dir / "config.json"
    raw = {key: value for key, value in read_json(path).items() if key != without}
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise MsQuantError(
            f"{where}: model_type {model_type!r:.80} is not supported, expected one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    _refuse_unsupported(raw, where)
    given, raw = raw, {**_DEFAULTS.get(model_type, {}), **raw}
    heads = _positive_int(raw, "num_attention_heads", where)
    hidden = _positive_int(raw, "hidden_size", where)
    kv_heads = _positive_int(raw, "num_key_value_heads", where, default=heads)
    head_dim = _positive_int(raw, "head_dim", where, default=hidden // heads)
    if heads % kv_heads:
        raise MsQuantError(
            f"{where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise MsQuantError(f"{where}: head_dim {head_dim} is odd, the rotary embedding needs pairs")
    max_position = _positive_int(raw, "max_position_embeddings", where, default=2048)
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        intermediate_size=_positive_int(raw, "intermediate_size", where),
        num_layers=_layers(raw, where),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_positive_int(raw, "vocab_size", where),
        rms_norm_eps=_epsilon(raw.get("rms_norm_eps", 1e-6), where),
        max_position=max_position,
        rope=check_rope(_rope_parameters(raw, where), max_position, where),
        tied=_flag("tie_word_embeddings", raw, where),
        qkv_bias=_flag(family.qkv_bias, raw, where),
        o_bias=_flag(family.o_bias, raw, where),
        mlp_bias=_flag(family.mlp_bias, raw, where),
        qk_norm=family.qk_norm,
        dtype=_dtype(raw, where),
        eos_token_ids=_token_ids(raw.get("eos_token_id"), where),
        raw=given,
    )


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise MsQuantError(
            f"{where}: has a quantization_config with quant_method {method!r:.80}, expected a "
            "float checkpoint; dequantize the model first"
        )
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise MsQuantError(f"{where}: hidden_act {act!r:.80} is not supported, expected 'silu'")
    if raw.get("use_sliding_window"):
        raise MsQuantError(
            f"{where}: use_sliding_window is {raw['use_sliding_window']!r:.80}, expected false: "
            "only full attention is supported"
        )
    layers = raw.get("layer_types")
    if layers is not None and not isinstance(layers, list):
        raise MsQuantError(f"{where}: layer_types is {layers!r:.80}, expected a list")
    others = [kind for kind in layers if kind != "full_attention"] if layers else []
    if others:
        raise MsQuantError(
            f"{where}: layer_types has {others[0]!r:.80}, expected 'full_attention' in every layer"
        )


def _positive_int(raw: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise MsQuantError(f"{where}: the key {key!r:.80} is missing, expected a positive integer")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise MsQuantError(f"{where}: {key} is {value!r:.80}, expected a positive integer")
    return value


def _layers(raw: dict[str, Any], where: str) -> int:
    layers = _positive_int(raw, "num_hidden_layers", where)
    if layers > MAX_LAYERS:
        raise MsQuantError(f"{where}: num_hidden_layers is {layers}, expected at most {MAX_LAYERS}")
    return layers


def _epsilon(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise MsQuantError(
            f"{where}: rms_norm_eps is {value!r:.80}, expected a small positive number"
        )
    return float(value)


def _flag(rule: bool | str, raw: dict[str, Any], where: str) -> bool:
    if isinstance(rule, bool):
        return rule
    value = raw.get(rule)
    if value is not None and not isinstance(value, bool):
        raise MsQuantError(f"{where}: {rule} is {value!r:.80}, expected true or false")
    return bool(value)


def _dtype(raw: dict[str, Any], where: str) -> str:
    value = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if value not in ("bfloat16", "float16", "float32"):
        raise MsQuantError(
            f"{where}: dtype {value!r:.80} is not supported, expected bfloat16, float16 or float32"
        )
    return value


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise MsQuantError(f"{where}: eos_token_id is {value!r:.80}, expected an integer or a list")
    return tuple(ids)


def _rope_parameters(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary parameters from either place they are written in.

    transformers 5 writes one ``rope_parameters``; before, ``rope_theta`` stood beside an
    optional ``rope_scaling`` whose type key was ``type`` or ``rope_type``.
    """
    found = [
        _one_rope(key, raw, where) for key in ("rope_parameters", "rope_scaling") if raw.get(key)
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise MsQuantError(
            f"{where}: rope_parameters {raw['rope_parameters']!r:.80} and rope_scaling "
            f"{raw['rope_scaling']!r:.80} differ, expected one of them"
        )
    return found[0] if found else _one_rope("rope_parameters", raw, where)


def _one_rope(key: str, raw: dict[str, Any], where: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict) or any(isinstance(item, dict) for item in value.values()):
        raise MsQuantError(
            f"{where}: {key} is {value!r:.80}, expected one flat object for all the layers"
        )
    rope = dict(value)
    if "type" in rope:
        rope.setdefault("rope_type", rope["type"])
        del rope["type"]
    rope.setdefault("rope_type", "default")
    theta = raw.get("rope_theta")
    rope.setdefault("rope_theta", 10000.0 if theta is None else theta)
    if raw.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", raw["partial_rotary_factor"])
    if rope["rope_type"] in ("yarn", "llama3") and raw.get("original_max_position_embeddings"):
        # transformers prefers the value outside, too
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return rope
