"""A server as a process of its own, over a scripted batcher: `python process.py PORT DRAIN`."""

from __future__ import annotations

import logging
import sys

from scripted import Batcher
from serving import tiny_tokenizer

from kvpress.serve.command import LimitOptions, made_service
from kvpress.serve.keys import Keys
from kvpress.serve.running import listening, run

if __name__ == "__main__":
    drain = float(sys.argv[1])
    logging.basicConfig(level=logging.INFO)
    tokenizer = tiny_tokenizer()
    batcher = Batcher(tokenizer, lambda request: "x" * (request.sampling.seed or 1), pace=0.01)
    bound = listening("127.0.0.1", 0)
    sys.stdout.write(f"{bound.getsockname()[1]}\n")
    sys.stdout.flush()
    run(made_service(batcher, tokenizer, "tiny", Keys(), LimitOptions(drain=drain)), bound, drain)
