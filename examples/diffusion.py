"""A video diffusion transformer with quantized and sparse attention and quantized linears.

    python examples/diffusion.py [--out DIRECTORY] [--clips 2] [--steps 20] [--only NAME ...]

Samples the same clips, from the same noise, with each way of computing; prints how far they are
from those of the float network, and writes a picture: eight frames of a clip, a row for each way.

psnr, cosine and l2 compare clips; v .9, v .5 and v .2 are relative errors of the velocity at these
times on held-out clips. Density is the share of query-key pairs that was computed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from moving_shapes import FRAMES, GRID, SIDE, TEXT, TOKENS, noise, to_videos, words
from PIL import Image, ImageDraw
from video_dit import STEPS, VideoDiT, attach, load, sample, trajectory
from video_measures import cosine, psnr, relative_l2, velocities

import ms_quant
from ms_quant import TimestepPolicyConfig
from ms_quant.attention.dense import attention as dense_attention
from ms_quant.attention.fa_quant import fa_quant
from ms_quant.attention.grid import TokenGrid
from ms_quant.attention.rotation import walsh_rotation
from ms_quant.attention.rules import SparseRule, make_mask
from ms_quant.attention.schedule import StepWindow
from ms_quant.attention.sparse import attend

PROMPTS = (
    "disk yellow square blue",
    "square red disk white",
    "disk magenta square green",
    "square black disk cyan",
)
CALIBRATION = ("square white disk red", "disk green disk blue", "square cyan square yellow")
INSIDE = ["blocks.*.attn.*", "blocks.*.ffn.*"]
"""The linears that see every token; the others see the time, or are the first and the last."""
BLOCK = (16, 16)
"""Of 516 tokens what 128 is of 4,128."""
SEQUENCE = TokenGrid.of(GRID, TEXT + TOKENS, TEXT)
FIRST = 15 / 40
"""The share of steps that are dense at first: MindIE-SD's launchers begin at step 15 of 40."""


@dataclass
class Attention:
    """Quantized, sparse or dense attention for every block of a network.

    Attributes:
        kind: of quantized operands; None for float.
        rule: which pairs are computed; None for all.
        window: the steps that are quantized or sparse; the others are dense and float.
        seconds: CPU time of all calls, masks with it.
        densities: share of pairs that each call computed.
    """

    kind: str | None = None
    rule: SparseRule | None = None
    window: StepWindow = field(default_factory=StepWindow)
    seconds: float = 0.0
    densities: list[float] = field(default_factory=list)

    def __call__(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: int, step: int
    ) -> np.ndarray:
        started = time.process_time()
        out, density = self._compute(q, k, v, step)
        self.seconds += time.process_time() - started
        self.densities.append(density)
        return out

    def _compute(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, step: int
    ) -> tuple[np.ndarray, float]:
        if step not in self.window or (self.kind is None and self.rule is None):
            return dense_attention(q, k, v), 1.0
        if self.kind is not None:
            turn = walsh_rotation(q.shape[-1])
            return fa_quant(q, k, v, turn, turn, kind=self.kind), 1.0
        mask = make_mask(self.rule, q, k, SEQUENCE)
        return attend(q, k, v, mask), float(mask.density().mean())


def at_density(rule: SparseRule, density: float, network: VideoDiT) -> SparseRule:
    """A rule with the sparsity at which it computes this share of the pairs, on one call."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def look(q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: int, step: int) -> np.ndarray:
        seen.append((q, k))
        return dense_attention(q, k, v)

    attach(network, look)
    velocities(network, 1, times=(0.5,))
    low, high, tried = 0.0, 1.0, {}
    while high - low > 0.005:  # of a rule that leaves heads dense, the nearest that was tried
        middle = (low + high) / 2
        new = replace(rule, sparsity=middle)
        found = np.mean([make_mask(new, q, k, SEQUENCE).density().mean() for q, k in seen])
        tried[abs(found - density)] = new
        low, high = (middle, high) if found > density else (low, middle)
    return tried[min(tried)]


def calibration(steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A sampling loop of the float network with other prompts and other noise."""
    prompts = np.stack([words(prompt) for prompt in CALIBRATION])
    return islice(trajectory(load(), noise(len(prompts), 1), prompts, steps), steps)


def quantized(scheme: str, steps: int, policy: TimestepPolicyConfig | None = None) -> nn.Cell:
    """The network with the linears of its blocks in a scheme."""
    needs_data = ms_quant.SCHEMES[scheme].needs_calibration
    return ms_quant.quantize(
        load(),
        scheme,
        include=INSIDE,
        calibration=calibration(steps) if needs_data else None,
        timestep_policy=policy,
    )


