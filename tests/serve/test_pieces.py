"""Text of tokens as they come, and texts that end it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import tiny_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from kvpress.batching.request import Drawn
from kvpress.serve.pieces import MOST_HELD, Pieces
from kvpress.serve.reading import Reading
from kvpress.serve.stops import Stops

TEXT = "▁ Grüße 世界! 🙂🏳️‍🌈 plain words, then é è ê and  two spaces"


def with_words() -> PreTrainedTokenizerFast:
    """Words that begin with a mark for their space, and bytes for all that is in none."""
    words = ["▁", *"abcdefghijklmnoprstuw,!", "▁t", "▁th", "▁the", "wo", "▁wo"]
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *words]
    pairs = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("w", "o"), ("▁", "wo")]
    model = BPE({name: n for n, name in enumerate(names)}, pairs, byte_fallback=True)
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    plain.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=plain)


MADE = {"bytes": tiny_tokenizer(), "words": with_words()}


def decode(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", list(MADE))
@settings(max_examples=60)
@given(text=st.text(alphabet=st.sampled_from(TEXT), max_size=120))
def test_pieces_join_to_the_whole_text(kind: str, text: str) -> None:
    tokenizer = MADE[kind]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(lambda some: decode(tokenizer, list(some)))
    found = [pieces.add(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in found)
    assert "".join(found) + pieces.finish() == decode(tokenizer, tokens)


def test_bytes_that_are_no_text_do_not_hold_it_up_for_ever() -> None:
    tokenizer, chosen = MADE["bytes"], random.Random(0)
    bad = tokenizer.convert_tokens_to_ids(["ÿ"])[0]  # how byte 0xFF is written
    pieces = Pieces(lambda some: decode(tokenizer, list(some)))
    found = [pieces.add(bad) for _ in range(3 * MOST_HELD)]
    assert [bool(piece) for piece in found].count(True) == 3
    tokens = [chosen.randrange(256) for _ in range(500)]
    text = "".join(pieces.add(token) for token in tokens) + pieces.finish()
    assert text.endswith(decode(tokenizer, tokens)[-3:])


def test_a_token_costs_the_same_however_long_the_text_is() -> None:
    tokenizer, longest = MADE["bytes"], 0

    def watched(tokens: Any) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokenizer, list(tokens))

    pieces = Pieces(watched)
    for token in tokenizer("word 世界 " * 100)["input_ids"]:
        pieces.add(token)
    assert longest < 30


@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_the_first_stop_and_never_shows_a_part_of_it(
    text: str, stops: list[str]
) -> None:
    reader, shown = Stops(stops), ""
    for letter in text:
        shown += reader.add(letter)
        assert not any(stop in shown for stop in stops)
    shown += reader.finish()
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    if ends:  # the one that was complete first; of those the one that began first
        first = min(end for end, _ in ends)
        assert reader.found and shown == text[: min(at for end, at in ends if end == first)]
    else:
        assert not reader.found and shown == text


@given(
    text=st.text(alphabet="abcé", max_size=30), cuts=st.lists(st.integers(1, 9)), stop=st.booleans()
)
def test_what_is_read_does_not_depend_on_how_many_tokens_come_at_once(
    text: str, cuts: list[int], stop: bool
) -> None:
    tokenizer = MADE["bytes"]
    drawn = [Drawn(token) for token in tokenizer(text)["input_ids"]] if text else []
    results = []
    for sizes in (iter([]), iter(cuts)):
        reading = Reading(
            lambda some: decode(tokenizer, list(some)), ["abc"] if stop else [], [256]
        )
        rest, parts = list(drawn), []
        while rest:
            size = next(sizes, 1)
            parts.append(reading.add(rest[:size]))
            rest = rest[size:]
        parts.append(reading.finish())
        told = [one for part in parts for one in part.drawn]
        results.append(("".join(part.text for part in parts), told))
    assert results[0] == results[1]
    shown, told = results[0]
    assert [place for _, place in told] == sorted(place for _, place in told)
    assert all(place <= len(shown) for _, place in told)
    assert len(told) == len(shown.encode())  # every token that is shown, and no other
