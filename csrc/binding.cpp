// The CPU operators for PyTorch, through its stable ABI: checks, allocation, choice of the instruction set.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "include/args.h"
#include "include/checked.h"

#if defined(KVPRESS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace kvpress {

namespace avx512 { extern const Kernels kernels, kernels_vnni, kernels_amx; }
namespace avx2 { extern const Kernels kernels; }
namespace portable { extern const Kernels kernels; }

namespace {

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

constexpr int64_t kMostWidth = 256, kMostQueries = 32;
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
    if (sizes.size() != dims) refuse(op_, name, " has ", x.dim(), " dimensions ", shape_of(x), ", its name says which ", dims, " are allowed");
    for (size_t i = 0; i < dims; i++) {
      int64_t& length = lengths_[size_t(letters[i])];
      if (letters[i] == '1' && sizes[i] != 1) refuse(op_, name, " has shape ", shape_of(x), "; dimension ", i, " must be 1");
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
    Lengths() { for (auto& x : of) x = -1; }
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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(N, sizes, strides, to<int32_t>(from(type)), aoti_torch_device_type_cpu(), 0, &made));
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

// Logits are computed in 32 bits: beyond these bounds they, or their tanh, would be no numbers.
constexpr double kLeast = 1e-6, kMost = 1e6;

Logits logits_of(const char* op, double scaling, double softcap) {
  if (!(std::abs(scaling) <= kMost)) refuse(op, "scaling is ", scaling, "; -1e6 to 1e6 are allowed");
  if (softcap != 0 && !(softcap >= kLeast && softcap <= kMost))
    refuse(op, "softcap is ", softcap, "; it must be positive (1e-6 to 1e6), or 0 for none");
  return {scaling, softcap};
}

// Memory that an operator writes must be no other operand's.
class Memory {
 public:
  explicit Memory(const char* op) : op_(op) {}

  void writes(const Tensor& x, const char* name) { add(x, name, true); }
  void reads(const Tensor& x, const char* name) { add(x, name, false); }

  void check() const {
    for (size_t i = 0; i < used_; i++)
      for (size_t j = i + 1; j < used_; j++)
        if ((span_[i].written || span_[j].written) && span_[i].begin < span_[j].end && span_[j].begin < span_[i].end)
          refuse(op_, span_[i].name, " and ", span_[j].name, " share memory, which is written; give them their own");
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
    span_[used_++] = {begin, begin + (last + 1) * uintptr_t(x.element_size()), name, written};
  }

  const char* op_;
  size_t used_ = 0;
  Span span_[48];
};

// Instruction sets, the fastest first.
constexpr const char* kSets[] = {"amx", "avx512vnni", "avx512", "avx2", "portable"};

// The place in kSets of the one that KVPRESS_CPU names: none before it may be used.
int first_set() {
  const char* wanted = std::getenv("KVPRESS_CPU");
  if (!wanted || !*wanted) return 0;
  for (int i = 0; i < 5; i++)
    if (!std::strcmp(wanted, kSets[i])) return i;
  refuse("operators", "KVPRESS_CPU='", wanted, "' is unknown; allowed: amx, avx512vnni, avx512, avx2, portable");
}

#if defined(KVPRESS_AMX)
// Whether there are tiles of bytes, and the system lets this process use them.
bool may_use_tiles() {
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kBytes) && !syscall(SYS_arch_prctl, kAsk, kTileData);
}
#endif

// The fastest kernels that this machine runs, or those that KVPRESS_CPU names.
const Kernels& kernels() {
  static const Kernels* chosen = [] {
    [[maybe_unused]] const int first = first_set();
#if defined(KERNELS_FOR_AVX512)
    if (first <= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(KVPRESS_AMX)
      if (first == 0 && may_use_tiles()) return &avx512::kernels_amx;
#endif
      return first <= 1 && __builtin_cpu_supports("avx512vnni") ? &avx512::kernels_vnni : &avx512::kernels;
    }
#endif
#if defined(KERNELS_FOR_AVX2)
    if (first <= 3 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return &avx2::kernels;
#endif
    return &portable::kernels;
  }();
  return *chosen;
}

Threads threads() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t workers, const std::function<void(int64_t)>& work) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; i++) work(i);
            });
          }};
}

// Checks the pages of rows. `appends`: whether each row is about to get one more slot.
Pages pages_of(const char* op, Shapes& shapes, const Tensor& key, const Tensor& value, const Tensor& table,
               const Tensor& counts, bool appends) {
  shapes.bind(key, "key_PDS");
  shapes.bind(value, "value_PSE");
  shapes.bind(table, "table_RW");
  shapes.bind(counts, "counts_R");
  expect(op, table, "table_RW", ScalarType::Int, "int32");
  expect(op, counts, "counts_R", ScalarType::Long, "int64");
  expect(op, key, "key_PDS", key.scalar_type(), "");
  expect(op, value, "value_PSE", key.scalar_type(), "of the same dtype as key_PDS");
  shapes.at_least_one("RDES");
  shapes.at_most("DE", kMostWidth);
  const int64_t room = times(shapes['W'], shapes['S']);
  if (shapes['S'] > kMostSlots || room > kMostSlots)
    refuse(op, "table_RW has room for ", room, " slots in pages of ", shapes['S'], "; at most ", kMostSlots, " are supported");
  const Pages pages{key.data_ptr(), value.data_ptr(), type_of(op, key, "key_PDS"), shapes['P'], shapes['S'],
                    shapes['D'], shapes['E'], static_cast<const int32_t*>(table.data_ptr()), shapes['W']};
  const auto* count = static_cast<const int64_t*>(counts.data_ptr());
  for (int64_t r = 0; r < shapes['R']; r++) {
    if (count[r] < 0 || count[r] > room - appends)
      refuse(op, "row ", r, " holds ", count[r], " slots", appends ? " and gets another" : "", ", but table_RW has room for ", room);
    const int64_t needed = pieces(count[r] + appends, pages.page_slots);
    uint32_t last = 0;  // a negative number is the largest of all
    for (int64_t w = 0; w < needed; w++) {
      const auto page = uint32_t(pages.table[r * pages.table_width + w]);
      last = page > last ? page : last;
    }
    if (needed > 0 && last >= pages.pages)
      refuse(op, "table_RW names page ", int32_t(last), " in row ", r, "; pages 0 to ", pages.pages - 1, " exist");
  }
  return pages;
}

