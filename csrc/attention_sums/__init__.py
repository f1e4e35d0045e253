"""Column sums of softmax attention over the queries of a prompt, without the P×S matrix."""

SCHEMA = (
    "attention_sums(Tensor query_BNPD, Tensor key_BHSD, Tensor position_BHS, float scaling, float"
    " softcap, int window, str noise, float tau, int seed, int layer) -> Tensor sums_BHS"
)
