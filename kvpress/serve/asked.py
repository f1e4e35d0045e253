"""What a request asks for, checked: nothing that would change the answer is passed over."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kvpress.batching.request import Sampling
from kvpress.errors import BudgetError, InputError
from kvpress.policy.budget import Budget
from kvpress.serve.fields import Fields, whole_text
from kvpress.serve.messages import messages, tools
from kvpress.serve.problems import wrong

MOST_CHOICES = 16  # answers of one request
MOST_STOPS, LONGEST_STOP = 16, 256  # texts, characters
MOST_TOLD = 20  # tokens beside each drawn one
LAST_SEED = 2**63 - 1 - MOST_CHOICES

Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A request that is in order.

    chat: the turns; None for a completion of prompts. tools: that the template shows. choices:
    answers of each prompt. most_new: tokens of an answer; None: as many as there may be. told:
    whether probabilities are told with the tokens. include_usage: at the end of a stream.
    """

    model: str
    prompts: tuple[Prompt, ...]
    chat: list[dict[str, Any]] | None
    tools: list[dict[str, Any]]
    choices: int
    most_new: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    budget: str | float | int | None
    stream: bool
    include_usage: bool

    @property
    def told(self) -> bool:
        """Whether probabilities are told."""
        return self.sampling.logprobs is not None


def chat(fields: Fields, policy: str) -> Asked:
    """A request for the next turn of a chat. policy: of the server. Raises Problem."""
    turns, functions = messages(fields.items("messages")), tools(fields.items("tools"))
    choice = fields.any("tool_choice")
    if choice not in (None, "auto", "none"):
        message = "tool_choice cannot force a call: nothing makes the model keep to it."
        raise wrong("tool_choice", f"{message} Allowed: auto, none.", "unsupported")
    fields.only("parallel_tool_calls", (True,), "how many calls there are is the model's choice.")
    told, top = fields.flag("logprobs"), fields.count("top_logprobs", 0, MOST_TOLD)
    if top and not told:
        raise wrong("top_logprobs", "top_logprobs needs logprobs=true.")
    form = fields.part("response_format")
    if form is not None:
        if form.needed("type") != "text":
            message = "response_format: nothing makes the model keep to a form. Allowed: text."
            raise wrong("response_format", message, "unsupported")
        form.nothing_else()
    most_new = fields.count("max_completion_tokens", 1, 2**31)
    older = fields.count("max_tokens", 1, 2**31)
    if None not in (most_new, older) and most_new != older:
        raise wrong("max_tokens", "max_tokens and max_completion_tokens differ. Give one of them.")
    for name in ("functions", "function_call", "audio", "prediction", "web_search_options"):
        fields.only(name, (), "leave it out.")
    fields.only("modalities", (["text"],), "the model writes text alone.")
    for name in ("reasoning_effort", "verbosity"):
        fields.only(name, (), "models have no such setting that this server knows.")
    shown = [] if choice == "none" else functions
    return _asked(
        fields,
        policy,
        chat=turns,
        tools=shown,
        most_new=most_new or older,
        logprobs=(top or 0) if told else None,
    )


def completion(fields: Fields, policy: str) -> Asked:
    """A request for what follows one or more prompts. policy: of the server. Raises Problem."""
    prompts = _prompts(fields.any("prompt"))
    fields.only("echo", (False,), "put the prompt before the answer yourself.")
    fields.only("suffix", ("",), "the model only goes on with a text.")
    fields.only("best_of", (fields.any("n") or 1,), "all answers are given: use n.")
    told = fields.count("logprobs", 0, MOST_TOLD)
    most_new = fields.count("max_tokens", 1, 2**31)
    return _asked(fields, policy, prompts=prompts, most_new=most_new, logprobs=told)


