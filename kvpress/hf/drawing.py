"""Drawing the next token of one request, as `generate()` would for it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvpress.errors import UnsupportedModelError
from kvpress.hf.sampling import Drawn, Sampling

_TOP_K = 50  # transformers' own, where a generation config does not say
# Options of a generation config that change tokens and are not honoured here.
_UNKNOWN = (
    "sequence_bias",
    "bad_words_ids",
    "guidance_scale",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "min_length",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "begin_suppress_tokens",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "watermarking_config",
    "num_beams",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
)
_NEUTRAL: tuple[Any, ...] = (None, 0, 1, 0.0, 1.0, False, [], {})


def check_config(config: GenerationConfig) -> None:
    """Raises UnsupportedModelError for a generation config that says what is not honoured here."""
    said = [name for name in _UNKNOWN if getattr(config, name, None) not in _NEUTRAL]
    if said:
        options = ", ".join(f"{name}={getattr(config, name)}" for name in said)
        raise UnsupportedModelError(
            f"The generation config of this model asks for {options}, which batching does not"
            " honour. Set them to None in model.generation_config, or use engine.generate()."
        )


def ends_of(config: GenerationConfig) -> tuple[int, ...]:
    """The ids that end a text."""
    ends = config.eos_token_id
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)


class Drawer:
    """Draws the tokens of one text. Its generator is its own: nobody else's draws move it.

    prompt: tokens of the text before the first one drawn. ends: ids that end it. is_plain: whether
    the likeliest token is taken, whatever came before.
    """

    def __init__(
        self,
        own: Sampling,
        config: GenerationConfig,
        prompt: int,
        ends: Sequence[int],
        device: torch.device,
    ) -> None:
        temperature = _first(own.temperature, config.temperature, 1.0)
        asked = (own.temperature, own.top_p, own.top_k, own.min_p)
        said = any(x is not None for x in asked) or bool(config.do_sample)
        self._samples = said and temperature > 0
        self._processors = LogitsProcessorList()
        self._processors.extend(_every(own, config, prompt, list(ends), device))
        if self._samples:
            self._processors.extend(_warpers(own, config, temperature))
        self._logprobs, self._device = own.logprobs, device
        self.is_plain = not self._samples and not self._processors and own.logprobs is None
        self._random = torch.Generator(device)
        if own.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(own.seed)

    def draw(self, ids: list[int], logits_V: Tensor) -> Drawn:
        """The next token of a text. ids: all of it so far. logits_V: fp32."""
        scores_1V = logits_V[None].clone()
        if self._processors:
            text_1T: Any = torch.tensor([ids], dtype=torch.int64, device=self._device)
            scores_1V = self._processors(text_1T, scores_1V)
        if self._samples:
            chances_1V = torch.softmax(scores_1V, dim=-1)
            token = int(torch.multinomial(chances_1V, 1, generator=self._random))
        else:
            token = int(scores_1V.argmax())
        if self._logprobs is None:
            return Drawn(token)
        logprobs_V = torch.log_softmax(logits_V, dim=-1)
        top = torch.topk(logprobs_V, self._logprobs) if self._logprobs else None
        pairs = () if top is None else zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Drawn(token, float(logprobs_V[token]), tuple(pairs))


def _every(
    own: Sampling, config: GenerationConfig, prompt: int, ends: list[int], device: torch.device
) -> list[Any]:
    """What changes the logits however a token is drawn, in transformers' order."""
    made: list[Any] = []
    penalty = _first(own.repetition_penalty, config.repetition_penalty, 1.0)
    if penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(penalty))
    if config.no_repeat_ngram_size:
        made.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    least = _first(own.min_new_tokens, config.min_new_tokens, 0)
    if least and ends:
        made.append(MinNewTokensLengthLogitsProcessor(prompt, least, ends, device=str(device)))
    if config.suppress_tokens:
        made.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=str(device)))
    return made


def _warpers(own: Sampling, config: GenerationConfig, temperature: float) -> list[Any]:
    """What changes the chances of a sampled token, in transformers' order."""
    made: list[Any] = []
    if temperature != 1.0:
        made.append(TemperatureLogitsWarper(float(temperature)))
    top_k = _first(own.top_k, config.top_k, _TOP_K)
    if top_k:
        made.append(TopKLogitsWarper(top_k))
    top_p = _first(own.top_p, config.top_p, 1.0)
    if top_p < 1.0:
        made.append(TopPLogitsWarper(top_p))
    min_p = _first(own.min_p, config.min_p, None)
    if min_p:
        made.append(MinPLogitsWarper(min_p))
    return made


def _first(*values: Any) -> Any:
    """The first that is said."""
    return next((value for value in values if value is not None), None)
