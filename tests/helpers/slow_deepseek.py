"""What runtimes compute from a quantized DeepSeek checkpoint, by their loaders' rules.

Nothing of the package reads or computes anything here: files are parsed, rows are reordered and
tokens are routed in plain NumPy, float64, one token and one expert at a time where that is clearer.
The rules are those that docs/serving.md and the pages of the formats state.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

TYPES = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
BF16 = TYPES["BF16"]


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor, by the index."""
    indexes = list(directory.glob("*.index.json"))
    shards = (
        set(json.loads(indexes[0].read_text())["weight_map"].values())
        if indexes
        else {path.name for path in directory.glob("*.safetensors")}
    )
    found = {}
    for shard in sorted(shards):
        data = (directory / shard).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = (start + place for place in entry["data_offsets"])
                array = np.frombuffer(data[first:last], TYPES[entry["dtype"]])
                found[name] = array.reshape(entry["shape"])
    return found


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32).astype(np.float64)


def bf16(array: np.ndarray) -> np.ndarray:
    return wide(np.asarray(array, np.float32).astype(BF16))


def per_token(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)), scale


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Pairs of outputs, the even one in the low nibble."""
    rows = np.empty((2 * len(packed), packed.shape[1]))
    for i, row in enumerate(packed.astype(np.int64) & 255):
        for odd, half in enumerate((row & 15, row >> 4)):
            rows[2 * i + odd] = np.where(half > 7, half - 16, half)
    return rows


class SlowDeepSeek(ABC):
    """A decoder with latent attention and experts.

    Args:
        directory: the checkpoint.

    Attributes:
        config: of the model.
        tensors: as stored.
    """

    def __init__(self, directory: Path):
        self.config = json.loads((directory / "config.json").read_text())
        assert "quantization_config" not in self.config or self.compressed
        self.tensors = read_tensors(directory)

    compressed = False

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """Negative log likelihoods of all tokens of a window but the first."""
        x = wide(self.tensors["model.embed_tokens.weight"])[tokens]
        for index in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{index}."
            x = x + self.attention(prefix, x)
            x = x + self.mlp(prefix, self.norm(f"{prefix}post_attention_layernorm", x))
        head = wide(self.tensors["lm_head.weight"])
        logits = self.norm("model.norm", x) @ head.T
        top = logits.max(axis=1, keepdims=True)
        log = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        return -log[np.arange(len(tokens) - 1), tokens[1:]]

    def unit(self, x: np.ndarray, eps: float) -> np.ndarray:
        return x / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + eps)

    def norm(self, path: str, x: np.ndarray, eps: float | None = None) -> np.ndarray:
        eps = self.config.get("rms_norm_eps", 1e-6) if eps is None else eps
        return self.unit(x, eps) * wide(self.tensors[f"{path}.weight"])

    def attention(self, prefix: str, x: np.ndarray) -> np.ndarray:
        """Every runtime's attention: pairs are halves apart, whatever order files have."""
        c, path = self.config, f"{prefix}self_attn."
        heads, nope, rope, rank = (
            c[key]
            for key in (
                "num_attention_heads",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "kv_lora_rank",
            )
        )
        low, latent = self.down(path, f"{prefix}input_layernorm", x)
        q = self.up(path, low).reshape(len(x), heads, nope + rope)
        key = self.turned(latent[:, None, rank:])[:, 0]
        held = self.norm(f"{path}kv_a_layernorm", latent[:, :rank], 1e-6)
        made = wide(self.tensors[f"{path}kv_b_proj.weight"]).reshape(heads, -1, rank)
        brought = np.stack([q[:, head, :nope] @ made[head, :nope] for head in range(heads)])
        brought, held = self.in_latent_space(path, brought, held)
        q_rope, out = self.turned(q[:, :, nope:]), []
        for head in range(heads):
            v = held @ made[head, nope:].T
            scores = brought[head] @ held.T + q_rope[:, head] @ key.T
            scores = np.where(np.tri(len(x)) > 0, scores * self.scale, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        return self.linear(f"{path}o_proj", np.concatenate(out, axis=1))

    def in_latent_space(
        self, path: str, brought: np.ndarray, held: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What attention reads of queries (heads, tokens, rank) and latent vectors."""
        return brought, held

    @property
    def scale(self) -> float:
        c = self.config
        scale = (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]) ** -0.5
        rope = c.get("rope_scaling")
        return scale * (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2

    def turned(self, x: np.ndarray) -> np.ndarray:
        """Rotate-half rope of (tokens, heads, D), with YaRN."""
        c, size = self.config, x.shape[2]
        rope, theta = c["rope_scaling"], c["rope_theta"]

        def dim(turns: float) -> float:
            length = rope["original_max_position_embeddings"]
            return size * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

        first = max(math.floor(dim(rope["beta_fast"])), 0)
        last = min(math.ceil(dim(rope["beta_slow"])), size - 1)
        last = last + 0.001 if first == last else last
        turned = np.empty_like(x)
        for j in range(size // 2):
            ramp = min(max((j - first) / (last - first), 0), 1)
            f = theta ** (-2 * j / size)
            angle = np.arange(len(x))[:, None] * (f / rope["factor"] * ramp + f * (1 - ramp))
            a, b = x[:, :, j], x[:, :, j + size // 2]
            turned[:, :, j] = a * np.cos(angle) - b * np.sin(angle)
            turned[:, :, j + size // 2] = b * np.cos(angle) + a * np.sin(angle)
        return turned

    def mlp(self, prefix: str, x: np.ndarray) -> np.ndarray:
        if f"{prefix}mlp.gate.weight" not in self.tensors:
            return self.gated(f"{prefix}mlp.", x)
        c, y = self.config, self.gated(f"{prefix}mlp.shared_experts.", x)
        correction = self.tensors[f"{prefix}mlp.gate.e_score_correction_bias"]
        assert correction.dtype == np.float32
        scores = 1 / (1 + np.exp(-x @ wide(self.tensors[f"{prefix}mlp.gate.weight"]).T))
        chosen: dict[int, list[tuple[int, float]]] = {}
        for token, row in enumerate(scores):
            choice = row + wide(correction)
            groups = choice.reshape(c["n_group"], -1)
            best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[: c["topk_group"]]
            left = np.full_like(groups, -np.inf)
            left[best] = groups[best]
            experts = np.argsort(-left.reshape(-1))[: c["num_experts_per_tok"]]
            total = row[experts].sum() + 1e-20
            for expert in experts:
                weight = row[expert] / total * c["routed_scaling_factor"]
                chosen.setdefault(int(expert), []).append((token, weight))
        for expert, pairs in chosen.items():
            tokens = [token for token, _ in pairs]
            made = self.expert(f"{prefix}mlp.experts.", expert, x[tokens])
            y[tokens] += made * np.array([weight for _, weight in pairs])[:, None]
        return y

    def gated(self, path: str, x: np.ndarray) -> np.ndarray:
        gate = self.linear(f"{path}gate_proj", x)
        up = self.linear(f"{path}up_proj", x)
        return self.linear(f"{path}down_proj", gate / (1 + np.exp(-gate)) * up)

    def expert(self, path: str, index: int, x: np.ndarray) -> np.ndarray:
        return self.gated(f"{path}{index}.", x)

    def evens_first(self, name: str, array: np.ndarray) -> np.ndarray:
        """What the loaders of files in the order of Hugging Face do to rotary rows."""
        c = self.config
        rope = c["qk_rope_head_dim"]
        unit = c["qk_nope_head_dim"] if "q_b_proj" in name else c["kv_lora_rank"]
        rows = []
        for start in range(0, len(array), unit + rope):
            end = start + unit + rope
            rows += [*range(start, start + unit), *range(start + unit, end, 2)]
            rows += range(start + unit + 1, end, 2)
        return array[rows]

    def dynamic(self, path: str, x: np.ndarray) -> np.ndarray:
        """W8A8_DYNAMIC; scales are one for each row, whatever their shape."""
        codes, step = per_token(x)
        weight = self.tensors[f"{path}.weight"]
        assert weight.dtype == np.int8
        scale = wide(self.tensors[f"{path}.weight_scale"]).reshape(-1)
        return codes @ weight.astype(np.float64).T * step * scale

    @abstractmethod
    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        """A linear that has no norm of its own before it."""

    @abstractmethod
    def down(self, path: str, norm: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """q_a_proj and kv_a_proj_with_mqa behind a norm."""

    @abstractmethod
    def up(self, path: str, low: np.ndarray) -> np.ndarray:
        """q_b_proj behind its norm."""


class Float(SlowDeepSeek):
    """The float model; what attention reads in the latent space is kept by path."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def down(self, path: str, norm: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, name = self.norm(norm, x), f"{path}kv_a_proj_with_mqa"
        return self.linear(f"{path}q_a_proj", rows), self.turned_rows(name, rows)

    def up(self, path: str, low: np.ndarray) -> np.ndarray:
        return self.turned_rows(f"{path}q_b_proj", self.norm(f"{path}q_a_layernorm", low, 1e-6))

    def turned_rows(self, path: str, x: np.ndarray) -> np.ndarray:
        return self.evens_first(path, self.linear(path, x).T).T

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        return x @ wide(self.tensors[f"{path}.weight"]).T

    def in_latent_space(
        self, path: str, brought: np.ndarray, held: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        self.seen.setdefault(path, []).append((brought, held))
        return brought, held


class MindFormers(SlowDeepSeek):
    """golden-stick: rotary rows are used as they are stored; norms are divided by input scales.

    Args:
        directory: the checkpoint.
        fused: divide norms in bfloat16, as the fused attention does; else inputs, exactly.
    """

    def __init__(self, directory: Path, fused: bool = True):
        super().__init__(directory)
        names = [p for p in directory.glob("*.json") if "quantization_description" in str(p)]
        assert len(names) == 1
        self.description: dict[str, Any] = json.loads(names[0].read_text())
        self.fused = fused

    def kind(self, prefix: str) -> str:
        """The first entry whose name contains a layer's; none is an error."""
        return next(value for key, value in self.description.items() if prefix in key)

    def down(self, path: str, norm: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self.kind(f"{path}q_a_proj") == "W8A8"
        parts = [f"{path}kv_a_proj_with_mqa", f"{path}q_a_proj"]  # the order of the fused rows
        y = self.static(parts, self.quantized(parts, norm, x, 1e-6))
        rows = len(self.tensors[f"{parts[0]}.weight"])
        return y[:, rows:], y[:, :rows]

    def up(self, path: str, low: np.ndarray) -> np.ndarray:
        assert self.kind(f"{path}q_b_proj") == "W8A8"
        parts = [f"{path}q_b_proj"]
        return self.static(parts, self.quantized(parts, f"{path}q_a_layernorm", low, 1e-6))

    def quantized(self, parts: list[str], norm: str, x: np.ndarray, eps: float) -> np.ndarray:
        scale, offset = (self.tensors[f"{parts[-1]}.{n}"] for n in ("input_scale", "input_offset"))
        gain = self.tensors[f"{norm}.weight"]
        assert scale.dtype == gain.dtype == BF16 and offset.dtype == np.int8
        if self.fused:
            divided = bf16(gain.astype(np.float32) / scale.astype(np.float32))
            values = self.unit(x, eps) * divided
        else:
            values = self.unit(x, eps) * wide(gain) / wide(scale)
        return np.clip(np.rint(values + offset), -128, 127)

    def static(self, parts: list[str], codes: np.ndarray) -> np.ndarray:
        def both(suffix: str) -> np.ndarray:
            return np.concatenate([self.tensors[f"{part}.{suffix}"] for part in parts])

        weight, scale = both("weight"), both("deq_scale")
        assert (weight.dtype, scale.dtype) == (np.int8, np.float32)
        return (codes @ weight.astype(np.float64).T + both("quant_bias")) * scale

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        if self.kind(path) == "W8A8_DYNAMIC":
            assert self.tensors[f"{path}.weight_scale"].dtype == BF16
            return self.dynamic(path, x)
        assert self.kind(path) == "W8A8"
        scale, offset = (self.tensors[f"{path}.{n}"] for n in ("input_scale", "input_offset"))
        assert scale.shape == offset.shape == (x.shape[1],)
        return self.static([path], np.clip(np.rint(x / wide(scale) + offset), -128, 127))

    def expert(self, path: str, index: int, x: np.ndarray) -> np.ndarray:
        kind = self.kind(path)  # of the first expert, for all
        if kind == "W8A8_DYNAMIC":
            return self.gated(f"{path}{index}.", x)
        assert kind == "W4A8_DYNAMIC" and self.description["group_size"] > 0
        gate, up = (self.grouped(f"{path}{index}.{n}_proj", x) for n in ("gate", "up"))
        return self.grouped(f"{path}{index}.down_proj", gate / (1 + np.exp(-gate)) * up)

    def grouped(self, path: str, x: np.ndarray) -> np.ndarray:
        bits, size = self.tensors[f"{path}.weight_scale"], self.description["group_size"]
        assert bits.dtype == np.uint64 and bits.max() < 2**32
        scale = wide(bits.astype(np.uint32).view(np.float32))
        codes, step = per_token(x)
        weight, y = nibbles(self.tensors[f"{path}.weight"]), 0
        for group in range(scale.shape[1]):
            columns = slice(group * size, group * size + size)
            y = y + codes[:, columns] @ weight[:, columns].T * scale[:, group]
        return y * step


class VllmAscend(SlowDeepSeek):
    """ascend: rotary rows come in the order of Hugging Face, the loader reorders them."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        path = directory / "quant_model_description.json"
        self.description: dict[str, Any] = json.loads(path.read_text())
        assert set(self.tensors) <= set(self.description)

    def in_latent_space(
        self, path: str, brought: np.ndarray, held: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """In int8 where the layer has scales; latent vectors have one code for both uses."""
        if f"{path}fa_k.scale" not in self.description:
            return brought, held
        assert self.description["fa_quant_type"] == "FAKQuant"
        assert not any(self.tensors[f"{path}fa_{name}.offset"].any() for name in "qkv")
        q, k = (wide(self.tensors[f"{path}fa_{name}.scale"]) for name in "qk")
        assert q.shape == (len(brought), 1) and k.shape == (1, 1)
        q = q[:, :, None]
        codes = (np.clip(np.rint(x / s), -128, 127) for x, s in ((brought, q), (held, k)))
        return next(codes) * q, next(codes) * k

    def kind(self, *paths: str) -> str:
        """All parts of a fused layer must be of one type."""
        kinds = {self.description[f"{path}.weight"] for path in paths}
        assert len(kinds) == 1
        return kinds.pop()

    def down(self, path: str, norm: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, parts = self.norm(norm, x), [f"{path}q_a_proj", f"{path}kv_a_proj_with_mqa"]
        assert self.kind(*parts) == "W8A8"
        assert len({self.tensors[f"{part}.input_scale"].tobytes() for part in parts}) == 1
        low, latent = (self.linear(part, rows) for part in parts)
        return low, self.evens_first(parts[1], latent.T).T

    def up(self, path: str, low: np.ndarray) -> np.ndarray:
        rows = self.norm(f"{path}q_a_layernorm", low, 1e-6)
        return self.evens_first("q_b_proj", self.linear(f"{path}q_b_proj", rows).T).T

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        if self.kind(path) == "W8A8_DYNAMIC":
            assert not self.tensors[f"{path}.weight_offset"].any()
            return self.dynamic(path, x)
        assert self.kind(path) == "W8A8"
        get = {
            suffix: self.tensors[f"{path}.{suffix}"]
            for suffix in ("weight", "input_scale", "input_offset", "quant_bias", "deq_scale")
        }
        reciprocal = bf16(1 / bf16(get["input_scale"]))
        codes = np.clip(np.rint(x * reciprocal + wide(get["input_offset"])), -128, 127)
        total = codes @ get["weight"].astype(np.float64).T + get["quant_bias"]
        return total * wide(get["deq_scale"])

    def expert(self, path: str, index: int, x: np.ndarray) -> np.ndarray:
        first = (f"{path}0.{name}_proj" for name in ("gate", "up", "down"))
        if self.kind(*first) == "W8A8_DYNAMIC":
            return self.gated(f"{path}{index}.", x)
        assert self.description["group_size"] == 0
        gate, up = (self.packed(f"{path}{index}.{n}_proj", x, 1) for n in ("gate", "up"))
        gated = gate / (1 + np.exp(-gate)) * up
        return self.packed(f"{path}{index}.down_proj", gated, 16)

    def packed(self, path: str, x: np.ndarray, slices: int) -> np.ndarray:
        """Inputs in nibbles, 16 * high + (low - 8) + 8: the kernel adds the last by scale_bias."""
        codes, step = per_token(x)
        weight, scale = (
            nibbles(self.tensors[f"{path}.weight"]),
            self.tensors[f"{path}.weight_scale"],
        )
        added = self.tensors[f"{path}.scale_bias"]
        assert added.shape == (len(weight), slices) and added.dtype == np.float32
        high = np.floor(codes / 16)
        low = codes - 16 * high - 8
        return ((16 * high + low) @ weight.T * wide(scale)[:, 0] + added.sum(axis=1)) * step


class Vllm(SlowDeepSeek):
    """compressed-tensors: config groups by exact names, the scheme of expert 0 for all."""

    compressed = True

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.entry = self.config["quantization_config"]
        assert self.entry["quant_method"] == "compressed-tensors"

    def scheme(self, path: str) -> dict[str, Any] | None:
        if path in self.entry["ignore"]:
            return None
        groups = self.entry["config_groups"].values()
        return next(g for g in groups if path in g["targets"] or g["targets"] == ["Linear"])

    def down(self, path: str, norm: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, parts = self.norm(norm, x), [f"{path}q_a_proj", f"{path}kv_a_proj_with_mqa"]
        assert self.scheme(parts[0]) == self.scheme(parts[1])
        assert self.scheme(f"{path}kv_b_proj") is None
        low, latent = (self.linear(part, rows) for part in parts)
        return low, self.evens_first(parts[1], latent.T).T

    def up(self, path: str, low: np.ndarray) -> np.ndarray:
        rows = self.norm(f"{path}q_a_layernorm", low, 1e-6)
        return self.evens_first("q_b_proj", self.linear(f"{path}q_b_proj", rows).T).T

    def linear(self, path: str, x: np.ndarray, scheme: dict[str, Any] | None = None) -> np.ndarray:
        scheme = scheme or self.scheme(path)
        assert scheme is not None
        if scheme["format"] == "int-quantized":
            return self.dynamic(path, x)
        assert scheme["format"] == "pack-quantized" and scheme["input_activations"] is None
        rows, columns = self.tensors[f"{path}.weight_shape"].tolist()
        words = self.tensors[f"{path}.weight_packed"].view(np.uint32)
        scale, weight = wide(self.tensors[f"{path}.weight_scale"]), np.empty((rows, columns))
        for column in range(columns):
            code = words[:, column // 8] >> np.uint32(4 * (column % 8)) & np.uint32(15)
            size = scheme["weights"]["group_size"]
            weight[:, column] = (code.astype(np.int64) - 8) * scale[:, column // size]
        return x @ weight.T

    def expert(self, path: str, index: int, x: np.ndarray) -> np.ndarray:
        first = [self.scheme(f"{path}0.{name}_proj") for name in ("gate", "up", "down")]
        assert first[0] == first[1] == first[2] is not None
        gate, up = (self.linear(f"{path}{index}.{n}_proj", x, first[0]) for n in ("gate", "up"))
        gated = gate / (1 + np.exp(-gate)) * up
        return self.linear(f"{path}{index}.down_proj", gated, first[0])
