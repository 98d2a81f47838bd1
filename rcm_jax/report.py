"""One HTML file that shows a run: facts, scores against targets, sample videos in step, loss curves, sample grid.

It opens from disk without a network: pictures and videos are inside it, curves are SVG, the script is ten lines.
"""

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, SupportsFloat

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import Float
from numpy.typing import ArrayLike

from rcm_jax import media

Scores = Mapping[str, Mapping[str, SupportsFloat]]
Bound = tuple[str, float | int]  # (">=" or "<=", number)


class Score(NamedTuple):
    """How a score is shown. better: "higher", "lower", or "" where neither is."""

    label: str
    better: str
    format: str


SCORES = {
    "caption_accuracy": Score("Caption accuracy", "higher", ".1%"),
    "digit_accuracy": Score("Digit accuracy", "higher", ".1%"),
    "direction_accuracy": Score("Direction accuracy", "higher", ".1%"),
    "frechet": Score("Fréchet distance", "lower", ".3f"),
    "precision": Score("Precision", "higher", ".3f"),
    "recall": Score("Recall", "higher", ".3f"),
    "coverage": Score("Coverage", "higher", ".3f"),
    "diversity": Score("Diversity (real = 1)", "", ".3f"),
    "feature_diversity": Score("Feature diversity", "", ".3f"),
    "latent_diversity": Score("Latent diversity", "", ".3f"),
    "sampling_seconds": Score("Sampling, s", "lower", ".3g"),
    "decoding_seconds": Score("Decoding, s", "lower", ".3g"),
    "frames_per_second": Score("Frames a second", "higher", ".3g"),
    "n": Score("Videos scored", "", ",.0f"),
    "n_real": Score("Real videos", "", ",.0f"),
}
ARROWS = {"higher": "↑", "lower": "↓", "": ""}


def write_report(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, object],
    scores: Scores,
    targets: Mapping[str, Mapping[str, Bound]] | None = None,
    methods: Scores | None = None,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    videos: Mapping[str, Sequence[tuple[str, bytes | str | Path]]] | None = None,
    grid_png: bytes | str | Path | None = None,
) -> None:
    """Writes the report. A part that is not given leaves no trace in it.

    facts: name -> value, such as machine, versions, seconds; "command" gets a line of its own.
    scores: column -> {score: number}, such as {"real data": ..., "teacher, 50 steps": ..., "student, 4 steps": ...}.
    targets: column -> {score: (">=" or "<=", bound)}; each is marked as met or missed in its cell.
    methods: row -> {score: number}, a second table that compares methods; the best of each column is bold.
    curves: name -> (iterations, values), as records.read_metrics gives them.
    videos: row -> [(prompt, MP4 or its path)], the same prompts in the same order in every row.
    Raises ValueError, before anything is written, for a target without its score, rows that do not match, curves of
    unequal length, and videos that browsers cannot play.
    """
    sections = [
        facts_list(facts),
        section("Scores", _score_table(scores, targets or {})),
        section("Methods compared", method_table(methods)) if methods else "",
        section("Samples", _video_table(videos), PLAY_BUTTON) if videos else "",
        section("Training curves", _curve_grid(curves)) if curves else "",
        section("Sample frames", _grid(grid_png)) if grid_png else "",
    ]
    page = PAGE.format(title=escape(title), style=STYLE, script=SCRIPT if videos else "", body="\n".join(sections))
    media.write_file(path, page.encode("utf-8", "replace"))


def section(heading: str, content: str, extra: str = "") -> str:
    """A part of the page: HTML under a heading, with `extra` beside it."""
    return f"<section><header><h2>{escape(heading)}</h2>{extra}</header>{content}</section>"


def facts_list(facts: Mapping[str, object]) -> str:
    """Names and values; "command" gets a line of its own."""
    items = []
    for name, value in facts.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        if name == "command":
            items.append(f'<div class="wide"><dt>command</dt><dd><code>{escape(text)}</code></dd></div>')
        else:
            items.append(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>")
    return f'<dl class="facts">{"".join(items)}</dl>'


def _score_table(scores: Scores, targets: Mapping[str, Mapping[str, Bound]]) -> str:
    for column, bounds in targets.items():
        for name, (sign, _) in bounds.items():
            if name not in scores.get(column, {}):
                raise ValueError(
                    f"targets[{column!r}][{name!r}] has no score to compare with: score it or drop the target"
                )
            if sign not in (">=", "<="):
                raise ValueError(f'targets[{column!r}][{name!r}] has {sign=}: it must be ">=" or "<="')
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in scores)
    rows = []
    for name in _names(scores):
        cells = "".join(
            f"<td>{format_score(name, values.get(name))}{_target(name, values, targets.get(column, {}))}</td>"
            for column, values in scores.items()
        )
        rows.append(f'<tr><th scope="row">{_label(name)}</th>{cells}</tr>')
    return f"{_verdict(scores, targets)}{table(head, rows)}"