def _asked(
    fields: Fields,
    policy: str,
    *,
    most_new: int | None,
    logprobs: int | None,
    prompts: tuple[Prompt, ...] = (),
    chat: list[dict[str, Any]] | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> Asked:
    """What both kinds have in common."""
    for name in ("presence_penalty", "frequency_penalty"):
        fields.only(name, (0, 0.0), "there is repetition_penalty instead.")
    fields.only("logit_bias", ({},), "leave it out.")
    fields.only("store", (False,), "nothing is stored.")
    fields.only("service_tier", ("auto", "default"), "there is one tier.")
    for name in ("user", "safety_identifier", "prompt_cache_key"):  # they change no answer
        fields.text(name)
    fields.part("metadata")
    stream = fields.flag("stream")
    asked = Asked(
        model=fields.needed("model"),
        prompts=prompts,
        chat=chat,
        tools=tools or [],
        choices=fields.count("n", 1, MOST_CHOICES) or 1,
        most_new=most_new,
        sampling=_sampling(fields, logprobs),
        stop=_stop(fields.any("stop")),
        budget=_budget(fields.part("kvpress"), policy),
        stream=stream,
        include_usage=_include_usage(fields.part("stream_options"), stream),
    )
    fields.nothing_else()
    if max(len(prompts), 1) * asked.choices > MOST_CHOICES:
        message = f"{len(prompts)} prompts with n={asked.choices} are too many answers."
        raise wrong("n", f"{message} Allowed: {MOST_CHOICES}.")
    return asked


def _sampling(fields: Fields, logprobs: int | None) -> Sampling:
    try:
        return Sampling(
            temperature=fields.number("temperature"),
            top_p=fields.number("top_p"),
            top_k=fields.count("top_k", 0, 2**31),
            min_p=fields.number("min_p"),
            repetition_penalty=fields.number("repetition_penalty"),
            min_new_tokens=fields.count("min_tokens", 0, 2**31),
            seed=fields.count("seed", 0, LAST_SEED),
            logprobs=logprobs,
        )
    except InputError as error:
        raise wrong(str(error).partition("=")[0], str(error)) from None


def _stop(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    texts = given if isinstance(given, list) else [given]
    if len(texts) > MOST_STOPS:
        raise wrong("stop", f"stop: {len(texts)} texts are given. Allowed: {MOST_STOPS}.")
    for text in texts:
        if not 0 < len(whole_text(text, "stop")) <= LONGEST_STOP:
            raise wrong("stop", f"stop: texts have 1 to {LONGEST_STOP} characters.")
    return tuple(texts)


def _budget(given: Fields | None, policy: str) -> str | float | int | None:
    if given is None:
        return None
    chosen = given.text("policy")
    if chosen not in (None, policy):
        message = f"kvpress.policy: this server has one policy, {policy}. Leave it out."
        raise wrong("kvpress.policy", message, "unknown_policy")
    budget = given.any("budget")
    given.nothing_else()
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, (str, int, float)):
        raise wrong("kvpress.budget", "kvpress.budget must be a number or a string.")
    # An exponent could have millions of digits to count.
    if isinstance(budget, str) and not re.fullmatch(r"[0-9.]{1,20} ?[A-Za-z]{0,8}", budget):
        raise wrong("kvpress.budget", "kvpress.budget is not like 0.5, 0.5prompt, 2048, 256MiB.")
    try:
        Budget.parse(budget, "kvpress.budget")
    except (BudgetError, ArithmeticError) as error:
        raise wrong("kvpress.budget", str(error), "invalid_budget") from None
    return budget


def _include_usage(given: Fields | None, stream: bool) -> bool:
    if given is None:
        return False
    if not stream:
        raise wrong("stream_options", "stream_options needs stream=true.")
    wanted = given.flag("include_usage")
    given.only("include_obfuscation", (False,), "streams are not padded.")
    given.nothing_else()
    return wanted


def _prompts(given: Any) -> tuple[Prompt, ...]:
    """One text, several, ids of one, or of several."""
    if isinstance(given, str):
        return (whole_text(given, "prompt"),)
    if not isinstance(given, list) or not given:
        raise wrong("prompt", "prompt must be a string, token ids, or a list of these.", "missing")
    if _are_ids(given):
        return (tuple(given),)
    found: list[Prompt] = []
    for place, each in enumerate(given):
        if isinstance(each, list) and each and _are_ids(each):
            found.append(tuple(each))
        else:
            found.append(whole_text(each, f"prompt[{place}]"))
    return tuple(found)


def _are_ids(given: list[Any]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) for each in given)
