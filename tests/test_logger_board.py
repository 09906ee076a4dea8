"""Tests of board.py: table, means, thinned curves, code changes, hostile text; the page in a headless browser.

The browser is Chromium, driven through its WebDriver (Debian: apt-get install chromium chromium-driver); where there is
none, its tests are skipped.
"""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from random import Random
from unicodedata import bidirectional, category
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runlogs import board

QUICK = settings(deadline=None, database=None, max_examples=40)
VOID = {"meta", "input", "br"}
HOSTILE = (
    "</script ><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'`>&amp;|[a](javascript:hacked)"
    "\x1b[31mred\0\r\n\u202eevil\u2028\ud800𝔸😀 <!-- ${window.hacked=1} {body} %s"
)


def curve(label, start, steps=8, seconds=2.0):
    """Validation at even steps, training loss at all of them, `seconds` a step."""
    losses = [start / (step + 1) + 1 for step in range(steps + 1)]
    return {"label": label, "points": [[i, seconds * i, None if i % 2 else x, x + 0.5] for i, x in enumerate(losses)]}


def record(name, **more):
    base = {"name": name, "date": "2030-01-02", "folder": f"2030-01-02_{name}", "readme_title": f"About {name}",
            "n": 2, "mean_val_loss": 1.88571, "sd_val_loss": 0.00126, "mean_time_s": 1234.5, "sd_time_s": 1.25,
            "steps": 1000, "tokens": 65_536_000, "gpus": "CPU, 2 cores", "torch": "2.13.0+cpu",
            "code_hash": "0123456789abcdef", "source": "a = 1\nb = 2\n",
            "curves": [curve("run 0", 4.0), curve("run 1", 6.0)]}  # fmt: skip
    return base | more


FIRST = record("First")
SECOND = record("Second", date="2030-02-03", mean_time_s=1000.0, source="a = 1\nb = 3\nc = 4\n")
EMPTY = {"name": "Nothing", "curves": [], "date": None}
EVIL = dict.fromkeys(("name", "date", "folder", "readme_title", "gpus", "torch", "code_hash", "source"), HOSTILE)
EVIL |= {"n": math.nan, "steps": 10**400, "tokens": "1<2", "mean_time_s": math.inf, "mean_val_loss": True,
         "curves": [{"label": HOSTILE, "points": [[0, math.nan, 3.0, None], [None, 1, 2, 3]]}]}  # fmt: skip


