"""Tests of board.py: table, means, thinned curves, code changes, hostile text; the page in a headless browser.

The browser is Chromium (Debian: apt-get install chromium; .ci/run does that); where there is none, its tests are
skipped.
"""

import json
import math
import re
from html.parser import HTMLParser
from random import Random
from unicodedata import bidirectional, category

import pytest
from browser import PROGRAM, Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator
from scipy.stats import t as student
from scipy.stats import ttest_ind

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


GAIN = {"time_s": 33.975, "ci_low": 33.88, "ci_high": 34.0701, "percent": 45.98, "n_record": 18, "n_baseline": 9}
FIRST = record("First")
SECOND = record("Second", date="2030-02-03", mean_time_s=1000.0, source="a = 1\nb = 3\nc = 4\n")
EMPTY = {"name": "Nothing", "curves": [], "date": None}
EVIL = dict.fromkeys(("name", "date", "folder", "readme_title", "gpus", "torch", "code_hash", "source"), HOSTILE)
EVIL |= {"gain": dict.fromkeys(board.CHANGE, HOSTILE)}
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
    second = record("A|B", date="2030-02-03", sd_val_loss=None, tokens=None, gain=GAIN)
    assert board.board_markdown([FIRST, second]) == (
        "| # | Record | Date | Validation loss (nats/token, mean ± sd) | Time (s, mean ± sd)"
        " | Gain on the same machine (change of time, 95 % interval) | Steps | Tokens (millions) | n (runs) | GPUs"
        " | torch | Code (hash) |\n"
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- | --- |\n"
        "| **2** | [A\\|B](2030-01-02_A%7CB)<br>About A\\|B | 2030-02-03 | **1.8857** | **1,234.50 ± 1.25**"
        " | −33.98 s (−34.07 to −33.88), −46.0 % | 1,000 | – | 2 | CPU, 2 cores | 2.13.0+cpu | 01234567 |\n"
        "| 1 | [First](2030-01-02_First)<br>About First | 2030-01-02 | 1.8857 ± 0.0013 | 1,234.50 ± 1.25 | – | 1,000"
        " | 65.54 | 2 | CPU, 2 cores | 2.13.0+cpu | 01234567 |\n"
    )


def test_no_records_are_said_to_be_none():
    assert board.board_markdown([]) == "No records yet.\n"
    page = Page(board.board_html([], "T"))
    assert "No records yet." in page.text("p") and "script" not in [tag for tag, _ in page.tags]


def test_missing_values_are_dashes_in_both_forms():
    row = board.board_markdown([EMPTY]).splitlines()[-1]
    assert row == "| **1** | Nothing | – | **–** | **–** | – | – | – | – | – | – | – |"
    page = Page(board.board_html([EMPTY], "T"))
    assert page.text("td") == "1" + "–" * 10
    assert [attrs["data-v"] for tag, attrs in page.tags if "data-v" in attrs] == ["1"] + [""] * 6


def test_the_table_holds_the_numbers_and_marks_the_current_record():
    page = Page(board.board_html([FIRST, SECOND | {"gain": GAIN}], "Our <records>"))
    assert page.text("title") == page.text("h1") == "Our <records>"
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr"] == [None, "current", None]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"][-2:] == ["2030-01-02_Second", "2030-01-02_First"]
    values = " ".join(attrs["data-v"] for _, attrs in page.tags if "data-v" in attrs)
    assert values == "2 1.88571 1000.0 -33.975 1000 65536000 2 1 1.88571 1234.5  1000 65536000 2"
    sorts = [attrs["aria-sort"] for tag, attrs in page.tags if tag == "th" and "aria-sort" in attrs]
    assert sorts == ["descending"] + ["none"] * 11
    assert "−33.98 s (−34.07 to −33.88), −46.0 %" in page.text("td")
    assert "current record" == page.text("em") and "nats/token, mean\xa0±\xa0sd" in page.text("small")