// Checks and fills what decode_rows and decode_step share.
DecodeRows rows_of(const char* op, Shapes& shapes, const Strided& query, const Tensor& key, const Tensor& value,
                   const Tensor& table, const Tensor& counts, double scaling, double softcap, bool appends) {
  DecodeRows a{};
  a.pages = pages_of(op, shapes, key, value, table, counts, appends);
  const int64_t batch = shapes['B'], query_heads = shapes['N'], rows = shapes['R'];
  if (batch == 0 || rows % batch || rows == 0 || query_heads % (rows / batch))
    refuse(op, "table_RW has ", rows, " rows; query_BNQD of shape ", shape_of(query.tensor),
           " needs a multiple of B whose number of KV heads divides N");
  if (query_heads == 0) refuse(op, "query_BNQD has no heads");
  a.query = query.heads;
  a.counts = static_cast<const int64_t*>(counts.data_ptr());
  a.batch = batch;
  a.heads = rows / batch;
  a.group = query_heads / a.heads;
  a.logits = logits_of(op, scaling, softcap);
  return a;
}

constexpr size_t kLayoutSizes = 10, kPartTensors = 8;
constexpr int64_t kMostSize = 1 << 20;

// Sizes as they stand in kvpress/layout.py.
Layout layout_of(const char* op, const int64_t* sizes) {
  const auto known = [](int64_t bits) { return bits == 16 || bits == 8 || bits == 4 || bits == 2; };
  for (size_t i = 0; i < kLayoutSizes; i++)
    if (sizes[i] < 1 || sizes[i] > kMostSize) refuse(op, "layout: size ", i, " is ", sizes[i], "; 1 to ", kMostSize, " are allowed");
  if (!known(sizes[5]) || !known(sizes[6])) refuse(op, "layout: bits must be 16, 8, 4, 2");
  const Layout l(sizes);
  if (l.slots % (l.key_bits < 16 || l.value_bits < 16 ? 64 : 16) || l.key_group % 32 || l.slots % l.key_group || l.value_group % 32)
    refuse(op, "layout: slots must be a multiple of 64 (16 where nothing is quantised) and of key_group, groups multiples of 32");
  if (l.key_kept > l.key_width || l.value_kept > l.value_width || l.key_width > kMostWidth || l.value_width > kMostWidth)
    refuse(op, "layout: more channels than there are, or than ", kMostWidth);
  return l;
}

// Kept channels of rows; those of rows without slots may be any that exist.
const int16_t* channels_of(const char* op, const Tensor& x, int64_t rows, int64_t kept, int64_t width, const int64_t* counts = nullptr) {
  expect(op, x, "channels", ScalarType::Short, "int16");
  if (x.dim() != 2 || x.size(0) != rows || x.size(1) != kept) refuse(op, "channels of shape ", shape_of(x), " for ", rows, " rows and ", kept, " channels");
  const auto* channel = static_cast<const int16_t*>(x.data_ptr());
  for (int64_t r = 0; r < rows; r++, channel += kept) {
    for (int64_t i = 0; i < kept; i++) {
      if (channel[i] < 0 || channel[i] >= width) refuse(op, "channel ", channel[i], " of ", width);
      if (i > 0 && channel[i] <= channel[i - 1] && !(counts && counts[r] == 0))
        refuse(op, "channel ", channel[i], " after ", channel[i - 1], " in row ", r, "; channels must ascend");
    }
  }
  return static_cast<const int16_t*>(x.data_ptr());
}

// A column of old slots that may be missing; without numbers it is.
template <class T>
T* optional_of(const char* op, const Tensor& x, const char* name, ScalarType type, const char* text, std::initializer_list<int64_t> shape) {
  expect(op, x, name, type, text);
  if (x.numel() == 0) return nullptr;
  bool fits = size_t(x.dim()) == shape.size();
  for (size_t i = 0; fits && i < shape.size(); i++) fits = x.size(int64_t(i)) == shape.begin()[i];
  if (!fits) refuse(op, name, " of old slots has shape ", shape_of(x));
  return static_cast<T*>(x.data_ptr());
}

