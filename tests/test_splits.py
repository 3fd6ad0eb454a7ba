"""Documents are dealt to the splits whole, each to one."""

import random

import pytest

from windquant import splits
from windquant.articles import Article


def test_documents_are_dealt_in_proportion_and_whole() -> None:
    chance = random.Random(0)
    documents = [Article(str(number), ["x" * chance.randint(10, 4000)]) for number in range(400)]
    shares = {"a": 0.1, "b": 0.3, "c": 0.6}
    dealt = splits.deal(documents, shares)
    assert sorted(document.title for part in dealt.values() for document in part) == sorted(map(str, range(400)))
    total = sum(len(document.text) for document in documents)
    for name, share in shares.items():
        assert sum(len(document.text) for document in dealt[name]) / total == pytest.approx(share, abs=0.01)
    assert splits.deal(documents[::-1], shares) == dealt


def _documents(*lengths: int) -> list[Article]:
    return [Article(f"{number}", ["x" * length]) for number, length in enumerate(lengths)]


def _worth(document: Article) -> int:
    return len(document.text)


def test_a_split_that_has_enough_borrows_nothing() -> None:
    split, reserve = _documents(10, 10, 10), _documents(100)
    splits.lend(reserve, split, 30, _worth)
    assert (len(split), len(reserve)) == (3, 1)


def test_a_split_borrows_until_it_has_enough() -> None:
    split, reserve = _documents(10), _documents(30, 40, 20, 5)
    splits.lend(reserve, split, 30, _worth)
    assert [len(document.text) for document in split] == [10, 5, 20]
    assert [len(document.text) for document in reserve] == [30, 40]


def test_half_of_what_is_lent_from_stays() -> None:
    split, reserve = _documents(10), _documents(30, 20, 20, 10)
    splits.lend(reserve, split, 1000, _worth)
    assert [len(document.text) for document in reserve] == [30, 20]
    splits.lend(empty := [], split, 1000, _worth)
    assert empty == []
    assert [len(document.text) for document in split] == [10, 10, 20]
