"""What would happen to architectures that no test runs: by their configs alone.

As a command it prints the list of docs/models.md, for the installed transformers; it takes minutes.
"""

from __future__ import annotations

import signal
import sys
from collections import defaultdict
from typing import Any

import families
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvpress.hf.fate import fate

_SECONDS = 60  # that one may take: some build models of other kinds inside
_FEWER = ({"num_hidden_layers": 4}, {})


def markdown() -> str:
    """A sentence for everything that may happen."""
    tested = {given[1] for given in (families.FAMILIES | families.REFUSED).values()}
    found = defaultdict(list)
    for model_type, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if name not in tested:
            found[_what(model_type)].append(model_type)
    version = transformers.__version__
    lines = [
        f"Of the other causal language models of transformers {version}, by their default configs:"
    ]
    for what, types in sorted(
        found.items(), key=lambda x: (x[0].startswith("refused"), -len(x[1]))
    ):
        lines.append(f"- {what}: {', '.join(types)}.")
    return "\n".join(lines)


def _what(model_type: str) -> str:
    """What happens to a model of a type."""
    config = _config(model_type)
    if config is None:
        return "not known, since their configs have no defaults"
    signal.alarm(_SECONDS)
    try:
        known = fate(config)
    except TimeoutError:
        return "not known, since building one takes long"
    finally:
        signal.alarm(0)
    if known.refused.startswith("transformers cannot"):
        return "not known, since their default configs build no model"
    if known.refused:
        return f"refused, {known.refused}"
    return "attached: " + ", ".join(sorted({part.what for part in known.parts}))


def _config(model_type: str) -> Any:
    for fields in _FEWER:
        try:
            return CONFIG_MAPPING[model_type](**fields)
        except Exception:
            continue
    return None


def _late(*_: Any) -> None:
    raise TimeoutError


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _late)
    sys.stdout.write(markdown() + "\n")