// Checks parts of old slots, the tensors of kvpress/layout.py one after the other. Returns for how many slots of all kinds a
// row has room.
int64_t add_parts(const char* op, DecodeRows& a, const std::vector<Tensor>& old, const std::vector<int64_t>& layouts) {
  const size_t parts = layouts.size() / kLayoutSizes;
  if (layouts.size() % kLayoutSizes || old.size() != parts * kPartTensors || parts > size_t(kMostParts))
    refuse(op, old.size(), " tensors and ", layouts.size(), " sizes of old slots; each of at most ", kMostParts, " parts has ", kPartTensors, " and ", kLayoutSizes);
  const int64_t rows = a.batch * a.heads, item = a.pages.type == Type::kFloat32 ? 4 : 2;
  int64_t columns = times(a.pages.table_width, a.pages.page_slots);
  for (size_t i = 0; i < parts; i++) {
    Part& part = a.part[a.parts++];
    const Tensor* x = &old[i * kPartTensors];
    const Layout& l = part.layout = layout_of(op, &layouts[i * kLayoutSizes]);
    if (l.key_width != a.pages.key_width || l.value_width != a.pages.value_width || l.item_bytes != item)
      refuse(op, "old slots of ", l.key_width, ", ", l.value_width, " channels and ", l.item_bytes, " bytes beside others");
    expect(op, x[0], "pages", ScalarType::Byte, "uint8");
    expect(op, x[3], "table", ScalarType::Int, "int32");
    expect(op, x[4], "counts", ScalarType::Long, "int64");
    if (x[0].dim() != 2 || x[0].size(1) != l.page_bytes) refuse(op, "pages have shape ", shape_of(x[0]), ", not ", l.page_bytes, " bytes");
    if (x[3].dim() != 2 || x[3].size(0) != rows || x[4].dim() != 1 || x[4].size(0) != rows)
      refuse(op, "table ", shape_of(x[3]), " and counts ", shape_of(x[4]), " of old slots for ", rows, " rows");
    part.page = static_cast<uint8_t*>(x[0].data_ptr());
    if (reinterpret_cast<uintptr_t>(part.page) % uintptr_t(item)) refuse(op, "pages begin between numbers of ", item, " bytes; copy them");
    part.pages = x[0].size(0);
    part.table = static_cast<const int32_t*>(x[3].data_ptr());
    part.table_width = x[3].size(1);
    part.counts = static_cast<const int64_t*>(x[4].data_ptr());
    part.key_channel = channels_of(op, x[1], rows, l.key_kept, l.key_width, part.counts);
    part.value_channel = channels_of(op, x[2], rows, l.value_kept, l.value_width, part.counts);
    part.position = optional_of<int32_t>(op, x[5], "position", ScalarType::Int, "int32", {part.pages, l.slots});
    part.mass = optional_of<float>(op, x[6], "mass", ScalarType::Float, "float32", {part.pages, l.slots});
    part.dropped = optional_of<int64_t>(op, x[7], "dropped", ScalarType::Long, "int64", {rows});
    const int64_t room = times(part.table_width, l.slots);
    for (int64_t r = 0; r < rows; r++) {
      if (part.counts[r] < 0 || part.counts[r] > room) refuse(op, "row ", r, " holds ", part.counts[r], " old slots; its table has room for ", room);
      if (part.counts[r] % l.slots) refuse(op, "row ", r, " holds ", part.counts[r], " old slots; they stand in whole pages of ", l.slots);
      if (part.dropped && (part.dropped[r] < 0 || part.dropped[r] > part.counts[r]))
        refuse(op, "row ", r, " dropped ", part.dropped[r], " of ", part.counts[r], " old slots");
      const int64_t needed = part.counts[r] / l.slots;
      for (int64_t w = 0; w < needed; w++)
        if (part.table[r * part.table_width + w] < 0 || part.table[r * part.table_width + w] >= part.pages)
          refuse(op, "table names page ", part.table[r * part.table_width + w], " of old slots in row ", r, "; ", part.pages, " exist");
    }
    // Columns of weights that old slots take: see span() in kvpress/layout.py.
    columns = plus(columns, times(pieces(room, 64), 64));
  }
  if (columns > kMostSlots) refuse(op, "tables have room for ", columns, " slots in all; at most ", kMostSlots, " are supported");
  return columns;
}

std::tuple<Tensor, Tensor, Tensor> decode_rows(const Tensor& query, const Tensor& key, const Tensor& value,
                                               const Tensor& table, const Tensor& counts, double scaling,
                                               double softcap, bool need_weights, const std::vector<Tensor>& old,
                                               const std::vector<int64_t>& layouts) {
  const char* op = "decode_rows";
  Shapes shapes(op);
  shapes.bind(query, "query_BNQD");
  if (shapes['Q'] < 1 || shapes['Q'] > kMostQueries)
    refuse(op, "query_BNQD has ", shapes['Q'], " queries; 1 to ", kMostQueries, " are allowed");
  const Strided queries(op, query, "query_BNQD");
  DecodeRows a = rows_of(op, shapes, queries, key, value, table, counts, scaling, softcap, false);
  a.queries = shapes['Q'];
  const int64_t slots = add_parts(op, a, old, layouts);
  Tensor out = empty(op, {shapes['B'], shapes['N'], a.queries, a.pages.value_width}, query.scalar_type());
  Tensor lse = empty(op, {shapes['B'], shapes['N'], a.queries}, ScalarType::Float);
  Tensor weights = need_weights ? empty(op, {shapes['B'], shapes['N'], a.queries, slots}, ScalarType::Float)
                                : empty(op, {0}, ScalarType::Float);
  a.out = out.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  a.weights = need_weights ? static_cast<float*>(weights.data_ptr()) : nullptr;
  kernels().decode_rows(a, threads());
  return {out, lse, weights};
}

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

Observation observation_of(const char* op, const std::string& noise, double tau, int64_t seed, int64_t layer) {
  if (!(tau >= kLeast && tau <= kMost)) refuse(op, "tau is ", tau, "; it must be positive (1e-6 to 1e6)");
  return {one_of<Noise>(op, "noise", noise, {"none", "frozen", "fresh"}), tau, seed, layer};
}

