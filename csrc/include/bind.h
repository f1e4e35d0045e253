// What every binding needs: errors, checks by letters and by dtype, memory. For the one unit that PyTorch sees.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "args.h"
#include "checked.h"

namespace kvpress {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Errors name the operator, the tensor, what was given and what is allowed.
template <class... Parts>
[[noreturn]] void refuse(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "kvpress::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_of(const Tensor& x) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < x.dim(); i++) text << (i ? ", " : "") << x.size(i);
  return text.str() + "]";
}

// The dispatcher lets None pass.
void check_defined(const char* op, const Tensor& x, const char* name) {
  if (!x.defined()) refuse(op, name, " is None; it must be a tensor");
}

constexpr int64_t kMostWidth = 640, kMostQueries = 32;
constexpr int64_t kMostCoded = 256;        // channels whose products with codes fit in 16 and 32 bits
constexpr int64_t kMostSlots = INT32_MAX;  // of a row: kernels number them with 32 bits, as positions are

// Lengths by letter, bound by the first tensor that shows them: shape(x, "key_PDS") checks the rest.
class Shapes {
 public:
  explicit Shapes(const char* op) : op_(op) {}

  void bind(const Tensor& x, const char* name) {
    check_defined(op_, x, name);
    if (!x.is_cpu()) refuse(op_, name, " must be on the CPU like the others");
    const char* letters = std::strrchr(name, '_') + 1;
    const auto dims = std::strlen(letters);
    const auto sizes = x.sizes();
    if (sizes.size() != dims)
      refuse(op_, name, " has ", x.dim(), " dimensions ", shape_of(x), ", its name says which ", dims, " are allowed");
    for (size_t i = 0; i < dims; i++) {
      int64_t& length = lengths_[size_t(letters[i])];
      if (letters[i] == '1' && sizes[i] != 1)
        refuse(op_, name, " has shape ", shape_of(x), "; dimension ", i, " must be 1");
      if (letters[i] == '1') continue;
      if (length < 0) length = sizes[i];
      if (length != sizes[i])
        refuse(op_, name, " has shape ", shape_of(x), ", but ", letters[i], " is ", length, " in another tensor");
    }
  }
  int64_t operator[](char letter) const { return lengths_[size_t(letter)]; }

  // Refuse lengths of some letters.
  void at_least_one(const char* letters) const {
    for (const char* letter = letters; *letter; letter++)
      if ((*this)[*letter] < 1) refuse(op_, *letter, " is ", (*this)[*letter], "; it must be at least 1");
  }
  void at_most(const char* letters, int64_t most) const {
    for (const char* letter = letters; *letter; letter++)
      if ((*this)[*letter] > most) refuse(op_, *letter, " is ", (*this)[*letter], "; at most ", most, " are supported");
  }

 private:
  struct Lengths {
    int64_t of[128];
    Lengths() {
      for (auto& x : of) x = -1;
    }
    int64_t& operator[](size_t i) { return of[i]; }
    const int64_t& operator[](size_t i) const { return of[i]; }
  };
  const char* op_;
  Lengths lengths_;
};

Type type_of(const char* op, const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::kFloat32;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kFloat16;
    default: refuse(op, name, " must be float32, bfloat16 or float16");
  }
}

void expect(const char* op, const Tensor& x, const char* name, ScalarType type, const char* text) {
  check_defined(op, x, name);
  if (x.scalar_type() != type) refuse(op, name, " must be ", text);
  if (!x.is_contiguous()) refuse(op, name, " must be contiguous; call .contiguous()");
}

// An uninitialised tensor. torch::stable::new_empty takes 1 µs more: it goes through the dispatcher.
template <size_t N>
Tensor empty(const char* op, const int64_t (&sizes)[N], ScalarType type) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  int64_t strides[N], step = 1;
  for (size_t i = N; i-- > 0; step = times(step, std::max<int64_t>(1, sizes[i]))) strides[i] = step;
  if (times(step, 8) == INT64_MAX) refuse(op, "the result would have more numbers than memory has bytes");
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(N, sizes, strides, to<int32_t>(from(type)), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// A tensor [B, N, T, D]; the returned copy owns its memory where the last dimension was not contiguous.
struct Strided {
  Tensor tensor;
  Heads heads;
  Strided(const char* op, const Tensor& x, const char* name)
      : tensor(x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x)),
        heads{tensor.data_ptr(), type_of(op, x, name), tensor.stride(0), tensor.stride(1), tensor.stride(2)} {}
};

// Memory that an operator writes must be no other operand's.
class Memory {
 public:
  explicit Memory(const char* op) : op_(op) { spans_.reserve(48); }

  void writes(const Tensor& x, const char* name) { add(x, name, true); }
  void reads(const Tensor& x, const char* name) { add(x, name, false); }

  // In the order of memory, what overlaps with anything before it overlaps with what reaches farthest.
  void check() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const Span none{0, 0, "", false};
    const Span *any = &none, *written = &none;
    for (const Span& span : spans_) {
      const Span* other = span.written ? any : written;
      if (span.begin < other->end)
        refuse(op_, other->name, " and ", span.name, " share memory, which is written; give them their own");
      if (span.end > any->end) any = &span;
      if (span.written && span.end > written->end) written = &span;
    }
  }

 private:
  struct Span {
    uintptr_t begin, end;
    const char* name;
    bool written;
  };

  void add(const Tensor& x, const char* name, bool written) {
    if (x.numel() == 0) return;
    const auto sizes = x.sizes(), strides = x.strides();
    uintptr_t last = 0;
    for (size_t i = 0; i < sizes.size(); i++) last += uintptr_t(sizes[i] - 1) * uintptr_t(strides[i]);
    const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
    spans_.push_back({begin, begin + (last + 1) * uintptr_t(x.element_size()), name, written});
  }

  const char* op_;
  std::vector<Span> spans_;
};

// The place of a word among those that are allowed.
template <class Enum>
Enum one_of(const char* op, const char* name, const std::string& given, std::initializer_list<const char*> allowed) {
  int i = 0;
  for (const char* text : allowed) {
    if (given == text) return Enum(i);
    i++;
  }
  std::ostringstream list;
  for (const char* text : allowed) list << " " << text;
  refuse(op, name, "='", given, "' is unknown; allowed:", list.str());
}

// Logits are computed in 32 bits: beyond these bounds they, or their tanh, would be no numbers.
constexpr double kLeast = 1e-6, kMost = 1e6;

Logits logits_of(const char* op, double scaling, double softcap) {
  if (!(std::abs(scaling) <= kMost)) refuse(op, "scaling is ", scaling, "; -1e6 to 1e6 are allowed");
  if (softcap != 0 && !(softcap >= kLeast && softcap <= kMost))
    refuse(op, "softcap is ", softcap, "; it must be positive (1e-6 to 1e6), or 0 for none");
  return {scaling, softcap};
}

Noise noise_of(const char* op, const std::string& noise, double tau, int64_t seed, int64_t layer, int64_t first) {
  if (!(tau >= kLeast && tau <= kMost)) refuse(op, "tau is ", tau, "; it must be positive (1e-6 to 1e6)");
  return {one_of<NoiseKind>(op, "noise", noise, {"none", "frozen", "fresh"}), tau, seed, layer,
          int64_t(uint32_t(first))};
}

}  // namespace
}  // namespace kvpress
