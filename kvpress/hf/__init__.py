"""The only package that imports transformers: attaching, caches, masks, calls of `generate()`."""
