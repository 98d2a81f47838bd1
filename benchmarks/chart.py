"""Line charts as PNG, drawn with Pillow: panels side by side, one legend."""

import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN, LEGEND = 380, 50, 150  # pixels: a panel's square, the room for its axes, the room for the legend
COLOURS = ("#1b6ca8", "#d1495b", "#8f2d3a", "#edae49", "#3c8d53", "#7a5195", "#555555", "#00a6a6", "#b07aa1", "#9c6b30")

Points = Sequence[tuple[float, float, str]]  # x and y from 0 to 1, and what is written beside


def draw_lines(panels: Mapping[str, Mapping[str, Points]], *, x_label: str, y_label: str, lowest: float = 0.0) -> bytes:
    """A PNG of panels by title, each with lines by name; both axes run from `lowest` to 1."""
    width = len(panels) * (SIZE + 2 * MARGIN) + LEGEND
    image = Image.new("RGB", (width, SIZE + 2 * MARGIN), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    names, scale = list(next(iter(panels.values()))), SIZE / (1 - lowest)
    for index, (title, lines) in enumerate(panels.items()):
        left, top = index * (SIZE + 2 * MARGIN) + MARGIN, MARGIN
        draw.rectangle((left, top, left + SIZE, top + SIZE), outline="#999999")
        draw.text((left, top - 20), title, "black", font)
        draw.text((left + SIZE / 2 - 20, top + SIZE + 22), x_label, "black", font)
        draw.text((left + 6, top + 4), y_label, "black", font)
        for tick in range(0, 11, 2):
            at = SIZE * tick / 10
            label = f"{lowest + (1 - lowest) * tick / 10:.2f}"
            draw.text((left + at - 12, top + SIZE + 5), label, "black", font)
            draw.text((left - 32, top + SIZE - at - 8), label, "black", font)
        for name, points in lines.items():
            colour = COLOURS[names.index(name)]
            places = [(left + (x - lowest) * scale, top + (1 - y) * scale) for x, y, _ in points]
            draw.line(places, colour, 2)
            for (x, y), (*_, note) in zip(places, points, strict=True):
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
                draw.text((x + 5, y - 14), note, colour, font)
    for row, name in enumerate(names):
        draw.text((width - LEGEND, MARGIN + 20 * row), name, COLOURS[row], font)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