// Checks what says how old a slot is and which ones stay. `least`: of seen.
void check_ages(const char* op, const int64_t* seen, const int64_t* recent, int64_t batch, int64_t sink, int64_t least) {
  if (sink < 0 || sink > kMostSlots) refuse(op, "sink is ", sink, "; 0 to ", kMostSlots, " are allowed");
  for (int64_t b = 0; b < batch; b++) {
    if (seen[b] < least || seen[b] > kMostSlots)
      refuse(op, "sequence ", b, " has seen ", seen[b], " tokens; ", least, " to ", kMostSlots, " are allowed");
    if (recent[b] < 0) refuse(op, "the last ", recent[b], " tokens of sequence ", b, " stay; it must not be negative");
  }
}

Tensor decode_step(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_pool,
                   const Tensor& value_pool, const Tensor& position_pool, const std::optional<Tensor>& mass_pool,
                   const Tensor& table, const Tensor& counts, const Tensor& seen, const Tensor& quota,
                   const Tensor& recent, int64_t sink, bool evict, const std::string& rank, const std::string& noise,
                   double tau, int64_t seed, int64_t layer, double scaling, double softcap, const std::vector<Tensor>& old,
                   const std::vector<int64_t>& layouts) {
  const char* op = "decode_step";
  Shapes shapes(op);
  shapes.bind(query, "query_BN1D");
  shapes.bind(key, "key_BH1D");
  shapes.bind(value, "value_BH1E");
  const Strided queries(op, query, "query_BN1D"), keys(op, key, "key_BH1D"), values(op, value, "value_BH1E");
  DecodeStep a{};
  a.attend = rows_of(op, shapes, queries, key_pool, value_pool, table, counts, scaling, softcap, true);
  if (a.attend.heads != shapes['H']) refuse(op, "key_BH1D has ", shapes['H'], " heads, table_RW has ", a.attend.heads);
  a.attend.queries = 1;
  a.key = keys.heads;
  a.value = values.heads;
  shapes.bind(position_pool, "position_PS");
  expect(op, position_pool, "position_PS", ScalarType::Int, "int32");
  a.position = static_cast<int32_t*>(position_pool.data_ptr());
  if (mass_pool) {
    shapes.bind(*mass_pool, "mass_PS");
    expect(op, *mass_pool, "mass_PS", ScalarType::Float, "float32");
    a.mass = static_cast<float*>(mass_pool->data_ptr());
  }
  shapes.bind(seen, "seen_B");
  shapes.bind(quota, "quota_R");
  shapes.bind(recent, "recent_B");
  for (const Tensor* x : {&seen, &quota, &recent}) expect(op, *x, "seen_B, quota_R and recent_B", ScalarType::Long, "int64");
  a.counts = static_cast<int64_t*>(counts.data_ptr());
  a.seen = static_cast<const int64_t*>(seen.data_ptr());
  a.quota = static_cast<const int64_t*>(quota.data_ptr());
  a.recent = static_cast<const int64_t*>(recent.data_ptr());
  check_ages(op, a.seen, a.recent, shapes['B'], sink, 1);
  a.sink = sink;
  a.evict = evict;
  a.rank = one_of<Rank>(op, "rank", rank, {"mass", "mass_per_age", "position"});
  if (evict && !mass_pool && a.rank != Rank::kPosition) refuse(op, "rank='", rank, "' needs mass_PS");
  a.observation = observation_of(op, noise, tau, seed, layer);
  add_parts(op, a.attend, old, layouts);
  for (int p = 0; p < a.attend.parts; p++) {
    const Part& part = a.attend.part[p];
    if (part.pages == 0) continue;
    if ((a.mass && (!part.mass || !part.position)) || (evict && (!part.position || !part.dropped)))
      refuse(op, "old slots need positions and dropped counts where something is evicted, and mass where it is kept");
  }
  Memory memory(op);
  memory.writes(key_pool, "key_PDS");
  memory.writes(value_pool, "value_PSE");
  memory.writes(position_pool, "position_PS");
  if (mass_pool) memory.writes(*mass_pool, "mass_PS");
  memory.writes(counts, "counts_R");
  memory.reads(query, "query_BN1D");
  memory.reads(key, "key_BH1D");
  memory.reads(value, "value_BH1E");
  memory.reads(table, "table_RW");
  memory.reads(seen, "seen_B");
  memory.reads(quota, "quota_R");
  memory.reads(recent, "recent_B");
  for (size_t i = 0; i < old.size(); i++) {
    const bool written = i % kPartTensors >= 5;
    written ? memory.writes(old[i], "old slots") : memory.reads(old[i], "old slots");
  }
  memory.check();
  Tensor out = empty(op, {shapes['B'], shapes['N'], 1, shapes['E']}, query.scalar_type());
  a.attend.out = out.data_ptr();
  kernels().decode_step(a, threads());
  return out;
}

