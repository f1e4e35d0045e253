"""Dense copies of ragged paged rows."""

SCHEMA = "gather_slots(Tensor pool_PSX, Tensor address_N) -> Tensor slots_NX"
