"""The page of the gates: what is in the file, and what Chromium makes of it."""

import base64
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_satformer.analysis.gates.page import PageText, write_page
from tests.browser import PATIENCE, Browser
from tests.debian import why_not

NASTY = ["</script>", "<b>bold</b>", "<!--<script>", "&amp;", '"', "\\", "\u2028", "@DATA@", ""]
ARROW_RIGHT, ESCAPE = "\ue014", "\ue00c"  # W3C WebDriver 17.4.2
PLAIN = ["The", " gates", "\n", " open", " \t", "\u4f60", " wide"]
CHOOSE = """
[...arguments].forEach((value, index) => {
    const select = document.querySelectorAll("select")[index];
    select.value = value;
    select.dispatchEvent(new Event("change"));
})"""
SUMMARY = {
    "rows": ["layer 2", "layer 3", "layer 5"],
    "columns": ["head 1", "head 2"],
    "value": "alpha",
    "notes": ["Gates are sparse: supported.", "<i>Heads</i> differ: undecided."],
}


def make_text(title: str, tokens: list[str], seed: int, signed: bool = False) -> PageText:
    """Half of its values are exactly 0, or one of its rows has none."""
    random = np.random.default_rng(seed)
    values = random.normal(0, 1, (3, 2, len(tokens)))
    values = values if signed else np.maximum(values, 0)
    if signed:
        values[0, 1] = np.nan
    return PageText(title, tokens, values, [None, *random.gamma(2, 1, len(tokens) - 1).tolist()])


