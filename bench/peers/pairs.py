"""Presses of NVIDIA's kvpress, each beside the policy that comes nearest to it.

Where the two differ by what they are, a further pair has the difference switched off on both sides:
what is left there is the difference of two programs that should do the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from kvpress.policy.loading import parse
from kvpress.policy.recipe import Recipe

_REPEAT = "\n\nRepeat the previous context exactly."
_MARK = "<the user's text>"
THEIRS = "theirs"  # an instruction: the one that KVzipPress gives


class Pair(NamedTuple):
    """A press and a policy, without their budget.

    `{prefix}`: the number of tokens before a user's text. differs: what they are known to differ
    in; empty: nothing.
    """

    press: str
    policy: str
    differs: str = ""

    def at(self, budget: str, frame: Frame) -> tuple[str, str]:
        """Press and policy as they are written with a budget."""
        prefix = len(frame.prefix)
        press, policy = (text.format(prefix=prefix) for text in (self.press, self.policy))
        first, plus, rest = policy.partition("+")
        return _with(press, budget), f"{_with(first, budget)}{plus}{rest}"


_POOLED = "votes are averaged over neighbours there; here the largest counts"
_WORDS = "the words before the repetition"
_TEMPLATE = "the chat template's tokens, which go first there"
_CHANNELS = "channels that never change are divided by zero there"
_CHUNKS = "whole chunks stay there, even if counts differ; protected tokens are part of a chunk"
_SUMMED = "absolute values are summed there; the norm here is Euclidean"
_SKETCHED = "random sketches, unscaled logits and z-scores over all heads there"
PAIRS = (
    Pair("KnormPress", "knorm", "layer 0: equal tokens have equal norms, and rounding breaks ties"),
    Pair("ExpectedAttentionPress", "expected_attention"),
    Pair("AdaKVPress(ExpectedAttentionPress)", "expected_attention+adakv"),
    Pair("SnapKVPress", "snapkv:window=64,pool=5", _POOLED),
    Pair("SnapKVPress:kernel_size=1", "snapkv:window=64,pool=1"),
    Pair("AdaKVPress(SnapKVPress)", "snapkv:window=64,pool=5+adakv", _POOLED),
    Pair("AdaKVPress(SnapKVPress):kernel_size=1", "snapkv:window=64,pool=1+adakv"),
    Pair("KVzipPress", "kvzip", f"{_TEMPLATE}; {_WORDS}"),
    Pair("KVzipPress", f"kvzip:instruction={THEIRS}", _TEMPLATE),
    Pair("KVzipPress:n_sink={prefix}", "kvzip:sink={prefix}", _WORDS),
    Pair("KVzipPress:n_sink={prefix}", f"kvzip:sink={{prefix}},instruction={THEIRS}"),
    Pair("KeyDiffPress", "keydiff"),
    Pair("CURPress", "cur", "a last window that is not full is padded with zeros there"),
    Pair("LagKVPress", "lagkv", _CHANNELS),
    Pair("ChunkKVPress(SnapKVPress)", "snapkv:window=64,pool=5+chunkkv", f"{_POOLED}; {_CHUNKS}"),
    Pair("ChunkKVPress(KnormPress)", "knorm+chunkkv", _CHUNKS),
    Pair("CriticalKVPress(SnapKVPress)", "snapkv:window=64,pool=5+criticalkv", _SUMMED),
    Pair("CompactorPress", "compactor", _SKETCHED),
)


class Frame(NamedTuple):
    """What a chat template puts around a user's text, as KVzipPress takes it from the tokenizer.

    prefix: the tokens before it. words: what is said before a repetition: the instruction and the
    text behind the user's.
    """

    prefix: tuple[int, ...]
    words: str


def frame(tokenizer: Any) -> Frame:
    """That of a tokenizer. Without a chat template there is nothing before, and a line feed behind.

    Raises ValueError where the template changes the text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return Frame((), f"{_REPEAT}\n")
    message = [{"role": "user", "content": _MARK}]
    whole: str = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, found, behind = whole.partition(_MARK)
    if not found:
        raise ValueError("The chat template changes the user's text; no frame can be read off it.")
    return Frame(tuple(tokenizer(before, add_special_tokens=False)["input_ids"]), _REPEAT + behind)


def recipe(policy: str, words: str) -> Recipe:
    """The recipe of a policy's text, with the peer's words where it asks for them."""
    return parse([_told(one, words) for one in parse(policy).policies])


def _told(policy: Any, words: str) -> Any:
    if getattr(policy, "instruction", None) != THEIRS:
        return policy
    return dataclasses.replace(policy, instruction=words)


def _with(text: str, budget: str) -> str:
    return f"{text}{',' if ':' in text else ':'}budget={budget}"
