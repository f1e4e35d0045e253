// Slots of a pool into fresh memory and back. They are moved as bytes: any dtype, bit by bit.
#pragma once

#include <algorithm>
#include <cstring>

#include "../include/tasks.h"

namespace kvpress::KERNEL_ISA {

template <class Word>
void copy_slots(const CopySlots& a, const Threads& threads) {
  constexpr int64_t kTogether = 256;  // slots of one task
  auto* pool = static_cast<Word*>(a.pool);
  auto* slots = static_cast<Word*>(a.slots);
  share(threads, (a.count + kTogether - 1) / kTogether, a.count * a.width > 1 << 15, [&](int64_t task) {
    for (int64_t n = task * kTogether; n < std::min(a.count, (task + 1) * kTogether); n++) {
      const int64_t page = a.address[n] / a.page_slots, offset = a.address[n] % a.page_slots;
      Word* slot = slots + n * a.width;
      if (!a.slot_last) {
        Word* place = pool + a.address[n] * a.width;
        std::memcpy(a.gather ? slot : place, a.gather ? place : slot, a.width * sizeof(Word));
        continue;
      }
      Word* channel = pool + page * a.width * a.page_slots + offset;
      for (int64_t d = 0; d < a.width; d++)
        if (a.gather)
          slot[d] = channel[d * a.page_slots];
        else
          channel[d * a.page_slots] = slot[d];
    }
  });
}

inline void copy_slots(const CopySlots& a, const Threads& threads) {
  if (a.item_bytes == 1) copy_slots<uint8_t>(a, threads);
  if (a.item_bytes == 2) copy_slots<uint16_t>(a, threads);
  if (a.item_bytes == 4) copy_slots<uint32_t>(a, threads);
  if (a.item_bytes == 8) copy_slots<uint64_t>(a, threads);
}

}  // namespace kvpress::KERNEL_ISA