class Page(HTMLParser):
    """Parsed page: balance is checked while parsing, `tags` are the start tags with attributes, `text` by element."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *elements):
        return "".join(data for element, data in self.texts if element in elements)

    def island(self):
        return json.loads(self.text("script").partition("\n")[0].partition('"use strict"')[0])


# --- order, table


def test_records_are_numbered_by_date_and_those_of_one_day_from_slow_to_fast():
    records = [record("c", date="2030-03-01", mean_time_s=5), record("a", date="2030-01-01", mean_time_s=1)]
    records += [record("d", date="2030-03-01", mean_time_s=4), record("b", date="2030-03-01", mean_time_s=None)]
    assert [(r["number"], r["name"]) for r in board.ranked(records)] == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]


def test_markdown_is_exactly_this():
    assert board.board_markdown([FIRST, record("A|B", date="2030-02-03", sd_val_loss=None, tokens=None)]) == (
        "| # | Record | Date | Validation loss (nats/token, mean ± sd) | Time (s, mean ± sd) | Steps"
        " | Tokens (millions) | n (runs) | GPUs | torch | Code (hash) |\n"
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |\n"
        "| **2** | [A\\|B](2030-01-02_A%7CB)<br>About A\\|B | 2030-02-03 | **1.8857** | **1,234.50 ± 1.25** | 1,000"
        " | – | 2 | CPU, 2 cores | 2.13.0+cpu | 01234567 |\n"
        "| 1 | [First](2030-01-02_First)<br>About First | 2030-01-02 | 1.8857 ± 0.0013 | 1,234.50 ± 1.25 | 1,000"
        " | 65.54 | 2 | CPU, 2 cores | 2.13.0+cpu | 01234567 |\n"
    )


def test_no_records_are_said_to_be_none():
    assert board.board_markdown([]) == "No records yet.\n"
    page = Page(board.board_html([], "T"))
    assert "No records yet." in page.text("p") and "script" not in [tag for tag, _ in page.tags]


def test_missing_values_are_dashes_in_both_forms():
    row = board.board_markdown([EMPTY]).splitlines()[-1]
    assert row == "| **1** | Nothing | – | **–** | **–** | – | – | – | – | – | – |"
    page = Page(board.board_html([EMPTY], "T"))
    assert page.text("td") == "1" + "–" * 9
    assert [attrs["data-v"] for tag, attrs in page.tags if "data-v" in attrs] == ["1", "", "", "", "", ""]


def test_the_table_holds_the_numbers_and_marks_the_current_record():
    page = Page(board.board_html([FIRST, SECOND], "Our <records>"))
    assert page.text("title") == page.text("h1") == "Our <records>"
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr"] == [None, "current", None]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == ["2030-01-02_Second", "2030-01-02_First"]
    values = " ".join(attrs["data-v"] for _, attrs in page.tags if "data-v" in attrs)
    assert values == "2 1.88571 1000.0 1000 65536000 2 1 1.88571 1234.5 1000 65536000 2"
    sorts = [attrs["aria-sort"] for tag, attrs in page.tags if tag == "th" and "aria-sort" in attrs]
    assert sorts == ["descending"] + ["none"] * 10
    assert "current record" == page.text("em") and "nats/token, mean ± sd" in page.text("small")


# --- curves


def test_a_mean_is_taken_where_every_run_has_the_value():
    short = [[0, 0, 4.0, 4.0], [2, 6, 2.0, None]]
    long = [[0, 0, 2.0, None], [2, 8, 1.0, None], [4, 9, 0.5, None]]
    assert board.mean_curve([short, long]) == [[0, 0, 3.0, 4.0], [2, 7, 1.5, None]]
    assert board.mean_curve([]) == []


def test_values_of_one_step_become_one_row_in_order_and_nonsense_goes():
    points = [[5, 1.5, None, 2.0], [0, None, 9.0, None], [5, None, 3.0, math.inf], [None, 1, 1, 1]]
    points += [[5, 9, None, None], [5, True, "x", None], [6, 1, None, math.nan]]
    assert board.tidy(points) == [[0, None, 9.0, None], [5, 1.5, 3.0, 2.0]]


@QUICK
@given(st.integers(0, 3000), st.integers(1, 40), st.integers(0, 9))
def test_thin_curves_keep_first_last_and_least_of_both_losses(length, every, seed):
    random = Random(seed)
    val, train = ([random.random() for _ in range(length)] for _ in range(2))
    points = [[i, i, x if i % every == 0 else None, y] for i, (x, y) in enumerate(zip(val, train, strict=True))]
    thin = board.thin(points)
    assert thin == points if length <= 400 else 200 <= len(thin) <= 400
    assert [point[0] for point in thin] == sorted({point[0] for point in thin})
    for loss in (2, 3):
        rows = [point for point in points if point[loss] is not None]
        for wanted in rows and (rows[0], rows[-1], min(rows, key=lambda point: point[loss])):
            assert wanted in thin


def test_the_page_carries_the_curves():
    page = Page(board.board_html([FIRST, EVIL | {"date": "2031"}], "T"))
    first, evil = page.island()
    for run, given_curve in zip(first["runs"], FIRST["curves"], strict=True):
        for row, wanted in zip(run["points"], given_curve["points"], strict=True):
            assert row == [v if v is None else pytest.approx(v, rel=1e-6) for v in wanted]
    assert [run["label"] for run in first["runs"]] == ["run 0", "run 1"]
    assert first["mean"][2] == [2, 4.0, pytest.approx((4 / 3 + 6 / 3) / 2 + 1, rel=1e-6), pytest.approx(3.166667)]
    assert evil["runs"][0]["points"] == evil["mean"] == [[0, None, 3.0, None]]
    assert evil["runs"][0]["label"].startswith("</script ><script>")


def test_the_size_is_bounded():
    points = [[i, 0.123456789 * i, 3 + 1 / (i + 1), 3 + 1 / (i + 2)] for i in range(1500)]
    many = record("n" * 10**5, curves=[{"label": "x" * 9000, "points": points}] * 25, source="y = 1\n" * 9000)
    lines = "".join(f"line_{i} = '{'z' * 5000}'\n" for i in range(3000))
    html = board.board_html([many, record("Last", date="2031-01-01", source=lines)], "t" * 10**5)
    first = Page(html).island()[0]
    assert first["run_count"] == 25 and len(first["runs"]) == 20
    assert all(len(run["points"]) <= board.CURVE_POINTS and len(run["label"]) <= 80 for run in first["runs"])
    assert len(html) < 20 * 400 * 45 + 2000 * 450 + 50_000


# --- code changes


def change(old, new):
    page = Page(board.board_html([record("A", source=old), record("B", date="2031-01-01", source=new)], "T"))
    return page, page.text("pre", "ins", "del", "b"), page.text("p", "summary", "span")


def test_a_code_change_shows_the_lines_and_their_counts():
    page, shown, _ = change("a = 1\nb = 2\n", "a = 1\nb = 3\nc = 4\n")
    assert shown == "+2−1" + "@@ -1,3 +1,4 @@\n a = 1\n-b = 2\n+b = 3\n+c = 4\n \n"
    assert page.text("ins") == "+2+b = 3\n+c = 4\n" and page.text("del") == "−1-b = 2\n"


@pytest.mark.parametrize("old, new, sentence", [
    ("a\n", "a\n", "identical sources"), ("a\r\nb", "a\nb", "identical sources"), (None, "a\n", "source not recorded"),
    ("a\n", "", "source not recorded"), ("a\n", "b\n" * 20_001, "not compared: 20,002 lines, the limit is 20,000"),
])  # fmt: skip
def test_sources_with_nothing_to_show_say_why(old, new, sentence):
    page, shown, said = change(old, new)
    assert f"against #1: {sentence}" in said and shown == "" and "details" not in [tag for tag, _ in page.tags]


def test_a_long_change_says_how_much_is_left_out():
    new = [f"b{i}" for i in range(2500)]
    page, _, said = change("a", "\n".join(new))
    assert page.text("ins").splitlines() == ["+2,500" + "+b0", *(f"+{line}" for line in new[1:1998])]
    assert "502 more lines of this comparison are left out." in said


@QUICK
@given(*[st.lists(st.sampled_from("abcdef"), max_size=12).map("\n".join)] * 2)
def test_counts_of_changed_lines_add_up(old, new):
    sentence, lines = board.code_change("x\n" + old, "x\n" + new)
    if old == new:
        assert (sentence, lines) == ("identical sources", [])
        return
    added, removed = (int(n) for n in re.findall(r"[+−](\d+)<", sentence))
    assert added - removed == new.count("\n") - old.count("\n")
    assert (added, removed) == tuple(sum(line[0] == sign for line in lines) for sign in "+-")


# --- hostile text


def structure(html):
    """Tags with the names of their attributes; those inside a code change follow from the number of its lines."""
    return [(tag, sorted(attrs)) for tag, attrs in Page(html).tags if tag not in ("ins", "del", "b")]


@QUICK
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=9, max_size=9))
def test_no_text_changes_the_structure(texts):
    *values, source, label, title = texts
    new = record("B", date="2031-01-01", source="x = 1")
    plain = board.board_html([record("A", source="x = 1\ny = 2"), new], "T")
    evil = dict(zip(("name", "readme_title", "gpus", "torch", "code_hash", "folder"), values, strict=True))
    evil = [record("A", source=f"x = 1\n{source}\ny"), new | evil | {"curves": [curve(label, 3.0)] * 2}]
    html, markdown = board.board_html(evil, title), board.board_markdown(evil)
    assert structure(html) == structure(plain)
    for text in (html, markdown):
        shown = set(text.encode("utf-8").decode()) - {"\n", "\t"}
        assert not [c for c in shown if category(c) == "Cc" or bidirectional(c)[:2] in ("LR", "RL", "PD", "FS")]
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in markdown.split("\n")] == [12, 12, 12, 12, 0]


def test_hostile_text_stays_text():
    html = board.board_html([FIRST, EVIL | {"date": "2031"}], HOSTILE)
    page, start = Page(html), "</script ><script>window.hacked=1</script>"
    for tag, count in {"script": 2, "img": 0, "a": 2}.items():
        assert sum(name == tag for name, _ in page.tags) == count
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    for shown in (page.text("title"), page.text("h1"), page.text("a"), page.text("small"), page.text("ins")):
        assert start in shown
    assert "\\x1b[31mred\\x00" in page.text("ins") and "\\u202eevil\\u2028\\ud800𝔸😀" in page.text("ins")
    row = board.board_markdown([EVIL]).split("\n")[2]
    assert re.findall("<[^>]*>", row) == ["<br>"] and "](%3C/script%20%3E" in row and "\\[a\\](javascript" in row


@pytest.mark.parametrize("folder, href", [
    ("javascript:alert(1)", "javascript%3Aalert%281%29"), ("//evil.example/x", "/evil.example/x"),
    ("../a b", "../a%20b"),
    ("http://evil.example", "http%3A//evil.example"), ("\\\\evil", "%5C%5Cevil"), (None, ""), ("ä\ud800", "%C3%A4%3F"),
])  # fmt: skip
def test_links_can_only_be_paths(folder, href):
    assert board.link(folder) == href


def test_the_page_refers_to_nothing_outside():
    html = board.board_html([FIRST, SECOND], "T")
    assert not re.search(r"(?i)https?:|url\((?!#clip\))|@import|\bimport\b|fetch\(|XMLHttp|WebSocket", html)
    page = Page(html)
    assert not [tag for tag, attrs in page.tags if tag in ("link", "img", "iframe", "base") or "src" in attrs]
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    allowed = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; script-src 'sha256-"
    assert policy.startswith(allowed) and policy.count(";") == 4 and policy.endswith("='")


# --- in a browser


class Browser:
    """A headless Chromium through WebDriver: real mouse and keyboard events."""

    def __init__(self, folder):
        flags = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update"
        flags += f" --disable-background-networking --disable-sync --disable-dev-shm-usage --user-data-dir={folder}"
        self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(filter(None, (re.search(r"successfully on port (\d+)", line) for line in self.process.stdout)))[1]
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"goog:chromeOptions": {"args": flags.split()}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/" + self.post("", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def post(self, path, data, method="POST"):
        body = json.dumps(data).encode()
        try:
            with urlopen(Request(self.url + path, body, {"Content-Type": "application/json"}, method=method)) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def js(self, code):
        return self.post("/execute/sync", {"script": f"return {code}", "args": []})

    def devtools(self, command, **params):
        self.post("/goog/cdp/execute", {"cmd": command, "params": params})

    def screen(self, width, height=900, dark=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def keys(self, *keys):
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def mouse(self, start, end=None):
        """Move to `start`; given `end`, drag from there to it. In pixels of the chart."""
        left, top = self.js("Object.values(document.querySelector('#chart').getBoundingClientRect().toJSON())")[:2]
        places = [(round(left + x), round(top + y)) for x, y in filter(None, (start, end))]
        moves = [{"type": "pointerMove", "x": x, "y": y} for x, y in places]
        if end:
            moves[1:] = [{"type": "pointerDown", "button": 0}, moves[1], {"type": "pointerUp", "button": 0}]
        self.post("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def close(self):
        self.post("", {}, "DELETE")
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"no {program} is installed: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page of records; afterwards the browser must have reported no error and loaded no other file."""

    def visit(records, width=1280, title="T", **screen):
        (tmp_path / "board.html").write_text(board.board_html(records, title), encoding="utf-8")
        browser.screen(width, **screen)
        browser.post("/url", {"url": (tmp_path / "board.html").as_uri()})
        browser.js("document.querySelector('#controls')?.scrollIntoView()")
        return browser

    yield visit
    assert browser.post("/se/log", {"type": "browser"}) == []
    assert browser.js("performance.getEntriesByType('resource').length") == 0


