"""Line charts as PNG, drawn with Pillow: panels in rows of two, each with its legend."""

import io
import itertools
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN, LEGEND = 380, 50, 280  # pixels: a panel's square, the room for its axes, the room for its legend
COLUMNS = 2
COLOURS = ("#1b6ca8", "#d1495b", "#8f2d3a", "#edae49", "#3c8d53", "#7a5195", "#555555", "#00a6a6", "#b07aa1", "#9c6b30")

Points = Sequence[tuple[float, float, str]]  # x and y up to 1, and what is written beside


def curve_points(values_W: Sequence[float | None]) -> Points:
    """The points of a curve over windows of equal length, each at the middle of its own; None is left out."""
    count = len(values_W)
    return [((window + 0.5) / count, value, "") for window, value in enumerate(values_W) if value is not None]


def draw_lines(
    panels: Mapping[str, Mapping[str, Points]],
    *,
    x_label: str,
    y_label: str,
    lowest: float = 0.0,
    lowest_x: float | None = None,
) -> bytes:
    """A PNG of panels by title, each with lines by name; both axes run from `lowest`, or x from its own, to 1.

    Points with a note have a dot, and so has one that is alone.
    """
    lowest_x = lowest if lowest_x is None else lowest_x
    width, height = SIZE + 2 * MARGIN + LEGEND, SIZE + 2 * MARGIN
    image = Image.new("RGB", (COLUMNS * width, -(-len(panels) // COLUMNS) * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for index, (title, lines) in enumerate(panels.items()):
        row, column = divmod(index, COLUMNS)
        left, top = column * width + MARGIN, row * height + MARGIN
        draw.rectangle((left, top, left + SIZE, top + SIZE), outline="#999999")
        draw.text((left, top - 20), title, "black", font)
        draw.text((left + SIZE / 2 - 20, top + SIZE + 22), x_label, "black", font)
        draw.text((left + 6, top + 4), y_label, "black", font)
        for tick in range(0, 11, 2):
            share, at = tick / 10, SIZE * tick / 10
            draw.text((left + at - 12, top + SIZE + 5), f"{lowest_x + (1 - lowest_x) * share:.2f}", "black", font)
            label = f"{lowest + (1 - lowest) * share:.{2 if lowest < 0.9 else 3}f}"
            draw.text((left - 38, top + SIZE - at - 8), label, "black", font)
        for place, ((name, points), colour) in enumerate(zip(lines.items(), itertools.cycle(COLOURS), strict=False)):
            spots = [
                (left + SIZE * (x - lowest_x) / (1 - lowest_x), top + SIZE * (1 - y) / (1 - lowest))
                for x, y, _ in points
            ]
            draw.line(spots, colour, 2)
            draw.text((left + SIZE + 10, top + 20 * place), name, colour, font)
            for (x, y), (*_, note) in zip(spots, points, strict=True):
                if note or len(points) == 1:
                    draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
                    draw.text((x + 5, y - 14), note, colour, font)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
