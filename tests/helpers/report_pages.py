"""Facts of checkpoints that are only talked about: large ones, and ones with hostile names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ms_quant.numerics.linear import QuantizedLinear, quantize_linear
from ms_quant.report.records import Facts, FloatWeights, Group

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "';document.title='owned';//",
    "{{7*7}}${7*7}<!--<script>",
    "</title></style></select></table>&lt;b&gt;",
    "javascript:document.title='owned'",
    "\u202egnp.exe\u0000\x1b[31m",
)


def large_facts(
    blocks: int = 144, kinds: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
) -> Facts:
    """Every entry that a page shows, for as many blocks; the last kind of block 5 is bad."""
    rng, groups = np.random.default_rng(0), []
    for block in range(blocks):
        for kind in kinds:
            path = f"model.layers.{block}.{kind}"
            bad = block == 5 and kind == kinds[-1]
            largest = float(np.exp(rng.normal(2, 1)))
            groups.append(
                Group(
                    path=path,
                    block=block,
                    kind=kind,
                    scheme="W8A8",
                    algorithm="osl",
                    weights=1 << 24,
                    bytes=17 << 20,
                    error=0.31 if bad else float(np.exp(rng.normal(-7, 0.5))),
                    worst=path,
                    chosen={"alpha": 0.5, "loss": 1e-5},
                    input={
                        "before": [40 * largest, largest],
                        "after": [2.0, 1.0],
                        "outliers": 1,
                        "channels": [[7, 40 * largest, 2.0]],
                    },
                    first=f"{path}_proj",
                )
            )
    tokens = {f"block {k}": rng.integers(0, 900, 128).tolist() for k in range(blocks)}
    routing = {
        key: {"tokens": 8192, "least": min(t), "mean": float(np.mean(t)), "most": max(t),
              "none": [], "seen_on_others": []}
        for key, t in tokens.items()
    }  # fmt: skip
    record = {
        "record": {"scheme": "W8A8", "algorithm": "osl", "calibration": {"samples": 64}},
        "routing": routing,
        "measured": {key: {"expert_tokens": found} for key, found in tokens.items()},
    }
    return Facts(
        place=Path("Large-W8A8"),
        format="ascend W8A8",
        model=f"qwen3_moe, {blocks} blocks",
        groups=groups,
        record=record,
        output_bytes=10 << 30,
        float_bytes=1 << 30,
        source_bytes=19 << 30,
        cache="C8",
        blocks=blocks,
        stored=lambda path: small_linear(),
        linears={group.path: [group.first] for group in groups},
    )


def small_linear() -> QuantizedLinear:
    weight = np.random.default_rng(1).normal(size=(64, 128)).astype(np.float32)
    return quantize_linear(weight, None, None, np.dtype(np.float32))


def hostile_facts() -> tuple[Facts, FloatWeights, dict[str, object]]:
    """Facts whose every name is hostile, the float model of them, and results of tasks."""
    groups = [
        Group(
            path=f"model.layers.{k}.{name}",
            block=k,
            kind=name,
            scheme=name,
            algorithm=name,
            weights=100,
            bytes=100,
            error=0.2,
            worst=name,
            chosen={name: name},
            input={"before": [900.0, 1.0], "outliers": 1, "channels": [[name, 900.0, None]]},
            first=name,
        )
        for k, name in enumerate(HOSTILE)
    ]
    record = {
        "record": {"scheme": HOSTILE[0], "algorithm": HOSTILE[1], "exclude": list(HOSTILE),
                   "calibration": {name: name for name in HOSTILE}},
        "routing": {name: {"least": 1, "mean": 1, "most": 1} for name in HOSTILE},
        "measured": {name: {"groups": {name: {}}} for name in HOSTILE},
    }  # fmt: skip
    facts = Facts(
        place=Path(HOSTILE[1].replace("/", "")),
        format=HOSTILE[0],
        model=HOSTILE[2],
        groups=groups,
        record=record,
        output_bytes=100,
        source_bytes=200,
        cache=HOSTILE[3],
        blocks=len(HOSTILE),
        stored=lambda path: small_linear(),
        linears={group.path: [group.first] for group in groups},
    )
    weights = FloatWeights(
        Path(HOSTILE[4].replace("/", "")), 200, lambda path: np.ones((4, 4), np.float32), False
    )
    subjects = {name: {"value": 0.5, "error": 0.1, "questions": 4} for name in HOSTILE}
    results = {
        "checkpoint": HOSTILE[0],
        "perplexity": 9.0,
        "perplexity_increase": 0.01,
        "verdict": HOSTILE[1],
        "tasks": [{"task": name, "accuracy": 0.5, "subjects": subjects} for name in HOSTILE],
        "attention": [{"path": name, "attention": name, "reason": name} for name in HOSTILE],
    }
    return facts, weights, results