NAMES = "[...document.querySelectorAll('tbody th')].map(th => th.firstChild.textContent)"
SORTS = "[...document.querySelectorAll('thead th')].map(th => th.ariaSort[0]).join('')"
LINES = "[...document.querySelectorAll('#lines path')].map(p => p.className.baseVal + p.dataset.number).join(' ')"
LABELS = "[...document.querySelectorAll('#axes text')].map(t => t.textContent)"
TICKS = "[...document.querySelectorAll('#axes [text-anchor=middle]')].map(t => t.textContent)"
GRID = "[...document.querySelectorAll('#axes line')].map(t => +t.getAttribute('y1'))"
TIP = "document.querySelector('#tip').hidden ? null : document.querySelector('#tip').textContent"


def click(browser, query):
    browser.js(f"document.querySelector(`{query}`).click()")


def test_headings_sort_the_table(visit):
    third = record("Third", date="2030-05-01", steps=None, torch="2.9.1")
    browser = visit([FIRST, SECOND | {"steps": 950, "torch": "2.10.0"}, third])
    assert browser.js(NAMES) == ["Third", "Second", "First"]
    for column, order, sorts in ((6, ["Second", "First", "Third"], "nnnnnannnnn"),
                                 (6, ["First", "Second", "Third"], "nnnnndnnnnn"),
                                 (10, ["Third", "Second", "First"], "nnnnnnnnnan"),
                                 (2, ["First", "Second", "Third"], "nannnnnnnnn")):  # fmt: skip
        click(browser, f"thead th:nth-child({column}) button")
        assert (browser.js(NAMES), browser.js(SORTS)) == (order, sorts)
    browser.js("document.querySelector('thead button').focus()")
    browser.keys("\ue007")  # Enter
    assert (browser.js(NAMES), browser.js(SORTS)) == (["First", "Second", "Third"], "annnnnnnnnn")


