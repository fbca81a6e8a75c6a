"""Trains the bundled model: a small Qwen3-architecture code model, on the standard library.

    python tools/train_bundled_model.py --out models/stdlib-qwen3-6m [--steps 3600 --seed 0]

Writes a Hugging Face directory (config.json, tokenizer.json, model.safetensors in bf16) with
``training.json`` and the model card, and the calibration and held-out texts into ``text`` beside
it. Checkpoints itself every few hundred steps and goes on from there when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import mindspore as ms
import ml_dtypes
import numpy as np
from bundling import (
    END,
    VOCABULARY,
    WINDOW,
    learning_rate,
    token_stream,
    training_rows,
    write_json,
    write_settings,
)
from corpus import library_files, split
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from trigram import InterpolatedTrigram

from ms_quant.cells.decoder import CausalLM, causal_mask, rope_tensors
from ms_quant.models.config import parse_config

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 1024,
    "max_window_layers": 3,
    "model_type": "qwen3",
    "num_attention_heads": 12,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}


def write_texts(directory: Path, parts: dict[str, list[tuple[str, str]]]) -> None:
    """The texts beside the model, the names of their files, and their licence."""
    directory.mkdir(exist_ok=True)
    for name in ("calibration", "heldout"):
        text = "".join(text for _, text in parts[name])
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
        (directory / f"{name}.files.txt").write_text("".join(f"{p}\n" for p, _ in parts[name]))
    shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", directory / "LICENSE.txt")


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def initialise(model: CausalLM, rng: np.random.Generator) -> None:
    for name, parameter in model.parameters_and_names():
        if parameter.ndim < 2:
            continue
        std = 0.02 if "embed" in name or "lm_head" in name else 1 / math.sqrt(parameter.shape[1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * CONFIG["num_hidden_layers"])
        parameter.set_data(Tensor(rng.normal(0, std, parameter.shape).astype(np.float32)))


class Loss(nn.Cell):
    """Mean cross entropy of the next token."""

    def __init__(self, model: CausalLM):
        super().__init__()
        self.model = model
        self.cos, self.sin = rope_tensors(model.config, 0, WINDOW)
        self.mask = causal_mask(WINDOW)
        self.cross_entropy = ops.SparseSoftmaxCrossEntropyWithLogits()

    def construct(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(ids, self.cos, self.sin, self.mask)
        return self.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1))


def window_losses(model: CausalLM, stream: np.ndarray) -> np.ndarray:
    """Loss of every token of non-overlapping windows, shape (windows, WINDOW)."""
    count = (len(stream) - 1) // WINDOW
    ids = stream[: count * WINDOW].reshape(count, WINDOW)
    targets = stream[1 : count * WINDOW + 1].reshape(count, WINDOW)
    cos, sin = rope_tensors(model.config, 0, WINDOW)
    mask = causal_mask(WINDOW)
    losses = []
    for i in range(0, count, 16):
        logits = model(Tensor(ids[i : i + 16]), cos, sin, mask).asnumpy().astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        normaliser = np.log(np.exp(logits).sum(-1))
        chosen = np.take_along_axis(logits, targets[i : i + 16, :, None], -1)[..., 0]
        losses.append(normaliser - chosen)
    return np.concatenate(losses)


def train(args: argparse.Namespace, model: CausalLM, stream: np.ndarray, work: Path) -> None:
    parameters = list(model.trainable_params())
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    rates = [learning_rate(s, args.steps, args.learning_rate) for s in range(args.steps)]
    optimizer = nn.AdamWeightDecay(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": plain, "weight_decay": 0.0},
            {"order_params": parameters},
        ],
        learning_rate=Tensor(np.array(rates, np.float32)),
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
    )
    loss_cell = Loss(model)
    gradient = ms.value_and_grad(loss_cell, None, optimizer.parameters)

    @ms.jit
    def step_function(ids, targets):
        loss, gradients = gradient(ids, targets)
        gradients = ops.clip_by_global_norm(gradients, 1.0)
        return ops.depend(loss, optimizer(gradients))

    state_file = work / "training_state.ckpt"
    first = 0
    if state_file.exists():
        state = ms.load_checkpoint(str(state_file))
        first = int(state.pop("step").asnumpy())
        ms.load_param_into_net(model, state)
        ms.load_param_into_net(optimizer, state)
        print(f"going on from step {first}", file=sys.stderr)
    started, running = time.time(), None
    for step in range(first, args.steps):
        rows = training_rows(stream, args.seed, step, args.batch, WINDOW + 1)
        loss = float(step_function(Tensor(rows[:, :-1]), Tensor(rows[:, 1:])).asnumpy())
        running = loss if running is None else 0.98 * running + 0.02 * loss
        if step % 50 == 0 or step + 1 == args.steps:
            rate = (step - first + 1) * args.batch * WINDOW / (time.time() - started)
            shown = f"step {step} loss {running:.4f} {rate:.0f} tokens/s"
            print(shown, file=sys.stderr, flush=True)
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            keep = {p.name: p for p in [*parameters, *optimizer.get_parameters()]}
            data = [{"name": n, "data": Tensor(p.asnumpy())} for n, p in keep.items()]
            data.append({"name": "step", "data": Tensor(step + 1)})
            ms.save_checkpoint(data, str(work / "next.ckpt"))
            (work / "next.ckpt").replace(state_file)


def write_model(out: Path, model: CausalLM, tokenizer: Tokenizer) -> None:
    tensors = {
        name: p.asnumpy().astype(ml_dtypes.bfloat16) for name, p in model.parameters_and_names()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    write_settings(out, CONFIG, tokenizer)


def measure(out: Path, model: CausalLM, train_ids: np.ndarray, held_ids: np.ndarray) -> dict:
    """What the model card states, measured on the bf16 weights as written."""
    for name, tensor in load_file(out / "model.safetensors").items():
        dict(model.parameters_and_names())[name].set_data(Tensor(tensor.astype(np.float32)))
    losses = window_losses(model, held_ids)
    trigram = InterpolatedTrigram.fit(train_ids, VOCABULARY)
    count = losses.size
    return {
        "heldout_tokens": int(count),
        "heldout_perplexity": float(np.exp(losses.mean())),
        "trigram_perplexity": trigram.perplexity(held_ids[: count + 1]),
        "loss_positions_0_31": float(losses[:, :32].mean()),
        "loss_positions_128_255": float(losses[:, 128:].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="where training state is kept")
    args = parser.parse_args()
    out, work = args.out, args.work or args.out / "work"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)

    parts = split(library_files())
    texts = {name: [text for _, text in files] for name, files in parts.items()}
    if (out / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(texts["train"])
        tokenizer.save(str(out / "tokenizer.json"))
    streams = {name: token_stream(tokenizer, value) for name, value in texts.items()}
    for name, stream in streams.items():
        print(name, len(parts[name]), "files", len(stream), "tokens", file=sys.stderr)

    ms.set_seed(args.seed)
    model = CausalLM(parse_config(CONFIG))
    initialise(model, np.random.default_rng(args.seed))
    train(args, model, streams["train"], work)
    write_model(out, model, tokenizer)
    write_texts(out.parent / "text", parts)
    report = {
        "command": " ".join(["python", "tools/train_bundled_model.py", *sys.argv[1:]]),
        "seed": args.seed,
        "steps": args.steps,
        "tokens_seen": args.steps * args.batch * WINDOW,
        "learning_rate": args.learning_rate,
        "train_tokens": len(streams["train"]),
        "python": sys.version.split()[0],
        "mindspore": ms.__version__,
        **measure(out, model, streams["train"], streams["heldout"]),
    }
    write_json(out / "training.json", report)
    card = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(card.format(**report), encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