def first_steps_dynamic(steps: int) -> TimestepPolicyConfig:
    """Static inputs, but for the first tenth of the steps, whose noise differs the most."""
    policy = TimestepPolicyConfig("static")
    policy.register(range(max(1, steps // 10)), "dynamic", "w8a8_static_linear")
    return policy


@dataclass(frozen=True)
class Way:
    """A way of computing: an attention, or linears in a scheme.

    Attributes:
        density: the share of pairs in sparse steps.
        first: the share of steps, at first, whose attention is dense and float.
        by_step: whether the first steps' inputs are quantized token by token.
    """

    attention: Attention = field(default_factory=Attention)
    density: float | None = None
    first: float = 0.0
    scheme: str | None = None
    by_step: bool = False

    def network(self, steps: int) -> tuple[VideoDiT, Attention]:
        """A network that computes so, and the attention that its blocks call."""
        window = StepWindow(start=round(self.first * steps))
        attention = replace(self.attention, window=window, densities=[])
        if self.density is not None:
            attention.rule = at_density(attention.rule, self.density, load())
        policy = first_steps_dynamic(steps) if self.by_step else None
        network = load() if self.scheme is None else quantized(self.scheme, steps, policy)
        attach(network, attention)
        return network, attention


def sparse(kind: str, first: float = 0.0, **options: Any) -> Way:
    """Sparse attention that computes half of the pairs."""
    return Way(Attention(rule=SparseRule(kind, block_shape=BLOCK, **options)), 0.5, first)


WAYS = {
    "float": Way(),
    "FP8": Way(Attention("FP8_DYNAMIC")),
    "MXFP8": Way(Attention("MXFP8_DYNAMIC")),
    "MXFP4": Way(Attention("MXFP4_DYNAMIC")),
    "mix": Way(Attention("MIX")),
    "RainFusion 1, arm2": sparse("rf_v1", mode="arm2"),
    "RainFusion 1, arm3": sparse("rf_v1", mode="arm3"),
    "RainFusion 1, best": sparse("rf_v1", mode="best"),
    "RainFusion 2": sparse("rf_v2"),
    "RainFusion 3, no first frame": sparse("rf_v3", protect_first_frame=False),
    "time blocks": sparse("time_blocks", protect_first_frame=False),
    "time blocks, first frame": sparse("time_blocks"),
    "FP8 after first steps": Way(Attention("FP8_DYNAMIC"), first=FIRST),
    "RainFusion 2 after first": sparse("rf_v2", FIRST),
    "RainFusion 3 after first": sparse("rf_v3", FIRST, protect_first_frame=False),
    "time blocks after first": sparse("time_blocks", FIRST, protect_first_frame=False),
    "W8A8": Way(scheme="W8A8"),
    "W8A8_TIMESTEP": Way(scheme="W8A8_TIMESTEP", by_step=True),
    "W4A4_MXFP4": Way(scheme="W4A4_MXFP4"),
    "W4A4_MXFP4_SVD": Way(scheme="W4A4_MXFP4_SVD"),
}


@dataclass(frozen=True)
class Measured:
    """What one way of computing gave."""

    clips: np.ndarray
    velocities: list[np.ndarray]
    density: float
    seconds: float


def measure(way: Way, count: int, steps: int) -> Measured:
    """Samples clips and asks for velocities."""
    network, attention = way.network(steps)
    prompts = np.stack([words(PROMPTS[i % len(PROMPTS)]) for i in range(count)])
    clips = sample(network, noise(count, 0), prompts, steps)
    density, seconds = float(np.mean(attention.densities)), attention.seconds
    return Measured(clips, velocities(network, steps=steps), density, seconds)


def row(name: str, found: Measured, exact: Measured) -> str:
    """A line of the table."""
    pairs = zip(found.velocities, exact.velocities, strict=True)
    errors = " ".join(f"{relative_l2(a, b):6.4f}" for a, b in pairs)
    return (
        f"{name:28} {psnr(found.clips, exact.clips):5.1f} {cosine(found.clips, exact.clips):7.4f} "
        f"{relative_l2(found.clips, exact.clips):7.4f} {errors} {found.density:8.3f} "
        f"{found.seconds:11.2f}"
    )


def strip(found: dict[str, np.ndarray], scale: int = 5) -> Image.Image:
    """The frames of the first clip of each way, a row for each."""
    margin, side = 190, scale * SIDE + 4
    picture = Image.new("RGB", (margin + FRAMES * side, len(found) * side), "white")
    draw = ImageDraw.Draw(picture)
    for line, (name, tokens) in enumerate(found.items()):
        draw.text((6, line * side + side // 2 - 6), name, fill="black")
        levels = np.clip((to_videos(tokens[:1])[0] + 1.8) / 3.6 * 255, 0, 255).astype(np.uint8)
        large = levels.repeat(scale, axis=1).repeat(scale, axis=2)
        for number, frame in enumerate(large):
            picture.paste(Image.fromarray(frame), (margin + number * side, line * side + 2))
    return picture


def main() -> None:
    """Prints the table and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", choices=list(WAYS)[1:], default=list(WAYS)[1:])
    args = parser.parse_args()
    ms.runtime.launch_blocking()  # on a CPU many times faster
    exact = measure(WAYS["float"], args.clips, args.steps)
    print(f"{'':28}  psnr  cosine      l2   v .9   v .5   v .2  density attention s")
    print(row("float", exact, exact))
    found = {"float": exact.clips}
    for name in args.only:
        measured = measure(WAYS[name], args.clips, args.steps)
        found[name] = measured.clips
        print(row(name, measured, exact), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    strip(found).save(args.out / "diffusion.png")
    print(args.out / "diffusion.png")


if __name__ == "__main__":
    main()
