"""Draws the pictures of docs/kernels.md as SVG.

python scripts/draw_kernels.py [FOLDER]     default: docs/images
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

INK, SOFT, PAPER, NONE = "#1f2328", "#59636e", "#ffffff", "#f3f4f6"
# One colour for each of the four codes of a byte, or of the four lanes t.
BANDS = ("#bfd7ff", "#c6ecc9", "#ffe2b0", "#f5c6dc")
MASKS = ("03", "0C", "30", "C0")
ROWS = ("r", "r + R", "r + 2R", "r + 3R")


class Drawing:
    """Shapes and texts on a white sheet of its own, legible on light and dark pages."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, fill: str) -> None:
        """Adds a rectangle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{INK}"/>'
        )

    def text(
        self, x: float, y: float, words: str, at: str = "middle", style: str = "", fill: str = INK
    ) -> None:
        """Adds a line of text; style is any of m (monospace), b (bold), s (small)."""
        kinds = f' class="{" ".join(style)}"' if style else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{at}" fill="{fill}"{kinds}>'
            f"{escape(words)}</text>"
        )

    def cell(self, x: float, y: float, w: float, h: float, words: str, fill: str) -> None:
        """Adds a rectangle with a text in it."""
        self.box(x, y, w, h, fill)
        self.text(x + w / 2, y + h / 2 + 4.5, words, style="m")

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Adds an arrow."""
        self.parts.append(
            f'<path d="M{x0:g} {y0:g} L{x1:g} {y1:g}" stroke="{SOFT}" stroke-width="1.5" '
            'marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """Returns the file's text."""
        width, height = self.size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                "<style>text{font:13px sans-serif}.m{font-family:monospace}.b{font-weight:bold}"
                ".s{font-size:11.5px}</style>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{SOFT}"/></marker>'
                "</defs>",
                f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" '
                f'fill="{PAPER}" stroke="#d1d9e0"/>',
                *self.parts,
                "</svg>",
                "",
            ]
        )


def layout() -> Drawing:
    """Weights [N, K] to packed bytes [R, K], and a word of them to four A operands."""
    d = Drawing(860, 330, "Four rows to a byte, and a word of bytes to four operands")
    d.text(116, 28, "codes [N, K], N = 4R", style="b")
    for band, fill in enumerate(BANDS):
        top = 44 + 62 * band
        d.box(52, top, 128, 62, fill)
        d.box(112, top + 22, 14, 14, PAPER)
        d.text(119, top + 33.5, "abcd"[band], style="ms")
        d.text(46, top + 34, ROWS[band], "end", "s")
    d.text(119, 308, "column k", style="s", fill=SOFT)
    d.arrow(188, 168, 222, 168)

    d.text(325, 28, "qweight [R, K], one byte", style="b")
    d.box(230, 44, 190, 62, NONE)
    d.box(316, 66, 14, 14, PAPER)
    d.text(308, 78, "row r, column k", "end", "s", SOFT)
    d.arrow(323, 82, 323, 132)
    for place, letter in enumerate("dcba"):
        band = 3 - place
        d.cell(231 + 47 * place, 152, 47, 28, f"{letter} + 1", BANDS[band])
        d.text(254 + 47 * place, 146, f"bits {2 * band + 1}, {2 * band}", style="s", fill=SOFT)
    for line, words in enumerate(
        ("AND leaves one code in place,", "times 1, 4, 16 or 64: at most 128,", "an unsigned byte.",
         "The sum is shifted once, at the end.")
    ):  # fmt: skip
        d.text(325, 214 + 19 * line, words, style="s")
    d.arrow(428, 168, 458, 168)

    d.text(655, 28, "32-bit word: columns k to k + 3 of packed row r", style="b")
    for byte in range(4):
        left = 520 + 68 * byte
        for place in range(4):
            d.box(left + 17 * place, 44, 17, 26, BANDS[3 - place])
        d.text(left + 34, 86, f"k + {3 - byte}" if byte < 3 else "k", style="s", fill=SOFT)
    for band, mask in enumerate(MASKS):
        top = 104 + 54 * band
        d.text(470, top + 18, f"AND {mask * 4}", "start", "m")
        for byte in range(4):
            for place in range(4):
                fill = BANDS[band] if 3 - place == band else PAPER
                d.box(580 + 40 * byte + 10 * place, top, 10, 26, fill)
        d.text(750, top + 12, "A of rows " + ROWS[band], "start", "s")
        d.text(750, top + 27, f"codes times {4**band}", "start", "s", SOFT)
    return d


def fragments() -> Drawing:
    """Which bytes a lane loads, and which registers of the two mma they are."""
    d = Drawing(860, 400, "Sixteen bytes of a lane are the registers of two mma")
    d.text(430, 28, "a block of 64 columns; lane (g, t) = (lane / 4, lane % 4)", style="b")
    rows = (
        ("weights, packed row g", ""),
        ("weights, packed row g + 8", "'"),
        ("codes of token g", "x"),
    )
    for line, (name, mark) in enumerate(rows):
        top = 60 + 46 * line
        d.text(210, top + 19, name, "end")
        for t in range(4):
            for word in range(4):
                label = f"x{word}" if mark == "x" else f"w{word}{mark}"
                fill = BANDS[word] if t == 1 else NONE
                d.cell(222 + 152 * t + 38 * word, top, 38, 28, label, fill)
    for t in range(4):
        d.text(
            298 + 152 * t, 52, f"t = {t}: columns {16 * t} to {16 * t + 15}", style="s", fill=SOFT
        )
    d.text(
        430,
        206,
        "each lane: three loads of 16 bytes, straight from memory, and no other lane's bytes",
    )

    for h in range(2):
        left = 60 + 400 * h
        low, high = 2 * h, 2 * h + 1
        d.text(left + 170, 240, f"mma h = {h}", style="b")
        registers = (
            ("A0", f"w{low} & mask", low), ("A1", f"w{low}' & mask", low),
            ("A2", f"w{high} & mask", high), ("A3", f"w{high}' & mask", high),
            ("B0", f"x{low}", low), ("B1", f"x{high}", high),
        )  # fmt: skip
        for index, (register, words, word) in enumerate(registers):
            x, y = left + 116 * (index // 2), 252 + 42 * (index % 2)
            d.text(x - 6, y + 19, register, "end", "s")
            d.cell(x, y, 84 if index < 4 else 44, 28, words, BANDS[word])
    d.text(
        430,
        356,
        "times four masks, for four tiles of 16 rows, R apart: eight mma.m16n8k32 a block.",
    )
    d.text(
        430, 378,
        "A dot product does not care about the order of K, so both operands are permuted alike.",
        style="s", fill=SOFT,
    )  # fmt: skip
    return d


def pipeline() -> Drawing:
    """The stages of many_kernel over time, and the swizzle of two-byte elements."""
    d = Drawing(860, 400, "The pipeline for many tokens, and where chunks lie in shared memory")
    d.text(235, 28, "four stages of shared memory, 64 columns each", style="b")
    for stage in range(4):
        d.text(148 + 86 * stage, 56, f"stage {stage}", style="s", fill=SOFT)
    for block in range(6):
        top = 66 + 40 * block
        d.text(94, top + 21, f"step b = {block}", "end", "s")
        for stage in range(4):
            ahead = (stage - block) % 4
            held = block + ahead
            fill = (BANDS[1], BANDS[0], BANDS[0], BANDS[2])[ahead]
            d.cell(106 + 86 * stage, top, 84, 32, f"block {held}", fill)
    for index, (fill, words) in enumerate(
        (
            (BANDS[1], "multiplied now: 16-byte loads to fragments, mma, sums in registers"),
            (BANDS[0], "cp.async in flight, or arrived and not yet waited for"),
            (BANDS[2], "cp.async starts now, after the barrier: everyone has read block b - 1"),
        )
    ):
        d.box(20, 318 + 24 * index, 16, 14, fill)
        d.text(44, 330 + 24 * index, words, "start", "s")

    d.text(670, 28, "two-byte elements: eight chunks of 16 bytes a row", style="b")
    for row in range(4):
        top = 66 + 46 * row
        d.text(512, top + 19, f"token {row}", "end", "s")
        for place in range(8):
            chunk = place ^ (row & 1)
            wanted = chunk % 2 == 0
            d.cell(
                522 + 38 * place, top, 38, 28, str(chunk), BANDS[row % 2 * 3] if wanted else NONE
            )
    for line, words in enumerate(
        (
            "One load instruction reads chunk 2t of each token (coloured);",
            "eight lanes, of two neighbouring tokens, are one access.",
            "Odd tokens have their chunks swapped in pairs, so the",
            "eight lie in all eight places: all 32 banks, no conflict.",
            "One-byte elements: rows of 64 bytes, chunk t, 128 bytes",
            "in a row for two tokens; nothing to swap.",
        )
    ):
        d.text(500, 268 + 19 * line, words, "start", "s")
    return d


PICTURES: dict[str, Callable[[], Drawing]] = {
    "kernel-layout.svg": layout,
    "kernel-fragments.svg": fragments,
    "kernel-pipeline.svg": pipeline,
}


def main() -> None:
    """Writes the files."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw().svg())


if __name__ == "__main__":
    main()
