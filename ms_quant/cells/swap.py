"""Replacing the linears of a MindSpore network with quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from ms_quant.algorithms import Chain, get_chain
from ms_quant.algorithms.problem import Problem, apply
from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.recorder import Recorder
from ms_quant.cells.tree import is_linear, linears, replace_cell, replaced
from ms_quant.errors import MsQuantError
from ms_quant.numerics.affine import check_finite
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.observers import ActivationStats
from ms_quant.schemes import VALUES, get_scheme
from ms_quant.spec import Scheme


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
    scheme: str = "W8A8",
    *,
    calibration: Iterable | None = None,
    algorithm: str = "minmax",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    **options: Any,
) -> nn.Cell:
    """Replaces the linears of a network with :class:`QuantLinear`, in place.

    Args:
        network (Cell): any network with ``nn.Dense`` or ``mint.nn.Linear`` inside, in PyNative.
        scheme (str): a name from ``ms_quant.SCHEMES``. Default: ``"W8A8"``.
        calibration (Iterable, optional): what to call the network with: for each call a Tensor
            or array, a tuple or list of arguments, or a dict of named ones, as MindSpore's
            dataset iterators give them. Needed by static schemes and most algorithms.
            Default: ``None``.
        algorithm (str): names from ``ms_quant.ALGORITHMS`` joined with ``+``, such as
            ``"osl+gptq"``; searches take each linear's own output error. A smoothing vector stays
            with the linear, as one more division of its input. Default: ``"minmax"``.
        include (Sequence[str]): glob patterns of paths to quantize. Default: ``("*",)``.
        exclude (Sequence[str]): glob patterns of paths that stay float. Default: ``()``.
        options: options of the scheme and the algorithms, such as ``group_size=64`` or
            ``alpha=0.7``.

    Returns:
        Cell, `network`. When `network` itself is a linear, its replacement.

    Raises:
        MsQuantError: a pattern matches nothing, a static scheme without calibration, a linear
            that no calibration input reached, an option unknown or out of range, groups that do
            not divide a linear's inputs, or values that are NaN or inf.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import numpy as np
        >>> import ms_quant
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 4))
        >>> data = [Tensor(np.random.randn(32, 8).astype(np.float32))]
        >>> net = ms_quant.quantize(net, "W8A8", calibration=data)
    """
    if is_linear(network):
        if tuple(include) != ("*",) or exclude:
            raise MsQuantError(
                f"{network.cls_name}: is a linear itself, expected include and exclude only with "
                "a network of several"
            )
        holder = nn.SequentialCell(network)
        quantize(holder, scheme, calibration=calibration, algorithm=algorithm, **options)
        quantized = holder[0]
        for name, parameter in quantized.parameters_and_names():
            parameter.name = name
        return quantized
    wanted = get_scheme(scheme, **{k: v for k, v in options.items() if k in VALUES})
    settings = {key: value for key, value in options.items() if key not in VALUES}
    chain = get_chain(algorithm, wanted, settings)
    cells = dict(linears(network))
    if not cells:
        raise MsQuantError(f"{network.cls_name}: holds no Dense or Linear, nothing to quantize")
    chosen = select(cells, include, exclude)
    for path in chosen:
        weight, _ = weight_and_bias(path, cells[path])  # refuses before the long part
        wanted.weight.check_columns(weight.shape[1], f"{path}.weight")
    inputs = _observe(network, {n: cells[n] for n in chosen}, wanted, chain, calibration)
    quantized = {}
    for path in chosen:
        weight, bias = weight_and_bias(path, cells[path])
        problem = Problem(
            name=path,
            scheme=wanted,
            weights={path: weight},
            biases={} if bias is None else {path: bias},
            stats=inputs.get(path),
            dtype=np.dtype(np.float32),
            loss=_own_output_error(path, weight, bias, inputs.get(path)),
        )
        quantized[path] = QuantLinear(apply(problem, chain.solve(problem))[path])
    for path, cell in quantized.items():  # all or, after an error above, none
        replace_cell(network, path, cell)
    return network


def _observe(
    network: nn.Cell,
    cells: Mapping[str, nn.Cell],
    scheme: Scheme,
    chain: Chain,
    calibration: Iterable | None,
) -> dict[str, ActivationStats]:
    if not scheme.needs_calibration and not chain.any("calibrated"):
        return {}
    if calibration is None:
        what = f"scheme {scheme.name}" if scheme.needs_calibration else f"algorithm {chain.name}"
        raise MsQuantError(f"{what}: needs calibration inputs, found None")
    calls = [_arguments(batch) for batch in calibration]
    tokens = sum(_tokens(call) for call in calls)
    stats = {
        path: ActivationStats(
            cell.weight.shape[1],
            tokens,
            chain.kept_tokens,
            name=f"{path} input",
            with_hessian=chain.any("hessian"),
            with_histogram=chain.any("histogram"),
        )
        for path, cell in cells.items()
    }
    recorders = {path: Recorder(cell, stats[path].update) for path, cell in cells.items()}
    with replaced(network, recorders):
        for arguments, named in calls:
            network(*arguments, **named)
    for path, seen in stats.items():
        if not seen.tokens:
            raise MsQuantError(f"{path}: no calibration input reached it; exclude it or add data")
    return stats


def _arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """What one item of the calibration data stands for: arguments and named arguments."""

    def tensor(value: Any) -> Any:
        return Tensor(value) if isinstance(value, np.ndarray) else value

    if isinstance(batch, Mapping):
        return (), {key: tensor(value) for key, value in batch.items()}
    arguments = batch if isinstance(batch, tuple | list) else (batch,)
    return tuple(map(tensor, arguments)), {}


def _tokens(call: tuple[tuple, dict[str, Any]]) -> int:
    """A guess of the tokens in a call; only decides how densely rows are kept."""
    first = next((value for value in (*call[0], *call[1].values())), None)
    if not isinstance(first, Tensor):
        return 1
    channels = first.shape[-1] if first.ndim and first.is_floating_point() else 1  # or token ids
    return max(1, first.size // max(1, channels))


def _own_output_error(
    path: str, weight: np.ndarray, bias: np.ndarray | None, stats: ActivationStats | None
) -> Callable[[Mapping[str, QuantizedLinear]], float]:
    def loss(candidate: Mapping[str, QuantizedLinear]) -> float:
        assert stats is not None
        exact = stats.rows @ weight.T + (0 if bias is None else bias)
        error = candidate[path].forward(stats.rows) - exact
        return float(np.mean(np.square(error), dtype=np.float64))

    return loss
