"""One HTML page that shows two sets of samples side by side: same prompts and seeds, in step, with their scores.

The page links to the files where they lie, by paths relative to it, and needs no network.
"""

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from rcm_jax import media, report
from rcm_jax.config import UserError
from rcm_jax.sample_sets import Sample, SampleSet, list_samples
from rcm_jax.set_scores import RECORD, Scored, read_scores

# Scores that can be compared only where a condition agrees.
DEPENDENT = {
    "network": ("frechet", "precision", "recall", "coverage", "feature_diversity"),
    "real": ("frechet", "precision", "recall", "coverage"),
    "n": ("frechet", "precision", "recall", "coverage"),
    "latents": ("latent_diversity",),
    "device": ("sampling_seconds", "decoding_seconds", "frames_per_second"),
}

CONDITIONS = {
    "network": "networks or their clips",
    "real": "the real videos",
    "n": "the numbers of videos",
    "latents": "where the latents are from",
    "device": "devices",
}


class Compared(NamedTuple):
    """A set under a name, and its scores if it has some."""

    name: str
    samples: SampleSet
    scored: Scored | None


class Pairing(NamedTuple):
    """Samples of one prompt and seed in both sets, in the order of the first, and those that only one has."""

    pairs: list[tuple[Sample, Sample]]
    first_only: list[Sample]
    second_only: list[Sample]


def open_set(name: str, folder: Path) -> Compared:
    """A folder of samples, and what launch.evaluate wrote of its scores."""
    scores = folder / RECORD
    return Compared(name, list_samples(folder), read_scores(scores) if scores.exists() else None)


def pair(first: SampleSet, second: SampleSet) -> Pairing:
    """Finds samples of the same prompt and seed."""
    there = {(sample.prompt, sample.seed): sample for sample in second.samples}
    here = {(sample.prompt, sample.seed) for sample in first.samples}
    return Pairing(
        [(sample, there[key]) for sample in first.samples if (key := (sample.prompt, sample.seed)) in there],
        [sample for sample in first.samples if (sample.prompt, sample.seed) not in there],
        [sample for sample in second.samples if (sample.prompt, sample.seed) not in here],
    )


def write_page(path: Path, first: Compared, second: Compared) -> Pairing:
    """Writes the page and says what is on it.

    Raises UserError if no prompt and seed is in both sets.
    """
    pairing = pair(first.samples, second.samples)
    if not pairing.pairs:
        raise UserError(
            f"{first.samples.folder} and {second.samples.folder} have no prompt and seed in common: sample the same"
            " prompts with the same --seed"
        )
    folder = path.absolute().parent
    body = [
        _settings(first, second),
        report.section("Scores", _scores(first, second)),
        report.section(f"{len(pairing.pairs)} pairs of one prompt and seed", _pairs(pairing, first, second, folder)),
        _unpaired(first, pairing.first_only, folder),
        _unpaired(second, pairing.second_only, folder),
    ]
    title = f"{first.name} beside {second.name}"
    style = report.STYLE + STYLE
    page = report.PAGE.format(title=escape(title), style=style, body="\n".join(body), script=SCRIPT)
    media.write_file(path, page.encode("utf-8", "replace"))
    return pairing


def _settings(first: Compared, second: Compared) -> str:
    """What both were sampled with, and in a table what differs."""
    ours, theirs = (_shared(each.samples.samples) for each in (first, second))
    names = list(dict.fromkeys([*ours, *theirs]))
    differing = [name for name in names if ours.get(name) != theirs.get(name)]
    shared = report.facts_list({name: ours[name] for name in names if name not in differing})
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>'
        f"<td>{_shown(ours.get(name))}</td><td>{_shown(theirs.get(name))}</td></tr>"
        for name in differing
    ]
    head = f'<th scope="col">{escape(first.name)}</th><th scope="col">{escape(second.name)}</th>'
    table = report.section("What differs", report.table(head, rows)) if rows else ""
    return table + report.section("In common", shared)


