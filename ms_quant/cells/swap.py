"""Replacing the linears of a MindSpore network with quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from ms_quant.algorithms import PLAIN, get_algorithms
from ms_quant.algorithms.problem import Problem, apply
from ms_quant.cells import timesteps
from ms_quant.cells.calibrate import observe
from ms_quant.cells.float_forward import run_dtype
from ms_quant.cells.load import load
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.save import check_format
from ms_quant.cells.tree import is_linear, linears, replace_cell
from ms_quant.errors import MsQuantError
from ms_quant.files.floats import round_finite
from ms_quant.formats.mindie_sd.choice import network_scale_type, network_scheme
from ms_quant.formats.mindie_sd.held import held_dtype
from ms_quant.numerics.affine import check_finite
from ms_quant.numerics.linear import QuantizedLinear, stable_smooth
from ms_quant.numerics.storage import DTYPES
from ms_quant.numerics.timestep import Timestep
from ms_quant.schemes.records import Scheme
from ms_quant.schemes.table import VALUES, get_scheme
from ms_quant.statistics.observers import ActivationStats, StepStats
from ms_quant.timestep import TimestepPolicyConfig


def weight_and_bias(path: str, cell: nn.Cell) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 (out, in) weight and (out,) bias of a linear Cell.

    Raises:
        MsQuantError: the Cell has an activation inside, or a value is NaN or inf.
    """
    if getattr(cell, "activation", None) is not None:
        raise MsQuantError(
            f"{path}: a Dense with a built-in activation cannot be replaced, expected "
            "activation=None with the activation as a Cell of its own"
        )
    bias = getattr(cell, "bias", None)
    weight = cell.weight.asnumpy().astype(np.float32)
    check_finite(weight, f"{path}.weight")
    if bias is None:
        return weight, None
    bias = bias.asnumpy().astype(np.float32)
    check_finite(bias, f"{path}.bias")
    return weight, bias


