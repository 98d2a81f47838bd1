"""A report is one file that needs nothing else, says what was measured, and cannot be broken by a prompt."""

import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import uniform_filter1d

from rcm_jax import media, records, report

VIDEO = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
MP4 = media.encode_mp4(VIDEO, fps=4, scale=4)
SCORES = {
    "real data": {"caption_accuracy": 0.997, "frechet": 0.512},
    "teacher, 50 steps": {"caption_accuracy": np.float32(0.98), "frechet": 1.234},
    "student, 4 steps": {"caption_accuracy": jnp.float32(0.875), "frechet": float("nan"), "motion_blur": 2},
}
VOID = {"meta", "img", "input"}


class Page(HTMLParser):
    """What a reader sees: visible text, cells of each table, and every address that the page would load."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.text, self.links, self.tags, self.tables = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.links += [attributes[name] for name in ("src", "href", "srcset", "poster") if name in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open or "script" in self.open:
            return
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def write(path, **parts) -> str:
    report.write_report(path / "report.html", **{"title": "Run", "facts": {}, "scores": SCORES} | parts)
    return (path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    media.write_grid(folder / "grid.png", {"student": [VIDEO]}, ["a"])
    (folder / "a.mp4").write_bytes(MP4)
    return write(
        folder,
        facts={"machine": "2 cores & more", "seconds": 182.3456, "command": "python -m launch.demo --workdir='a b'"},
        targets={"student, 4 steps": {"caption_accuracy": (">=", 0.9), "motion_blur": ("<=", 1.5)}},
        methods={
            "rCM": {"recall": 0.8, "frechet": 2.0},
            "DMD": {"recall": 0.5, "frechet": 1.0},
            "sCM": {"recall": 0.8},
        },
        curves={"loss": (range(200), np.geomspace(100, 1, 200)), "gradient": ([1, 2], [0.5, 0.4])},
        videos={"teacher": [("one", MP4), ("two", folder / "a.mp4")], "student": [("one", MP4), ("two", MP4)]},
        grid_png=folder / "grid.png",
    )


def test_it_is_one_file_that_loads_nothing(full):
    page = Page(full)
    assert len(page.links) == 5
    assert all(link.startswith(("data:video/mp4;base64,", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", full))


def test_videos_and_grid_are_inside_byte_for_byte(full):
    page = Page(full)
    videos = [attributes for tag, attributes in page.tags if tag == "video"]
    for video in videos:
        assert base64.b64decode(video["src"].split(",")[1]) == MP4
        assert (video["width"], video["height"]) == ("32", "32")
        assert {"autoplay", "loop", "muted", "playsinline"} <= video.keys()  # plays by itself, also without the script
    assert [video["aria-label"] for video in videos] == ["teacher: one", "teacher: two", "student: one", "student: two"]
    assert base64.b64decode(page.links[-1].split(",")[1])[:8] == b"\x89PNG\r\n\x1a\n"


def test_facts_are_shown(full):
    text = " ".join(Page(full).text)
    for fact in ("2 cores & more", "182.3", "python -m launch.demo --workdir='a b'"):
        assert fact in text


def test_scores_have_a_row_a_score_and_a_column_a_sampler(full):
    assert Page(full).tables[0] == [
        ["", "real data", "teacher, 50 steps", "student, 4 steps"],
        ["Caption accuracy\xa0↑", "99.7%", "98.0%", "87.5%✗ ≥ 90%"],
        ["Fréchet distance\xa0↓", "0.512", "1.234", "–"],
        ["motion blur", "–", "–", "2✗ ≤ 1.5"],
    ]


@pytest.mark.parametrize(
    ("score", "bound", "met"),
    [
        (0.9, (">=", 0.9), True),
        (0.8999, (">=", 0.9), False),
        (1.5, ("<=", 1.5), True),
        (1.6, ("<=", 1), False),
        (float("nan"), (">=", 0.0), False),
        (float("nan"), ("<=", 9.0), False),
    ],
)
def test_targets_are_met_or_missed(tmp_path, score, bound, met):
    html = write(tmp_path, scores={"student": {"recall": score}}, targets={"student": {"recall": bound}})
    assert ("✓ met, ✗ missed" in html, f"{int(met)} of 1 targets met" in html) == (True, True)
    assert ('class="met"' in html, 'class="missed"' in html) == (met, not met)


def test_best_of_the_methods_is_bold(full):
    bold = re.findall(r"<b>([^<]*)</b>", full)
    assert bold == ["0.800", "1.000", "0.800"]  # both of a tie, and the lower distance


def test_what_is_not_given_leaves_no_trace(tmp_path):
    page = Page(write(tmp_path))
    assert [page.count(tag) for tag in ("h2", "table", "video", "svg", "img", "script", "button")] == [1, 1] + 5 * [0]


HOSTILE = """</td></script><script>alert("x")</script>'" onload='y' & é 数字"""


