#include "chunk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "chunk_tiles.h"

#if defined(RETRIEVAL_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace retrieval {

#if defined(RETRIEVAL_TILES)
namespace {

bool has_tile_instructions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  return (d & kAmxBf16) != 0 && (d & kAmxTile) != 0 && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("gfni") &&
         __builtin_cpu_supports("avx512bf16");
}

// Tiles are large, so Linux (5.16 on) saves them only for processes that asked.
bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

constexpr int kTaskBlocks = 32;            // row blocks of a task: their sums and queries fit in 1 MiB of L2
constexpr std::int64_t kWantedTasks = 32;  // enough to keep many cores evenly busy
constexpr std::int64_t kRangeKeys = 4096;  // a shorter range is not worth its merge
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(void* data) const { ::operator delete[](data, std::align_val_t{64}); }
};
template <typename T>
using Aligned = std::unique_ptr<T[], Free>;

template <typename T>
Aligned<T> allocate(std::int64_t count) {
  return Aligned<T>(static_cast<T*>(::operator new[](static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64})));
}

// How the work is cut.
struct Plan {
  std::int64_t num_keys = 0;       // positions, the chunk's own included
  std::int64_t num_rows = 0;       // of one KV head
  std::int64_t blocks_per_task = 0;
  std::int64_t num_runs = 0;       // of row blocks, per KV head
  std::int64_t first_key = 0;      // the first that any row sees
  std::int64_t keys_per_range = 0;
  std::int64_t num_ranges = 0;

  Plan(const Chunk& chunk, const std::vector<const Part*>& parts) {
    for (const Part* part : parts) num_keys += part->end - part->begin;
    num_rows = chunk.num_new * (chunk.num_q_heads / chunk.num_kv_heads);
    const std::int64_t num_blocks = divide_up(num_rows, tiles::kRows);
    num_runs = divide_up(num_blocks, kTaskBlocks);
    blocks_per_task = divide_up(num_blocks, num_runs);
    if (chunk.window > 0) first_key = std::max<std::int64_t>(0, num_keys - chunk.num_new - chunk.window + 1);
    const std::int64_t seen = num_keys - first_key;
    const std::int64_t wanted = divide_up(kWantedTasks, num_runs * chunk.num_kv_heads);
    num_ranges = std::clamp<std::int64_t>(seen / kRangeKeys, 1, wanted);
    keys_per_range = divide_up(divide_up(seen, num_ranges), tiles::kBlockKeys) * tiles::kBlockKeys;
    num_ranges = divide_up(seen, keys_per_range);
  }
};

// Where a range's results go: [num_q_heads][num_new][head_dim] and [num_q_heads][num_new].
struct Target {
  void* out;
  bool is_bf16;
  std::int64_t head_stride, row_stride;
  float* lse;

  void* row(std::int64_t head, std::int64_t i) const {
    return static_cast<std::byte*>(out) + (head * head_stride + i * row_stride) * (is_bf16 ? 2 : 4);
  }
};

class Task {
 public:
  Task(const Chunk& chunk, const Plan& plan, int kv_head, std::int64_t run, std::int64_t range)
      : chunk_(chunk),
        plan_(plan),
        kv_head_(kv_head),
        group_(chunk.num_q_heads / chunk.num_kv_heads),
        num_slices_((chunk.head_dim + 31) / 32),
        packed_size_(tiles::packed_size(num_slices_)),
        first_row_(run * plan.blocks_per_task * tiles::kRows),
        last_row_(std::min(plan.num_rows, first_row_ + plan.blocks_per_task * tiles::kRows)),
        first_key_(std::max(plan.first_key + range * plan.keys_per_range, begin_of(first_row_))),
        last_key_(std::min(plan.first_key + (range + 1) * plan.keys_per_range, end_of(last_row_ - 1))) {}

  void run(const std::vector<const Part*>& parts, const Target& target);

 private:
  // Positions that a row sees.
  std::int64_t position(std::int64_t row) const { return plan_.num_keys - chunk_.num_new + row / group_; }
  std::int64_t end_of(std::int64_t row) const { return position(row) + 1; }
  std::int64_t begin_of(std::int64_t row) const {
    return chunk_.window > 0 ? std::max<std::int64_t>(0, position(row) + 1 - chunk_.window) : 0;
  }
  // Rows of a block behind the last one do as the last one does.
  std::int64_t row(std::int64_t block, int i) const {
    return std::min(first_row_ + block * tiles::kRows + i, last_row_ - 1);
  }