class Found(HTMLParser):
    """The elements of a page, and what its script element of data holds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data = ""
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = ("id", "data") in attrs

    def handle_data(self, data):
        self.data += data if self._inside else ""


def read_page(path: Path) -> tuple[dict, list[str]]:
    found = Found(path.read_text())
    data = json.loads(found.data)
    for text in data["texts"]:
        values = np.frombuffer(base64.b64decode(text["values"]), "<f2")
        shape = (len(data["rows"]), len(data["columns"]), len(text["tokens"]))
        text["values"] = values.reshape(shape)
    return data, found.tags


def test_holds_what_it_was_given(tmp_path):
    texts = [make_text("one", PLAIN, 0), make_text("two", PLAIN * 2, 1, signed=True)]
    path = tmp_path / "new" / "gates.html"
    write_page(path, "Gates", SUMMARY, texts)
    data, _ = read_page(path)
    assert {name: data[name] for name in SUMMARY} == SUMMARY
    assert data["title"] == "Gates"
    for found, text in zip(data["texts"], texts, strict=True):
        assert (found["title"], found["tokens"]) == (text.title, text.tokens)
        np.testing.assert_allclose(found["values"], text.values, rtol=2**-11, atol=1e-6)
        assert found["losses"] == [None, *(pytest.approx(x, abs=1e-4) for x in text.losses[1:])]


def test_texts_are_no_markup(tmp_path):
    write_page(tmp_path / "plain.html", "Gates", SUMMARY, [make_text("one", PLAIN, 0)])
    tokens = [*NASTY, "\ud800"]
    notes = SUMMARY | {"notes": NASTY, "value": "<alpha>"}
    write_page(tmp_path / "nasty.html", NASTY[0], notes, [make_text(NASTY[2], tokens, 0)])
    _, plain = read_page(tmp_path / "plain.html")
    data, tags = read_page(tmp_path / "nasty.html")
    assert tags == plain
    assert data["texts"][0]["tokens"] == tokens
    assert (data["title"], data["notes"]) == (NASTY[0], NASTY)


def test_only_zero_is_zero(tmp_path):
    values = np.array([0.0, -0.0, 1e-30, -1e-12, 1e9, -1e9, np.inf, np.nan])
    text = PageText("one", ["a"] * 8, values.reshape(1, 1, 8), [float("nan")] * 8)
    write_page(tmp_path / "a.html", "Gates", SUMMARY | {"rows": ["1"], "columns": ["1"]}, [text])
    found = read_page(tmp_path / "a.html")[0]["texts"][0]
    kept = found["values"].ravel()
    assert np.array_equal(kept == 0, values == 0)
    assert np.array_equal(np.sign(kept), np.sign(values), equal_nan=True)
    assert np.isfinite(kept[:-1]).all()
    assert found["losses"] == [None] * 8


def test_a_large_model_stays_within_six_megabytes(tmp_path):
    values = np.zeros((24, 32, 256), np.float32)
    texts = [PageText(str(n), [" token"] * 256, values, [1.2345] * 256) for n in range(10)]
    labels = {
        "rows": [f"layer {n}" for n in range(24)],
        "columns": [f"head {n}" for n in range(32)],
    }
    write_page(tmp_path / "a.html", "Gates", SUMMARY | labels, texts)
    assert (tmp_path / "a.html").stat().st_size < 6e6


@pytest.mark.parametrize(
    ("shape", "losses"), [((2, 3, 7), 7), ((3, 2, 6), 7), ((3, 2), 7), ((3, 2, 7), 6)]
)
def test_what_does_not_fit_is_refused(tmp_path, shape, losses):
    text = PageText("one", PLAIN, np.zeros(shape), [None] * losses)
    with pytest.raises(
        ValueError, match=r"text 'one' must be by row, column and token \(3, 2, 7\)"
    ):
        write_page(tmp_path / "a.html", "Gates", SUMMARY, [text])
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if told := why_not():
        pytest.skip(told)
    root = Path(tempfile.mkdtemp(prefix="chromium-"))
    opened = None
    try:
        opened = Browser(root)
        yield opened
    except OSError as error:
        pytest.skip(str(error))
    finally:
        if opened is not None:
            opened.stop()
        shutil.rmtree(root, ignore_errors=True)


def read_grid(browser: Browser) -> tuple[list[list[str]], np.ndarray]:
    """The headings and the numbers of the panel, the means first. [1 + rows, 1 + columns]"""
    rows = browser.run(
        "return [...document.querySelectorAll('#grid tr')].map("
        "row => [...row.children].map(cell => cell.textContent))"
    )
    numbers = [[float(x) if x != "\u2013" else np.nan for x in row[1:]] for row in rows[1:]]
    return [rows[0], [row[0] for row in rows[1:]]], np.array(numbers)


def with_means(values: np.ndarray) -> np.ndarray:
    """What the grid shows of a token. [rows, columns] -> [1 + rows, 1 + columns]"""
    top = np.concatenate([[np.nanmean(values)], np.nanmean(values, 0)])
    rest = np.concatenate([np.nanmean(values, 1, keepdims=True), values], 1)
    return np.concatenate([top[None], rest])


def colour_at(image: Image.Image, element: dict) -> np.ndarray:
    """The most frequent colour in the place of an element: that behind its letters."""
    x, y, width, height = (int(element[name]) for name in ("x", "y", "width", "height"))
    pixels = np.asarray(image.crop((x + 2, y + 2, x + width - 2, y + height - 2))).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return colours[counts.argmax()].astype(int)


def take_picture(browser: Browser, path: Path) -> Image.Image:
    content = browser.screenshot()
    path.write_bytes(content)
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return image.convert("RGB")


def assert_shows(browser: Browser, text: PageText, index: int) -> None:
    """The panel tells of a token: its place and its loss, once it is painted, and its values."""
    loss = text.losses[index]
    told = "no loss" if loss is None else f"loss {loss:.3f}"
    told = f"{text.title}, token {index + 1} of {len(text.tokens)}, {told}"
    deadline = time.monotonic() + PATIENCE
    while told not in (shown := browser.find("#facts")[0]["text"]):
        assert time.monotonic() < deadline, f"{shown!r} is not {told!r}"
        time.sleep(0.1)
    headings, numbers = read_grid(browser)
    assert headings == [["head", "mean", "1", "2"], ["mean", *SUMMARY["rows"]]]
    expected = with_means(text.values[:, :, index])
    np.testing.assert_allclose(numbers, expected, rtol=2**-10, atol=6e-4)


TOKENS = [*PLAIN, *NASTY, " last"]
TEXTS = [make_text("one", TOKENS, 0), make_text("two", PLAIN, 1, signed=True)]


@pytest.fixture
def page(browser, tmp_path) -> Iterator[Browser]:
    """The page in a browser; its console stays empty, and nothing but the file is asked for."""
    path = tmp_path / "gates.html"
    write_page(path, "What the gates do", SUMMARY, TEXTS)
    browser.log("browser")
    browser.log("performance")
    browser.open(path)
    yield browser
    assert browser.log("browser") == []
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked == [path.as_uri()]


@pytest.mark.slow
def test_the_pointer_shows_a_token(page):
    elements = page.find(".text span")
    assert [element["text"] for element in elements] == [*TOKENS, *PLAIN]
    assert [note["text"] for note in page.find("#notes li")] == SUMMARY["notes"]
    assert not page.find(".text b, #notes i")
    assert page.run("return document.title") == "What the gates do"

    # whatever the panel says of a token, also of one without a letter, it stays where it is
    places = [(name, page.find(name)[0]) for name in ("#panel", "#grid", "#gridscale")]
    told = {"\n": "\u21b5", "\u2028": "U+2028", "": "\u2205", "</script>": "</script>"}
    told = {TOKENS.index(token): shown for token, shown in told.items()}
    told |= {1: "\u2423gates", 0: "The", len(TOKENS) + 3: "\u2423open"}
    for index, shown in told.items():
        page.point(elements[index])
        own = index - len(TOKENS)
        assert_shows(page, *((TEXTS[1], own) if own >= 0 else (TEXTS[0], index)))
        assert page.find("#token")[0]["text"] == shown
        for name, before in places:
            assert page.find(name)[0] | {"text": ""} == before | {"text": ""}, name
    assert [one["text"] for one in page.find("#grid td.missing")] == ["\u2013"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "row", "column"),
    [("value", -1, -1), ("value", 1, 1), ("value", 0, -1), ("loss", 0, 0)],
)
def test_colours_are_those_of_what_is_chosen(page, tmp_path, measure, row, column):
    page.run(CHOOSE, measure, row, column)
    image = take_picture(page, tmp_path / "page.png")
    values = TEXTS[0].values[[row] if row >= 0 else slice(None)]
    shown = values[:, [column] if column >= 0 else slice(None)].mean((0, 1))
    if measure == "loss":
        shown = np.array(TEXTS[0].losses, float)
    wide = [n for n, token in enumerate(TOKENS) if len(token.strip()) > 3]
    low, high = min(wide, key=lambda n: shown[n]), max(wide, key=lambda n: shown[n])
    elements = page.find(".text span")
    pale, strong = (colour_at(image, elements[n]) for n in (low, high))
    assert np.abs(pale - strong).max() > 60
    assert pale.sum() > strong.sum()


@pytest.mark.slow
def test_a_click_holds_a_token(page):
    elements = page.find(".text span")
    page.point(elements[3], "pointerDown", "pointerUp")
    page.point(elements[1])
    assert_shows(page, TEXTS[0], 3)
    page.point(page.find("#grid td")[-1], "pointerDown", "pointerUp")
    assert page.run("return [...document.querySelectorAll('select')].map(one => one.value)") == [
        *("value", "2", "1")
    ]
    assert_shows(page, TEXTS[0], 3)
    page.press(ARROW_RIGHT)
    assert_shows(page, TEXTS[0], 4)
    page.press(ESCAPE, ARROW_RIGHT)
    assert_shows(page, TEXTS[0], 5)
    page.point(elements[1], "pointerDown", "pointerUp", kind="touch")
    assert_shows(page, TEXTS[0], 1)


@pytest.mark.slow
def test_is_dark_for_who_has_it_dark(page, tmp_path):
    title = page.find("h1")[0]
    for mode in ("dark", "light"):
        features = [{"name": "prefers-color-scheme", "value": mode}]
        page.emulate("setEmulatedMedia", features=features)
        colour = colour_at(take_picture(page, tmp_path / f"{mode}.png"), title)
        assert colour.max() < 60 if mode == "dark" else colour.min() > 200
