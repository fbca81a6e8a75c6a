"""Which activations of a model are massive, and what rotation and smoothing do about them.

    python benchmarks/massive_activations.py MODEL --calib TEXT [--heldout TEXT] [--windows 24]
        [--samples 16] [--blocks 1,2,11] [--plot FILE.svg]

The float model runs block by block on the calibration windows. The first table names what is
massive in the inputs of down_proj of some blocks, the second what their outputs make of the
residual stream, the third has the crest factors (largest magnitude over root mean square) of the
inputs of each kind of group, before and after rotation. Then MODEL is quantized to static W8A8 with
each remedy: the fourth table has how many int8 steps the largest value of the median token gets,
the last, with --heldout, what perplexity costs when only the down_proj, only the other linears, and
all are quantized. The plot needs matplotlib; it shows the inputs of down_proj of all blocks, and
those of one around its largest value.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ms_quant.analysis.inputs import MASSIVE, InputWatch
from ms_quant.analysis.records import InputFacts
from ms_quant.data.calibration import eval_windows
from ms_quant.data.tokenizer import load_tokenizer
from ms_quant.evaluation.comparison import paired_difference
from ms_quant.evaluation.head import EMBEDDING
from ms_quant.evaluation.perplexity import measure
from ms_quant.formats.opening import FloatModel, JobModel
from ms_quant.models.block_forward import BlockForward, Positions
from ms_quant.models.embedding import used_rows
from ms_quant.models.names import block_prefix
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.pipeline.request import CheckedJob, QuantizeOptions, prepare
from ms_quant.pipeline.run import run_blocks
from ms_quant.quantization.observe import shows_input
from ms_quant.statistics.observers import ActivationStats

REMEDIES = "minmax", "quarot", "smoothquant", "quarot+smoothquant"
KINDS = "qkv", "o", "gate_up", "down"
HALVES: dict[str, Callable[[str], bool]] = {
    "`down_proj` alone": lambda path: path.endswith("down_proj"),
    "all others": lambda path: not path.endswith("down_proj"),
    "all": lambda path: True,
}
SHOWN_TOKENS, SHOWN_CHANNELS = 10, 8  # of the plot; channels to each side of the largest


STREAM = "residual stream"  # what a block has made of it


def inputs(checked: CheckedJob) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Block by block what each group of the float model reads, float32 (tokens, channels), and the
    block's output."""
    config, tokens = checked.plan.config, checked.tokens
    assert tokens is not None
    x = used_rows(checked.tensors.float32_chunks(EMBEDDING), tokens)(tokens)
    at = Positions(config, tokens.shape[1])
    for index in range(config.num_layers):
        block = BlockForward.load(config, index, checked.tensors.read_float32)
        rows: dict[str, np.ndarray] = {}
        watched = {
            group.members[0]: shows_input(
                block.linears[group.members[0]], partial(_keep, rows, group.name)
            )
            for group in block.spec.groups
        }
        x = block.with_linears(watched).run(x, at)
        yield index, {**rows, STREAM: x}


def _keep(rows: dict[str, np.ndarray], name: str, found: np.ndarray) -> None:
    rows[name] = found.copy()


