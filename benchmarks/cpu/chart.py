"""The chart as SVG: one panel a figure, one bar a side."""

from html import escape

WIDTH, PANEL_WIDTH, COLUMNS, BAR, GAP, LABEL = 1100, 540, 2, 15, 4, 130
OURS, PEER = "#2f6db5", "#b9bec6"
STYLE = "text{font:12px sans-serif;fill:#1d2127}.title{font-weight:600}.value{font-size:11px}"


def draw(panels: list[tuple[str, str, dict[str, float]]]) -> str:
    """panels: title, unit, value by side in the order of the bars."""
    columns: list[list[str]] = [[] for _ in range(COLUMNS)]
    heights = [10.0] * COLUMNS
    for title, unit, values in panels:
        column = heights.index(min(heights))
        columns[column].append(_panel(title, unit, values, column * (WIDTH - PANEL_WIDTH) + 10, heights[column]))
        heights[column] += 44 + len(values) * (BAR + GAP)
    body = "\n".join(part for column in columns for part in column)
    size = f'width="{WIDTH}" height="{max(heights):.0f}" viewBox="0 0 {WIDTH} {max(heights):.0f}"'
    background = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{background}\n{body}\n</svg>\n'


def _panel(title: str, unit: str, values: dict[str, float], x: float, y: float) -> str:
    parts = [f'<text class="title" x="{x:.0f}" y="{y + 14:.0f}">{escape(title)}, {escape(unit)}</text>']
    most, room = max(values.values()), PANEL_WIDTH - LABEL - 80
    for i, (side, value) in enumerate(values.items()):
        top, length = y + 24 + i * (BAR + GAP), room * value / most
        color = OURS if side.startswith("ours") else PEER
        number = f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
        parts += [
            f'<text x="{x + LABEL - 6:.0f}" y="{top + 12:.0f}" text-anchor="end">{escape(side)}</text>',
            f'<rect x="{x + LABEL:.0f}" y="{top:.0f}" width="{length:.1f}" height="{BAR}" fill="{color}"/>',
            f'<text class="value" x="{x + LABEL + length + 5:.0f}" y="{top + 12:.0f}">{number}</text>',
        ]
    return "\n".join(parts)