def method_table(methods: Scores, unjudged: Collection[str] = ()) -> str:
    """A row a method, the best of each score bold, save of those that cannot be compared."""
    names = _names(methods)
    head = "".join(f'<th scope="col">{_label(name)}</th>' for name in names)
    judged = [name for name in names if name not in unjudged]
    best = {name: _best(name, [values.get(name) for values in methods.values()]) for name in judged}
    rows = []
    for method, values in methods.items():
        cells = ""
        for name in names:
            text = format_score(name, values.get(name))
            cells += f"<td>{f'<b>{text}</b>' if text == best.get(name) else text}</td>"
        rows.append(f'<tr><th scope="row">{escape(method)}</th>{cells}</tr>')
    return table(head, rows)


def table(head: str, rows: Sequence[str]) -> str:
    """Rows under a head whose first cell is empty."""
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _names(scores: Scores) -> list[str]:
    """The scores that occur, known ones first, in one order."""
    given = dict.fromkeys(name for values in scores.values() for name in values)
    return [name for name in SCORES if name in given] + [name for name in given if name not in SCORES]


def find_score(name: str) -> Score:
    """How a score of this name is shown."""
    return SCORES.get(name, Score(name.replace("_", " "), "", ".4g"))


def _label(name: str) -> str:
    score = find_score(name)
    arrow = ARROWS[score.better]
    hint = f'&nbsp;<span class="muted" title="{score.better} is better">{arrow}</span>' if arrow else ""
    return escape(score.label) + hint


def format_score(name: str, value: SupportsFloat | None) -> str:
    return "–" if value is None or not math.isfinite(value) else format(float(value), find_score(name).format)


def _best(name: str, values: Sequence[SupportsFloat | None]) -> str | None:
    """The best value as shown (ties on paper are ties), None where no direction is better or nothing is compared."""
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    better = {"higher": max, "lower": min}.get(find_score(name).better)
    return format_score(name, better(finite)) if better and len(finite) > 1 else None


def _met(value: SupportsFloat, bound: Bound) -> bool:
    return float(value) >= bound[1] if bound[0] == ">=" else float(value) <= bound[1]


def _target(name: str, values: Mapping[str, SupportsFloat], bounds: Mapping[str, Bound]) -> str:
    if name not in bounds:
        return ""
    sign = {">=": "≥", "<=": "≤"}[bounds[name][0]]
    number = bounds[name][1]
    bound = f"{100 * number:.3g}%" if find_score(name).format.endswith("%") else f"{number:.3g}"
    if _met(values[name], bounds[name]):
        return f'<small class="met" title="target met">✓ {sign} {bound}</small>'
    return f'<small class="missed" title="target missed">✗ {sign} {bound}</small>'


def _verdict(scores: Scores, targets: Mapping[str, Mapping[str, Bound]]) -> str:
    results = [_met(scores[column][name], bound) for column in targets for name, bound in targets[column].items()]
    if not results:
        return ""
    return f'<p class="muted">{sum(results)} of {len(results)} targets met (✓ met, ✗ missed).</p>'


