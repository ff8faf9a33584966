"""Draws images per second as bars, a group for each rung and a colour for each batch: an SVG without dependencies."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from bench.waterfall.rows import Row

WIDTH, PANEL_HEIGHT, BARS_HEIGHT = 960, 270, 170
LEFT, RIGHT, HEAD, LEGEND = 20, 20, 44, 26
COLOURS = ("#9db4c0", "#5c8aa8", "#2f5d8a", "#16324f", "#e09f3e", "#9e2a2b")
INK, BACKGROUND = "#222222", "#ffffff"


def draw_chart(panels: Mapping[str, Sequence[Row]], title: str) -> str:
    """An SVG with one panel for each model, each with a scale of its own.

    Args:
        panels: rows of one scope, GPU and kind of weights, by the name of the model.
    """
    batches = sorted({row.batch for rows in panels.values() for row in rows})
    colours = {batch: COLOURS[i % len(COLOURS)] for i, batch in enumerate(batches)}
    height = HEAD + LEGEND + PANEL_HEIGHT * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}</title>",
        _rectangle(0, 0, WIDTH, height, BACKGROUND),
        _text(LEFT, 28, title, size=17, anchor="start"),
        *_legend(colours),
    ]
    for i, (model, rows) in enumerate(panels.items()):
        parts += _panel(model, rows, colours, HEAD + LEGEND + i * PANEL_HEIGHT)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(colours: Mapping[int, str]) -> list[str]:
    parts = []
    for i, (batch, colour) in enumerate(colours.items()):
        x = LEFT + 100 * i
        parts += [_rectangle(x, HEAD, 12, 12, colour), _text(x + 18, HEAD + 11, f"batch {batch}", anchor="start")]
    return parts


def _panel(model: str, rows: Sequence[Row], colours: Mapping[int, str], top: float) -> list[str]:
    """Above each bar its images per second; under each rung its best ratio to segment-anything at batch 1."""
    # A batch that lacks a rung, for want of memory perhaps, must not decide their order.
    by_length = sorted(colours, key=lambda batch: -sum(row.batch == batch for row in rows))
    rungs = list(dict.fromkeys(row.rung for batch in by_length for row in rows if row.batch == batch))
    fastest = max(row.img_s for row in rows)
    floor = top + PANEL_HEIGHT - 60
    slot = (WIDTH - LEFT - RIGHT) / len(rungs)
    parts = [
        _text(LEFT, top + 20, model, size=15, anchor="start"),
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor:.1f}" y2="{floor:.1f}" stroke="{INK}"/>',
    ]
    for i, rung in enumerate(rungs):
        bars = [row for row in rows if row.rung == rung]
        bar = min(0.86 * slot / len(bars), 44)
        middle = LEFT + (i + 0.5) * slot
        start = middle - bar * len(bars) / 2
        for j, row in enumerate(bars):
            high = BARS_HEIGHT * row.img_s / fastest
            x = start + j * bar
            parts.append(_rectangle(x + 1, floor - high, bar - 2, high, colours[row.batch]))
            label = f"{row.img_s:.0f}" if row.img_s >= 100 else f"{row.img_s:.3g}"
            parts.append(_text(x + bar / 2, floor - high - 4, label, size=9.5))
        best = max(row.x_fp32 for row in bars)
        parts += [_text(middle, floor + 18, rung, size=13), _text(middle, floor + 35, f"{best:.1f}x", size=12)]
    return parts


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, size: float = 12, anchor: str = "middle") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{INK}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
