"""Wikipedia markup to prose."""

import bz2
from pathlib import Path

import pytest

from windquant.articles import prose, read_dump
from windquant.errors import WindquantError

LONG = "The abacus is a calculating tool that was in use centuries before the adoption of the written numeral system"
PAGE = """<page><title>{title}</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision></page>"""


def dump(path: Path, *pages: str) -> Path:
    xml = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">' + "".join(pages) + "</mediawiki>"
    path.write_bytes(bz2.compress(xml.encode()))
    return path


def page(title: str, text: str, ns: int = 0, extra: str = "") -> str:
    return PAGE.format(title=title, ns=ns, extra=extra, text=text.replace("<", "&lt;"))


def test_links_styles_and_entities_become_words() -> None:
    markup = "'''Abacus''' is [[tool|a ''tool'']] of [[China]]&nbsp;&ndash; [http://x.org see it] &amp; more. "
    assert prose(markup + LONG + ".") == [f"Abacus is a tool of China – see it & more. {LONG}."]


@pytest.mark.parametrize(
    "noise",
    [
        "<ref name=x>Some book, page 3</ref>",
        "<ref name=x />",
        "{{citation needed|date=May 2015}}",
        "<!-- a comment -->",
        "[[File:Abacus.png|thumb|A [[picture]] with a caption]]",
        "[[Category:Tools]]",
        "[[de:Abakus]]",
        "<gallery>A.png|x</gallery>",
        "({{IPA|x}}; )",
    ],
)
def test_what_is_no_prose_vanishes_without_a_hole(noise: str) -> None:
    assert prose(f"{LONG} {noise}. {LONG}.") == [f"{LONG}. {LONG}."]


def test_templates_inside_sentences_keep_their_words() -> None:
    assert prose(f"It is {{{{convert|5|km|mi}}}} long, ''{{{{lang|fr|abaque}}}}'' in French. {LONG}.") == [
        f"It is 5 km long, abaque in French. {LONG}."
    ]


def test_only_paragraphs_of_sentences_remain() -> None:
    table = f"{{| class=wikitable\n| {LONG}. || {LONG}.\n|}}"
    lists = f"* {LONG}.\n# {LONG}.\n:{LONG}."
    markup = f"==History==\n{LONG}.\n{table}\n{lists}\nShort line.\n{LONG}\nWhere <math>x</math>: {LONG}.\n"
    assert prose(markup) == [f"{LONG}."]


def test_dump_leaves_out_redirects_other_namespaces_and_empty_pages(tmp_path: Path) -> None:
    path = dump(
        tmp_path / "dump.bz2",
        page("Abacus", f"{LONG}.\n\nAgain: {LONG}."),
        page("Abaci", f"{LONG}.", extra='<redirect title="Abacus" />'),
        page("Talk:Abacus", f"{LONG}.", ns=1),
        page("Stub", "{{stub}}"),
    )
    articles = read_dump(path)
    assert [(article.title, article.paragraphs) for article in articles] == [
        ("Abacus", [f"{LONG}.", f"Again: {LONG}."])
    ]
    assert articles[0].text == f"{LONG}.\n\nAgain: {LONG}."


@pytest.mark.parametrize("damage", [lambda data: b"no bz2 at all", lambda data: data[: len(data) // 2]])
def test_damaged_dump_is_named(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]  # a lambda
    path = dump(tmp_path / "dump.bz2", page("Abacus", f"{LONG}. " * 400))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WindquantError, match=r"dump\.bz2: not a readable Wikipedia dump"):
        read_dump(path)
