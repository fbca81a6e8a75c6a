"""What a recipe says, whatever language it was written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EVERYTHING = ("*",)


@dataclass(frozen=True)
class Step:
    """An algorithm that prepares weights and inputs before anything is rounded.

    Attributes:
        algorithm: a name of ``ALGORITHMS``: ``quarot``, ``smoothquant``, ``osl``, ``awq``,
            ``flatquant`` or ``svd``.
        options: its options by their own names, such as ``{"alpha": 0.9}``.
        include: patterns of the linears it works on.
        exclude: patterns of those that it leaves; they win.
        groups: kinds of the family's linear groups that it works on, in this order; () is all.
        by_producer: its patterns name what makes a linear's input (a norm, ``v_proj`` before
            ``o_proj``, ``up_proj`` before ``down_proj``) in place of the linear.
        together: a linear that it leaves takes along those that read the same input.
        where: path of what says so, for errors.
    """

    algorithm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = EVERYTHING
    exclude: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    by_producer: bool = False
    together: bool = False
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Rule:
    """The scheme that linears get.

    Attributes:
        scheme: a name of ``SCHEMES``.
        options: of the scheme's weights, such as ``{"group_size": 128, "symmetric": False}``.
        algorithms: those that choose ranges and codes, such as ``gptq``, ``ssz``, ``histogram``.
        algorithm_options: their options by full name, such as ``{"gptq.damping": 0.01}``.
        include: patterns of the linears.
        exclude: patterns of those that it leaves; they win.
        where: path of what says so, for errors.
    """

    scheme: str
    options: Mapping[str, Any] = field(default_factory=dict)
    algorithms: tuple[str, ...] = ()
    algorithm_options: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = EVERYTHING
    exclude: tuple[str, ...] = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Recipe:
    """What is done to which linear of a model, read from a file and not yet applied to one.

    Attributes:
        rules: which linear gets which scheme. One rule a linear; what none reaches stays float.
        steps: what is done before, in this order.
        kv_cache: one of ``KV_CACHES``, or "" for as it is.
        formats: names of the checkpoint formats to write; () is the default of the schemes.
        calib: calibration file, None if the recipe names none.
        samples: windows of it.
        seq_len: tokens of a window.
        seed: of the choice of windows.
        shard_bytes: largest data size of an output file; 0 is one file.
        lenient: it is applied as msModelSlim applies one: of several rules that reach a linear the
            first holds, and a pattern that matches nothing is no error. Linears that runtimes fuse
            stay float together if one of them does.
        not_for: model types that it is refused for, each with the reason.
        made: how it was made, where a program did; nothing follows from it.
        notes: what it says that is read and changes nothing here.
        kv_cache_exclude: patterns of attention whose cache stays float all the same.
    """

    rules: tuple[Rule, ...]
    steps: tuple[Step, ...] = ()
    kv_cache: str = ""
    formats: tuple[str, ...] = ()
    calib: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    shard_bytes: int | None = None
    lenient: bool = False
    not_for: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    kv_cache_exclude: tuple[str, ...] = ()