def _shared(samples: Sequence[Sample]) -> dict[str, object]:
    """The settings of a set's samples, "various" where they differ."""
    first, *rest = (sample.settings for sample in samples)
    return {
        name: value if all(other.get(name) == value for other in rest) else "various" for name, value in first.items()
    }


def _shown(value: object) -> str:
    return "–" if value is None else escape(str(value))


def _scores(first: Compared, second: Compared) -> str:
    notes, unjudged = [], set()
    for each in (first, second):
        if each.scored is None:
            notes.append(f"{each.name} is not scored: python -m launch.evaluate score {each.samples.folder}")
            continue
        notes += [f"{each.name}: {note}" for note in each.scored.notes]
        broken = [name for name, value in each.scored.scores.items() if not math.isfinite(value)]
        if broken:
            words = ", ".join(report.find_score(name).label for name in broken)
            notes.append(f"{each.name} has scores that are not finite numbers, shown as –: {words}")
        count = len(each.samples.samples) + len(each.samples.unknown)
        if each.scored.scores.get("n") != count:
            notes.append(f"{each.name} was scored when it had {each.scored.scores.get('n')} samples, now {count}")
    if first.scored and second.scored:
        both = first.scored.scores.keys() & second.scored.scores.keys()
        for name, scores in DEPENDENT.items():
            dependent = [score for score in scores if score in both]
            if dependent and first.scored.conditions.get(name) != second.scored.conditions.get(name):
                unjudged.update(dependent)
                words = ", ".join(report.find_score(score).label for score in dependent)
                notes.append(f"cannot be compared, for {CONDITIONS[name]} differ: {words}")
    scores = {each.name: each.scored.scores for each in (first, second) if each.scored}
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    table = report.method_table(scores, unjudged) if scores else ""
    return table + (f'<ul class="muted notes">{listed}</ul>' if notes else "")


def _pairs(pairing: Pairing, first: Compared, second: Compared, folder: Path) -> str:
    groups: dict[str, list[tuple[Sample, Sample]]] = {}
    for ours, theirs in pairing.pairs:
        groups.setdefault(ours.prompt, []).append((ours, theirs))
    parts = [CONTROLS] if any(sample.path.suffix == ".mp4" for both in pairing.pairs for sample in both) else []
    for prompt, both in groups.items():
        parts.append(f"<h3>{escape(prompt)}</h3>{_prompt_scores(prompt, first, second)}")
        for ours, theirs in both:
            figures = (_figure(each.name, sample, folder) for each, sample in ((first, ours), (second, theirs)))
            parts.append(f'<div class="pair">{"".join(figures)}</div>')
    return "".join(parts)


def _prompt_scores(prompt: str, first: Compared, second: Compared) -> str:
    found: Sequence[Mapping[str, float]] = [
        each.scored.prompts.get(prompt, {}) if each.scored else {} for each in (first, second)
    ]
    names = [name for name in found[0] if name in found[1]]
    words = [
        f"{report.find_score(name).label} {' | '.join(report.format_score(name, each[name]) for each in found)}"
        for name in names
    ]
    return f'<p class="muted">{escape(", ".join(words))}</p>' if words else ""


def _figure(name: str, sample: Sample, folder: Path) -> str:
    link, label = _link(sample.path, folder), escape(f"{name}: {sample.prompt}")
    width, _, height = str(sample.metadata.get("size", "")).partition("x")
    size = f' width="{width}" height="{height}"' if width.isdecimal() and height.isdecimal() else ""
    if sample.path.suffix == ".png":
        shown = f'<img src="{link}"{size} alt="{label}" loading="lazy">'
    else:
        shown = f'<video src="{link}"{size} aria-label="{label}" preload="none" controls muted playsinline></video>'
    return (
        f"<figure>{shown}<figcaption><span>{escape(name)}</span>"
        f'<a class="muted" href="{link}">seed {sample.seed}</a></figcaption></figure>'
    )


