"""Draws docs/images/attention_masks.svg from the definitions: what each rule keeps.

    python tools/draw_attention.py

Above, the pairs of query (down) and key (right) that RainFusion 1's three masks keep, tokens as
they come; below, which tokens of a clip one block of 128 holds in three orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ms_quant.attention.bands import band_masks, bandwidth
from ms_quant.attention.grid import Clip, TokenGrid
from ms_quant.attention.orders import raster, time_windows, windows

OUT = Path(__file__).parent.parent / "docs" / "images" / "attention_masks.svg"
TEXT, SHAPE, CELL = 4, (7, 4, 4), 2
CLIP, BLOCK, PIXEL = Clip(0, 8, 16, 24), 128, 2
WIDTH, PANEL = 760, 252
KEPT, LEFT_OUT = "#24527a", "#e8f0fa"


def runs(kept: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Row, start and length of the runs of true in each row."""
    for row, line in enumerate(kept):
        edges = np.flatnonzero(np.diff(np.pad(line, 1).astype(np.int8)))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            yield row, int(start), int(end - start)


def cells(kept: np.ndarray, x: int, y: int, side: int) -> str:
    height, width = (side * n for n in kept.shape)
    marks = "".join(
        f"M{x + start * side} {y + row * side}h{length * side}v{side}h{-length * side}z"
        for row, start, length in runs(kept)
    )
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{LEFT_OUT}"/>'
        f'<path d="{marks}" fill="{KEPT}"/>'
    )


def says(text: str, x: int, y: int) -> str:
    return f'<text x="{x}" y="{y}">{text}</text>'


def masks() -> Iterator[str]:
    tokens = int(np.prod(SHAPE)) + TEXT
    found = band_masks(TokenGrid.of(SHAPE, tokens, TEXT), 1, bandwidth(0.5))
    for number, mask in enumerate((found[1], found[0], found[2])):
        x = 8 + number * PANEL
        yield says(f"{mask.names[0]}: keeps {mask.density()[0, 0]:.0%}", x, 36)
        yield cells(mask.pairs_of_tokens()[0, 0], x, 44, CELL)


def blocks() -> Iterator[str]:
    names = {"as tokens come": raster, "8x8 windows (rf_v3)": windows, "along time": time_windows}
    for number, (name, order) in enumerate(names.items()):
        x, chosen = 8 + number * PANEL, np.zeros(CLIP.tokens, bool)
        chosen[order(CLIP, False)[7 * BLOCK : 8 * BLOCK]] = True
        yield says(name, x, 332)
        for t, frame in enumerate(chosen.reshape(CLIP.frames, CLIP.height, CLIP.width)):
            row, column = divmod(t, 4)
            yield cells(frame, x + column * 54, 340 + row * 38, PIXEL)


def main() -> None:
    style = "text{font:13px sans-serif;fill:#1b2733}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 420" role="img" '
        'aria-label="What the masks of three kinds of heads keep, and what a block holds">'
        f'<style>{style}</style><rect width="{WIDTH}" height="420" fill="#fff"/>'
    )
    titles = (
        says("Pairs kept: queries down, keys right; 4 tokens of text, 7 frames of 4 x 4", 8, 16),
        says("The tokens of one block of 128, in 8 frames of 16 x 24", 8, 310),
    )
    OUT.write_text("\n".join([head, *titles, *masks(), *blocks(), "</svg>"]) + "\n")
    print(OUT)


if __name__ == "__main__":
    main()