def test_the_legend_switches_records(visit):
    browser = visit([FIRST, SECOND])
    assert browser.js(LINES) == "run2 run2 run1 run1 mean2 mean1"
    click(browser, "#legend button")
    assert browser.js(LINES) == "run1 run1 mean1"
    assert browser.js("[...document.querySelectorAll('#legend button')].map(b => b.ariaPressed)") == ["false", "true"]
    click(browser, "#none")
    assert browser.js(LINES) == "" and not browser.js("document.querySelector('#empty').hidden")
    click(browser, "#all")
    assert browser.js(LINES) == "run2 run2 run1 run1 mean2 mean1"


def test_switches_change_what_is_drawn(visit):
    browser = visit([FIRST, SECOND])
    assert browser.js(LABELS)[:2] == ["validation loss (nats/token)", "step"] and browser.js(TICKS)[-1] == "8"
    linear = browser.js(GRID)
    click(browser, "[name=x][value='1']")
    assert browser.js(LABELS)[:2] == ["validation loss (nats/token)", "training time (s)"]
    assert browser.js(TICKS)[-1] == "16"
    click(browser, "[value=log]")
    logarithmic = browser.js(GRID)
    assert len({round(a - b) for a, b in zip(linear, linear[1:], strict=False)}) == 1
    gaps = [a - b for a, b in zip(logarithmic, logarithmic[1:], strict=False)]
    assert len(gaps) > 2 and gaps == sorted(gaps, reverse=True) and gaps[0] > 1.5 * gaps[-1]
    click(browser, "[name=y][value='3']")
    assert browser.js(LABELS)[0] == "training loss (nats/token)"


