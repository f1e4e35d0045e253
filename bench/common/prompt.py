"""Prompts made of a text: one with a question, several parts of it, as many tokens as wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvpress.bench.common.text import default_text

from kvpress.errors import KVPressError, PolicyError

if TYPE_CHECKING:
    import torch

QUESTION = "In one sentence: what does the assert statement do?"
TOKENS = 4000


class PromptError(KVPressError, ValueError):
    """A prompt or generation setting that cannot be run."""


def reference_prompt(tokenizer: Any, tokens: int = TOKENS, question: str = QUESTION) -> str:
    """About `tokens` tokens of Python's language reference and a question, as a chat."""
    text = default_text().content
    overhead = len(tokenizer(as_chat(tokenizer, question))["input_ids"])
    start = tokenizer(text[: tokens * 8], return_offsets_mapping=True)["offset_mapping"][
        : tokens - overhead
    ]
    return as_chat(tokenizer, f"{text[: start[-1][1]]}\n\n{question}")


def as_chat(tokenizer: Any, text: str) -> str:
    """The text as one user message in the tokenizer's chat template, if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return text
    message = [{"role": "user", "content": text}]
    chat: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return chat


_ANSWER = "An answer."


def as_turn(tokenizer: Any, text: str) -> tuple[str, str]:
    """What ends an answer in the tokenizer's chat template, and the text as the next user message.

    Raises PromptError for a template that writes earlier messages otherwise once there are more.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", text
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    messages = [*before, {"role": "user", "content": text}]
    known: str = tokenizer.apply_chat_template(before, tokenize=False)
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not whole.startswith(known) or _ANSWER not in known:
        raise PromptError(
            "The chat template of this tokenizer writes earlier messages otherwise once there are"
            " more: a chat cannot go on from what was read. Give --no-chat, and write turns so."
        )
    return known[known.rindex(_ANSWER) + len(_ANSWER) :], whole[len(known) :]


def check_positions(model: Any, tokens: int, new_tokens: int) -> None:
    """Raises PromptError where a prompt and new tokens exceed the model's positions."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens + new_tokens > limit:
        raise PromptError(
            f"A prompt of {tokens} tokens and {new_tokens} new ones exceed the model's {limit}"
            " positions. Shorten the prompt, lower the number of new tokens, or take another model."
        )


def prompts(model: Any, tokenizer: Any, tokens: int, batch: int, new_tokens: int) -> torch.Tensor:
    """`[batch, tokens]`: consecutive parts of the language reference, on the model's device.

    Where it is not long enough it starts again. Raises PromptError where they and `new_tokens` more
    exceed the model's positions.
    """
    import torch

    check_positions(model, tokens, new_tokens)
    ids = tokenizer(default_text().content, add_special_tokens=False)["input_ids"]
    text = torch.tensor(ids)
    repeats = -(-tokens * batch // len(text))
    return text.repeat(repeats)[: tokens * batch].view(batch, tokens).to(model.device)


def parts(model: Any, tokenizer: Any, text: str, tokens: int, samples: int) -> list[Any]:
    """Consecutive parts of a text: ids `[1, tokens]`, on the model's device."""
    import torch

    check_positions(model, tokens, 0)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < tokens * samples:
        raise PolicyError(
            f"The text has {len(ids):,} tokens; {samples} samples of {tokens:,} need"
            f" {tokens * samples:,}. Give a longer text, or fewer --samples or --tokens."
        )
    return list(torch.tensor(ids[: tokens * samples]).view(samples, 1, tokens).to(model.device))
