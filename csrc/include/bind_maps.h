// Checks of prompts, of maps of their blocks and of sums over their attention.
#pragma once

#include "bind.h"

namespace kvpress {
namespace {

// Checks what operators of a prompt share.
void check_prompt(const char* op, const Shapes& shapes) {
  shapes.at_least_one("BNHDQS");
  shapes.at_most("D", kMostWidth);
  shapes.at_most("S", kMostSlots);
  if (shapes['N'] % shapes['H']) refuse(op, shapes['N'], " query heads are no multiple of ", shapes['H'], " KV heads");
  if (shapes['Q'] > shapes['S']) refuse(op, shapes['Q'], " queries for ", shapes['S'], " slots; 1 to S are allowed");
}

BlockMap map_of(const char* op, const Shapes& shapes, uint8_t* bytes) {
  check_prompt(op, shapes);
  return {shapes['Q'], shapes['S'], bytes};
}

// The map of a prompt, where there is one.
BlockMap map_of(const char* op, Shapes& shapes, const std::optional<Tensor>& map, double softcap = 0) {
  if (!map) return {};
  if (softcap != 0) refuse(op, "softcap=", softcap, " with a map; give one of them");
  shapes.bind(*map, "map_BNX");
  expect(op, *map, "map_BNX", ScalarType::Byte, "uint8");
  const BlockMap blocks = map_of(op, shapes, static_cast<uint8_t*>(map->data_ptr()));
  if (shapes['X'] != blocks.offset(blocks.rows()))
    refuse(op, "map_BNX has ", shapes['X'], " bytes per head; it must have ", blocks.offset(blocks.rows()));
  return blocks;
}

// Checks and fills what attention_sums and attend_sums share. The tensors that `a` points into live in the others.
AttentionSums sums_of(const char* op, Shapes& shapes, const Strided& queries, const Strided& keys,
                      const Tensor& position, const Tensor& sums, double scaling, double softcap, const Noise& noise) {
  check_prompt(op, shapes);
  AttentionSums a{};
  a.query = queries.heads;
  a.key = keys.heads;
  a.position = static_cast<const int64_t*>(position.data_ptr());
  a.batch = shapes['B'];
  a.heads = shapes['H'];
  a.group = shapes['N'] / shapes['H'];
  a.queries = a.reduction.window = shapes['Q'];
  a.slots = shapes['S'];
  a.width = shapes['D'];
  a.logits = logits_of(op, scaling, softcap);
  a.noise = noise;
  a.sums = static_cast<float*>(sums.data_ptr());
  return a;
}

// Positions in the form that kernels read. `holes`: whether slots may be empty.
Tensor positions_of(const char* op, Shapes& shapes, const Tensor& position, bool holes) {
  shapes.bind(position, "position_BHS");
  if (position.scalar_type() != ScalarType::Long) refuse(op, "position_BHS must be int64");
  const Tensor made = torch::stable::contiguous(position);
  const auto* at = static_cast<const int64_t*>(made.data_ptr());
  for (int64_t i = 0; i < made.numel(); i++)
    if (at[i] > kMostSlots || (at[i] < 0 && !holes))
      refuse(op, "position_BHS holds ", at[i], "; ", holes ? "at most " : "0 to ", kMostSlots,
             holes ? " is allowed" : " are allowed: every slot of a whole prompt holds a token");
  return made;
}

}  // namespace
}  // namespace kvpress