void absorb_step(Tensor key_pool, Tensor value_pool, Tensor position_pool, std::optional<Tensor> mass_pool, Tensor table,
                 Tensor counts, Tensor seen, Tensor quota, Tensor recent, int64_t sink, std::string rank, Tensor threshold,
                 std::optional<Tensor> frequency, bool interleaved, int64_t start, int64_t width, double own,
                 double memory, double gain, bool largest, bool normalised, bool together, bool keys, bool sinks,
                 bool counted) {
  const char* op = "absorb_step";
  Shapes shapes(op);
  shapes.bind(seen, "seen_B");
  shapes.bind(quota, "quota_R");
  shapes.bind(recent, "recent_B");
  shapes.bind(threshold, "threshold_B");
  for (const Tensor* x : {&seen, &quota, &recent}) expect(op, *x, "seen_B, quota_R and recent_B", ScalarType::Long, "int64");
  expect(op, threshold, "threshold_B", ScalarType::Float, "float32");
  const int64_t batch = shapes['B'], rows = shapes['R'];
  if (batch == 0 || rows % batch) refuse(op, "quota_R has ", rows, " rows for ", batch, " sequences");
  for (const double x : {own, memory, gain})
    if (!(std::abs(x) <= kMost)) refuse(op, "own, memory and gain are ", own, ", ", memory, ", ", gain, "; -1e6 to 1e6 are allowed");
  AbsorbStep a{};
  a.pages = pages_of(op, shapes, key_pool, value_pool, table, counts, false);
  shapes.bind(position_pool, "position_PS");
  expect(op, position_pool, "position_PS", ScalarType::Int, "int32");
  if (mass_pool) {
    shapes.bind(*mass_pool, "mass_PS");
    expect(op, *mass_pool, "mass_PS", ScalarType::Float, "float32");
    a.mass = static_cast<float*>(mass_pool->data_ptr());
  }
  if (frequency) {
    shapes.bind(*frequency, "frequency_F");
    expect(op, *frequency, "frequency_F", ScalarType::Float, "float32");
    a.frequency = static_cast<const float*>(frequency->data_ptr());
    a.pairs = shapes['F'];
  }
  a.rank = one_of<Rank>(op, "rank", rank, {"mass", "mass_per_age", "position"});
  if (!mass_pool && a.rank != Rank::kPosition) refuse(op, "rank='", rank, "' needs mass_PS");
  if (width < 1 || width > a.pages.key_width - counted)
    refuse(op, "width is ", width, "; keys have ", a.pages.key_width, " channels, ", int(counted), " of counts");
  if (start < 0 || plus(start, times(2, a.pairs)) > width)
    refuse(op, a.pairs, " pairs of channels from ", start, " on do not fit into ", width);
  if (a.pairs && !keys) refuse(op, "frequency_F is given, but keys are not merged");
  a.position = static_cast<int32_t*>(position_pool.data_ptr());
  a.counts = static_cast<int64_t*>(counts.data_ptr());
  a.seen = static_cast<const int64_t*>(seen.data_ptr());
  a.quota = static_cast<const int64_t*>(quota.data_ptr());
  a.recent = static_cast<const int64_t*>(recent.data_ptr());
  check_ages(op, a.seen, a.recent, batch, sink, 0);
  Memory spans(op);
  spans.writes(key_pool, "key_PDS");
  spans.writes(value_pool, "value_PSE");
  spans.writes(position_pool, "position_PS");
  if (mass_pool) spans.writes(*mass_pool, "mass_PS");
  spans.writes(counts, "counts_R");
  spans.writes(threshold, "threshold_B");
  spans.reads(table, "table_RW");
  spans.reads(seen, "seen_B");
  spans.reads(quota, "quota_R");
  spans.reads(recent, "recent_B");
  if (frequency) spans.reads(*frequency, "frequency_F");
  spans.check();
  a.batch = batch;
  a.heads = rows / batch;
  a.sink = sink;
  a.threshold = static_cast<float*>(threshold.data_ptr());
  a.start = start;
  a.interleaved = interleaved;
  a.width = width;
  a.own = own;
  a.memory = memory;
  a.gain = gain;
  a.largest = largest;
  a.normalised = normalised;
  a.together = together;
  a.keys = keys;
  a.sinks = sinks;
  a.counted = counted;
  kernels().absorb_step(a, threads());
}

// Checks what operators of a prompt share.
void check_prompt(const char* op, const Shapes& shapes) {
  shapes.at_least_one("BNHDPS");
  shapes.at_most("D", kMostWidth);
  shapes.at_most("S", kMostSlots);
  if (shapes['N'] % shapes['H']) refuse(op, shapes['N'], " query heads are no multiple of ", shapes['H'], " KV heads");
  if (shapes['P'] > shapes['S']) refuse(op, shapes['P'], " queries for ", shapes['S'], " slots; 1 to S are allowed");
}

BlockMap map_of(const char* op, const Shapes& shapes, uint8_t* bytes) {
  check_prompt(op, shapes);
  return {shapes['P'], shapes['S'], bytes};
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
AttentionSums sums_of(const char* op, Shapes& shapes, const Strided& queries, const Strided& keys, const Tensor& position,
                      const Tensor& sums, double scaling, double softcap, const Observation& observation) {
  check_prompt(op, shapes);
  AttentionSums a{};
  a.query = queries.heads;
  a.key = keys.heads;
  a.position = static_cast<const int64_t*>(position.data_ptr());
  a.batch = shapes['B'];
  a.heads = shapes['H'];
  a.group = shapes['N'] / shapes['H'];
  a.queries = a.window = shapes['P'];
  a.slots = shapes['S'];
  a.width = shapes['D'];
  a.logits = logits_of(op, scaling, softcap);
  a.observation = observation;
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
      refuse(op, "position_BHS holds ", at[i], "; ", holes ? "at most " : "0 to ", kMostSlots, holes ? " is allowed" : " are allowed: every slot of a whole prompt holds a token");
  return made;
}

Tensor attention_sums(Tensor query, Tensor key, Tensor position, double scaling, double softcap, int64_t window,
                      std::string noise, double tau, int64_t seed, int64_t layer, std::optional<Tensor> map) {
  const char* op = "attention_sums";
  Shapes shapes(op);
  shapes.bind(query, "query_BNPD");
  shapes.bind(key, "key_BHSD");
  check_prompt(op, shapes);
  const Tensor positions = positions_of(op, shapes, position, true);
  if (window < 0) refuse(op, "window is ", window, "; it must not be negative");
  const Strided queries(op, query, "query_BNPD"), keys(op, key, "key_BHSD");
  Tensor sums = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['S']}, ScalarType::Float);
  AttentionSums a = sums_of(op, shapes, queries, keys, positions, sums, scaling, softcap,
                            observation_of(op, noise, tau, seed, layer));
  a.window = window;
  a.map = map_of(op, shapes, map, softcap);
  kernels().attention_sums(a, threads());
  return sums;
}

