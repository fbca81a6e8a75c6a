"""Trains the bundled mixtures of experts: a small Qwen3-MoE, and DeepSeek-V3 in miniature.

    python tools/train_small_moe.py deepseek_v3 --out models/stdlib-deepseek --steps 1500
    python tools/train_small_moe.py qwen3_moe --out models/stdlib-qwen3-moe --steps 1350

Text, tokenizer, split and schedule are those of models/stdlib-qwen3-6m. It needs torch, which
nothing that this project installs does, and safetensors and tokenizers.

Why not this project's Cells, which trained that model: MindSpore's CPU operators have no product of
sorted rows with the experts that they chose. A layer of 16 experts of 64 on 2,048 tokens of 128,
forward and backward, takes 0.83 CPU seconds with a loop over the experts, 0.12 compiled with every
token through every expert, and 0.025 here.

Checkpoints itself every 100 steps and goes on from there when started again, with another number
of steps too; what is left of the schedule then ends there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bundling import (
    VOCABULARY,
    WINDOW,
    learning_rate,
    token_stream,
    training_rows,
    write_json,
    write_settings,
)
from corpus import library_files, split
from muon import Muon
from small_moe import SMALL, CausalLM, SigmoidRouter, initialise
from small_moe_files import CONFIGS, load_weights, published, save_weights
from small_moe_measure import load_rows, measure
from tokenizers import Tokenizer
from torch import Tensor
from trigram import InterpolatedTrigram

DRAFT_WEIGHT, BIAS_SPEED, DECAY = 0.3, 0.005, 0.1
MUON = 2
"""So much larger is its learning rate than that of AdamW."""
MODELS = Path(__file__).resolve().parents[1] / "models"


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def losses(model: CausalLM, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the next token, of the MTP layer (of the token after it), and of the balance."""
    logits, state = model(rows[:, :WINDOW])
    main = cross_entropy(logits, rows[:, 1 : WINDOW + 1])
    draft, balance = main.new_zeros(()), main.new_zeros(())
    if model.drafts:
        draft = cross_entropy(model.draft(state, rows[:, 1 : WINDOW + 1]), rows[:, 2:])
    routers = model.routers().values()
    if coefficient := model.config.get("router_aux_loss_coef"):
        balance = coefficient * sum(router.balance for router in routers) / len(routers)
    return main, draft, balance


