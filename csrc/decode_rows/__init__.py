"""Attention of new queries over ragged paged rows."""

SCHEMA = (
    "decode_rows(Tensor query_BNQD, Tensor key_PSD, Tensor value_PSD, Tensor table_RW, Tensor"
    " counts_R, float scaling, float softcap, bool need_weights) -> (Tensor out_BNQD, Tensor"
    " lse_BNQ, Tensor weights_BNQS)"
)
