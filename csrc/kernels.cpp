// All kernels for one instruction set: compiled once with each set of flags, with KERNEL_ISA as its name.
#include "absorb_step/cpu.h"
#include "attend_blocks/cpu.h"
#include "attend_parts/cpu.h"
#include "attention_sums/cpu.h"
#include "channel_scores/cpu.h"
#include "choose_pages/cpu.h"
#include "copy_ranges/cpu.h"
#include "decode_rows/cpu.h"
#include "decode_step/cpu.h"
#include "decode_steps/cpu.h"
#include "estimate_blocks/cpu.h"
#include "gather_slots/cpu.h"
#include "join_parts/cpu.h"
#include "match_keys/cpu.h"
#include "missed_mass/cpu.h"
#include "pack/cpu.h"
#include "page_bounds/cpu.h"
#include "read_records/cpu.h"
#include "score_cells/cpu.h"
#include "score_pages/cpu.h"
#include "search_pages/cpu.h"

namespace kvpress::KERNEL_ISA {

constexpr Kernels with(decltype(Kernels::estimate_blocks) estimate) {
  return {decode_rows, attend_parts, decode_step, absorb_step,    attention_sums, estimate,     attend_blocks,
          match_keys,  copy_slots,   pack_pages,  channel_scores, join_parts,     read_records, page_bounds,
          score_pages, choose_pages, missed_mass, search_pages,   score_cells,    copy_ranges,  decode_steps};
}

extern const Kernels kernels;
const Kernels kernels = with(estimate_blocks<PairProducts>);

#if defined(__AVX512F__)
extern const Kernels kernels_vnni;  // for machines that have those instructions too
const Kernels kernels_vnni = with(estimate_blocks<QuadProducts>);
#if defined(KVPRESS_AMX)
extern const Kernels kernels_amx;
const Kernels kernels_amx = with(estimate_blocks<TileProducts>);
#endif
#endif

}  // namespace kvpress::KERNEL_ISA
