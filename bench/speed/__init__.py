"""Time and memory of policies beside transformers' caches: what `kvpress bench` measures."""