def _unpaired(each: Compared, samples: Sequence[Sample], folder: Path) -> str:
    """What one set has alone, and its files that do not say what they show."""
    rows = [f"{escape(sample.prompt)}, seed {sample.seed}" for sample in samples]
    rows += ["tells no prompt and seed"] * len(each.samples.unknown)
    paths = [*(sample.path for sample in samples), *each.samples.unknown]
    if not rows:
        return ""
    listed = "".join(
        f'<li>{row}: <a href="{_link(path, folder)}">{escape(path.name)}</a></li>'
        for row, path in zip(rows, paths, strict=True)
    )
    return report.section(f"Only in {each.name}: {len(rows)}", f'<ul class="notes">{listed}</ul>')


def _link(path: Path, folder: Path) -> str:
    """A file's address from a page in the folder."""
    return escape(quote(Path(os.path.relpath(path.absolute(), folder)).as_posix()))


STYLE = """
h3 { font-size: 15px; font-weight: 620; margin: 28px 0 6px; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-bottom: 12px; }
.pair video, .pair img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--panel); }
.notes { padding-left: 18px; margin: 12px 0 0; overflow-wrap: anywhere; }
a { color: var(--line); }
#controls {
  position: sticky; top: 0; z-index: 1; display: flex; align-items: center; gap: 12px;
  padding: 8px 0; background: var(--paper);
}
#controls input { flex: 1; accent-color: var(--line); }
#controls output { min-width: 96px; text-align: right; font-variant-numeric: tabular-nums; }
td { white-space: normal; overflow-wrap: anywhere; }
"""

CONTROLS = """<div id="controls" hidden>
<button id="play" type="button">Play</button>
<input id="seek" type="range" min="0" max="1" step="any" value="0" aria-label="time in all videos">
<output id="time"></output>
</div>"""

# One clock for all videos. Only those in sight are loaded, and the clock waits for them. A video at its end has no
# future data and is not waited for; it shows its last frame until the longest one ends.
SCRIPT = """<script>
const videos = [...document.querySelectorAll("video")], shown = new Set();
const [controls, play, seek, time] = ["controls", "play", "seek", "time"].map(id => document.getElementById(id));
const SLACK = 0.1;  // seconds that a video may be off the clock
let playing = false, clock = 0, before = 0;
const length = () => Math.max(0.01, ...[...shown].map(video => video.duration || 0));
const place = video => { video.currentTime = Math.min(clock, video.duration || 0); };
const loads = video => !video.error && video.readyState < (clock < video.duration - 2 * SLACK ? 3 : 2);
const follow = (video, runs) => {
  // Some browsers load a video only when it is told to play.
  const plays = playing && (runs || loads(video)) && !(clock >= video.duration);
  if (plays && video.paused) video.play().catch(() => {});
  if (!plays && !video.paused) video.pause();
  if (video.seeking || video.readyState < 1) return;
  if (Math.abs(video.currentTime - Math.min(clock, video.duration)) > (runs ? SLACK : 0.001)) place(video);
};
const step = now => {
  const runs = playing && ![...shown].some(loads);
  if (runs) clock += (now - before) / 1000;
  if (runs && clock > length()) clock = 0;
  before = now;
  shown.forEach(video => follow(video, runs));
  seek.max = length();
  seek.value = clock;
  time.textContent = `${clock.toFixed(1)} / ${length().toFixed(1)} s`;
  requestAnimationFrame(step);
};
if (controls) {
  const sight = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting}) => {
    if (isIntersecting === shown.has(target)) return;
    if (isIntersecting) shown.add(target); else shown.delete(target);
    target.preload = isIntersecting ? "auto" : "none";
    target.load();
  }), {rootMargin: "200px"});
  videos.forEach(video => { video.controls = false; sight.observe(video); });
  play.onclick = () => { playing = !playing; play.textContent = playing ? "Pause" : "Play"; };
  seek.oninput = () => { clock = +seek.value; shown.forEach(place); };
  controls.hidden = false;
  requestAnimationFrame(now => { before = now; step(now); });
}
</script>"""