def facts(rows: np.ndarray, windows: int) -> InputFacts:
    """What ``ms-quant analyze`` says of an input."""
    watch = InputWatch(windows, len(rows) // windows)
    stats = ActivationStats(rows.shape[1], len(rows), 1)
    watch.look(rows)
    stats.update(rows)
    return watch.facts(stats)


def crest(rows: np.ndarray) -> float:
    """Largest magnitude over root mean square."""
    return float(np.abs(rows).max() / np.sqrt(np.square(rows, dtype=np.float64).mean()))


class Seen(NamedTuple):
    """What the float model has shown.

    Attributes:
        facts: of the input of down_proj, for each block.
        stream: the largest magnitude of each block's output, and its channel.
        weights: the largest weight of down_proj that multiplies the largest input's channel, for
            each block.
        peaks: float32 (blocks, windows, tokens), largest magnitude of each token in it.
        crests: kind of group to the crest factors of its inputs, for each block.
        around: block, window, first channel and float32 (tokens, channels) magnitudes, around the
            largest value of all.
    """

    facts: list[InputFacts]
    stream: list[tuple[float, int]]
    weights: list[float]
    peaks: np.ndarray
    crests: dict[str, list[float]]
    around: tuple[int, int, int, np.ndarray]


def see(checked: CheckedJob) -> Seen:
    """Runs the float model of a request."""
    assert checked.tokens is not None
    windows, length = checked.tokens.shape
    found, stream, weights, peaks, largest = [], [], [], [], 0.0
    around: tuple[int, int, int, np.ndarray] = 0, 0, 0, np.zeros((1, 1))
    crests: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for index, rows in inputs(checked):
        down = np.abs(rows["down"]).reshape(windows, length, -1)
        found.append(facts(rows["down"], windows))
        window, _, channel = np.unravel_index(down.argmax(), down.shape)
        path = checked.plan.config.block(index).group("down").members[0]
        weight = checked.tensors.read_float32(f"{block_prefix(index)}{path}.weight")
        weights.append(float(np.abs(weight[:, channel]).max()))
        made = np.abs(rows[STREAM])
        stream.append((float(made.max()), int(made.argmax() % made.shape[-1])))
        peaks.append(down.max(axis=2))
        for kind, values in crests.items():
            values.append(crest(rows[kind]))
        if found[-1].absmax > largest:
            largest = found[-1].absmax
            first = max(0, int(channel) - SHOWN_CHANNELS)
            part = down[window, :SHOWN_TOKENS, first : int(channel) + SHOWN_CHANNELS + 1]
            around = index, int(window), first, part.copy()
    return Seen(found, stream, weights, np.stack(peaks), crests, around)


class Part(JobModel):
    """The model that a job has quantized, with the linears that are not chosen in float."""

    def __init__(self, checked: CheckedJob, chosen: Callable[[str], bool]):
        super().__init__(checked.plan, checked.job(), checked.tensors)
        self.chosen = chosen

    def linear(self, path: str) -> QuantizedLinear | None:
        return super().linear(path) if self.chosen(path) else None

    def tensor(self, name: str) -> np.ndarray:
        weight = name.removesuffix(".weight") in self._quantized
        return self.numbers.read(name) if weight else super().tensor(name)


@contextmanager
def quantized(options: QuantizeOptions) -> Iterator[CheckedJob]:
    """A request whose blocks are finished, without its output."""
    checked = prepare(options)
    job = checked.job()
    with job.open():
        run_blocks(checked, job, lambda index, part: None)
        yield checked
        job.remove()


def steps(checked: CheckedJob) -> dict[str, list[float]]:
    """Kind of group to the int8 steps that the largest value of the median token gets, for each
    block."""
    model = JobModel(checked.plan, checked.job(), checked.tensors)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for index, rows in inputs(checked):
        for kind, values in found.items():
            group = checked.plan.config.block(index).group(kind)
            linear = model.linear(f"{block_prefix(index)}{group.members[0]}")
            assert linear is not None
            scaled = np.abs(rows[kind] / linear.static.input_scale)
            values.append(float(np.median(scaled.max(axis=1))))
    return found


def increases(checked: CheckedJob, tokens: np.ndarray, exact: np.ndarray) -> Iterator[str]:
    """What perplexity costs, with its standard error, for each half of the linears."""
    for chosen in HALVES.values():
        losses = measure(Part(checked, chosen), tokens).losses
        mean, error = paired_difference(losses, exact)
        assert error is not None
        yield f"{100 * math.expm1(mean):+.2f} ± {100 * math.exp(mean) * error:.2f} %"


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*cells: str) -> None:
    print()
    row(*cells)
    print("|---" * len(cells) + "|")


def named(found: InputFacts) -> tuple[str, ...]:
    """The cells of a massive input."""
    channels = ", ".join(map(str, found.channels)) or "none"
    contrast = f"{found.absmax / found.token_median:,.0f}"
    return f"{found.absmax:,.4g}", channels, f"{found.token_median:.3g}", contrast


