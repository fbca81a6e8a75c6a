"""Attention of diffusion networks: finding it, and putting something else in its place."""

from ms_quant.cells.diffusion.analyze import analyze_attention
from ms_quant.cells.diffusion.attach import attach_attention, detach_attention
from ms_quant.cells.diffusion.diffusion_attention import DiffusionAttention
from ms_quant.cells.diffusion.function import AttentionCall, AttentionFunction
from ms_quant.cells.diffusion.plan import AttentionPlan
from ms_quant.cells.diffusion.sites import AttentionSite, attention_sites
from ms_quant.cells.diffusion.summary import attention_summary

__all__ = [
    "AttentionCall",
    "AttentionFunction",
    "AttentionPlan",
    "AttentionSite",
    "DiffusionAttention",
    "analyze_attention",
    "attach_attention",
    "attention_sites",
    "attention_summary",
    "detach_attention",
]
