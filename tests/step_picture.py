# SPDX-License-Identifier: Apache-2.0
"""Draws docs/step.svg, the picture of the README: what happens to one step, and when.

It is a sketch and no measurement: `layerwise bench trace` draws a measured step.

    .venv/bin/python tests/step_picture.py > docs/step.svg
"""

from __future__ import annotations

LEFT, TOP, ROW, WIDTH = 150, 46, 30, 1000
UPDATED, WRITTEN, COMMITTED, QUIET, INK = "#2b5c8a", "#e0a080", "#3f8f4f", "#e4e7ea", "#20242a"
# Begin and end, in thousandths of the picture's time.
TRAINING = [
    ("forward", 0, 110),
    ("backward", 110, 330),
    ("update t", 330, 440),
    ("forward", 450, 560),
    ("backward", 560, 780),
    ("update t+1", 780, 890),
]
LAYERS = ["head", "block 2", "block 1", "embedding"]


def _x(time: float) -> float:
    return LEFT + time * (WIDTH - LEFT - 20) / 900


def _bar(row: int, begin: float, end: float, color: str, text: str = "", ink: str = INK) -> str:
    x, y, width = _x(begin), TOP + row * ROW, _x(end) - _x(begin)
    box = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 10}" rx="2" fill="{color}"/>'
    return box + (_text(x + width / 2, y + 14, text, "middle", ink) if text else "")


def _text(x: float, y: float, text: str, anchor: str = "start", ink: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}">{text}</text>'


def picture() -> str:
    """The whole file: SVG, with a last line break."""
    rows = ["training thread", *LAYERS, "shard of each rank", "manifest, rank 0"]
    parts = [_text(LEFT - 12, TOP + row * ROW + 14, name, "end") for row, name in enumerate(rows)]
    for name, begin, end in TRAINING:
        update = name.startswith("update")
        parts.append(_bar(0, begin, end, UPDATED if update else QUIET, name, "#ffffff" if update else INK))
    for at in range(len(LAYERS)):
        parts.append(_bar(1 + at, 330 + 27 * at, 354 + 27 * at, UPDATED))
        parts.append(f'<circle cx="{_x(445):.1f}" cy="{TOP + (1 + at) * ROW + 10}" r="4" fill="{INK}"/>')
        parts.append(_bar(1 + at, 455 + 42 * at, 507 + 42 * at, WRITTEN, "written"))
    parts.append(_bar(5, 643, 695, WRITTEN, "flushed"))
    parts.append(_bar(6, 700, 775, COMMITTED, "committed", "#ffffff"))
    bottom = TOP + len(rows) * ROW
    for time, label in ((445, "end of step t: captured"), (777, "step t survives any crash")):
        line = f'x1="{_x(time):.1f}" x2="{_x(time):.1f}" y1="{TOP - 8}" y2="{bottom}"'
        parts.append(f'<line {line} stroke="{INK}" stroke-dasharray="3 3"/>')
        parts.append(_text(_x(time), TOP - 16, label, "middle"))
    size = f'width="{WIDTH}" height="{bottom + 10}" viewBox="0 0 {WIDTH} {bottom + 10}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    print(picture(), end="")