std::tuple<Tensor, Tensor> attend_sums(Tensor query, Tensor key, Tensor value, Tensor position, double scaling,
                                       double softcap, std::string noise, double tau, int64_t seed, int64_t layer,
                                       std::optional<Tensor> map) {
  const char* op = "attend_sums";
  Shapes shapes(op);
  shapes.bind(query, "query_BNPD");
  shapes.bind(key, "key_BHSD");
  shapes.bind(value, "value_BHSE");
  check_prompt(op, shapes);
  const Tensor positions = positions_of(op, shapes, position, false);
  shapes.at_least_one("E");
  shapes.at_most("E", kMostWidth);
  if (key.scalar_type() != query.scalar_type() || value.scalar_type() != query.scalar_type())
    refuse(op, "key_BHSD and value_BHSE must be of the dtype of query_BNPD");
  if (shapes['P'] != shapes['S'])
    refuse(op, shapes['P'], " queries for ", shapes['S'], " slots; a whole prompt has as many of both. Use attention_sums for a chunk");
  const Strided queries(op, query, "query_BNPD"), keys(op, key, "key_BHSD"), values(op, value, "value_BHSE");
  Tensor out = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['P'], shapes['E']});
  Tensor sums = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['S']}, ScalarType::Float);
  AttentionSums a = sums_of(op, shapes, queries, keys, positions, sums, scaling, softcap,
                            observation_of(op, noise, tau, seed, layer));
  a.value = values.heads;
  a.value_width = shapes['E'];
  a.out = out.data_ptr();
  a.map = map_of(op, shapes, map, softcap);
  kernels().attention_sums(a, threads());
  return {out, sums};
}

std::tuple<Tensor, Tensor> match_keys(Tensor evicted, Tensor kept, Tensor allowed) {
  const char* op = "match_keys";
  Shapes shapes(op);
  shapes.bind(evicted, "evicted_BHED");
  shapes.bind(kept, "kept_BHCD");
  shapes.bind(allowed, "allowed_BHC");
  shapes.at_least_one("D");
  shapes.at_most("D", kMostWidth);
  shapes.at_most("EC", kMostSlots);
  const Strided evicted_keys(op, evicted, "evicted_BHED"), kept_keys(op, kept, "kept_BHCD");
  if (kept.scalar_type() != evicted.scalar_type()) refuse(op, "kept_BHCD must be of the same dtype as evicted_BHED");
  if (allowed.scalar_type() != ScalarType::Bool) refuse(op, "allowed_BHC must be bool");
  const Tensor targets_allowed = torch::stable::contiguous(allowed);
  const int64_t batch = shapes['B'], heads = shapes['H'], keys = shapes['E'];
  Tensor similarity = empty(op, {batch, heads, keys}, ScalarType::Float);
  Tensor target = empty(op, {batch, heads, keys}, ScalarType::Long);
  MatchKeys a{};
  a.evicted_key = evicted_keys.heads;
  a.kept_key = kept_keys.heads;
  a.allowed = static_cast<const bool*>(targets_allowed.data_ptr());
  a.batch = batch;
  a.heads = heads;
  a.evicted = keys;
  a.kept = shapes['C'];
  a.width = shapes['D'];
  a.similarity = static_cast<float*>(similarity.data_ptr());
  a.target = static_cast<int64_t*>(target.data_ptr());
  kernels().match_keys(a, threads());
  return {similarity, target};
}

// Checks what pack and unpack share.
PackPages pages_to_pack(const char* op, const Tensor& key_channels, const Tensor& value_channels,
                        const std::vector<int64_t>& layout, int64_t pages, Type type) {
  if (layout.size() != kLayoutSizes) refuse(op, "layout has ", layout.size(), " sizes, not ", kLayoutSizes);
  PackPages a{};
  a.layout = layout_of(op, layout.data());
  a.type = type;
  if (a.layout.item_bytes != (type == Type::kFloat32 ? 4 : 2)) refuse(op, "layout of numbers of ", a.layout.item_bytes, " bytes for another dtype");
  a.key_channel = channels_of(op, key_channels, pages, a.layout.key_kept, a.layout.key_width);
  a.value_channel = channels_of(op, value_channels, pages, a.layout.value_kept, a.layout.value_width);
  a.pages = pages;
  return a;
}

Tensor pack(Tensor key, Tensor value, Tensor key_channels, Tensor value_channels, std::vector<int64_t> layout) {
  const char* op = "pack";
  Shapes shapes(op);
  shapes.bind(key, "key_PSD");
  shapes.bind(value, "value_PSE");
  expect(op, key, "key_PSD", key.scalar_type(), "");
  expect(op, value, "value_PSE", key.scalar_type(), "of the dtype of key_PSD");
  PackPages a = pages_to_pack(op, key_channels, value_channels, layout, shapes['P'], type_of(op, key, "key_PSD"));
  if (shapes['S'] != a.layout.slots || shapes['D'] != a.layout.key_width || shapes['E'] != a.layout.value_width)
    refuse(op, "key_PSD ", shape_of(key), " and value_PSE ", shape_of(value), " do not fit the layout");
  Tensor page = empty(op, {a.pages, a.layout.page_bytes}, ScalarType::Byte);
  a.key = key.data_ptr();
  a.value = value.data_ptr();
  a.page = static_cast<uint8_t*>(page.data_ptr());
  kernels().pack_pages(a, threads());
  return page;
}