@pytest.mark.parametrize("gain, text", [
    (GAIN, "−33.98 s (−34.07 to −33.88), −46.0 %"), (None, "–"), ({}, "–"), (33.98, "–"), ("<b>", "–"),
    (GAIN | {"ci_low": None, "percent": math.nan}, "−33.98 s"), (GAIN | {"time_s": math.inf}, "–"),
    ({"time_s": -2.5, "percent": -12.34}, "2.50 s, 12.3 %"), ({"time_s": 0.0, "ci_low": -1, "ci_high": 2},
    "0.00 s (−2.00 to 1.00)"), ({"time_s": 1, "ci_low": "<b>", "ci_high": 1}, "−1.00 s"),
])  # fmt: skip
def test_a_gain_in_words(gain, text):
    assert board.change_text(board.change_of(gain)) == text


@pytest.mark.parametrize("text, day", [
    ("1970-01-01", 0), ("2024-02-29", 19782), ("1969-12-31", -1), ("2023-02-29", None), ("0000-01-01", None),
    ("20240229", None), ("2024-02-29\n", None), ("2024-W09-4", None), ("٢٠٢٤-٠٢-٢٩", None), ("", None),
])  # fmt: skip
def test_days_of_a_date(text, day):
    assert board.days(text) == day


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
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in markdown.split("\n")] == [13, 13, 13, 13, 0]


def test_hostile_text_stays_text():
    html = board.board_html([FIRST, EVIL | {"date": "2031"}], HOSTILE)
    page, start = Page(html), "</script ><script>window.hacked=1</script>"
    for tag, count in {"script": 2, "img": 0, "a": 6}.items():
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


# --- colours


