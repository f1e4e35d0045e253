// What PyTorch calls as kvpress::scatter_slots: checks, allocation, the kernel.
#pragma once

#include "../gather_slots/bind.h"

namespace kvpress {
namespace {

void scatter_slots(Tensor pool, Tensor address, Tensor slots, bool slot_last) {
  const char* op = "scatter_slots";
  CopySlots a = copy_of(op, pool, address, slot_last);
  check_defined(op, slots, "slots_AX");
  if (slots.scalar_type() != pool.scalar_type()) refuse(op, "slots_AX must be of the dtype of pool_PX");
  const int64_t first = slot_last ? 1 : 2, extra = slot_last ? 1 : pool.dim() - 2;
  bool fits = slots.dim() == 1 + extra && slots.size(0) == a.count;
  for (int64_t i = 0; fits && i < extra; i++) fits = slots.size(1 + i) == pool.size(first + i);
  if (!fits)
    refuse(op, "slots_AX has shape ", shape_of(slots), "; it must hold ", a.count, " slots of pool_PX, of ", a.width,
           " numbers each");
  Memory memory(op);
  memory.writes(pool, "pool_PX");
  memory.reads(address, "address_A");
  memory.reads(slots, "slots_AX");
  memory.check();
  const Tensor from = torch::stable::contiguous(slots);
  a.slots = from.data_ptr();
  if (a.count && a.width) kernels().copy_slots(a, threads());
}

}  // namespace
}  // namespace kvpress
