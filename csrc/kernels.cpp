// All kernels for one instruction set: compiled once with each set of flags, with KERNEL_ISA as its name.
#include "absorb_step/cpu.h"
#include "attend_blocks/cpu.h"
#include "attention_sums/cpu.h"
#include "channel_scores/cpu.h"
#include "decode_rows/cpu.h"
#include "decode_step/cpu.h"
#include "estimate_blocks/cpu.h"
#include "gather_slots/cpu.h"
#include "match_keys/cpu.h"
#include "pack/cpu.h"

namespace kvpress::KERNEL_ISA {

extern const Kernels kernels;
const Kernels kernels{decode_rows, decode_step, absorb_step, attention_sums, estimate_blocks, attend_blocks, match_keys, copy_slots, pack_pages, channel_scores};

}  // namespace kvpress::KERNEL_ISA
