"""Zero-shot tasks made from articles that nothing else reads, as records for the task definitions in `tasks/`.

- **cloze**: the last word of a sentence, given the sentence and those before it. As in LAMBADA, only words that the
  context mentions and that do not end the phrase before it, so that a model can know them.
- **next_sentence**: which of four sentences follows. The wrong three come from other articles and are of similar
  length. (From the same article, 135 million parameters are right in 40 % of the cases; chance is 25 %.)
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, zip_longest
from pathlib import Path
from typing import Any

from windquant.articles import Article

#: Folder of the lm-eval definitions.
DEFINITIONS = Path(__file__).with_suffix("")
Record = dict[str, Any]

BOUNDARY = re.compile(r'(?<=[a-z0-9)”"][.!?])\s+(?=[A-Z“"])')
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Dr|St|Lt|Gen|Col|Capt|Jr|Sr|No|vs|Inc|Co|Prof|Rev|Fig|cf|ca|al|etc|[A-Z])\.$")
PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'’\-–()%$]*[.]")  # one sentence, nothing quoted
WORD = re.compile(r"[a-z]{4,}|[A-Z][a-z]{3,}")
SHORTEST, LONGEST = 60, 200  # characters of a sentence in a task
CONTEXT = 280  # characters of context to aim for
ENOUGH = 500_000  # characters of articles: every sentence is compared with all others


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, on one line each; where in doubt (abbreviations, initials) two stay together."""
    found: list[str] = []
    for part in BOUNDARY.split(" ".join(paragraph.split())):
        if found and ABBREVIATION.search(found[-1]):
            found[-1] += " " + part
        else:
            found.append(part)
    return found


def cloze_records(articles: Sequence[Article], count: int) -> list[Record]:
    """At most `count` records {"context", "target", "title"}, drawn evenly from the articles."""
    return _draw([_cloze(article) for article in articles], count)


def next_sentence_records(articles: Sequence[Article], count: int) -> list[Record]:
    """At most `count` records {"context", "choices" (4), "label", "title"}, drawn evenly from the first articles."""
    articles = _enough(articles)
    pool = [
        (article.title, sentence)
        for article in articles
        for paragraph in article.paragraphs
        for sentence in sentences(paragraph)
        if _usable(sentence)
    ]
    return _draw([_next_sentence(article, pool) for article in articles], count)


def _enough(articles: Sequence[Article]) -> Sequence[Article]:
    """The first articles, ENOUGH characters of them, or all."""
    ends = accumulate(len(article.text) for article in articles)
    return articles[: sum(end <= ENOUGH for end in ends) + 1]


def _draw(makers: Sequence[Iterator[Record]], count: int) -> list[Record]:
    """One record of every article in turn; which ones depends on their text alone, not on a seed."""
    if count == 0:
        return []
    piles = [sorted(maker, key=lambda record: _digest(record["context"])) for maker in makers]
    turns = (record for turn in zip_longest(*piles) for record in turn if record is not None)
    return list(islice(turns, count))


def _cloze(article: Article) -> Iterator[Record]:
    for paragraph in article.paragraphs:
        parts = sentences(paragraph)
        for index, sentence in enumerate(parts):
            words = sentence.split()
            target = words[-1].rstrip(".") if words else ""
            if index == 0 or not _usable(sentence) or not WORD.fullmatch(target):
                continue
            context = " ".join([*_before(parts, index), *words[:-1]])
            known = re.findall(r"[\w-]+", context)
            if target in known[:-1] and target.lower() != known[-1].lower():
                yield {"context": context, "target": target, "title": article.title}


def _next_sentence(article: Article, pool: Sequence[tuple[str, str]]) -> Iterator[Record]:
    others = [sentence for title, sentence in pool if title != article.title]
    for paragraph in article.paragraphs:
        parts = sentences(paragraph)
        for index in range(1, len(parts)):
            truth = parts[index]
            if not _usable(truth) or not _usable(parts[index - 1]):
                continue
            alike = [other for other in others if 0.8 < len(other) / len(truth) < 1.25]
            if len(alike) < 3:
                continue
            context = " ".join(_before(parts, index))
            chance = random.Random(_digest(context))
            choices = [truth, *chance.sample(alike, 3)]
            chance.shuffle(choices)
            label = choices.index(truth)
            yield {"context": context, "choices": choices, "label": label, "title": article.title}


def _usable(sentence: str) -> bool:
    return SHORTEST <= len(sentence) <= LONGEST and PLAIN.fullmatch(sentence) is not None


def _before(parts: list[str], index: int) -> list[str]:
    """The sentences before parts[index], as many as fit into the context, at least one."""
    first = index - 1
    while first > 0 and sum(map(len, parts[first - 1 : index])) <= CONTEXT:
        first -= 1
    return parts[first:index]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
