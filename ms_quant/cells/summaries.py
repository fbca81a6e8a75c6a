"""What became of the linears of a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mindspore import nn

from ms_quant.cells.quant_linear import QuantLinear
from ms_quant.cells.tables import table
from ms_quant.cells.tree import is_linear

FLOAT, UNKNOWN = "FLOAT", "-"


@dataclass(frozen=True)
class LinearSummary:
    """What became of one linear.

    Attributes:
        path: of the Cell; "" for the network itself.
        kind: class of the Cell that is there.
        shape: (out, in) of the weight.
        scheme: name of its scheme; ``"FLOAT"`` where it stayed float, "-" where it is not known.
        algorithm: what found its numbers; "-" where there is none or it is not known, as of linears
            that were loaded.
        error: squared error over squared output on the calibration tokens; of the weight where
            there were none; None where it is not known.
        error_of: ``"output"`` or ``"weight"``, what the error is that of; "-" where there is none.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    scheme: str = FLOAT
    algorithm: str = UNKNOWN
    error: float | None = None
    error_of: str = UNKNOWN


@dataclass(frozen=True)
class Summary:
    """What became of the linears of a network; printed, it is a table.

    Attributes:
        linears: in definition order.
    """

    linears: tuple[LinearSummary, ...]

    def __iter__(self) -> Iterator[LinearSummary]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)

    def __str__(self) -> str:
        header = ("path", "cell", "out x in", "scheme", "algorithm", "error", "of")
        rows = [
            (
                row.path or ".",
                row.kind,
                f"{row.shape[0]} x {row.shape[1]}",
                row.scheme,
                row.algorithm,
                "-" if row.error is None else f"{row.error:.2e}",
                row.error_of,
            )
            for row in self.linears
        ]
        return table(header, rows)


def summary(network: nn.Cell) -> Summary:
    """What became of the linears of a network.

    Args:
        network (Cell): any network, before or after :func:`ms_quant.quantize`.

    Returns:
        Summary, one row for each linear, quantized or not: path, class, shape, scheme, algorithm,
        and the error that quantizing it brought: squared error over squared output on the kept
        calibration tokens, or over the squared weight where nothing was calibrated.

    Supported Platforms:
        ``CPU`` (tested), ``Ascend`` (written, never run on a device)

    Examples:
        >>> import ms_quant
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(8, 16), nn.ReLU(), nn.Dense(16, 4))
        >>> net = ms_quant.quantize(net, "W8A8_DYNAMIC", exclude=["2"])
        >>> for row in ms_quant.summary(net):
        ...     print(row.path, row.kind, row.shape, row.scheme, row.error_of)
        0 QuantLinear (16, 8) W8A8_DYNAMIC weight
        2 Dense (4, 16) FLOAT -
    """
    rows = [_row(path, cell) for path, cell in network.cells_and_names() if _is_row(cell)]
    return Summary(tuple(rows))


def _is_row(cell: nn.Cell) -> bool:
    return isinstance(cell, QuantLinear) or is_linear(cell)


def _row(path: str, cell: nn.Cell) -> LinearSummary:
    if not isinstance(cell, QuantLinear):
        rows, columns = cell.weight.shape
        return LinearSummary(path, cell.cls_name, (int(rows), int(columns)))
    scheme = UNKNOWN if cell.scheme is None else cell.scheme.name
    shape, made = (cell.out_channels, cell.in_channels), cell.made
    if made is None:
        return LinearSummary(path, cell.cls_name, shape, scheme)
    of = "output" if made.on_outputs else "weight"
    return LinearSummary(path, cell.cls_name, shape, scheme, made.algorithm, made.error, of)
