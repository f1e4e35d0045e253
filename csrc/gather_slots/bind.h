// What PyTorch calls as kvpress::gather_slots: checks, allocation, the kernel.
#pragma once

#include "../include/bind.h"
#include "../include/dispatch.h"

namespace kvpress {
namespace {

// Checks what gather_slots and scatter_slots share; `slots` is filled in by them.
CopySlots copy_of(const char* op, const Tensor& pool, const Tensor& address, bool slot_last) {
  check_defined(op, pool, "pool_PX");
  check_defined(op, address, "address_A");
  const int64_t dims = pool.dim();
  if (dims < 2 || (slot_last && dims != 3))
    refuse(op, "pool_PX has shape ", shape_of(pool), "; [P, S, ...] or [P, D, S]");
  if (address.dim() != 1) refuse(op, "address_A has shape ", shape_of(address), "; it must be a list");
  expect(op, pool, "pool_PX", pool.scalar_type(), "");
  expect(op, address, "address_A", ScalarType::Long, "int64");
  CopySlots a{};
  a.pool = pool.data_ptr();
  a.address = static_cast<const int64_t*>(address.data_ptr());
  a.count = address.numel();
  a.page_slots = slot_last ? pool.size(2) : pool.size(1);
  a.width = 1;
  for (int64_t i = slot_last ? 1 : 2; i < (slot_last ? 2 : dims); i++) a.width = times(a.width, pool.size(i));
  a.item_bytes = int64_t(pool.element_size());
  if (a.item_bytes > 8) refuse(op, "pool_PX has numbers of ", a.item_bytes, " bytes; at most 8 are supported");
  a.slot_last = slot_last;
  const int64_t slots = times(pool.size(0), a.page_slots);
  if (times(times(plus(a.count, slots), plus(a.width, 1)), 8) == INT64_MAX)
    refuse(op, "pool_PX has shape ", shape_of(pool), ", more slots than memory has bytes");
  for (int64_t n = 0; n < a.count; n++)
    if (a.address[n] < 0 || a.address[n] >= slots)
      refuse(op, "address_A names slot ", a.address[n], "; slots 0 to ", slots - 1, " exist");
  return a;
}

Tensor gather_slots(Tensor pool, Tensor address, bool slot_last) {
  CopySlots a = copy_of("gather_slots", pool, address, slot_last);
  std::vector<int64_t> shape{a.count};
  for (int64_t i = slot_last ? 1 : 2; i < (slot_last ? 2 : pool.dim()); i++) shape.push_back(pool.size(i));
  Tensor slots = torch::stable::new_empty(pool, shape);
  a.slots = slots.data_ptr();
  a.gather = true;
  if (a.count && a.width) kernels().copy_slots(a, threads());
  return slots;
}

}  // namespace
}  // namespace kvpress
