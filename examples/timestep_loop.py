"""A diffusion model's denoising loop with W8A8_TIMESTEP: an input range for each timestep.

    python examples/timestep_loop.py

The first steps, whose inputs change the most, quantize each token by itself; the others have static
ranges, one for each step. Names and calls are those of MindIE-SD.
"""

from __future__ import annotations

from collections.abc import Iterator

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

import ms_quant
from ms_quant import TimestepManager, TimestepPolicyConfig

STEPS = 6


def build() -> nn.Cell:
    """A denoiser with the same values each time."""
    ms.set_seed(0)
    return nn.SequentialCell(nn.Dense(32, 64), nn.GELU(), nn.Dense(64, 32))


def denoise(denoiser: nn.Cell, latent: Tensor) -> Iterator[Tensor]:
    """The loop: each step's input, before the denoiser sees it."""
    for index in range(STEPS):
        TimestepManager.set_timestep_idx(index)
        yield latent
        latent = latent - 0.3 * denoiser(latent)
    TimestepManager.set_timestep_idx(None)


def show(what: str, done: int, of: int) -> None:
    """How far a long calibration is."""
    print(f"\r{what} {done}/{of or '?'}", end="\n" if done == of else "", flush=True)


def main() -> None:
    """Calibrates the loop, and runs it quantized."""
    ms.runtime.launch_blocking()  # on a CPU many times faster
    latent = Tensor(np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32))
    policy = TimestepPolicyConfig("static")
    policy.register(range(2), "dynamic", "w8a8_static_linear")
    quantized = ms_quant.quantize(
        build(),
        "W8A8_TIMESTEP",
        calibration=denoise(build(), latent),
        timestep_policy=policy,
        progress=show,
    )
    print(ms_quant.summary(quantized))
    *_, exact = denoise(build(), latent)
    *_, found = denoise(quantized, latent)
    apart = np.linalg.norm((found - exact).asnumpy()) / np.linalg.norm(exact.asnumpy())
    print(f"after {STEPS} steps the latents are {apart:.4f} apart")


if __name__ == "__main__":
    main()
