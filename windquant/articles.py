"""Wikipedia dump -> prose: the articles of a `pages-articles` XML file as plain paragraphs.

Markup, tables, templates, references, files and lists go; what remains is running text, one string per paragraph.
"""

import bz2
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from windquant.errors import WindquantError

#: Tags whose content is no prose. Everything else (b, i, small, blockquote, ...) is transparent.
DROPPED_TAGS = frozenset(
    "ref table gallery timeline imagemap code pre source syntaxhighlight score hiero references poem".split()
)
#: Link prefixes that do not show up as running text: File:, Image:, Category:, and interlanguage links (de:, zh-yue:).
DROPPED_LINK = re.compile(r"\s*(file|image|category|media|wikt|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE)
MINIMUM_PARAGRAPH = 80  # characters; shorter lines are captions, labels and remains of tables
DROP_LINE = "\x00"  # stands for a bullet or a formula until the whole line is dropped


@dataclass(frozen=True)
class Article:
    """A title and its paragraphs of running text."""

    title: str
    paragraphs: list[str]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


def read_dump(path: Path) -> list[Article]:
    """All articles with prose of a bz2 MediaWiki dump, in its order; redirects and other namespaces are left out.

    Raises WindquantError if the file is not a readable dump.
    """
    articles = []
    try:
        for title, markup in _pages(path):
            paragraphs = prose(markup)
            if paragraphs:
                articles.append(Article(title, paragraphs))
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise WindquantError(f"{path}: not a readable Wikipedia dump ({error}); delete it and run again") from error
    return articles


def _pages(path: Path) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of every article page, one page in memory at a time."""
    with bz2.open(path) as file:
        for _, element in ElementTree.iterparse(file):
            space, _, tag = element.tag.rpartition("}")
            if tag != "page":
                continue
            names = {"w": space.lstrip("{")}
            is_article = element.findtext("w:ns", "0", names) == "0" and element.find("w:redirect", names) is None
            if is_article:
                yield element.findtext("w:title", "", names), element.findtext("w:revision/w:text", "", names)
            element.clear()


def prose(markup: str) -> list[str]:
    """Paragraphs of running text in wikitext; headings, lists and everything that is not a sentence are dropped."""
    import mwparserfromhell

    # Style tags are only runs of apostrophes: a regular expression drops them faster than the parser finds them.
    markup = re.sub(r"'{2,}", "", markup)
    code = mwparserfromhell.parse(markup, skip_style_tags=True)
    lines = (_clean(line) for line in _visible(code).split("\n") if DROP_LINE not in line)
    return [line for line in lines if len(line) >= MINIMUM_PARAGRAPH and line[-1] in '.!?"”)']


def _visible(code: Any) -> str:
    """What a reader of the page sees of a parsed `Wikicode` as running text."""
    from mwparserfromhell import nodes

    parts: list[str] = []
    for node in code.nodes:
        match node:
            case nodes.Text():
                parts.append(str(node.value))
            case nodes.Wikilink():
                if not DROPPED_LINK.match(str(node.title)):
                    parts.append(_visible(node.title if node.text is None else node.text))
            case nodes.ExternalLink():
                parts.append(_visible(node.title) if node.title is not None else "")
            case nodes.HTMLEntity():
                parts.append(html.unescape(str(node)))
            case nodes.Template():
                parts.append(_template(node))
            case nodes.Heading():
                parts.append("\n")
            case nodes.Tag():
                name = str(node.tag).strip().lower()
                if name in ("li", "dt", "dd", "math", "chem"):
                    parts.append(DROP_LINE)
                elif name == "br":
                    parts.append(" ")
                elif name not in DROPPED_TAGS and node.contents is not None:
                    parts.append(_visible(node.contents))
    return "".join(parts)


def _template(node: Any) -> str:
    """The words of the few templates that stand inside sentences; all others (infoboxes, notes) vanish."""
    name = str(node.name).strip().lower()
    values = [_visible(argument.value).strip() for argument in node.params if not argument.showkey]
    if name in ("convert", "cvt") and len(values) >= 2:
        return f"{values[0]} {values[1]}"
    if (name == "lang" or name.startswith("lang-")) and values:
        return values[-1]
    if name in ("nowrap", "nobr", "sc", "smallcaps", "transl", "circa", "c.") and values:
        return values[-1]
    return {"snd": " – ", "spaced ndash": " – ", "ndash": "–", "mdash": "—", "'": "'", "nbsp": " "}.get(name, "")


def _clean(line: str) -> str:
    """One line without the holes that dropped templates leave: empty brackets, doubled or misplaced blanks."""
    line = html.unescape(line).replace("\u00a0", " ")
    line = re.sub(r"\(\s*(?:[,;:]\s*)+", "(", line)  # "(; born 1879)"
    line = re.sub(r"\(\s*(?:or|and)?\s*\)|\[\s*\]", "", line)
    line = re.sub(r"\s+", " ", line)
    line = re.sub(r" ([,.;:?!)])", r"\1", line)
    return line.strip()
