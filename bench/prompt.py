"""The default prompt: Python's language reference, and a question about it."""

from __future__ import annotations

from typing import Any

from kvpress.bench.text import default_text

QUESTION = "In one sentence: what does the assert statement do?"
TOKENS = 4000


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