def luminance(colour):
    wide = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(wide[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_from_the_page(scheme):
    pairs = re.findall(r"--([a-z0-9-]+): light-dark\(#(\w+), #(\w+)\)", board.STYLE)
    colour = {name: pair[scheme] for name, *pair in pairs}
    for name in ("text", "soft", *(f"c{i}" for i in range(8))):
        assert contrast(colour[name], colour["page"]) >= 4.5, name
    for text, ground in (("add-text", "add"), ("cut-text", "cut"), ("text", "mark"), ("soft", "mark")):
        assert contrast(colour[text], colour[ground]) >= 4.5, text


# --- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not PROGRAM:
        pytest.skip("no chromium is installed: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page of records; afterwards the browser must have reported no error and loaded no other file."""

    def visit(records, width=1280, title="T", target=None, **screen):
        (tmp_path / "board.html").write_text(board.board_html(records, title, target), encoding="utf-8")
        browser.visit((tmp_path / "board.html").as_uri(), width, **screen)
        return browser

    yield visit
    assert browser.complaints() == []
    assert browser.js("performance.getEntriesByType('resource').length") == 0


def texts(query):
    return f"[...document.querySelectorAll(`{query}`)].map(node => node.textContent)"


def attribute(query, name):
    return f"[...document.querySelectorAll(`{query}`)].map(node => node.getAttribute('{name}'))"


NAMES = "[...document.querySelectorAll('tbody th')].map(th => th.firstChild.textContent)"
SORTS = "[...document.querySelectorAll('thead th')].map(th => th.ariaSort[0]).join('')"
LINES = "[...document.querySelectorAll('#lines path')].map(p => p.className.baseVal + p.dataset.number).join(' ')"
LABELS, TICKS = texts("#axes text"), texts("#axes [text-anchor=middle]")
GRID = "[...document.querySelectorAll('#axes line')].map(t => +t.getAttribute('y1'))"
WIDTH = "document.querySelector('#chart').clientWidth - 22"  # where the plot ends
LEFT = 60  # where it begins
TIP, TIME_TIP = (f"(tip => tip.hidden ? null : tip.textContent)(document.querySelector('#{chart}').nextElementSibling)"
                 for chart in ("chart", "timeline"))  # fmt: skip


def click(browser, query):
    browser.js(f"document.querySelector(`{query}`).click()")


def numbers_of(path):
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


# table


@pytest.mark.parametrize("column", range(len(board.COLUMNS)), ids=[key for _, _, key, _ in board.COLUMNS])
def test_every_heading_sorts_both_ways_and_missing_values_stay_last(visit, column):
    low = record("b", date="2030-03-01", mean_val_loss=1.5, mean_time_s=9, gain={"time_s": 20}, steps=90, tokens=2e6,
                 n=5, gpus="2x A", torch="2.9.1", code_hash="0a")  # fmt: skip
    high = record("c", date="2030-04-01", mean_val_loss=1.75, mean_time_s=80, gain={"time_s": -3}, steps=100,
                  tokens=1e7, n=40, gpus="10x A", torch="2.10.0", code_hash="0b")  # fmt: skip
    browser = visit([high, {"name": "a"}, low])
    up, down = ["b", "c", "a"], ["c", "b", "a"]
    if board.COLUMNS[column][2] in ("name", "number"):  # no record is without these
        up, down = ["a", "b", "c"], ["c", "b", "a"]
    head = f"thead th:nth-child({column + 1})"
    click(browser, f"{head} button")
    assert (browser.js(NAMES), browser.js(SORTS)) == (up, "n" * column + "a" + "n" * (11 - column))
    click(browser, f"{head} button")
    assert (browser.js(NAMES), browser.js(SORTS)) == (down, "n" * column + "d" + "n" * (11 - column))


def test_the_keyboard_sorts(visit):
    browser = visit([FIRST, SECOND])
    assert browser.js(NAMES) == ["Second", "First"]
    browser.js("document.querySelector('thead button').focus()")
    browser.keys("Enter")
    assert (browser.js(NAMES), browser.js(SORTS)) == (["First", "Second"], "a" + "n" * 11)


# record times


DATED = [record("Slow", date="2030-01-01", mean_time_s=100, sd_time_s=20),
         record("Slower", date="2030-01-11", mean_time_s=200, sd_time_s=None, mean_val_loss=None),
         record("Fast", date="2030-01-31", mean_time_s=50, sd_time_s=0.0), record("Undated", date="soon"),
         record("Timeless", date="2030-02-01", mean_time_s=None),
         record("Now", date="2030-02-20", mean_time_s=60)]  # fmt: skip


def circles(browser):
    found = browser.js("[...document.querySelectorAll('#dates circle')].map(c => [c.className.baseVal, "
                       "+c.getAttribute('cx'), +c.getAttribute('cy')])")  # fmt: skip
    return {name: (kind, x, y) for name, (kind, x, y) in zip(("Slow", "Slower", "Fast", "Now"), found, strict=True)}


def test_record_times_stand_at_their_dates(visit):
    spots = circles(visit(DATED))
    assert [kind for kind, _, _ in spots.values()] == ["best", "other", "best", "latest"]
    (_, x, y), (_, x2, y2), (_, x3, y3), (_, x4, y4) = spots.values()
    assert (x3 - x) / (x2 - x) == pytest.approx(3) and (x4 - x) / (x2 - x) == pytest.approx(5)
    assert y - y2 > 20 and y - y2 == pytest.approx(y3 - y)  # twice the time, half of it
    assert (y3 - y4) / (y - y2) == pytest.approx(math.log2(1.2))


def test_bars_are_one_standard_deviation_and_the_line_is_the_best_so_far(visit):
    browser = visit(DATED)
    spots, octave = circles(browser), circles(browser)["Slow"][2] - circles(browser)["Slower"][2]
    bars = [numbers_of(path) for path in browser.js(attribute("#dates .whisker", "d"))]
    assert len(bars) == 2  # of Slow and Now: the others have none or 0
    assert bars[0][:2] == pytest.approx([spots["Slow"][1] - 4, spots["Slow"][2] - octave * math.log2(1.2)])
    assert bars[0][5] == pytest.approx(spots["Slow"][2] - octave * math.log2(0.8))
    (_, x, y), (_, x3, y3), end = spots["Slow"], spots["Fast"], browser.js(WIDTH)
    [line] = browser.js(attribute(".frontier", "d"))
    assert re.sub(r"[\d.]+", "", line) == "M HVHVH"  # a step is first across, then down
    assert numbers_of(line) == pytest.approx([x, y, x, y, x3, y3, end])


def test_hovering_over_a_record_time_shows_its_numbers(visit):
    browser = visit(DATED)
    assert browser.js(TIME_TIP) is None
    for name, shown in {
        "Slow": "#2 Slow\n2030-01-01 · 100.00 ± 20.00 s\nvalidation 1.8857 ± 0.0013",
        "Slower": "#3 Slower\n2030-01-11 · 200.00 s",
        "Now": "#6 Now\n2030-02-20 · 60.00 ± 1.25 s\nvalidation 1.8857 ± 0.0013\ncurrent record",
    }.items():
        _, x, y = circles(browser)[name]
        browser.mouse("#timeline", (x + 3, y - 2))
        number = {"Slow": 1, "Slower": 2, "Now": 5}[name]
        assert browser.js(TIME_TIP) == f"#{number}{shown[2:]}"
    browser.mouse("h1", (2, 2))
    assert browser.js(TIME_TIP) is None


def test_fingers_and_keys_go_through_the_record_times(visit):
    browser = visit(DATED, width=390)
    _, x, y = circles(browser)["Fast"]
    browser.tap("#timeline", x, y)
    assert browser.js(TIME_TIP).startswith("#3 Fast\n2030-01-31 · 50.00 ± 0.00 s")
    browser.js("document.querySelector('#timeline').focus()")
    for key, name in (("ArrowLeft", "Slower"), ("ArrowLeft", "Slow"), ("ArrowLeft", "Slow"), ("End", "Now"),
                      ("ArrowRight", "Now"), ("Home", "Slow"), ("ArrowRight", "Slower")):  # fmt: skip
        browser.keys(key)
        assert browser.js(TIME_TIP).split()[1] == name
        assert browser.js("document.querySelector('#said').textContent").split()[1] == name
    browser.keys("Escape")
    assert browser.js(TIME_TIP) is None


@pytest.mark.parametrize("dates, shown", [
    (["2030-01-02"] * 2, ["2029-12-31", "2030-01-02", "2030-01-04"]), (["2029-05-01", "2031-04-01"], ["2030-01"]),
    (["0001-01-01", "9999-12-31"], ["2000-01"]), (["1969-11-01", "1970-03-01"], ["1970-01"]),
])  # fmt: skip
def test_dates_have_ticks(visit, dates, shown):
    browser = visit([record(f"R{i}", date=date) for i, date in enumerate(dates)])
    labels = browser.js(texts("#dates [text-anchor=middle]"))
    assert set(shown) <= set(labels) and 2 <= len(labels) <= 14 and labels == sorted(labels)


def test_without_dates_or_times_there_is_no_chart_of_them(visit):
    browser = visit([record("A", date="soon"), record("B", mean_time_s=0), record("C", mean_time_s=-1)])
    assert browser.js("document.querySelector('#timeline')") is None and browser.js(LINES)


# curves


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
    click(browser, "[name=whole]")
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
    off = browser.js("[...document.querySelectorAll(':disabled')].map(i => i.name + i.value)")
    assert off == ["modedifference", "y3", "x1", ""]


def test_the_loss_axis_fits_what_comes_after_the_first_quarter(visit):
    browser = visit([FIRST])
    high = "Math.max(...[...document.querySelectorAll('#axes [text-anchor=end]')].map(t => +t.textContent || 0))"
    assert 2.5 < browser.js(high) < 3.4  # run 1 at step 2: 3; at step 0: 7
    click(browser, "[name=whole]")
    assert browser.js(high) == 7


def test_the_target_is_a_line_in_the_validation_loss(visit):
    browser = visit([FIRST], target=2.25)
    line = "document.querySelector('#axes line.target')"
    low, high = (browser.js(f"plot.Y({loss})") for loss in (2.2, 2.3))
    assert low > float(browser.js(f"{line}.getAttribute('y1')")) > high
    assert browser.js(texts("#axes text.target")) == ["target 2.25"]
    click(browser, "[name=y][value='3']")
    assert browser.js(line) is None and browser.js("plot.Y(2.25) > 100")  # it would be in view
    assert visit([FIRST]).js(line) is None
    assert visit([FIRST], target=math.nan).js(line) is None
    far = visit([FIRST], target=0.5)  # in view although no curve gets there
    assert far.js(f"{line} !== null")
    far.mouse("#chart", (LEFT + 50, 100), (LEFT + 500, 120))
    assert far.js(line) is None  # not after a zoom


def test_dragging_zooms_and_reset_goes_back(visit):
    browser = visit([FIRST, SECOND])
    whole, right = browser.js(TICKS), browser.js(WIDTH)
    browser.mouse("#chart", (LEFT + (right - LEFT) / 2, 100), (right, 120))
    assert whole[0] == "0" and float(browser.js(TICKS)[0]) == 4 and 7 < float(browser.js(TICKS)[-1]) <= 8
    heights = browser.js("[...document.querySelectorAll('#lines .mean')].map(p => p.getBBox().height)")
    assert min(heights) > 1000  # the loss axis fits what is in view: the rest of the curve is far above
    click(browser, "#reset")
    ends = [(LEFT + (right - LEFT) * part, 100) for part in (0.55, 0.7)]  # no point in view: steps 4.4 to 5.6
    browser.mouse("#chart", *ends)
    assert 1.5 < min(float(label) for label in browser.js(LABELS) if re.fullmatch(r"[12]\.\d+", label)) < 1.8
    click(browser, "#reset")
    assert browser.js(TICKS) == whole and browser.js("document.querySelector('#reset').disabled")
    browser.js("document.querySelector('#chart').focus()")
    browser.keys("+", "ArrowRight")
    assert 1 < float(browser.js(TICKS)[0]) < 3 < float(browser.js(TICKS)[-1])
    assert re.fullmatch(r"step \d to step \d", browser.js("document.querySelector('#said').textContent"))
    browser.keys("Escape")
    assert browser.js(TICKS) == whole


def test_hovering_shows_the_values(visit):
    browser = visit([FIRST])
    assert browser.js(TIP) is None
    click(browser, "[name=whole]")
    browser.mouse("#chart", (LEFT + 4, 30))
    assert browser.js(TIP) == "#1 First\nrun 1\nstep 0 · 0.00 s\nvalidation 7.0000 · training 7.5000"
    browser.mouse("#chart", (LEFT + 4, 100))
    assert browser.js(TIP) == "#1 First\nmean of 2 runs\nstep 0 · 0.00 s\nvalidation 6.0000 · training 6.5000"
    browser.mouse("h1", (2, 2))
    assert browser.js(TIP) is None


# differences


def noisy(name, seed, runs, steps, seconds, **more):
    """A record of runs with noise; validation at `steps`, `seconds` a step."""
    random, curves = Random(seed), []
    for i in range(runs):
        points = [[k, k * seconds * (1 + i / 1000), 2 + 3 / (1 + k / 20) + random.gauss(0, 0.02), None] for k in steps]
        curves.append({"label": f"run {i}", "points": points})
    return record(name, curves=curves, **more)


OLD = noisy("Old", 1, 3, range(0, 101, 10), 1.0)
NEW = noisy("New", 2, 5, range(0, 81, 20), 2.0, date="2030-06-01")
SUM = "document.querySelector('#sum').textContent"


def differ(browser, x=0):
    click(browser, "[value=difference]")
    click(browser, f"[name=x][value='{x}']")


def test_a_difference_has_welchs_interval_at_equal_steps(visit):
    browser = visit([OLD, NEW])
    differ(browser)
    rows = browser.js("plot.lines[0].points")
    assert [row[0] for row in rows] == [0, 20, 40, 60, 80]
    for step, value, half, old, new in rows:
        samples = [[point[2] for curve in rec["curves"] for point in curve["points"] if point[0] == step]
                   for rec in (NEW, OLD)]  # fmt: skip
        test = ttest_ind(*samples, equal_var=False)
        low, high = test.confidence_interval(0.95)
        assert (value - half, value + half) == pytest.approx((low, high), abs=2e-5)
        assert (new, old) == pytest.approx([sum(s) / len(s) for s in samples], abs=1e-5)
    said = f"#2 minus #1 at step 80, the last that both have: {value:+.4f} (95 %: {low:+.4f} to {high:+.4f}) nats/token"
    assert browser.js(SUM) == said.replace("-", "−") + ", 5 and 3 runs."
    assert browser.js(LABELS)[0] == "validation loss, #2 minus #1 (nats/token)"


def test_the_band_and_the_zero_line_are_where_the_numbers_are(visit):
    browser = visit([OLD, NEW])
    differ(browser)
    rows = browser.js("plot.lines[0].points.map(([x, d, h]) => [plot.X(x), plot.Y(d - h), plot.Y(d + h), plot.Y(d)])")
    band, line = (numbers_of(path) for path in browser.js(attribute("#lines path", "d")))
    low, high = [y for _, y, *_ in rows], [y for _, _, y, _ in rows]
    assert band[1::2] == pytest.approx(low + high[::-1], abs=0.06)
    assert line == pytest.approx([number for row in rows for number in (row[0], row[3])], abs=0.06)
    zero = browser.js("[+document.querySelector('#axes .zero').getAttribute('y1'), plot.Y(0), plot.bottom]")
    assert zero[0] == zero[1] < zero[2]


def test_equal_times_are_interpolated_in_each_run(visit):
    browser = visit([OLD, NEW])
    differ(browser, x=1)
    rows = browser.js("plot.lines[0].points")
    assert rows[0][0] == 0 and rows[-1][0] == pytest.approx(100)  # the fastest old run ends first
    true = [(at, (2 + 3 / (1 + at / 40)) - (2 + 3 / (1 + at / 20))) for at, *_ in rows]
    for (at, wanted), (_, value, half, *_) in zip(true, rows, strict=True):
        assert abs(value - wanted) < 0.08 and (0.005 < half < 0.3), at
    assert "at 100.00 s, the last" in browser.js(SUM) and browser.js(LABELS)[1] == "training time (s)"


def test_times_that_go_back_are_left_out_of_a_difference(visit):
    points = [[step, time, 3.0 + step, None] for step, time in enumerate((0, 5, 4, 3, 8, 10))]
    browser = visit([record("A", curves=[{"label": "a", "points": points}]), record("B", date="2031-01-01")])
    differ(browser, x=1)
    assert browser.js("plot.lines[0].points.map(([x, , , a]) => [x, a])") == [[0, 3], [5, 4], [8, 7], [10, 8]]


def test_any_two_records_can_be_picked(visit):
    browser = visit([OLD, record("One", date="2030-03-01", curves=[curve("x", 5.0)]), NEW])
    differ(browser)
    assert browser.js(texts("[name=a] option")) == ["#3 New", "#2 One", "#1 Old"]
    assert browser.js(SUM).startswith("#3 minus #2 at step 8,") and "No band: it needs two runs" in browser.js(SUM)
    assert browser.js(attribute("#lines .band", "d")) == [""]
    browser.js("form.a.value = '0', form.b.value = '2', form.dispatchEvent(new Event('change'))")
    assert browser.js(SUM).startswith("#1 minus #3 at step 80,") and "No band" not in browser.js(SUM)
    click(browser, "[name=y][value='3']")  # neither has training losses
    assert browser.js(SUM) == "" and not browser.js("document.querySelector('#empty').hidden")
    click(browser, "[value=curves]")
    hidden = browser.js("[...document.querySelectorAll('[data-mode]')].map(node => node.dataset.mode[0] + node.hidden)")
    assert set(hidden) == {"dtrue", "cfalse"}


def bumpy(name, losses, **more):
    """Two runs with these losses at steps 0, 20, 40, ...; 0.1 apart."""
    runs = [[[20 * i, i, loss + offset, None] for i, loss in enumerate(losses)] for offset in (0, 0.1)]
    return record(name, curves=[{"label": "run", "points": points} for points in runs], **more)


def test_hovering_over_a_difference_shows_that_of_the_nearest_step(visit):
    browser = visit([bumpy("Flat", [3] * 5), bumpy("Bump", [3, 3, 1, 3, 3], date="2031-01-01")])
    differ(browser)
    browser.mouse("#chart", browser.js("[plot.X(49), plot.Y(0)]"))  # at the height of the next one
    half = student.ppf(0.975, 2) * math.sqrt(2 * 0.1**2 / 2 / 2)
    numbers = f"-2.0000 (95 %: {-2 - half:+.4f} to {-2 + half:+.4f})".replace("-", "−")
    assert browser.js(TIP) == f"#2 minus #1, step 40\n{numbers}\n1.0500 − 3.0500"


def test_numbers_are_rounded_as_in_the_table(visit):
    browser, random = visit([FIRST]), Random(1)
    values = [1.85855, 0.00125, 2.5, 1e6, *(random.randrange(10**6) / 1e5 for _ in range(300))]
    assert browser.js(f"{values}.map((v) => format(v, 4))") == [f"{value:,.4f}" for value in values]


def test_quantiles_are_students(visit):
    browser = visit([FIRST])
    for freedom in (1, 1.5, 2, 3.3, 9, 17.25, 60, 500):
        exact = student.ppf(0.975, freedom)
        assert browser.js(f"student({freedom})") == pytest.approx(exact, rel=1e-4)
    assert browser.js("student(1e9)") == pytest.approx(student.ppf(0.975, 1000), rel=1e-5)


def test_interpolation_is_monotone_and_exact_at_the_points(visit):
    browser, random = visit([FIRST]), Random(3)
    xs, ys = list(range(0, 90, 10)), [random.random() for _ in range(9)]
    browser.js(f"globalThis.curve = spline({[list(pair) for pair in zip(xs, ys, strict=True)]})")
    assert browser.js(f"{xs}.map(curve)") == ys and browser.js("[-1, 80.5].map(curve)") == [None, None]
    inner = [x / 4 for x in range(40, 280)]  # its slopes at both ends are of another kind
    assert browser.js(f"{inner}.map(curve)") == pytest.approx(list(PchipInterpolator(xs, ys)(inner)))
    assert browser.js("[0, 1].map(spline([[1, 5]]))") == [None, 5]


# hostile text, screens


NASTY = {
    "script": "</script><script>window.hacked=1</script>", "image": "<img src=x onerror=window.hacked=1>",
    "bidi": "\u202egpj.exe\u2066x\u2069", "long": "n" * 100_000, "quotes": "\"'`${window.hacked=1}`'\"",
    "separators": "a\u2028window.hacked=1\u2029b", "link": "javascript:window.hacked=1", "option": "</option></select>",
    "prototype": "__proto__", "entities": "&lt;b&gt;&#60;", "comment": "<!--<script>", "style": "</style><b>",
}  # fmt: skip


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_hostile_names_do_nothing(visit, text):
    fields = dict.fromkeys(("name", "folder", "readme_title", "gpus", "torch", "code_hash"), text)
    curves = [c | {"label": text} for c in FIRST["curves"]]
    evil = record("") | fields | {"date": "2031-01-01", "curves": curves, "source": f"x\n{text}\n"}
    browser = visit([FIRST, evil], width=390, title=text)
    shown = board.clean(text, 100)
    assert browser.js("window.hacked === undefined && document.querySelectorAll('script').length === 2")
    assert browser.js("document.querySelectorAll('img, tbody b, select b').length") == 0
    assert browser.js(NAMES)[0] == shown == browser.js("document.querySelector('tbody a').textContent")
    assert browser.js(texts("[name=b] option"))[0] == f"#2 {shown}"[:60]
    browser.js("document.querySelector('#timeline').focus()")
    browser.keys("End")
    assert browser.js(TIME_TIP).startswith(f"#2 {shown}\n")
    differ(browser)
    assert browser.js(SUM).startswith("#2 minus #1 at step 8,")
    assert browser.js("document.documentElement.scrollWidth") <= 390


def test_hostile_text_runs_nothing(visit):
    browser = visit([EVIL, record("First", date="a")], title=HOSTILE)
    assert browser.js("window.hacked === undefined && document.title.startsWith('</script ><script>window.hacked')")
    assert browser.js("document.querySelectorAll('script').length") == 2
    browser.mouse("#chart", (300, 200))
    assert browser.js(TIP) is not None


def test_the_policy_stops_scripts_that_are_not_the_pages(visit):
    browser = visit([FIRST])
    browser.js("document.body.insertAdjacentHTML('beforeend', '<img src=x:y onerror=window.hacked=1>')")
    browser.js("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked=1'}))")
    assert browser.js("window.hacked === undefined")
    assert browser.complaints()  # refused, and said so
    browser.events.clear()
    visit([FIRST])


def test_code_changes_open(visit):
    browser = visit([FIRST, SECOND])
    assert browser.js("document.querySelector('pre').checkVisibility()") is False
    browser.js("document.querySelector('summary').focus()")
    browser.keys("Enter")
    assert browser.js("document.querySelector('pre').checkVisibility()")
    assert browser.js(texts("pre ins")) == ["+b = 3\n", "+c = 4\n"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_screen_and_scheme(visit, width, dark):
    browser = visit([FIRST, record("x" * 300, date="2031-01-01", source="y" * 900, gain=GAIN)], width, dark=dark)
    page = "rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)"
    assert browser.js("getComputedStyle(document.body).backgroundColor") == page
    for mode in ("curves", "difference"):
        click(browser, f"[value={mode}]")
        click(browser, "summary")
        assert browser.js("document.documentElement.scrollWidth") <= width
        for query in ("#chart", "#timeline", "#controls", "#legend"):
            assert browser.js(f"document.querySelector('{query}').getBoundingClientRect().right") <= width
    browser.mouse("#timeline", (width - 60, 200))
    assert browser.js("document.querySelector('.tip').getBoundingClientRect().right") <= width


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_of_the_charts_are_whole_and_apart(visit, width):
    browser = visit([OLD, NEW | {"date": OLD["date"], "mean_time_s": 400}], width, target=2.6)
    boxes = """['#timeline', '#chart'].flatMap((id) => {
        const all = [...document.querySelector(id).querySelectorAll('text')], of = document.querySelector(id);
        const box = of.getBoundingClientRect(), rects = all.map((t) => t.getBoundingClientRect());
        const out = rects.filter((r) => r.left < box.left - 1 || r.right > box.right + 1 || r.bottom > box.bottom + 1);
        const over = rects.filter((r, i) => rects.some((s, k) => k < i && r.width && s.width && r.left < s.right
            && s.left < r.right && r.top + 2 < s.bottom && s.top + 2 < r.bottom));
        return [...out, ...over].map((r) => all[rects.indexOf(r)].textContent) })"""
    assert browser.js(boxes) == []
    click(browser, "[value=log]")
    click(browser, "[name=whole]")
    assert browser.js(boxes) == []
    differ(browser)
    assert browser.js(boxes) == []


def test_ticks_of_many_decades_are_apart(visit):
    browser = visit([bumpy("Wide", [1e7, 1e3, 1e-3, 1e-7])], 390)
    click(browser, "[value=log]")
    click(browser, "[name=whole]")
    lines = browser.js(GRID)
    assert len(lines) > 5 and all(a - b >= 18 for a, b in zip(lines, lines[1:], strict=False))


def test_controls_have_names_for_screen_readers(visit):
    browser = visit([FIRST, SECOND])
    differ(browser)
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    named = {(node["role"]["value"], node["name"]["value"]) for node in nodes if node.get("name", {}).get("value")}
    wanted = (("application", "Record times by date"), ("application", "Loss curves"), ("radio", "difference"),
              ("combobox", "record A"), ("combobox", "record B"), ("checkbox", "first quarter in full"),
              ("columnheader", "Gain on the same machine"), ("region", "Table of records"))  # fmt: skip
    for role, start in wanted:
        assert any(role == found and name.startswith(start) for found, name in named), (role, start)


def test_a_page_without_records_or_curves_has_no_errors(visit):
    visit([])
    browser = visit([EMPTY, {}])
    assert browser.js(LINES) == "" and browser.js("document.querySelector('[value=difference]').disabled")
