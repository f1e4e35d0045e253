// The CPU operators for PyTorch, through its stable ABI: one translation unit, a bind.h per operator.
#include <torch/csrc/stable/library.h>

#include "absorb_step/bind.h"
#include "attend_blocks/bind.h"
#include "attend_parts/bind.h"
#include "attend_sums/bind.h"
#include "attention_sums/bind.h"
#include "channel_scores/bind.h"
#include "choose_pages/bind.h"
#include "copy_ranges/bind.h"
#include "decode_chosen/bind.h"
#include "decode_rows/bind.h"
#include "decode_step/bind.h"
#include "decode_steps/bind.h"
#include "estimate_blocks/bind.h"
#include "gather_slots/bind.h"
#include "join_parts/bind.h"
#include "match_keys/bind.h"
#include "missed_mass/bind.h"
#include "pack/bind.h"
#include "page_bounds/bind.h"
#include "read_records/bind.h"
#include "scatter_slots/bind.h"
#include "score_cells/bind.h"
#include "score_pages/bind.h"
#include "search_pages/bind.h"
#include "unpack/bind.h"

STABLE_TORCH_LIBRARY_IMPL(kvpress, CPU, library) {
  library.impl("decode_rows", TORCH_BOX(&kvpress::decode_rows));
  library.impl("decode_chosen", TORCH_BOX(&kvpress::decode_chosen));
  library.impl("decode_step", TORCH_BOX(&kvpress::decode_step));
  library.impl("decode_steps", TORCH_BOX(&kvpress::decode_steps));
  library.impl("absorb_step", TORCH_BOX(&kvpress::absorb_step));
  library.impl("attention_sums", TORCH_BOX(&kvpress::attention_sums));
  library.impl("attend_sums", TORCH_BOX(&kvpress::attend_sums));
  library.impl("estimate_blocks", TORCH_BOX(&kvpress::estimate_blocks));
  library.impl("attend_blocks", TORCH_BOX(&kvpress::attend_blocks));
  library.impl("attend_parts", TORCH_BOX(&kvpress::attend_parts));
  library.impl("join_parts", TORCH_BOX(&kvpress::join_parts));
  library.impl("match_keys", TORCH_BOX(&kvpress::match_keys));
  library.impl("pack", TORCH_BOX(&kvpress::pack));
  library.impl("unpack", TORCH_BOX(&kvpress::unpack));
  library.impl("channel_scores", TORCH_BOX(&kvpress::channel_scores));
  library.impl("copy_ranges", TORCH_BOX(&kvpress::copy_ranges));
  library.impl("gather_slots", TORCH_BOX(&kvpress::gather_slots));
  library.impl("scatter_slots", TORCH_BOX(&kvpress::scatter_slots));
  library.impl("page_bounds", TORCH_BOX(&kvpress::page_bounds));
  library.impl("score_pages", TORCH_BOX(&kvpress::score_pages));
  library.impl("score_cells", TORCH_BOX(&kvpress::score_cells));
  library.impl("choose_pages", TORCH_BOX(&kvpress::choose_pages));
  library.impl("missed_mass", TORCH_BOX(&kvpress::missed_mass));
  library.impl("read_records", TORCH_BOX(&kvpress::read_records));
  library.impl("search_pages", TORCH_BOX(&kvpress::search_pages));
}

// The name of the instruction set that the operators use here.
extern "C" const char* kvpress_instruction_set() { return kvpress::choice().set; }