  void open();
  void attend_keys(const Part& part, std::int64_t offset, std::int64_t begin, std::int64_t end);
  void add_folds(std::int64_t block, std::int64_t begin, int num_keys);
  tiles::Ahead ahead(const std::uint16_t* rows, std::int64_t size) const;
  void close(const Target& target);

  const Chunk& chunk_;
  const Plan& plan_;
  const int kv_head_, group_, num_slices_, packed_size_;
  const std::int64_t first_row_, last_row_, first_key_, last_key_;
  // Which keys of the present key block each row of a row block sees.
  struct Limits {
    int begin[tiles::kRows], end[tiles::kRows];
  };

  std::vector<tiles::RowBlock> blocks_;  // C++17 allocates them aligned
  std::vector<Limits> limits_;           // one per row block, filled where rows differ
  std::vector<tiles::Fold> folds_;       // of the present key block
  tiles::KeyBlock key_block_{};
  tiles::Pipeline pipeline_{};
  Aligned<float> sums_, scores_;
  Aligned<std::uint16_t> queries_, keys_, values_, weights_;
};

// The thread's tile configuration for as long as a task needs it.
class TileScope {
 public:
  TileScope() { tiles::enter(saved_); }
  ~TileScope() { tiles::leave(saved_); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  alignas(64) unsigned char saved_[64];
};

void Task::open() {
  const std::int64_t num_blocks = divide_up(last_row_ - first_row_, tiles::kRows);
  blocks_.resize(static_cast<std::size_t>(num_blocks));
  sums_ = allocate<float>(num_blocks * packed_size_);
  queries_ = allocate<std::uint16_t>(num_blocks * packed_size_);
  scores_ = allocate<float>(2 * tiles::kStepKeys * tiles::kRows);
  weights_ = allocate<std::uint16_t>(2 * tiles::kBlockKeys * tiles::kRows);
  keys_ = allocate<std::uint16_t>(std::int64_t{tiles::kBlockSteps} * packed_size_);
  values_ = allocate<std::uint16_t>(std::int64_t{tiles::kBlockSteps} * packed_size_);
  key_block_.values = values_.get();
  pipeline_.num_slices = num_slices_;
  pipeline_.scale_log2 = chunk_.scale * 1.44269504f;
  pipeline_.scores = scores_.get();
  pipeline_.weights[0] = weights_.get();
  pipeline_.weights[1] = weights_.get() + tiles::kBlockKeys * tiles::kRows;
  limits_.resize(static_cast<std::size_t>(num_blocks));
  std::fill_n(sums_.get(), num_blocks * packed_size_, 0.0f);
  for (std::int64_t b = 0; b < num_blocks; ++b) {
    tiles::RowBlock& block = blocks_[static_cast<std::size_t>(b)];
    std::fill_n(block.bias, tiles::kRows, tiles::kNoBias);
    std::fill_n(block.total, tiles::kRows, 0.0f);
    block.sums = sums_.get() + b * packed_size_;
    std::uint16_t* packed = queries_.get() + b * packed_size_;
    block.queries = packed;
    const std::uint16_t* rows[tiles::kRows];
    for (int i = 0; i < tiles::kRows; ++i) {
      const std::int64_t r = row(b, i);
      rows[i] = chunk_.queries + (kv_head_ * group_ + r % group_) * chunk_.query_head_stride +
                r / group_ * chunk_.query_row_stride;
    }
    tiles::pack_queries(rows, chunk_.head_dim, num_slices_, packed);
  }
}

void Task::run(const std::vector<const Part*>& parts, const Target& target) {
  open();
  {
    const TileScope scope;
    std::int64_t offset = 0;
    for (const Part* part : parts) {
      const std::int64_t next = offset + part->end - part->begin;
      const std::int64_t begin = std::max(first_key_, offset), end = std::min(last_key_, next);
      for (std::int64_t key = begin; key < end; key += tiles::kBlockKeys) {
        attend_keys(*part, offset, key, std::min<std::int64_t>(end, key + tiles::kBlockKeys));
      }
      offset = next;
    }
  }
  close(target);
}

// All rows against positions [begin, end) of a part that starts at position offset.
void Task::attend_keys(const Part& part, std::int64_t offset, std::int64_t begin, std::int64_t end) {
  const auto rows_at = [&](const void* data, std::int64_t head_stride) {
    return static_cast<const std::uint16_t*>(data) + kv_head_ * head_stride +
           (part.begin + begin - offset) * part.head_dim;
  };
  const std::uint16_t* key_rows = rows_at(part.keys, part.key_head_stride);
  const std::uint16_t* value_rows = rows_at(part.values, part.value_head_stride);
  const int num_keys = static_cast<int>(end - begin);
  for (int step = 0; step * tiles::kStepKeys < num_keys; ++step) {
    const int first = step * tiles::kStepKeys;
    const int count = std::min(tiles::kStepKeys, num_keys - first);
    const std::uint16_t* keys = key_rows + std::int64_t{first} * part.head_dim;
    key_block_.keys[step] = keys;
    if (count < tiles::kStepKeys || part.head_dim != num_slices_ * 32) {
      std::uint16_t* packed = keys_.get() + step * packed_size_;
      tiles::pack_keys(keys, count, part.head_dim, num_slices_, packed);
      key_block_.keys[step] = packed;
    }
    tiles::pack_values(value_rows + std::int64_t{first} * part.head_dim, count, part.head_dim, num_slices_,
                       values_.get() + step * packed_size_);
  }
  folds_.clear();
  for (std::size_t b = 0; b < blocks_.size(); ++b) add_folds(static_cast<std::int64_t>(b), begin, num_keys);
  const std::int64_t last = std::min(last_key_, offset + part.end - part.begin);
  const std::int64_t num_next = std::min<std::int64_t>(last - end, tiles::kBlockKeys);
  pipeline_.keys_ahead = ahead(key_rows + std::int64_t{num_keys} * part.head_dim, num_next * part.head_dim);
  pipeline_.values_ahead = ahead(value_rows + std::int64_t{num_keys} * part.head_dim, num_next * part.head_dim);
  pipeline_.scored_keys = nullptr;  // those of the previous key block are gone
  for (std::size_t i = 0; i < folds_.size(); ++i) {
    tiles::fold(folds_[i], i + 1 < folds_.size() ? &folds_[i + 1] : nullptr, pipeline_);
  }
  tiles::settle(pipeline_);
}

// Elements to fetch over all steps of the present folds.
tiles::Ahead Task::ahead(const std::uint16_t* rows, std::int64_t size) const {
  std::int64_t num_steps = 0;
  for (const tiles::Fold& fold : folds_) num_steps += fold.last - fold.first;
  if (size <= 0 || num_steps == 0) return {};
  const auto* begin = reinterpret_cast<const char*>(rows);
  return {begin, begin + 2 * size, static_cast<int>(divide_up(divide_up(2 * size, 64), tiles::Ahead::kTurns * num_steps))};
}

// One row block against a key block that starts at position begin: steps that some rows do not see in part,
// steps that all rows see in whole, and again steps seen in part.
void Task::add_folds(std::int64_t block, std::int64_t begin, int num_keys) {
  const auto inside = [&](std::int64_t key) {
    return static_cast<int>(std::clamp<std::int64_t>(key - begin, 0, num_keys));
  };
  const std::int64_t first_row = row(block, 0), last_row = row(block, tiles::kRows - 1);
  const int seen_begin = inside(begin_of(first_row)), seen_end = inside(end_of(last_row));
  if (seen_begin >= seen_end) return;
  const int first = seen_begin / tiles::kStepKeys;
  const int last = (seen_end + tiles::kStepKeys - 1) / tiles::kStepKeys;
  const int whole_first =
      std::clamp((inside(begin_of(last_row)) + tiles::kStepKeys - 1) / tiles::kStepKeys, first, last);
  const int whole_last = std::clamp(inside(end_of(first_row)) / tiles::kStepKeys, whole_first, last);
  tiles::RowBlock* rows = &blocks_[static_cast<std::size_t>(block)];
  Limits& limits = limits_[static_cast<std::size_t>(block)];
  if (first < whole_first || whole_last < last) {
    for (int i = 0; i < tiles::kRows; ++i) {
      limits.begin[i] = inside(begin_of(row(block, i)));
      limits.end[i] = inside(end_of(row(block, i)));
    }
  }
  if (first < whole_first) folds_.push_back({&key_block_, rows, first, whole_first, limits.begin, limits.end});
  if (whole_first < whole_last) folds_.push_back({&key_block_, rows, whole_first, whole_last, nullptr, nullptr});
  if (whole_last < last) folds_.push_back({&key_block_, rows, whole_last, last, limits.begin, limits.end});
}

void Task::close(const Target& target) {
  for (std::size_t b = 0; b < blocks_.size(); ++b) {
    const tiles::RowBlock& block = blocks_[b];
    void* targets[tiles::kRows] = {};
    for (int i = 0; i < tiles::kRows; ++i) {
      const std::int64_t r = first_row_ + static_cast<std::int64_t>(b) * tiles::kRows + i;
      if (r >= last_row_) break;
      const std::int64_t head = kv_head_ * group_ + r % group_;
      targets[i] = target.row(head, r / group_);
      if (target.lse == nullptr) continue;
      const double reference = static_cast<double>(tiles::kBiasOfZero) - static_cast<double>(block.bias[i]);
      const double total = static_cast<double>(block.total[i]);
      const double log2_total = reference + tiles::kWeightExponent + std::log2(total);
      target.lse[head * chunk_.num_new + r / group_] =
          block.total[i] == 0.0f ? -kInfinity : static_cast<float>(0.6931471805599453 * log2_total);
    }
    tiles::finish(block, num_slices_, chunk_.head_dim, target.is_bf16, targets);
  }
}

std::uint16_t float_to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One row's partial results, all float32, into one.
void merge_row(const std::vector<Target>& partials, const Chunk& chunk, const Target& target, std::int64_t head,
               std::int64_t i) {
  const std::int64_t at = head * chunk.num_new + i;
  float top = -kInfinity;
  for (const Target& partial : partials) top = std::max(top, partial.lse[at]);
  float sums[kMaxHeadDim] = {};
  float total = 0.0f;
  for (const Target& partial : partials) {
    if (partial.lse[at] == -kInfinity) continue;
    const float weight = std::exp(partial.lse[at] - top);
    const auto* values = static_cast<const float*>(partial.row(head, i));
    total += weight;
    for (int j = 0; j < chunk.head_dim; ++j) sums[j] += weight * values[j];
  }
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  for (int j = 0; j < chunk.head_dim; ++j) {
    if (target.is_bf16) {
      static_cast<std::uint16_t*>(target.row(head, i))[j] = float_to_bf16(sums[j] * factor);
    } else {
      static_cast<float*>(target.row(head, i))[j] = sums[j] * factor;
    }
  }
  if (target.lse != nullptr) target.lse[at] = total == 0.0f ? -kInfinity : top + std::log(total);
}

}  // namespace