def test_switches_without_values_are_off(visit):
    points = [[step, None, 3.0, None] for step in range(3)]
    browser = visit([record("Bare", curves=[{"label": "run", "points": points}])])
    assert browser.js("[...document.querySelectorAll(':disabled')].map(i => i.name + i.value)") == ["y3", "x1", ""]


def test_dragging_zooms_and_reset_goes_back(visit):
    browser = visit([FIRST, SECOND])
    whole, right = browser.js(TICKS), browser.js("document.querySelector('#chart').clientWidth - 22")
    browser.mouse((56 + (right - 56) / 2, 100), (right, 120))
    assert whole[0] == "0" and float(browser.js(TICKS)[0]) == 4 and 7 < float(browser.js(TICKS)[-1]) <= 8
    heights = browser.js("[...document.querySelectorAll('#lines .mean')].map(p => p.getBBox().height)")
    assert min(heights) > 1000  # the loss axis fits what is in view: the rest of the curve is far above
    click(browser, "#reset")
    browser.mouse((56 + (right - 56) * 0.55, 100), (56 + (right - 56) * 0.7, 100))  # no point in view: steps 4.4 to 5.6
    assert 1.5 < min(float(label) for label in browser.js(LABELS) if re.fullmatch(r"[12]\.\d+", label)) < 1.8
    click(browser, "#reset")
    assert browser.js(TICKS) == whole and browser.js("document.querySelector('#reset').disabled")
    browser.js("document.querySelector('#chart').focus()")
    browser.keys("+", "\ue014")  # +, right arrow
    assert 1 < float(browser.js(TICKS)[0]) < 3 < float(browser.js(TICKS)[-1])
    browser.keys("\ue00c")  # Escape
    assert browser.js(TICKS) == whole


