"""The operators beside their references and PyTorch: what `kvpress bench ops` measures."""