bool can_attend_chunk() {
  static const bool can = has_tile_instructions() && ask_for_tiles();
  return can;
}

void attend_chunk(const Chunk& chunk, const std::vector<const Part*>& parts, ThreadPool& pool) {
  const Plan plan(chunk, parts);
  if (plan.num_rows == 0) return;
  const Target target{chunk.out, chunk.is_out_bf16, chunk.out_head_stride, chunk.out_row_stride, chunk.lse};
  std::vector<Target> partials;
  Aligned<float> outs, lses;
  if (plan.num_ranges > 1) {
    const std::int64_t rows = chunk.num_q_heads * chunk.num_new;
    outs = allocate<float>(plan.num_ranges * rows * chunk.head_dim);
    lses = allocate<float>(plan.num_ranges * rows);
    for (std::int64_t range = 0; range < plan.num_ranges; ++range) {
      partials.push_back({outs.get() + range * rows * chunk.head_dim, false, chunk.num_new * chunk.head_dim,
                          chunk.head_dim, lses.get() + range * rows});
    }
  }
  // The run varies fastest: tasks that work at the same time read the same keys.
  pool.run(chunk.num_kv_heads * plan.num_ranges * plan.num_runs, [&](std::int64_t i) {
    const std::int64_t run = i % plan.num_runs, range = i / plan.num_runs % plan.num_ranges;
    const int kv_head = static_cast<int>(i / plan.num_runs / plan.num_ranges);
    Task(chunk, plan, kv_head, run, range)
        .run(parts, partials.empty() ? target : partials[static_cast<std::size_t>(range)]);
  });
  if (partials.empty()) return;
  pool.run(chunk.num_q_heads * divide_up(chunk.num_new, 64), [&](std::int64_t i) {
    const std::int64_t pieces = divide_up(chunk.num_new, 64), head = i / pieces, first = i % pieces * 64;
    for (std::int64_t r = first; r < std::min(chunk.num_new, first + 64); ++r) merge_row(partials, chunk, target, head, r);
  });
}

#else

bool can_attend_chunk() { return false; }
void attend_chunk(const Chunk&, const std::vector<const Part*>&, ThreadPool&) {}

#endif

}  // namespace retrieval
