"""MindSpore-native quantization for Ascend, on any machine.

The public names are imported when they are first used: those of networks (``quantize``,
``calibrate``, ``Observations``, ``summary``, ``save_quantized``, ``load_quantized``,
``QuantLinear``, and those that attach attention) need MindSpore, the others do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ms_quant.algorithms import ALGORITHMS
    from ms_quant.analysis.records import Sensitivity
    from ms_quant.analysis.run import analyze
    from ms_quant.attention.functions import (
        arm,
        block_mask,
        fa_block_quant,
        fa_quant,
        sparse_attention,
    )
    from ms_quant.cells import (
        Observations,
        QuantLinear,
        calibrate,
        load_quantized,
        quantize,
        save_quantized,
        summary,
    )
    from ms_quant.cells.diffusion import (
        AttentionPlan,
        DiffusionAttention,
        analyze_attention,
        attach_attention,
        attention_sites,
        attention_summary,
        detach_attention,
    )
    from ms_quant.diffusers.pipeline import quantize_pipeline
    from ms_quant.errors import (
        BadArgumentError,
        BadFileError,
        DiskError,
        JobConflictError,
        MsQuantError,
        UnsupportedError,
    )
    from ms_quant.evaluation.comparison import compare
    from ms_quant.evaluation.generation import generate
    from ms_quant.evaluation.perplexity import perplexity
    from ms_quant.formats.opening import open_model
    from ms_quant.mixed_precision.run import quantize_mixed
    from ms_quant.pipeline.convert import convert_checkpoint
    from ms_quant.pipeline.quantize import quantize_checkpoint
    from ms_quant.recipe import Recipe, from_ptq_config, load_recipe
    from ms_quant.schemes.table import SCHEMES
    from ms_quant.tasks.run import evaluate_task
    from ms_quant.timestep import TimestepManager, TimestepPolicyConfig
    from ms_quant.verify.checkpoint import verify_checkpoint

__version__ = "0.1.0"

__all__ = [
    "ALGORITHMS",
    "SCHEMES",
    "AttentionPlan",
    "BadArgumentError",
    "BadFileError",
    "DiffusionAttention",
    "DiskError",
    "JobConflictError",
    "MsQuantError",
    "Observations",
    "QuantLinear",
    "Recipe",
    "Sensitivity",
    "TimestepManager",
    "TimestepPolicyConfig",
    "UnsupportedError",
    "analyze",
    "analyze_attention",
    "arm",
    "attach_attention",
    "attention_sites",
    "attention_summary",
    "block_mask",
    "calibrate",
    "compare",
    "convert_checkpoint",
    "detach_attention",
    "evaluate_task",
    "fa_block_quant",
    "fa_quant",
    "from_ptq_config",
    "generate",
    "load_quantized",
    "load_recipe",
    "open_model",
    "perplexity",
    "quantize",
    "quantize_checkpoint",
    "quantize_mixed",
    "quantize_pipeline",
    "save_quantized",
    "sparse_attention",
    "summary",
    "verify_checkpoint",
]

_MODULES = {
    "ms_quant.algorithms": ("ALGORITHMS",),
    "ms_quant.analysis.records": ("Sensitivity",),
    "ms_quant.analysis.run": ("analyze",),
    "ms_quant.attention.functions": (
        *("arm", "block_mask", "fa_block_quant", "fa_quant", "sparse_attention"),
    ),
    "ms_quant.cells": (
        *("Observations", "QuantLinear", "calibrate", "load_quantized", "quantize"),
        *("save_quantized", "summary"),
    ),
    "ms_quant.cells.diffusion": (
        "analyze_attention",
        *("AttentionPlan", "DiffusionAttention", "attach_attention", "attention_sites"),
        *("attention_summary", "detach_attention"),
    ),
    "ms_quant.diffusers.pipeline": ("quantize_pipeline",),
    "ms_quant.errors": (
        *("BadArgumentError", "BadFileError", "DiskError", "JobConflictError", "MsQuantError"),
        "UnsupportedError",
    ),
    "ms_quant.evaluation.comparison": ("compare",),
    "ms_quant.evaluation.generation": ("generate",),
    "ms_quant.evaluation.perplexity": ("perplexity",),
    "ms_quant.formats.opening": ("open_model",),
    "ms_quant.mixed_precision.run": ("quantize_mixed",),
    "ms_quant.pipeline.convert": ("convert_checkpoint",),
    "ms_quant.pipeline.quantize": ("quantize_checkpoint",),
    "ms_quant.recipe": ("Recipe", "from_ptq_config", "load_recipe"),
    "ms_quant.schemes.table": ("SCHEMES",),
    "ms_quant.tasks.run": ("evaluate_task",),
    "ms_quant.timestep": ("TimestepManager", "TimestepPolicyConfig"),
    "ms_quant.verify.checkpoint": ("verify_checkpoint",),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