def test_text_of_users_stays_text(tmp_path):
    page = Page(
        write(
            tmp_path,
            title=HOSTILE,
            facts={HOSTILE: HOSTILE, "command": HOSTILE},
            scores={HOSTILE: {"recall": 0.5, HOSTILE: 1.0}},
            methods={HOSTILE: {HOSTILE: 1.0}},
            curves={HOSTILE: ([0, 1], [2.0, 1.0]), HOSTILE + " empty": ([], [])},
            videos={HOSTILE: [(HOSTILE, MP4)]},
        )
    )
    assert page.count("script") == 1  # our own
    assert not any("onload" in attributes for _, attributes in page.tags)
    # title twice, fact's name and value, command, column, score in two tables, method, two curves, prompt, row
    assert "".join(page.text).count(HOSTILE) == 13
    assert {"title": HOSTILE} in [attributes for tag, attributes in page.tags if tag == "div"]
    labels = [attributes["aria-label"] for _, attributes in page.tags if "aria-label" in attributes]
    assert labels == [f"{HOSTILE}: {HOSTILE}", f"{HOSTILE} by iteration, 1 at the end"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"targets": {"student": {"recall": (">=", 1.0)}}}, r"targets\['student'\]\['recall'\] has no score"),
        ({"targets": {"real data": {"frechet": (">", 1.0)}}}, r"has sign='>': it must be"),
        ({"videos": {"a": [("one", MP4)], "b": [("two", MP4)]}}, r"videos\['b'\] must have the prompts .* \['one'\]"),
        ({"videos": {"a": [("one", b"no video")]}}, r"videos\['a'\], 'one' is not a video: browsers play h264 yuv420p"),
        ({"videos": {"a": [("one", media.encode_gif(VIDEO, fps=4))]}}, r"'one' is gif .*: browsers play h264"),
        ({"curves": {"loss": ([0, 1, 2], [1.0])}}, r"curves\['loss'\] has \(3,\) iterations and \(1,\) values"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **parts)
    assert not list(tmp_path.iterdir())


def draw(iterations, values) -> tuple[dict[str, np.ndarray], list[str]]:
    """Points of the raw and the smooth line, and the labels, of a curve read as XML."""
    figure = ElementTree.fromstring(report.draw_curve("loss", iterations, values))
    lines = {
        line.get("class"): np.array([point.split(",") for point in line.get("points").split()], float)
        for line in figure.iter("polyline")
    }
    return lines, [text.text for text in figure.iter("text")]


def test_a_curve_that_spans_decades_is_straight_on_a_logarithmic_axis():
    lines, labels = draw(np.arange(100), np.geomspace(1000, 1, 100))
    x, y = lines["raw"].T
    np.testing.assert_allclose(np.diff(y), np.diff(y).mean(), atol=0.11)
    assert {"1", "10", "100"} <= set(labels)
    assert (y[0] < y[-1], x[0] < x[-1]) == (True, True)  # down on the page is a lower value


def test_labels_tell_neighbouring_ticks_apart():
    _, labels = draw([10_000, 10_020], [2.00001, 2.00002])
    assert labels == ["2.00001", "2.000015", "2.00002", "10,000", "10,005", "10,010", "10,015", "10,020"]


def test_other_curves_have_a_linear_axis():
    lines, labels = draw([0, 1000, 2000, 3000], [-1.0, 0.0, 1.0, 2.0])
    np.testing.assert_allclose(np.diff(lines["raw"][:, 1]), np.diff(lines["raw"][:, 1]).mean(), atol=0.11)
    assert labels == ["-1", "0", "1", "2", "0", "1,000", "2,000", "3,000"]


def test_smooth_line_is_the_centred_mean():
    values = np.random.default_rng(0).normal(size=500)
    lines, _ = draw(np.arange(500), values)
    middle = uniform_filter1d(values, 11)[5:-5]
    smooth, raw = lines["smooth"][5:-5, 1], lines["raw"][5:-5, 1]
    inside = np.abs(raw - np.clip(raw, 13, 171)) == 0  # spikes beyond the axis are cut
    slope, offset = np.polyfit(values[5:-5][inside], raw[inside], 1)
    np.testing.assert_allclose(smooth, slope * middle + offset, atol=0.12)


def test_a_long_curve_is_thinned_without_losing_its_spikes():
    values = 1 + 0.1 * np.sin(np.arange(100_000))
    values[54_321], values[65_432] = 1.4, 0.6
    lines, _ = draw(np.arange(100_000), values)
    assert len(lines["raw"]) <= 600
    peak, dip = lines["raw"][:, 1].argmin(), lines["raw"][:, 1].argmax()
    np.testing.assert_allclose(lines["raw"][[peak, dip], 0], 46 + 304 * np.array([0.54321, 0.65432]), atol=0.2)


@pytest.mark.parametrize(
    ("iterations", "values", "points"),
    [
        ([5], [1.0], 1),
        ([0, 1, 2], [3.0, 3.0, 3.0], 3),
        ([0, 1, 2], [0.0, 0.0, 0.0], 3),
        ([0, 1, 2, 3], [np.nan, 2.0, np.inf, 1.0], 2),
        ([0, 1], [1e-30, 1e30], 2),
        ([7, 7], [1.0, -1.0], 2),
    ],
)
def test_odd_curves_stay_inside_the_picture(iterations, values, points):
    lines, labels = draw(iterations, values)
    assert len(lines["raw"]) == points
    for line in lines.values():
        assert ((line >= 0) & (line <= [360, 200])).all()
    assert labels


def test_a_curve_without_a_finite_value_says_so(tmp_path):
    assert "no finite values" in write(tmp_path, curves={"loss": ([0, 1], [np.nan, np.nan])})


def test_the_log_of_a_run_is_drawn_as_it_is(tmp_path):
    with records.RunRecords(tmp_path, total=30, tokens_per_step=1) as run:
        for iteration in (10, 20, 30):
            run.write(iteration, {"loss": 1 / iteration, "spike": float("inf")})
    page = Page(write(tmp_path, curves=records.read_metrics(tmp_path / "metrics.jsonl")))
    assert page.count("figure") == 4
    assert page.count("svg") == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1500, "1,500"),
        (0.25, "0.25"),
        (2e-5, "2e-5"),
        (-1.5e7, "-1.5e7"),
        (123456, "123,000"),
        (1e-3, "0.001"),
    ],
)
def test_numbers_at_the_axes_are_short(value, text):
    assert report.format_number(value) == text