def select(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The names that an include pattern matches and no exclude pattern does.

    Raises:
        MsQuantError: a pattern matches nothing.
    """
    names = list(names)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join(names[:4])
            raise MsQuantError(
                f"pattern {pattern!r} matches no linear, expected one of: {shown}, ..."
            )
    return [
        name
        for name in names
        if any(fnmatchcase(name, p) for p in include)
        and not any(fnmatchcase(name, p) for p in exclude)
    ]


def quantize(
    network: nn.Cell,
    scheme: str | PathLike[str] = "W8A8",
    *,
    calibration: Iterable | None = None,
    algorithm: str = "minmax",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    timestep_policy: TimestepPolicyConfig | None = None,
    dtype: Any = None,
    for_format: str | None = None,
    **options: Any,
) -> nn.Cell:
    """Replaces the linears of a network with :class:`QuantLinear`, in place.

    Args:
        network (Cell): any network with ``nn.Dense`` or ``mint.nn.Linear`` inside, in PyNative.
        scheme (str, PathLike): a name from ``ms_quant.SCHEMES``; or the path of a description as
            MindIE-SD reads it, ``quant_model_description_TYPE.json``, or ``..._TYPE_RANK.json``:
            then linears are loaded from it and the weights beside it, and of the other arguments
            only `timestep_policy` and `dtype` may be given. Every linear needs an entry; those that
            are ``FLOAT`` keep the network's values, and so does what is no linear, of which a
            warning tells. Or the path of ``quantized_network.safetensors`` that
            ``save_quantized(..., whole=True)`` wrote, which gives every parameter its value.
            Default: ``"W8A8"``.
        calibration (Iterable, optional): what to call the network with: for each call a Tensor
            or array, a tuple or list of arguments, or a dict of named ones, as MindSpore's
            dataset iterators give them. Needed by static schemes and most algorithms.
            Default: ``None``.
        algorithm (str): names from ``ms_quant.ALGORITHMS`` joined with ``+``, such as
            ``"osl+gptq"``; searches take each linear's own output error. A smoothing vector stays
            with the linear, as one more division of its input. Default: ``"minmax"``.
        include (Sequence[str]): glob patterns of paths to quantize. Default: ``("*",)``.
        exclude (Sequence[str]): glob patterns of paths that stay float. Default: ``()``.
        timestep_policy (TimestepPolicyConfig, optional): which timesteps of a diffusion model are
            static and which are dynamic, for W8A8_TIMESTEP. `calibration` sets
            ``TimestepManager.set_timestep_idx(t)`` before it gives inputs of step t; dynamic steps
            need none. There are as many steps as ``set_timestep_idx_max`` said, else 1 + the
            largest index of the inputs. Default: ``None``, all steps are dynamic.
        dtype (str, mindspore.dtype, optional): the type that the quantized network will run in,
            ``"bfloat16"``, ``"float16"`` or ``"float32"``. Scales, smoothing vectors and biases
            that such a runtime holds in this type are exact in it, and so is what the linears here
            compute. Default: ``None``, each linear's own type; of a file the type that it was
            made for.
        for_format (str, optional): ``"mindie-sd"`` refuses, before anything is calibrated, what
            :func:`ms_quant.save_quantized` could not write for MindIE-SD. Default: ``None``:
            ``save_quantized(..., whole=True)`` writes everything.
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
            when loading, an entry, tensor, type, shape or value that is missing, wrong or not
            served by MindIE-SD.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import numpy as np
        >>> import ms_quant
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 4))
        >>> data = [Tensor(np.random.randn(32, 8).astype(np.float32))]
        >>> net = ms_quant.quantize(net, "W8A8", calibration=data)
        >>> # A diffusion network: of four steps the last two are static.
        >>> from ms_quant.timestep import TimestepManager, TimestepPolicyConfig
        >>> policy = TimestepPolicyConfig("dynamic")
        >>> policy.register(range(2, 4), "static", "w8a8_static_linear")
        >>> denoiser = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 8))
        >>> def sampling(latent):
        ...     for index in range(4):
        ...         TimestepManager.set_timestep_idx(index)
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
        >>> # Written and loaded again, here or in MindIE-SD.
        >>> description = ms_quant.save_quantized(denoiser, "exported")
        >>> fresh = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 8))
        >>> fresh = ms_quant.quantize(fresh, description, timestep_policy=policy)
    """
    if isinstance(scheme, PathLike) or str(scheme).endswith((".json", ".safetensors", ".ckpt")):
        given = {
            "calibration": calibration is not None,
            "algorithm": algorithm != PLAIN,
            "include": tuple(include) != ("*",),
            "exclude": bool(exclude),
            "for_format": for_format is not None,
            **dict.fromkeys(options, True),
        }
        refused = [name for name, is_given in given.items() if is_given]
        if refused:
            raise MsQuantError(
                f"{refused[0]}: given with {scheme}, which says all, expected timestep_policy and "
                "dtype at most"
            )
        return load(network, Path(scheme), timestep_policy, wanted_dtype(dtype))
    if is_linear(network):
        if tuple(include) != ("*",) or exclude:
            raise MsQuantError(
                f"{network.cls_name}: is a linear itself, expected include and exclude only with "
                "a network of several"
            )
        holder = nn.SequentialCell(network)
        more = {"calibration": calibration, "timestep_policy": timestep_policy, **options}
        if for_format is not None:
            raise MsQuantError(
                f"for_format: given with {network.cls_name}, which is a linear itself, expected a "
                "network of them"
            )
        quantize(holder, scheme, algorithm=algorithm, dtype=dtype, **more)
        quantized = holder[0]
        for name, parameter in quantized.parameters_and_names():
            parameter.name = name
        return quantized
    chosen_dtype = wanted_dtype(dtype)
    wanted = get_scheme(scheme, **{k: v for k, v in options.items() if k in VALUES})
    settings = {key: value for key, value in options.items() if key not in VALUES}
    algorithms = get_algorithms(algorithm, wanted, settings)
    if algorithms.any("rotates"):
        raise MsQuantError(
            f"algorithm {algorithm!r}: quarot rotates a whole decoder checkpoint, expected it only "
            "with ms-quant quantize"
        )
    policy = _policy(wanted, timestep_policy)
    cells = dict(linears(network))
    if not cells:
        raise MsQuantError(f"{network.cls_name}: holds no Dense or Linear, nothing to quantize")
    chosen = select(cells, include, exclude)
    for path in chosen:
        weight, _ = weight_and_bias(path, cells[path])  # refuses before the long part
        wanted.weight.check_columns(weight.shape[1], f"{path}.weight")
    if for_format is not None:
        check_format(for_format, wanted, algorithms, {name: cells[name] for name in chosen})
    inputs = observe(
        network, {n: cells[n] for n in chosen}, wanted, algorithms, calibration, policy
    )
    wanted = network_scheme(wanted)
    quantized = {}
    for path in chosen:
        weight, bias = weight_and_bias(path, cells[path])
        runs_in = chosen_dtype or run_dtype(cells[path])
        if bias is not None:
            bias = round_finite(bias, held_dtype(wanted.name, "bias", runs_in), f"{path}.bias")
            bias = bias.astype(np.float32)
        problem = Problem(
            name=path,
            scheme=wanted,
            weights={f"{path}.weight": weight},
            biases={} if bias is None else {f"{path}.weight": bias},
            stats=inputs.get(path),
            dtype=runs_in,
            input_dtype=runs_in,
            scale_type=network_scale_type(wanted),
            loss=_own_output_error(weight, bias, inputs.get(path), policy),
        )
        solution = algorithms.first(problem)
        if solution.smooth is not None and not wanted.activation.holds_smoothing:
            solution = replace(solution, smooth=stable_smooth(solution.smooth, runs_in))
        (linear,) = apply(problem, algorithms.rest(problem, solution)).values()
        quantized[path] = QuantLinear(linear, timestep_policy=policy, scheme=wanted)
    for path, cell in quantized.items():  # all or, after an error above, none
        replace_cell(network, path, cell)
    return network


def wanted_dtype(dtype: Any) -> np.dtype | None:
    """The type that a network runs in, by its name or as MindSpore's; None where it is not given.

    Raises:
        MsQuantError: it is none of the three.
    """
    if dtype is None:
        return None
    name = str(dtype).lower()
    if name not in DTYPES:
        raise MsQuantError(f"dtype is {dtype!r:.80}, expected one of {', '.join(DTYPES)} or None")
    return DTYPES[name]


def _policy(scheme: Scheme, given: TimestepPolicyConfig | None) -> TimestepPolicyConfig | None:
    """The policy of a scheme of timesteps, None for others.

    Raises:
        MsQuantError: it is none, or the scheme takes none.
    """
    if given is not None and not isinstance(given, TimestepPolicyConfig):
        found = type(given).__name__
        raise MsQuantError(f"timestep_policy: {found}, expected a TimestepPolicyConfig")
    if isinstance(scheme.activation, Timestep):
        return given or TimestepPolicyConfig()
    if given is not None:
        raise MsQuantError(
            f"timestep_policy: scheme {scheme.name} takes none, expected scheme W8A8_TIMESTEP"
        )
    return None


def _own_output_error(
    weight: np.ndarray,
    bias: np.ndarray | None,
    stats: ActivationStats | None,
    policy: TimestepPolicyConfig | None,
) -> Callable[[Mapping[str, QuantizedLinear]], float]:
    def forward(linear: QuantizedLinear) -> np.ndarray:
        assert stats is not None
        if policy is not None and isinstance(stats, StepStats):
            return timesteps.forward_rows(linear, stats, policy)
        return linear.forward(stats.rows)

    def loss(candidate: Mapping[str, QuantizedLinear]) -> float:
        assert stats is not None
        exact = stats.rows @ weight.T + (0 if bias is None else bias)
        (linear,) = candidate.values()
        error = forward(linear) - exact
        return float(np.mean(np.square(error), dtype=np.float64))

    return loss
