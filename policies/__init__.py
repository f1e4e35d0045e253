"""The policies: one file each, loaded by name. See CONTRIBUTING.md for the recipe."""

# What `attach(memory=)` and `kvpress plan` try, the harmless ones first: kind, specification, and
# whether pages may go to the host and the disk. `{tokens}` is the largest budget that fits. Exact
# tiers stand before fewer bits, though every token then reads everything: there are tiers only
# where a user gave host= or disk=, which says rather late than less. Four bits are without a guard:
# how many rows it would keep in eight cannot be foreseen. Evicting is packed too, since three times
# as many tokens at 4 bits answer more: docs/quality.md.
LADDER = (
    ("full", "full", False),
    ("full", "full", True),
    ("packed", "quant:key_bits=8,value_bits=8", False),
    ("packed", "quant:guard=none", False),
    ("retrieving", "quest:read=1024", True),
    ("retrieving", "quest:read=1024+quant:guard=none", True),
    ("evicting", "expected_attention:budget={tokens}+heads+quant:guard=none", False),
    ("evicting", "snapkv:budget={tokens}+quant:guard=none", False),
    ("evicting", "snapkv:budget={tokens}", False),
)
