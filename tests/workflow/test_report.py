"""The report of the tiny model's results: what Snakemake does for it, what stands in it, how a browser shows it."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report import browser
from tests.report.browser import Browser
from tests.workflow.conftest import BITS, GREEDY, MODEL, RESULT, Snakemake
from tests.workflow.test_end_to_end import again

REPORT = "results/report.html"
PICTURE = f"results/{MODEL}_{BITS}bits.plan.svg"
PEERS = [
    {"peer": "gptq", "recipe": "3 bits, groups of 64", "bits": 3.25, "perplexity": 400.0, "seconds": 12.5,
     "peak_memory_bytes": 2_000_000_000, "reason": None, "model": MODEL},
    {"peer": "other", "recipe": "2 bits", "bits": None, "perplexity": None, "seconds": None,
     "peak_memory_bytes": None, "reason": "needs a GPU", "model": MODEL},
]  # fmt: skip


@pytest.fixture(scope="module")
def reported(finished: Path, snakemake: Snakemake) -> Path:
    """The clone with its report, and with peers."""
    table = finished / "benchmarks" / "peers" / "results.json"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps(PEERS))
    done = snakemake(finished, REPORT, PICTURE)
    assert done.returncode == 0, done.stdout[-3000:]
    return finished


@pytest.fixture(scope="module")
def page(reported: Path) -> Path:
    return reported / REPORT


class Text(HTMLParser):
    """The words of a page, and the addresses that it names."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.feed(content)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]


def test_nothing_else_is_made_and_a_second_call_has_nothing_to_do(reported: Path, snakemake: Snakemake) -> None:
    assert again(reported, snakemake, REPORT, PICTURE) == {}
    (reported / REPORT).unlink()
    assert again(reported, snakemake, REPORT) == {"report": 1}, "not even where results would be made anew"
    assert again(reported, snakemake, REPORT, "--config", "recovery={steps: 3}") == {"report": 1}
    snakemake(reported, REPORT)


def test_a_result_that_comes_or_goes_changes_the_report(reported: Path, snakemake: Snakemake) -> None:
    other = reported / GREEDY
    hidden = other.with_name("hidden")
    other.rename(hidden)
    try:
        assert again(reported, snakemake, REPORT) == {"report": 1}
    finally:
        hidden.rename(other)
    assert again(reported, snakemake, REPORT) == {}


def test_numbers_of_the_results_stand_in_the_page(page: Path, reported: Path) -> None:
    text = Text(page.read_text())
    words = " ".join(" ".join(text.words).split())
    for name in (RESULT, GREEDY):
        entry = json.loads((reported / name).read_text())
        for values in entry["perplexity"].values():
            assert f"{values['quantized']:.2f}" in words
        assert f"{entry['effective_bits']:.4f}" in words
        assert f"snakemake --cores all {name}" in words
        assert entry["data"]["quantized"] in words
    search = json.loads((reported / f"data/plans/{MODEL}_{BITS}bits.ppo.json").read_text())["search"]
    assert f"{len(search['pairs'])} measured plans" in words
    assert f"{len(search['curve'])} updates" in words
    assert "2 steps: on text that it is not trained on" in words
    assert "gptq" in words
    assert "needs a GPU" in words


def test_the_page_is_whole_in_itself(page: Path) -> None:
    text = page.read_text()
    assert all(address.startswith(("#", "data:")) for address in Text(text).addresses)
    assert not re.search(r"url\(|@import|<script|<link rel=.stylesheet", text)
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {"http://www.w3.org/2000/svg"}


def test_every_command_in_the_page_is_one_that_snakemake_knows(
    page: Path, reported: Path, snakemake: Snakemake
) -> None:
    commands = re.findall(r"<pre>snakemake --cores all (.*?)</pre>", page.read_text())
    targets = sorted({target for command in commands for target in command.split()})
    assert len(targets) >= 4
    assert again(reported, snakemake, *targets) == {"plan_picture": 1}, "the picture of the other plan"


def test_snakemakes_own_report_has_results_and_pictures(reported: Path, snakemake: Snakemake) -> None:
    done = snakemake(reported, "--report", "own.html", RESULT, GREEDY, PICTURE, REPORT)
    assert done.returncode == 0, done.stdout[-3000:]
    text = (reported / "own.html").read_text()
    for name in (RESULT, GREEDY, PICTURE, REPORT):
        assert name.rpartition("/")[2] in text


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if browser.PATH is None:
        pytest.skip("no chromium on this machine: how the page looks is not tested")
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


VISIBLE = """[...document.querySelectorAll('main svg[role=img]')].map(svg => {
    const box = svg.getBoundingClientRect(), style = getComputedStyle(svg);
    const named = svg.getAttribute('aria-labelledby').split(' ').map(id => document.getElementById(id).textContent);
    const view = svg.viewBox.baseVal;
    const cut = [...svg.querySelectorAll('text')].filter(text => {
        const b = text.getBoundingClientRect();
        return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1;
    }).map(text => text.textContent);
    return {width: box.width, height: box.height, shown: style.visibility == 'visible' && style.display != 'none',
            named, cut, shapes: svg.querySelectorAll('path, rect').length};
})"""
COLOURS = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"


@pytest.mark.parametrize("media", [{}, {"scheme": "dark"}, {"media": "print", "scheme": "dark"}])
def test_a_browser_shows_every_picture_and_asks_no_network(
    chromium: Browser, page: Path, media: dict[str, str]
) -> None:
    chromium.open(page, **media)
    pictures = chromium.evaluate(VISIBLE)
    assert len(pictures) >= 12
    for picture in pictures:
        assert picture["shown"], picture
        assert picture["width"] > 200, picture
        assert picture["height"] > 50, picture
        assert picture["shapes"] > 2, picture
        assert picture["cut"] == [], picture
        assert all(len(text) > 10 for text in picture["named"]), picture
    dark = "dark" in media.values() and "media" not in media
    paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in chromium.evaluate(COLOURS))
    assert (paper < 0.2 and ink > 0.8) if dark else (paper > 0.95 and ink < 0.2)
    assert chromium.requests == [page.resolve().as_uri()]
    assert chromium.errors == []


def test_the_page_fits_a_telephone_and_paper(chromium: Browser, page: Path) -> None:
    chromium.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    chromium.open(page)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= 390
    chromium.call("Emulation.clearDeviceMetricsOverride")
    assert chromium.pdf().startswith(b"%PDF")


def test_the_picture_alone_is_a_picture(chromium: Browser, reported: Path, tmp_path: Path) -> None:
    shutil.copy(reported / PICTURE, tmp_path / "plan.svg")
    chromium.open(tmp_path / "plan.svg", scheme="dark")
    assert chromium.evaluate("document.documentElement.tagName") == "svg"
    assert chromium.evaluate("getComputedStyle(document.querySelector('rect')).fill") == "rgb(20, 23, 28)"
    assert chromium.requests == [(tmp_path / "plan.svg").as_uri()]
    assert chromium.errors == []