std::tuple<Tensor, Tensor> unpack(Tensor page, Tensor key_channels, Tensor value_channels, std::vector<int64_t> layout,
                                  Tensor like) {
  const char* op = "unpack";
  Shapes shapes(op);
  shapes.bind(page, "page_PX");
  expect(op, page, "page_PX", ScalarType::Byte, "uint8");
  check_defined(op, like, "like");
  PackPages a = pages_to_pack(op, key_channels, value_channels, layout, shapes['P'], type_of(op, like, "like"));
  if (shapes['X'] != a.layout.page_bytes) refuse(op, "page_PX has ", shapes['X'], " bytes, the layout ", a.layout.page_bytes);
  if (reinterpret_cast<uintptr_t>(page.data_ptr()) % uintptr_t(a.layout.item_bytes))
    refuse(op, "page_PX begins between numbers of ", a.layout.item_bytes, " bytes; copy it");
  Tensor key = empty(op, {a.pages, a.layout.slots, a.layout.key_width}, like.scalar_type());
  Tensor value = empty(op, {a.pages, a.layout.slots, a.layout.value_width}, like.scalar_type());
  a.key = key.data_ptr();
  a.value = value.data_ptr();
  a.page = static_cast<uint8_t*>(page.data_ptr());
  a.unpack = true;
  kernels().pack_pages(a, threads());
  return {key, value};
}

Tensor channel_scores(Tensor query, Tensor key, Tensor held) {
  const char* op = "channel_scores";
  Shapes shapes(op);
  shapes.bind(query, "query_BNWD");
  shapes.bind(key, "key_BHSD");
  shapes.bind(held, "held_BHS");
  if (held.scalar_type() != ScalarType::Bool) refuse(op, "held_BHS must be bool");
  shapes.at_least_one("BHNWD");
  shapes.at_most("D", kMostWidth);
  shapes.at_most("S", kMostSlots);
  if (shapes['N'] % shapes['H']) refuse(op, shapes['N'], " query heads are no multiple of ", shapes['H'], " KV heads");
  const Strided queries(op, query, "query_BNWD"), keys(op, key, "key_BHSD");
  const Tensor holds = torch::stable::contiguous(held);
  Tensor scores = empty(op, {shapes['B'], shapes['H'], shapes['D']}, ScalarType::Float);
  ChannelScores a{queries.heads, keys.heads, static_cast<const bool*>(holds.data_ptr()), shapes['B'], shapes['H'],
                  shapes['N'] / shapes['H'], shapes['W'], shapes['S'], shapes['D'], static_cast<float*>(scores.data_ptr())};
  kernels().channel_scores(a, threads());
  return scores;
}

// Sums of products of larger codes would not fit in 16 bits.
void check_codes(const char* op, const Tensor& x, const char* name) {
  const auto* code = static_cast<const int8_t*>(x.data_ptr());
  int8_t least = 0, most = 0;
  for (int64_t i = 0; i < x.numel(); i++) {
    least = std::min(least, code[i]);
    most = std::max(most, code[i]);
  }
  if (least < -7 || most > 7) refuse(op, name, " holds codes from ", int(least), " to ", int(most), "; -7 to 7 are allowed");
}

Tensor estimate_blocks(Tensor query, Tensor query_scale, Tensor key, Tensor key_scale, Tensor shift, Tensor threshold,
                       int64_t local) {
  const char* op = "estimate_blocks";
  Shapes shapes(op);
  shapes.bind(query, "query_BNPD");
  shapes.bind(query_scale, "query_scale_BNP");
  shapes.bind(key, "key_BHSD");
  shapes.bind(key_scale, "key_scale_BHJK");
  shapes.bind(shift, "shift_BNS");
  shapes.bind(threshold, "threshold_BNP");
  expect(op, query, "query_BNPD", ScalarType::Char, "int8");
  expect(op, key, "key_BHSD", ScalarType::Char, "int8");
  expect(op, query_scale, "query_scale_BNP", ScalarType::Float, "float32");
  expect(op, key_scale, "key_scale_BHJK", ScalarType::Float, "float32");
  expect(op, shift, "shift_BNS", ScalarType::Float, "float32");
  expect(op, threshold, "threshold_BNP", ScalarType::Float, "float32");
  BlockMap map = map_of(op, shapes, nullptr);
  if (shapes['J'] != map.columns() || shapes['K'] != BlockMap::kGroups)
    refuse(op, "key_scale_BHJK must hold ", map.columns(), " × ", BlockMap::kGroups, " scales per head");
  if (local < 0) refuse(op, "local is ", local, "; it must not be negative");
  check_codes(op, query, "query_BNPD");
  check_codes(op, key, "key_BHSD");
  Tensor bytes = torch::stable::new_empty(query, {shapes['B'], shapes['N'], map.offset(map.rows())}, ScalarType::Byte);
  map.bytes = static_cast<uint8_t*>(bytes.data_ptr());
  const auto floats = [](const Tensor& x) { return static_cast<const float*>(x.data_ptr()); };
  EstimateBlocks a{static_cast<const int8_t*>(query.data_ptr()),
                   static_cast<const int8_t*>(key.data_ptr()),
                   floats(query_scale),
                   floats(key_scale),
                   floats(shift),
                   floats(threshold),
                   shapes['B'],
                   shapes['H'],
                   shapes['N'] / shapes['H'],
                   shapes['D'],
                   local,
                   map};
  kernels().estimate_blocks(a, threads());
  return bytes;
}