def optimizers_for(model: CausalLM) -> list[torch.optim.Optimizer]:
    """Muon for what multiplies hidden states, AdamW for tables, routers and norms."""
    tables, vectors, matrices = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif any(word in name for word in SMALL):
            tables.append(parameter)
        else:
            matrices.append(parameter)
    groups = [{"params": tables, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    return [adam, Muon(matrices, DECAY)]


class Replicas:
    """A model and another on the same weights, so that each of two cores has half of a batch.

    They meet once a step. Two threads inside each operation would meet thousands of times, which
    is slow as soon as something else runs on the machine.
    """

    def __init__(self, model: CausalLM, count: int):
        self.models = [model]
        for _ in range(1, count):
            other = CausalLM(model.config)
            other.load_state_dict(model.state_dict(), assign=True)
            self.models.append(other)
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, rows: Tensor) -> np.ndarray:
        """Puts the mean gradient into the model; mean losses of the main model and of MTP."""

        def part(model: CausalLM, rows: Tensor) -> list[float]:
            main, draft, balance = losses(model, rows)
            ((main + DRAFT_WEIGHT * draft + balance) / len(self.models)).backward()
            return [main.item(), draft.item()]

        found = list(self.pool.map(part, self.models, rows.chunk(len(self.models))))
        for model in self.models[1:]:
            for sum_of, parameter in zip(
                self.models[0].parameters(), model.parameters(), strict=True
            ):
                sum_of.grad += parameter.grad
                parameter.grad = None
        return np.mean(found, axis=0)

    def counts(self) -> dict[int, Tensor]:
        """Tokens of each expert of each layer in the last batch."""
        found = [model.routers() for model in self.models]
        return {i: sum(routers[i].counts for routers in found) for i in found[0]}


class Training:
    """A model, its optimizers, and how far they are; on disk from time to time."""

    def __init__(self, args: argparse.Namespace, file: Path):
        self.args, self.file = args, file
        self.model = CausalLM(CONFIGS[args.model])
        initialise(self.model, args.seed)
        self.optimizers = optimizers_for(self.model)
        self.step, self.seconds, self.shown = 0, 0.0, None
        if file.exists():
            state = torch.load(file)
            self.model.load_state_dict(state["model"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"going on from step {self.step}", file=sys.stderr)
        self.replicas = Replicas(self.model, args.threads)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        following = self.file.with_suffix(".next")
        torch.save(state, following)
        following.replace(self.file)

    def one_step(self, stream: np.ndarray) -> None:
        args = self.args
        rate = learning_rate(self.step, args.steps, args.learning_rate)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (MUON if isinstance(optimizer, Muon) else 1)
        rows = training_rows(stream, args.seed, self.step, args.batch, WINDOW + 2)
        now = self.replicas.backward(torch.from_numpy(rows).long())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        speed = learning_rate(self.step, args.steps, BIAS_SPEED, warmup=0)
        for i, counts in self.replicas.counts().items():
            router = self.model.routers()[i]
            if isinstance(router, SigmoidRouter):
                router.move_bias(counts, speed)
        self.shown = now if self.shown is None else 0.98 * self.shown + 0.02 * now
        self.step += 1

    def run(self, stream: np.ndarray) -> None:
        first, started, before = self.step, time.time(), self.seconds
        while self.step < self.args.steps:
            self.one_step(stream)
            self.seconds = before + time.time() - started
            last = self.step == self.args.steps
            if self.step % 25 == 0 or last:
                self.show((self.step - first) * self.args.batch * WINDOW / (time.time() - started))
            if self.step % 100 == 0 or last:
                self.save()

    def show(self, rate: float) -> None:
        loads = " ".join(f"{min(c)}-{max(c)}" for c in self.replicas.counts().values())
        main, draft = self.shown
        text = f"step {self.step} loss {main:.4f} draft {draft:.4f} {rate:.0f} tokens/s"
        print(f"{text} tokens per expert {loads}", file=sys.stderr, flush=True)


def finish(training: Training, streams: dict[str, np.ndarray], tokenizer: Tokenizer) -> None:
    """Writes the model's directory; its card states what the weights as stored do."""
    args, model, out = training.args, training.model, training.args.out
    save_weights(model, out / "model.safetensors")
    load_weights(model, out / "model.safetensors")
    write_settings(out, model.config, tokenizer)
    trigram = InterpolatedTrigram.fit(streams["train"], VOCABULARY)
    figures = measure(model, streams["heldout"])
    report = {
        "command": f"python tools/train_small_moe.py {args.model} --out models/{out.name}"
        f" --steps {args.steps}",
        "seed": args.seed,
        "steps": args.steps,
        "tokens_seen": args.steps * args.batch * WINDOW,
        "learning_rate": args.learning_rate,
        "training_minutes": round(training.seconds / 60),
        "train_tokens": len(streams["train"]),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "parameters": sum(tensor.numel() for tensor in published(model).values()),
        "trigram_perplexity": trigram.perplexity(
            streams["heldout"][: figures["heldout_tokens"] + 1]
        ),
        **figures,
    }
    write_json(out / "training.json", report)
    card = Path(__file__).with_name(f"{args.model}_card.md").read_text(encoding="utf-8")
    drafting = model.config["num_hidden_layers"]
    loads = load_rows(figures["tokens_per_expert"], drafting)
    size = (out / "model.safetensors").stat().st_size / 1e6
    (out / "README.md").write_text(card.format(**report, loads=loads, size=size), encoding="utf-8")
    print(json.dumps(report, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(CONFIGS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="where training state is kept")
    parser.add_argument("--threads", type=int, default=2, help="each takes its part of a batch")
    args = parser.parse_args()
    if args.batch % args.threads:
        parser.error(f"--batch is {args.batch}, expected a multiple of --threads ({args.threads})")
    out, work = args.out, args.work or args.out / "work"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)

    tokenizer = Tokenizer.from_file(str(MODELS / "stdlib-qwen3-6m" / "tokenizer.json"))
    parts = split(library_files())
    streams = {
        name: token_stream(tokenizer, [text for _, text in files]) for name, files in parts.items()
    }
    training = Training(args, work / "training_state.pt")
    training.run(streams["train"])

    finish(training, streams, tokenizer)


if __name__ == "__main__":
    main()