def test_hovering_shows_the_values(visit):
    browser = visit([FIRST])
    assert browser.js(TIP) is None
    browser.mouse((60, 60))
    assert browser.js(TIP) == "#1 First\nrun 1\nstep 0 · 0.00 s\nvalidation 7.0000 · training 7.5000"
    browser.mouse((60, 100))
    assert browser.js(TIP) == "#1 First\nmean of 2 runs\nstep 0 · 0.00 s\nvalidation 6.0000 · training 6.5000"
    browser.post("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [
        {"type": "pointerMove", "x": 5, "y": 5}]}]})  # fmt: skip
    assert browser.js(TIP) is None


def test_hostile_text_runs_nothing(visit):
    browser = visit([EVIL, record("First", date="a")], title=HOSTILE)
    assert browser.js("window.hacked === undefined && document.title.startsWith('</script ><script>window.hacked')")
    assert browser.js("document.querySelectorAll('script').length") == 2
    browser.mouse((300, 200))
    assert browser.js(TIP) is not None


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_screen_and_scheme(visit, width, dark):
    browser = visit([FIRST, record("x" * 300, date="2031", source="y" * 900)], width, dark=dark)
    assert browser.js("document.documentElement.scrollWidth") <= width
    page = "rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)"
    assert browser.js("getComputedStyle(document.body).backgroundColor") == page
    assert browser.js("document.querySelector('#chart').getBoundingClientRect().right") <= width


def test_a_page_without_records_or_curves_has_no_errors(visit):
    visit([])
    assert visit([EMPTY, {}]).js(LINES) == ""
