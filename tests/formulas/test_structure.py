"""Tokens that give a text its shape."""

from __future__ import annotations

from kvpress.formulas.structure import structural


def test_punctuation_that_comes_often_is_structure() -> None:
    words = [" name", ":", " a", ",", "\n", " name", ":", " b", ",", "\n", "…", ":", ","]
    found = structural(words, 3, 0.1)
    assert [word for word, x in zip(words, found, strict=True) if x == 0.1] == [":", ","] * 3
    assert structural(words, 2, 0.1)[4] == 0.1  # the ends of lines
    assert structural(words, 4, 0.1) == [1.0] * len(words)


def test_what_joins_a_word_or_is_no_whole_character_is_content() -> None:
    words = ["1", ".", "5", "-", "b", "-", " c", ".", "_", ".", "x", "\ufffd", "\ufffd"]
    found = structural(words, 2, 0.0)
    # The dots and the first hyphen join; a space follows the second hyphen.
    assert [i for i, x in enumerate(found) if x == 0.0] == [5]
