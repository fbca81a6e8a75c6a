"""Replacing the linears of a MindSpore network with quantized ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import Any

from mindspore import nn

from ms_quant.cells.calls import Progress, silent
from ms_quant.cells.choice import Common, Predicate, is_file, plans_of
from ms_quant.cells.diffusion.quantize import Attention, AttentionJob
from ms_quant.cells.load import load, wanted_dtype
from ms_quant.cells.observations import Observations
from ms_quant.cells.observe import Structure
from ms_quant.cells.replacement import Replacement
from ms_quant.cells.same_input import Groups
from ms_quant.cells.sites import SCORES, sites
from ms_quant.cells.tree import is_linear, replace_cell
from ms_quant.errors import BadArgumentError
from ms_quant.pipeline.defaults import DEFAULTS
from ms_quant.recipe import Recipe
from ms_quant.timestep import TimestepPolicyConfig


def quantize(
    network: nn.Cell,
    scheme: str | PathLike[str] | Recipe | Predicate = DEFAULTS.scheme,
    *,
    calibration: Iterable | Observations | None = None,
    algorithm: str = DEFAULTS.algorithm,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    groups: Groups | None = None,
    blocks: Sequence[str] | None = None,
    scores: Sequence[str] = SCORES,
    timestep_policy: TimestepPolicyConfig | None = None,
    attention: Attention | None = None,
    dtype: Any = None,
    for_format: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> nn.Cell:
    """Replaces the linears of a network with :class:`QuantLinear`, in place.

    Args:
        network (Cell): any network with ``nn.Dense`` or ``mint.nn.Linear`` inside, in PyNative.
        scheme (str, PathLike, Recipe, Callable): what linears become, one of

            - a name from ``ms_quant.SCHEMES``;
            - a ``Recipe``, or the path of one, ``.yaml`` or ``.yml``, whose patterns name linears
              by their paths in the network: it gives schemes, algorithms and options;
            - a function ``(path, cell)`` that gives, for each linear, the name of a scheme, a
              record with a ``scheme`` and ``algorithms``, or ``None`` for one that stays float;
            - the path of ``quant_model_description_TYPE.json`` or of
              ``quantized_network.safetensors``: MindIE-SD's call for what
              :func:`ms_quant.load_quantized` does. Of the other arguments only `timestep_policy`
              and `dtype` may be given.

            Default: ``"W8A8"``.
        calibration (Iterable, Observations, optional): what to call the network with: for each call
            a Tensor or array, a tuple or list of arguments, or a dict of named ones, as MindSpore's
            dataset iterators give them. It is gone through once, and is not held in memory. Or what
            :func:`ms_quant.calibrate` returned, maybe merged or from a file. Needed by static
            schemes and most algorithms. Default: ``None``.
        algorithm (str): names from ``ms_quant.ALGORITHMS`` joined with ``+``, such as
            ``"osl+gptq"``. A smoothing vector stays with the linear, as one more division of its
            input. Default: ``"minmax"``.
        include (Sequence[str]): glob patterns of paths to quantize. Default: ``("*",)``.
        exclude (Sequence[str]): glob patterns of paths that stay float. Default: ``()``.
        groups (Sequence, Callable, optional): which linears read one input, and so get one
            smoothing vector: a list of patterns, such as ``"*.{q,k,v}_proj"`` (of what one matches
            those with the same parent are a group) and of lists of paths; or a function
            ``(path, cell)`` that gives the same value for those of a group and ``None`` for one
            that is alone. Default: ``None``: linears of one block that are given the same tensor in
            every calibration call.
        blocks (Sequence[str], optional): patterns of the Cells whose output tells searches such as
            ``"osl"`` how good a candidate is, of those inside each other the outermost; ``()`` for
            none: then it is the output of the group's own linears. Default: ``None``: elements of a
            ``CellList`` or ``SequentialCell`` in which linears share an input, as those of
            attention do.
        scores (Sequence[str]): glob patterns of the paths of linears whose outputs are multiplied
            into attention scores: queries and keys. ``"awq"`` does not clip their weights.
            Default: ``("*q_proj", "*k_proj")``, as most networks call them; those that call them
            otherwise have none unless it is said here.
        timestep_policy (TimestepPolicyConfig, optional): which timesteps of a diffusion model are
            static and which are dynamic, for W8A8_TIMESTEP, and how those of attention are
            quantized, where it says something of the target ``fa``. `calibration` sets
            ``TimestepManager.set_timestep_idx(t)`` before it gives inputs of step t; dynamic steps
            need none. There are as many steps as ``set_timestep_idx_max`` said, else 1 + the
            largest index of the inputs. Default: ``None``, all steps are dynamic.
        attention (Mapping, optional): pattern of paths or class names to what self attention that
            it matches becomes: a kind such as ``"FP8_DYNAMIC"``, a sparse rule such as ``"rf_v2"``,
            a dict of both and their options (``{"kind": ..., "sparse": ..., "sparsity": 0.8,
            "start_step": 15}``), an ``AttentionPlan``, or ``None`` for float; of several patterns
            the last counts. ``ms_quant.attention_summary(network)`` says what became of it, and
            ``ms_quant.detach_attention(network)`` undoes it. Default: ``None``, as it is.
        dtype (str, mindspore.dtype, optional): the type that the quantized network will run in,
            ``"bfloat16"``, ``"float16"`` or ``"float32"``. Scales, smoothing vectors and biases
            that such a runtime holds in this type are exact in it, and so is what the linears here
            compute. Default: ``None``, each linear's own type; of a file the type that it was
            made for.
        for_format (str, optional): ``"mindie-sd"`` refuses, before anything is calibrated, what
            :func:`ms_quant.save_quantized` could not write for MindIE-SD. Default: ``None``.
        progress (Callable, optional): called with ``("collect", calls, 0)`` for each item of
            `calibration`, ``("calibrate", calls, of)`` for each call and
            ``("quantize", groups, of)`` for each group of linears. Default: ``None``.
        options: options of the scheme and the algorithms, such as ``group_size=64`` or
            ``alpha=0.7``.

    A bfloat16 or float16 network is calibrated on a CPU, too: MindSpore has no products of these
    types there, so for that time its parameters are float32. What it computes afterwards is as it
    was; its float linears still need a device.

    Returns:
        Cell, `network`. When `network` itself is a linear, its replacement.

    Raises:
        MsQuantError: a pattern matches nothing, a static scheme without calibration, a linear
            that no calibration input reached, or none of a static timestep, inputs of no timestep
            where one is needed, a policy that the scheme does not take, an option unknown or out
            of range, groups that do not divide a linear's inputs, or values that are NaN or inf;
            Nothing is replaced then.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import numpy as np
        >>> import ms_quant
        >>> from mindspore import Tensor, nn
        >>> def build():
        ...     return nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 8))
        >>> data = [Tensor(np.random.randn(32, 8).astype(np.float32))]
        >>> net = ms_quant.quantize(build(), "W8A8", calibration=data)
        >>> # Two schemes in one network, by a function of path and Cell.
        >>> net = ms_quant.quantize(build(), lambda path, cell: "W8A16" if path == "0" else None)
        >>> print([row.scheme for row in ms_quant.summary(net)])
        ['W8A16', 'FLOAT']
        >>> # A diffusion network: of four steps the last two are static.
        >>> policy = ms_quant.TimestepPolicyConfig("dynamic")
        >>> policy.register(range(2, 4), "static", "w8a8_static_linear")
        >>> denoiser = build()
        >>> def sampling(latent):
        ...     for index in range(4):
        ...         ms_quant.TimestepManager.set_timestep_idx(index)
        ...         yield latent
        ...         latent = latent - 0.1 * denoiser(latent)
        >>> denoiser = ms_quant.quantize(
        ...     denoiser, "W8A8_TIMESTEP", calibration=sampling(data[0]), timestep_policy=policy
        ... )
        >>> for latent in sampling(data[0]):
        ...     print(latent.shape)
        (32, 8)
        (32, 8)
        (32, 8)
        (32, 8)
    """
    given = {
        "calibration": calibration,
        "algorithm": algorithm,
        "include": tuple(include),
        "exclude": tuple(exclude),
        "groups": groups,
        "blocks": blocks,
        "scores": tuple(scores),
        "attention": attention,
        "for_format": for_format,
        "progress": progress,
    }
    if is_file(scheme):
        _refuse_given(scheme, given, options)
        assert isinstance(scheme, str | PathLike)
        return load(network, Path(scheme), timestep_policy, wanted_dtype(dtype))
    if is_linear(network):
        for_linear = {**given, "timestep_policy": timestep_policy, "dtype": dtype, **options}
        return _quantized_alone(network, scheme, for_linear)
    runs_in, chosen = wanted_dtype(dtype), sites(network, include, exclude, scores)
    plans = plans_of(scheme, network, chosen, Common(algorithm, options))
    attached = None if attention is None else AttentionJob(network, attention, timestep_policy)
    job = Replacement(
        *(network, chosen, plans, timestep_policy, runs_in, progress or silent),
        policy_of_attention=attached is not None,
    )
    if for_format is not None:
        job.check_format(for_format)
    with ExitStack() as stack:
        if attached is not None:
            stack.enter_context(attached.watching())
        observed = job.observed(calibration, Structure(groups, blocks))
        if attached is not None:
            attached.call(calibration, progress or silent)
    quantized = job.quantized(observed)
    if attached is not None:
        attached.attach()
    for path, cell in quantized.items():  # all or, after an error above, none
        replace_cell(network, path, cell)
    return network


def _refuse_given(scheme: object, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuses what a file of quantized linears says already."""
    refused = [n for n, value in given.items() if value is not None and value != _default(n)]
    if refused or options:
        raise BadArgumentError(
            f"{[*refused, *options][0]}: given with {scheme}, which says all, expected "
            "timestep_policy and dtype at most"
        )


def _default(name: str) -> Any:
    """What an argument of :func:`quantize` is where it is not given."""
    return signature(quantize).parameters[name].default


def _quantized_alone(linear: nn.Cell, scheme: Any, given: Mapping[str, Any]) -> nn.Cell:
    """What a linear that is no part of a network becomes."""
    if any(given[name] != _default(name) for name in ("include", "exclude")):
        raise BadArgumentError(
            f"{linear.cls_name}: is a linear itself, expected include and exclude only with a "
            "network of several"
        )
    for name in ("groups", "blocks", "scores", "attention", "for_format"):
        if given[name] != _default(name):
            raise BadArgumentError(
                f"{name}: given with {linear.cls_name}, which is a linear itself, expected a "
                "network of them"
            )
    if not isinstance(scheme, str) or isinstance(given["calibration"], Observations):
        raise BadArgumentError(
            f"{linear.cls_name}: is a linear itself, expected the name of a scheme and calibration "
            "inputs"
        )
    holder = nn.SequentialCell(linear)
    quantize(holder, scheme, **given)
    quantized = holder[0]
    for name, parameter in quantized.parameters_and_names():
        parameter.name = name
    return quantized