def _video_table(videos: Mapping[str, Sequence[tuple[str, bytes | str | Path]]]) -> str:
    prompts = [prompt for prompt, _ in next(iter(videos.values()))]
    head = "".join(f'<th scope="col"><div title="{escape(prompt)}">{escape(prompt)}</div></th>' for prompt in prompts)
    rows, widest = [], 0
    for label, row in videos.items():
        if [prompt for prompt, _ in row] != prompts:
            raise ValueError(f"videos[{label!r}] must have the prompts of the first row in the same order: {prompts}")
        cells = ""
        for prompt, video in row:
            mp4 = video if isinstance(video, bytes) else Path(video).read_bytes()
            width, height = _playable_size(mp4, f"videos[{label!r}], {prompt!r}")
            widest = max(widest, width)
            cells += (
                f'<td><video src="{_data_url("video/mp4", mp4)}" width="{width}" height="{height}"'
                f' aria-label="{escape(f"{label}: {prompt}")}" autoplay loop muted playsinline></video></td>'
            )
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    rendering = "pixelated" if widest <= 256 else "auto"  # small videos are enlarged: their pixels stay square
    style = f"--columns:{len(prompts)};--widest:{min(widest, 416)}px;--rendering:{rendering}"
    return (
        f'<div class="scroll"><table class="videos" style="{style}"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _playable_size(mp4: bytes, name: str) -> tuple[int, int]:
    """(width, height) of an H.264 yuv420p MP4, the one kind that every browser plays."""
    try:
        with av.open(io.BytesIO(mp4)) as container:
            codec = container.streams.video[0].codec_context
            kind = f"{codec.name} {codec.pix_fmt}"
            size = codec.width, codec.height
    except (FFmpegError, IndexError):
        kind, size = "not a video", (0, 0)
    if kind != "h264 yuv420p":
        raise ValueError(f"{name} is {kind}: browsers play h264 yuv420p, write it with media.write_video")
    return size


def _grid(grid_png: bytes | str | Path) -> str:
    png = grid_png if isinstance(grid_png, bytes) else Path(grid_png).read_bytes()
    return (
        f'<div class="scroll"><img class="grid" src="{_data_url("image/png", png)}" alt="frames of the samples"></div>'
    )


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _curve_grid(curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> str:
    note = (
        '<p class="muted">By iteration: single values faint, their moving average over them, its end at the right.</p>'
    )
    return f'{note}<div class="curves">{"".join(draw_curve(name, *curve) for name, curve in curves.items())}</div>'


# Plot area of a curve within its 360 x 200 picture.
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 12, 172


def draw_curve(name: str, iterations: ArrayLike, values: ArrayLike) -> str:
    """A figure with the raw values faint and their moving average over them, as inline SVG.

    The axis is logarithmic for positive values that span more than a factor 20; single spikes may leave the picture.
    """
    x, y = np.asarray(iterations, float), np.asarray(values, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"curves[{name!r}] has {x.shape} iterations and {y.shape} values: they must be equally many")
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    caption = f"<span>{escape(name)}</span>"
    if not len(x):
        return f'<figure><figcaption>{caption}<span class="muted">no finite values</span></figcaption></figure>'
    logarithmic = bool(y.min() > 0 and y.max() > 20 * y.min())
    y = np.log10(y) if logarithmic else y
    smooth = _moving_average(y)
    low, high = min(np.quantile(y, 0.01), smooth.min()), max(np.quantile(y, 0.99), smooth.max())
    margin = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    low, high = low - margin, high + margin
    first, last = x.min(), max(x.max(), x.min() + 1)

    def across(x):
        return LEFT + (x - first) / (last - first) * (RIGHT - LEFT)

    def down(y):
        return BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP)

    raw = _polyline(across(x), np.clip(down(y), TOP, BOTTOM), "raw")
    line = _polyline(across(x), down(smooth), "smooth")
    ticks = [
        f'<path class="rule" d="M{LEFT} {down(at):.1f}H{RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{down(at) + 3.5:.1f}" text-anchor="end">{label}</text>'
        for at, label in (_log_ticks(low, high) if logarithmic else _linear_ticks(low, high, 4))
    ]
    ticks += [
        f'<text x="{across(at):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{label}</text>'
        for at, label in _linear_ticks(first, last, 4)
    ]
    latest = format_number(10 ** smooth[-1] if logarithmic else smooth[-1])
    return (
        f'<figure><figcaption>{caption}<span class="muted">{latest}</span></figcaption>'
        f'<svg viewBox="0 0 360 200" role="img" aria-label="{escape(name)} by iteration, {latest} at the end">'
        f'{"".join(ticks)}<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>{raw}{line}</svg></figure>'
    )


def _moving_average(y: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Centred mean over a fiftieth of the curve, over fewer values at its ends."""
    half = len(y) // 100
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    return (total[stop] - total[start]) / (stop - start)


def _polyline(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], kind: str) -> str:
    """Lowest and highest point of each of 300 stretches: no more than a screen can show, and no spike is lost."""
    keep = np.arange(len(x))
    if len(x) > 600:
        parts = np.array_split(keep, 300)
        keep = np.unique([part[pick(y[part])] for part in parts for pick in (np.argmin, np.argmax)])
    points = " ".join(f"{x[i]:.1f},{y[i]:.1f}" for i in keep)
    return f'<polyline class="{kind}" points="{points}"/>'


def _linear_ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """About `count` multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    ticks = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    digits = 1 + math.floor(math.log10(max(-low, high))) - round(math.log10(power))
    return [(float(tick), format_number(tick, max(3, digits))) for tick in ticks]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten, at most five of them; with 2 and 5 between where there are fewer than three."""
    decades = np.arange(math.floor(low), math.ceil(high) + 1)
    inside = decades[(decades >= low) & (decades <= high)]
    if len(inside) >= 3:
        return [(float(power), format_number(10.0**power)) for power in inside[:: math.ceil(len(inside) / 5)]]
    ticks = [math.log10(factor * 10.0**power) for power in decades for factor in (1, 2, 5)]
    return [(tick, format_number(10**tick)) for tick in ticks if low <= tick <= high]


def format_number(value: float | int, digits: int = 3) -> str:
    """1,500, 0.25, 2e-5: so many significant digits, no needless zeros."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        number, power = f"{value:.{digits - 1}e}".split("e")
        return f"{float(number):.{digits}g}e{int(power)}"
    return f"{float(f'{value:.{digits}g}'):,.10g}"


PLAY_BUTTON = '<button id="play" type="button" hidden>Pause</button>'

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
{script}
</body>
</html>
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1f2328; --muted: #656d76; --rule: #e3e6ea; --panel: #f6f8fa;
  --line: #0b62d6; --met: #1a7f37; --missed: #c3272b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1318; --ink: #e4e8ee; --muted: #949ea9; --rule: #2a313a; --panel: #181e25;
    --line: #67a8ff; --met: #56c271; --missed: #ff8078;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 20px; }
h2 { font-size: 18px; font-weight: 620; letter-spacing: -0.005em; margin: 0; }
section { margin-top: 40px; }
section > header { display: flex; align-items: center; justify-content: space-between; margin-bottom: 12px; }
p { margin: 0 0 10px; }
small { display: block; font-size: 12px; line-height: 1.35; }
.muted { color: var(--muted); font-weight: 400; }
.met { color: var(--met); }
.missed { color: var(--missed); }
.facts {
  display: flex; flex-wrap: wrap; gap: 12px 40px;
  margin: 0; padding: 16px 18px; background: var(--panel); border-radius: 10px;
}
.facts dt { color: var(--muted); font-size: 12px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts .wide { flex-basis: 100%; }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
/* A shade at the right edge for as long as there is more to scroll to. */
.scroll {
  overflow-x: auto;
  background: linear-gradient(to left, var(--paper) 40%, transparent) right / 36px calc(100% + 1px) no-repeat local,
    linear-gradient(to left, var(--rule), transparent) right / 14px 100% no-repeat scroll;
}
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; vertical-align: top; font-weight: 400; white-space: nowrap; }
thead th { color: var(--muted); font-size: 13px; vertical-align: bottom; white-space: normal; }
tr > :first-child { padding-left: 0; text-align: left; position: sticky; left: 0; background: var(--paper); }
tr > :last-child { padding-right: 0; }
thead tr { border-bottom: 1px solid var(--muted); }
tbody tr + tr { border-top: 1px solid var(--rule); }
.videos { width: auto; }
.videos tr { border: 0; }
.videos th, .videos td { padding: 4px; white-space: normal; text-align: left; vertical-align: middle; }
.videos thead th { vertical-align: bottom; line-height: 1.35; }
.videos tr > :first-child { padding: 4px 16px 4px 0; white-space: nowrap; line-height: 1.35; }
.videos th div, .videos video {
  width: clamp(96px, calc((min(100vw, 1120px) - 220px) / var(--columns) - 8px), var(--widest)); overflow-wrap: anywhere;
}
.videos th div { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5; overflow: hidden; }
.videos video { display: block; height: auto; border-radius: 4px; image-rendering: var(--rendering); }
@media (max-width: 640px) {
  main { padding: 24px 16px 48px; }
  th, td { padding: 7px; font-size: 14px; }
  tbody th { white-space: normal; min-width: 104px; }
  small { font-size: 11px; }
  .videos tr > :first-child { white-space: normal; min-width: 84px; padding-right: 8px; }
}
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 24px; }
figure { margin: 0; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 13px; padding: 0 10px 0 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font-size: 10.5px; font-variant-numeric: tabular-nums; }
svg path, svg polyline { fill: none; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.rule { stroke: var(--rule); }
.axis { stroke: var(--muted); }
.raw { stroke: var(--line); opacity: 0.28; }
.smooth { stroke: var(--line); stroke-width: 1.75; }
.grid { display: block; width: 100%; min-width: 760px; height: auto; border-radius: 6px; }
button {
  font: inherit; font-size: 13px; color: var(--ink); background: var(--panel);
  border: 1px solid var(--rule); border-radius: 6px; padding: 3px 12px; cursor: pointer;
}
@media print { button { display: none; } }
"""

# The longest video sets the beat: when it ends, all start again together.
SCRIPT = """<script>
const videos = [...document.querySelectorAll("video")], button = document.getElementById("play");
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const show = () => {
  button.textContent = playing ? "Pause" : "Play";
  videos.forEach(video => playing ? video.play().catch(() => {}) : video.pause());
};
const restart = () => { videos.forEach(video => { video.currentTime = 0; }); show(); };
const ready = video => video.readyState || new Promise(done => { video.onloadedmetadata = video.onerror = done; });
Promise.all(videos.map(ready)).then(() => {
  videos.forEach(video => { video.loop = video.autoplay = false; });
  videos.reduce((a, b) => b.duration > a.duration ? b : a).onended = restart;
  button.hidden = false;
  button.onclick = () => { playing = !playing; show(); };
  restart();
});
</script>"""