def spread(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> str:
    """Median and worst block, and which that is."""
    return f"{np.median(values):.3g}, {worst(values):.3g} in {values.index(worst(values))}"


def token_texts(model: Path, checked: CheckedJob) -> np.ndarray:
    """The text of each token of the calibration data, (windows, tokens)."""
    assert checked.tokens is not None
    tokenizer = load_tokenizer(model)
    ids, places = np.unique(checked.tokens, return_inverse=True)
    texts = np.array([tokenizer.decode([one]) for one in ids.tolist()], object)
    return texts[places].reshape(checked.tokens.shape)


def draw(path: Path, seen: Seen, texts: Sequence[str]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "massive"
    figure, (over, around) = plt.subplots(2, 1, figsize=(7.5, 7.6), height_ratios=(1, 1.05))
    blocks = np.arange(len(seen.peaks))
    first = seen.peaks[:, :, 0].max(axis=1)
    over.plot(blocks, first, "o-", color="#c1121f", label="first token, the largest")
    others = seen.peaks[:, :, 1:].max(axis=(1, 2))
    over.plot(blocks, others, ".--", color="#555555", lw=1, label="any other token, the largest")
    median = np.median(seen.peaks, axis=(1, 2))
    over.plot(blocks, median, "s-", ms=4, color="#1d4e89", label="median token")
    over.set(yscale="log", xlabel="block", title="largest |input| of down_proj")
    over.set(xticks=blocks[:: max(1, len(blocks) // 15)], ylim=(None, 3 * first.max()))
    for index in np.flatnonzero(first > 500 * np.median(median)):
        place = index, 1.3 * first[index]
        over.annotate(f"{first[index]:,.0f}", place, ha="center", va="bottom")
    over.grid(alpha=0.3)
    over.legend(loc="upper center", bbox_to_anchor=(0.65, 1), fontsize=9)
    block, window, channel, values = seen.around
    norm = mpl.colors.LogNorm(0.01, values.max())
    cells = around.pcolormesh(
        np.maximum(values.T, 0.01), norm=norm, cmap="YlOrRd", ec="white", lw=0.5
    )
    around.set(title=f"|input| of down_proj of block {block}, the first tokens of window {window}")
    around.set(ylabel="channel", xticks=np.arange(len(values)) + 0.5)
    around.set_xticklabels([repr(text)[1:-1] for text in texts])
    around.set(yticks=np.arange(0, values.shape[1], 2) + 0.5)
    around.set_yticklabels(channel + np.arange(0, values.shape[1], 2))
    token, most = np.unravel_index(values.argmax(), values.shape)
    place = token + 0.5, most + 0.5
    around.annotate(f"{values.max():,.0f}", place, ha="center", va="center", color="white")
    figure.colorbar(cells, ax=around, pad=0.02)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--blocks", default="", help="of the first table; those that are massive")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run(args, Path(directory))


def run(args: argparse.Namespace, directory: Path) -> None:
    def options(remedy: str) -> QuantizeOptions:
        out = directory / remedy
        return QuantizeOptions(
            args.model, out, "W8A8", remedy, calib=args.calib, samples=args.samples
        )

    plain = prepare(options("minmax"))
    seen, rotated = see(plain), see(prepare(options("quarot")))
    texts = token_texts(args.model, plain)
    if args.plot:
        draw(args.plot, seen, texts[seen.around[1], :SHOWN_TOKENS].tolist())
    tell_massive(seen, rotated, texts, args.blocks)
    head("crest factor: median block, worst block", "before", "rotated")
    for kind in KINDS:
        row(f"`{kind}`", spread(seen.crests[kind], max), spread(rotated.crests[kind], max))
    lost: dict[str, list[str]] = {}
    exact = tokens = np.zeros(0)
    if args.heldout:
        tokens = eval_windows(args.heldout, args.model, 256, args.windows)
        exact = measure(FloatModel(args.model), tokens).losses
    head("steps of the median token: median block, worst block", *(f"`{kind}`" for kind in KINDS))
    for remedy in REMEDIES:
        with quantized(options(remedy)) as checked:
            found = steps(checked)
            row(f"`{remedy}`", *(spread(found[kind], min) for kind in KINDS))
            if args.heldout:
                lost[remedy] = list(increases(checked, tokens, exact))
    if lost:
        head("perplexity", *HALVES)
        for remedy, cells in lost.items():
            row(f"`{remedy}`", *cells)


def tell_massive(seen: Seen, rotated: Seen, texts: np.ndarray, blocks: str) -> None:
    """The first table; `texts` are the tokens, (windows, tokens)."""
    head("block", "largest", "channels", "median token", "times that", "massive tokens", "rotated")
    massive = [index for index, found in enumerate(seen.facts) if found.massive_tokens]
    chosen = [int(index) for index in blocks.split(",")] if blocks else massive
    for index in chosen:
        found = seen.facts[index]
        least = max(found.absmax / 2, MASSIVE * found.token_median)
        which = seen.peaks[index] >= least
        counts = [("first", int(which[:, 0].sum()))]
        counts += Counter(texts[:, 1:][which[:, 1:]].tolist()).most_common()
        tokens = ", ".join(f"{count} {text!r}" for text, count in counts if count) or "none"
        row(index, *named(found), tokens, f"{rotated.facts[index].absmax:,.4g}")
    weights = "largest weight of that input", "rotated"
    head("after block", f"{STREAM}, largest", "channel", "rotated", *weights)
    for index in chosen:
        (largest, channel), (other, _) = seen.stream[index], rotated.stream[index]
        columns = (f"{one.weights[index]:.3g}" for one in (seen, rotated))
        row(index, f"{largest:,.0f}", channel, f"{other:,.0f}", *columns)


if __name__ == "__main__":
    main()