std::tuple<Tensor, Tensor> attend_blocks(Tensor query, Tensor key, Tensor value, Tensor map, double scaling) {
  const char* op = "attend_blocks";
  Shapes shapes(op);
  shapes.bind(query, "query_BNPD");
  shapes.bind(key, "key_BHSD");
  shapes.bind(value, "value_BHSE");
  const BlockMap blocks = map_of(op, shapes, std::optional<Tensor>(map));
  shapes.at_most("E", kMostWidth);
  const Strided queries(op, query, "query_BNPD"), keys(op, key, "key_BHSD"), values(op, value, "value_BHSE");
  Tensor out = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['P'], shapes['E']});
  Tensor lse = torch::stable::new_empty(query, {shapes['B'], shapes['N'], shapes['P']}, ScalarType::Float);
  AttendBlocks a{queries.heads, keys.heads, values.heads, shapes['B'], shapes['H'], shapes['N'] / shapes['H'],
                 shapes['D'], shapes['E'], logits_of(op, scaling, 0).scaling, blocks, out.data_ptr(), static_cast<float*>(lse.data_ptr())};
  kernels().attend_blocks(a, threads());
  return {out, lse};
}

// Checks what gather_slots and scatter_slots share; `slots` is filled in by them.
CopySlots copy_of(const char* op, const Tensor& pool, const Tensor& address, bool slot_last) {
  check_defined(op, pool, "pool_PX");
  check_defined(op, address, "address_N");
  const int64_t dims = pool.dim();
  if (dims < 2 || (slot_last && dims != 3)) refuse(op, "pool_PX has shape ", shape_of(pool), "; [P, S, ...] or [P, D, S]");
  if (address.dim() != 1) refuse(op, "address_N has shape ", shape_of(address), "; it must be a list");
  expect(op, pool, "pool_PX", pool.scalar_type(), "");
  expect(op, address, "address_N", ScalarType::Long, "int64");
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
      refuse(op, "address_N names slot ", a.address[n], "; slots 0 to ", slots - 1, " exist");
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

void scatter_slots(Tensor pool, Tensor address, Tensor slots, bool slot_last) {
  const char* op = "scatter_slots";
  CopySlots a = copy_of(op, pool, address, slot_last);
  check_defined(op, slots, "slots_NX");
  if (slots.scalar_type() != pool.scalar_type()) refuse(op, "slots_NX must be of the dtype of pool_PX");
  const int64_t first = slot_last ? 1 : 2, extra = slot_last ? 1 : pool.dim() - 2;
  bool fits = slots.dim() == 1 + extra && slots.size(0) == a.count;
  for (int64_t i = 0; fits && i < extra; i++) fits = slots.size(1 + i) == pool.size(first + i);
  if (!fits) refuse(op, "slots_NX has shape ", shape_of(slots), "; it must hold ", a.count, " slots of pool_PX, of ", a.width, " numbers each");
  Memory memory(op);
  memory.writes(pool, "pool_PX");
  memory.reads(address, "address_N");
  memory.reads(slots, "slots_NX");
  memory.check();
  const Tensor from = torch::stable::contiguous(slots);
  a.slots = from.data_ptr();
  if (a.count && a.width) kernels().copy_slots(a, threads());
}

}  // namespace
}  // namespace kvpress

STABLE_TORCH_LIBRARY_IMPL(kvpress, CPU, library) {
  library.impl("decode_rows", TORCH_BOX(&kvpress::decode_rows));
  library.impl("decode_step", TORCH_BOX(&kvpress::decode_step));
  library.impl("absorb_step", TORCH_BOX(&kvpress::absorb_step));
  library.impl("attention_sums", TORCH_BOX(&kvpress::attention_sums));
  library.impl("attend_sums", TORCH_BOX(&kvpress::attend_sums));
  library.impl("estimate_blocks", TORCH_BOX(&kvpress::estimate_blocks));
  library.impl("attend_blocks", TORCH_BOX(&kvpress::attend_blocks));
  library.impl("match_keys", TORCH_BOX(&kvpress::match_keys));
  library.impl("pack", TORCH_BOX(&kvpress::pack));
  library.impl("unpack", TORCH_BOX(&kvpress::unpack));
  library.impl("channel_scores", TORCH_BOX(&kvpress::channel_scores));
  library.impl("gather_slots", TORCH_BOX(&kvpress::gather_slots));
  library.impl("scatter_slots", TORCH_BOX(&kvpress::scatter_slots));
}

// Which instruction set the operators use here: its name in kSets.
extern "C" const char* kvpress_instruction_set() {
  const kvpress::Kernels* chosen = &kvpress::kernels();
#if defined(KERNELS_FOR_AVX512)
#if defined(KVPRESS_AMX)
  if (chosen == &kvpress::avx512::kernels_amx) return "amx";
#endif
  if (chosen == &kvpress::avx512::kernels_vnni) return "avx512vnni";
  if (chosen == &kvpress::avx512::kernels) return "avx512";
#endif
#if defined(KERNELS_FOR_AVX2)
  if (chosen == &kvpress::avx2::kernels) return "avx2";
#endif
  return "portable";
}
