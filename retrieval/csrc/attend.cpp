#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <set>

namespace retrieval {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kExactKeys = 1024;  // keys per task of exact attention
constexpr int kTileKeys = 256;             // keys whose scores are held at once
constexpr int kBlockKeys = 8 * kGroupKeys; // keys per entry of tops
constexpr int kBlocksPerChunk = kChunkKeys / kBlockKeys;
constexpr std::int64_t kChunksPerTask = 2;
constexpr std::int64_t kSmallPart = 512;   // searched parts this small are attended exactly
constexpr int kProbes = 16;                // keys rescored to find the threshold
constexpr float kLargestVariance = 4.0f;    // nats squared
constexpr std::int64_t kSampleGroups = 32; // groups estimated to see how wide a head looks

// Softmax over some keys, not yet divided: sum of exp(scale * (s - top)) and the values weighted with it.
struct Partial {
  float top[kMaxGroup];
  float sum[kMaxGroup];
  float* acc;  // [num][head_dim]
};

struct Candidate {
  std::int32_t position;
  float slack;     // largest distance of its bound above the floor of a head; infinite if drawn
  float inverse;   // one over the chance that it was drawn; 1 if it passed a floor
};

// One searched part, seen by one unit.
struct Scan {
  const Part* part;
  const HeadCodes* codes;
  std::int64_t begin, end;  // searched through the codes
  std::int64_t listed_end;  // candidates without a search: [end, listed_end)
  std::int64_t first_chunk, num_chunks;
  CodeQuery query;
  std::int16_t* bounds = nullptr;  // [num][num_chunks * kChunkKeys]
  std::int16_t* tops = nullptr;    // [num][num_chunks * kBlocksPerChunk]
  std::vector<std::vector<Candidate>> found;  // by chunk task
  std::vector<std::int32_t> positions;        // all found, ascending
  std::vector<float> inverses;                // Candidate::inverse of each
  float* scores = nullptr;                    // [num][positions.size()]

  std::int64_t stride() const { return num_chunks * kChunkKeys; }
  std::int64_t tops_stride() const { return num_chunks * kBlocksPerChunk; }
  const CodeChunk& chunk(std::int64_t i) const { return *codes->chunks[static_cast<std::size_t>(first_chunk + i)]; }
  float bound_unit(std::int64_t i, int h) const { return query.slope[h] * chunk(i).unit; }

  std::int64_t first_key(std::int64_t chunk) const { return (first_chunk + chunk) * kChunkKeys; }

  // How bounds of chunk i become weights relative to a key of score `best`.
  Weigher weigher(std::int64_t i, int h, float scale, float best) const {
    const float unit = scale * kLog2E;
    return {unit * (query.base[h] - best), unit * bound_unit(i, h), unit * query.lift[h] * chunk(i).unit / 32768.0f};
  }

  // Integer bounds of chunk i that reach `floor` are those >= the result; above 32767: none does.
  int threshold(std::int64_t i, int h, float floor) const {
    const float unit = bound_unit(i, h), distance = floor - query.base[h];
    if (unit <= 0.0f) return distance <= 0.0f ? -32768 : 32768;
    return static_cast<int>(std::clamp(std::floor(distance / unit) - 1.0f, -32768.0f, 32768.0f));
  }
};

// Query heads of one KV head and sequence, at most kMaxGroup.
struct Unit {
  int kv_head = 0;
  std::int64_t first_row = 0;  // of out and lse
  Queries queries;
  std::vector<const Part*> exact;
  std::vector<Scan> scans;
  std::vector<Partial> partials;  // exact blocks first, then blocks of candidates
  float best[kMaxGroup];   // best exact score known
  float floor[kMaxGroup];  // scores below do not matter
  float draws[kMaxGroup] = {};  // per weight: keys below the floor are drawn with that chance; 0: left out
  bool draws_any = false;
  std::int64_t num_probed = 0;
};

// Memory that is kept from call to call: pages once touched stay mapped.
class Arena {
 public:
  template <typename T>
  T* take(std::size_t count) {
    const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (blocks_.empty() || used_ + bytes > size_) grow(used_ + bytes);
    T* pointer = reinterpret_cast<T*>(blocks_.back().get() + (used_ - base_));
    used_ += bytes;
    return pointer;
  }
  // Everything taken is void; one block from now on.
  void reset() {
    if (blocks_.size() > 1) {
      blocks_.clear();
      blocks_.push_back(allocate_aligned(size_));
    }
    used_ = base_ = 0;
  }

 private:
  void grow(std::size_t needed) {
    const std::size_t bytes = std::max(needed - used_, std::max<std::size_t>(size_, 1u << 20));
    blocks_.push_back(allocate_aligned(bytes));
    base_ = used_ = size_;
    size_ += bytes;
  }
  std::vector<AlignedBytes> blocks_;
  std::size_t size_ = 0, used_ = 0, base_ = 0;
};

template <typename Visit>
void for_each_bit(std::uint64_t mask, Visit visit) {
  while (mask != 0) {
    visit(__builtin_ctzll(mask));
    mask &= mask - 1;
  }
}

// Bits of keys [64 g, 64 g + 64) that lie in [begin, end).
std::uint64_t range_mask(std::int64_t first, std::int64_t begin, std::int64_t end) {
  std::uint64_t mask = ~std::uint64_t{0};
  if (begin > first) mask &= begin - first >= 64 ? 0 : ~std::uint64_t{0} << (begin - first);
  if (end < first + 64) mask &= end <= first ? 0 : ~std::uint64_t{0} >> (first + 64 - end);
  return mask;
}

// Where one task works: chunks or positions [begin, end) of a run, result in partials[slot].
struct Task {
  std::size_t unit, run, slot;
  std::int64_t begin, end;
};

class Job {
 public:
  // With will_list, keys without codes become candidates instead of being attended.
  Job(const LayerQueries& queries, float scale, const Budget& budget, ThreadPool& pool, Arena& arena, bool will_list)
      : queries_(queries), scale_(scale), budget_(budget), pool_(pool), arena_(arena), will_list_(will_list) {
    arena_.reset();
  }

  void plan(const std::vector<std::vector<const Part*>>& parts);
  void scan();           // exact parts, and the bounds of searched ones
  void search(int k);    // candidates with exact scores: the k best, or with k = 0 all that matter
  void weigh();          // values of the candidates that matter
  void merge(float* out, float* lse) const;
  AttendStats stats() const;
  const std::vector<Unit>& units() const { return units_; }

 private:
  void lock(const std::vector<std::vector<const Part*>>& parts);
  void add_part(Unit& unit, std::size_t at, const Part& part);
  std::size_t add_partial(Unit& unit);
  void prepare(Unit& unit);
  void attend_exactly(const Task& task);
  void scan_chunks(const Task& task);
  void find_floor(Unit& unit, int k);
  float probe_bound(const Unit& unit, int h, std::size_t wanted) const;
  std::vector<float> probe(Unit& unit, int h, std::size_t wanted) const;
  float floor_of(float best, std::vector<float>& scores, int k) const;
  void look_around(Unit& unit, int h, float known) const;
  float phase(const Unit& unit, std::int64_t first_key) const;
  void refine(const Task& task, AttendStats& stats);
  void gather(std::size_t at);
  void settle_floor(Unit& unit, int k);
  void weigh_candidates(const Task& task, std::int64_t& num_retrieved, std::int64_t& num_rows);
  template <typename Work>
  void for_units(Work work) {
    pool_.run(static_cast<std::int64_t>(units_.size()), [&](std::int64_t u) { work(units_[static_cast<std::size_t>(u)]); });
  }
  template <typename Work>
  void for_tasks(const std::vector<Task>& tasks, Work work) {
    pool_.run(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i) { work(static_cast<std::size_t>(i)); });
  }

  const LayerQueries& queries_;
  const float scale_;
  const Budget& budget_;
  ThreadPool& pool_;
  Arena& arena_;
  const bool will_list_;
  std::vector<std::shared_lock<std::shared_mutex>> locks_;
  std::vector<Unit> units_;
  std::vector<Task> exact_tasks_, scan_tasks_, score_tasks_;
  AttendStats stats_;
};

// Codes may be shared by sequences; each is locked once, in address order.
void Job::lock(const std::vector<std::vector<const Part*>>& parts) {
  std::set<const LayerCodes*> codes;
  for (const auto& sequence : parts) {
    for (const Part* part : sequence) {
      if (part->codes) codes.insert(part->codes.get());
    }
  }
  for (const LayerCodes* each : codes) locks_.emplace_back(each->mutex());
}

std::size_t Job::add_partial(Unit& unit) {
  Partial partial;
  std::fill_n(partial.top, kMaxGroup, -kInfinity);
  std::fill_n(partial.sum, kMaxGroup, 0.0f);
  const auto size = static_cast<std::size_t>(unit.queries.num * unit.queries.head_dim);
  partial.acc = arena_.take<float>(size);
  std::fill_n(partial.acc, size, 0.0f);
  unit.partials.push_back(partial);
  return unit.partials.size() - 1;
}

void Job::add_part(Unit& unit, std::size_t at, const Part& part) {
  const std::int64_t num_heads = unit.queries.num;
  if (part.end <= part.begin) return;
  stats_.num_visible += num_heads * (part.end - part.begin);
  std::int64_t coded = part.begin;
  if (part.codes) coded = std::clamp(part.codes->num_keys_locked(), part.begin, part.end);
  if (budget_.k == 0 && !will_list_ && coded - part.begin < kSmallPart) coded = part.begin;
  if (coded > part.begin || will_list_) {
    Scan scan;
    scan.part = &part;
    scan.codes = part.codes ? &part.codes->head(unit.kv_head) : nullptr;
    scan.begin = part.begin;
    scan.end = coded;
    scan.listed_end = will_list_ ? part.end : coded;
    scan.first_chunk = part.begin / kChunkKeys;
    scan.num_chunks = coded > part.begin ? (coded + kChunkKeys - 1) / kChunkKeys - scan.first_chunk : 0;
    scan.bounds = arena_.take<std::int16_t>(static_cast<std::size_t>(num_heads * scan.stride()));
    scan.tops = arena_.take<std::int16_t>(static_cast<std::size_t>(num_heads * scan.tops_stride()));
    if (part.codes) stats_.bytes_read += scan.num_chunks * kChunkKeys * (part.codes->bits() * part.head_dim / 8 + 2);
    for (std::int64_t c = 0; c < scan.num_chunks; c += kChunksPerTask) {
      scan_tasks_.push_back({at, unit.scans.size(), scan.found.size(), c, std::min(c + kChunksPerTask, scan.num_chunks)});
      scan.found.emplace_back();
    }
    unit.scans.push_back(std::move(scan));
  }
  if (will_list_) return;
  if (coded < part.end) {
    const std::int64_t row_bytes = std::int64_t{part.head_dim} * element_bytes(part.dtype);
    stats_.num_scored += num_heads * (part.end - coded);
    stats_.bytes_read += 2 * row_bytes * (part.end - coded);
    for (std::int64_t first = coded; first < part.end; first += kExactKeys) {
      exact_tasks_.push_back({at, unit.exact.size(), add_partial(unit), first, std::min(first + kExactKeys, part.end)});
    }
    unit.exact.push_back(&part);
  }
}

void Job::plan(const std::vector<std::vector<const Part*>>& parts) {
  lock(parts);
  const int group = queries_.num_q_heads / queries_.num_kv_heads;
  for (int seq = 0; seq < queries_.num_seqs; ++seq) {
    for (int head = 0; head < queries_.num_q_heads;) {
      const int num = std::min(kMaxGroup, group - head % group);
      const auto at = static_cast<std::size_t>((seq * queries_.num_q_heads + head) * queries_.head_dim);
      Unit unit;
      unit.kv_head = head / group;
      unit.first_row = seq * queries_.num_q_heads + head;
      unit.queries = {queries_.values + at, queries_.bf16 != nullptr ? queries_.bf16 + at : nullptr, num, queries_.head_dim};
      for (const Part* part : parts[static_cast<std::size_t>(seq)]) add_part(unit, units_.size(), *part);
      units_.push_back(std::move(unit));
      head += num;
    }
  }
}

void Job::scan() {
  if (!scan_tasks_.empty()) {
    for_units([&](Unit& unit) { prepare(unit); });
  }
  const auto num_exact = static_cast<std::int64_t>(exact_tasks_.size());
  pool_.run(num_exact + static_cast<std::int64_t>(scan_tasks_.size()), [&](std::int64_t i) {
    if (i < num_exact) {
      attend_exactly(exact_tasks_[static_cast<std::size_t>(i)]);
    } else {
      scan_chunks(scan_tasks_[static_cast<std::size_t>(i - num_exact)]);
    }
  });
}

void Job::prepare(Unit& unit) {
  for (Scan& scan : unit.scans) {
    if (scan.num_chunks == 0) continue;
    scan.query = prepare_query(*scan.part->codes, unit.kv_head, unit.queries, budget_.deviations);
  }
}

// Softmax as it goes: one tile of scores at a time, rescaled when the maximum rises.
void Job::attend_exactly(const Task& task) {
  Unit& unit = units_[task.unit];
  const Part& part = *unit.exact[task.run];
  Partial& partial = unit.partials[task.slot];
  const Rows keys = part.key_rows(unit.kv_head), values = part.value_rows(unit.kv_head);
  const Kernels& kernel = kernels();
  float scores[kMaxGroup * kTileKeys];
  for (std::int64_t first = task.begin; first < task.end; first += kTileKeys) {
    const int count = static_cast<int>(std::min<std::int64_t>(kTileKeys, task.end - first));
    kernel.score(unit.queries, keys, nullptr, first, count, scores, kTileKeys);
    for (int h = 0; h < unit.queries.num; ++h) {
      float* row = scores + h * kTileKeys;
      const float top = std::max(partial.top[h], kernel.maximum(row, count));
      if (top > partial.top[h]) {
        const float factor = std::exp(scale_ * (partial.top[h] - top));
        float* acc = partial.acc + h * unit.queries.head_dim;
        for (int j = 0; j < unit.queries.head_dim; ++j) acc[j] *= factor;
        partial.sum[h] *= factor;
        partial.top[h] = top;
      }
      partial.sum[h] += kernel.exponentiate(row, count, scale_, top, -kInfinity);
    }
    kernel.accumulate(scores, kTileKeys, unit.queries.num, values, nullptr, first, count, partial.acc);
  }
}

void Job::scan_chunks(const Task& task) {
  Unit& unit = units_[task.unit];
  Scan& scan = unit.scans[task.run];
  const std::int64_t plane_stride = std::int64_t{kChunkGroups} * plane_bytes(unit.queries.head_dim);
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    const CodeChunk& chunk = scan.chunk(c);
    kernels().scan(scan.query.tables.data(), scan.query.offsets, unit.queries.num, unit.queries.head_dim,
                   scan.query.shift, reinterpret_cast<const std::uint8_t*>(chunk.planes.get()),
                   scan.part->codes->bits(), plane_stride, kChunkGroups, chunk.factors, scan.bounds + c * kChunkKeys,
                   scan.stride(), scan.tops + c * kBlocksPerChunk, scan.tops_stride());
  }
}

void Job::search(int k) {
  if (scan_tasks_.empty() && !will_list_) return;
  for_units([&](Unit& unit) { find_floor(unit, k); });
  std::vector<AttendStats> counts(scan_tasks_.size());
  for_tasks(scan_tasks_, [&](std::size_t i) { refine(scan_tasks_[i], counts[i]); });
  for (const AttendStats& count : counts) stats_.num_drawn += count.num_drawn;
  for (std::size_t u = 0; u < units_.size(); ++u) gather(u);
  for_tasks(score_tasks_, [&](std::size_t i) {
    const Task& task = score_tasks_[i];
    Unit& unit = units_[task.unit];
    Scan& scan = unit.scans[task.run];
    kernels().score(unit.queries, scan.part->key_rows(unit.kv_head), scan.positions.data() + task.begin, 0,
                    static_cast<int>(task.end - task.begin), scan.scores + task.begin,
                    static_cast<int>(scan.positions.size()));
  });
  for_units([&](Unit& unit) { settle_floor(unit, k); });
}

// The keys with the highest bounds are scored exactly. What they reach is a floor that the rest must
// pass: the k-th best score, or beta nats below the best.
void Job::find_floor(Unit& unit, int k) {
  const auto wanted = static_cast<std::size_t>(std::max({k, budget_.min_keys, kProbes}));
  std::fill_n(unit.best, kMaxGroup, -kInfinity);
  std::fill_n(unit.floor, kMaxGroup, -kInfinity);
  for (const Partial& partial : unit.partials) {
    for (int h = 0; h < unit.queries.num; ++h) unit.best[h] = std::max(unit.best[h], partial.top[h]);
  }
  std::int64_t num_visible = 0;
  for (const Scan& scan : unit.scans) {
    num_visible += scan.end - scan.begin;
  }
  if (num_visible <= 4 * static_cast<std::int64_t>(wanted)) return;  // score them all
  for (int h = 0; h < unit.queries.num; ++h) {
    std::vector<float> scores = probe(unit, h, wanted);
    unit.num_probed += static_cast<std::int64_t>(scores.size());
    for (const float score : scores) unit.best[h] = std::max(unit.best[h], score);
    unit.floor[h] = floor_of(unit.best[h], scores, k);
    if (k > 0 || budget_.rest <= 0.0f || will_list_) continue;
    float known = 0.0f;
    for (const float score : scores) known += std::exp(scale_ * (score - unit.best[h]));
    for (const Partial& partial : unit.partials) {
      if (partial.sum[h] > 0.0f) known += partial.sum[h] * std::exp(scale_ * (partial.top[h] - unit.best[h]));
    }
    look_around(unit, h, known);
  }
}

// A bound that about `wanted` keys or more reach: each block's best passes the least of the wanted tops.
float Job::probe_bound(const Unit& unit, int h, std::size_t wanted) const {
  std::vector<float> tops;
  for (const Scan& scan : unit.scans) {
    for (std::int64_t b = 0; b < scan.tops_stride(); ++b) {
      const auto top = static_cast<float>(scan.tops[h * scan.tops_stride() + b]);
      tops.push_back(scan.query.base[h] + scan.bound_unit(b / kBlocksPerChunk, h) * top);
    }
  }
  if (tops.size() > wanted) {
    const auto nth = tops.begin() + static_cast<std::ptrdiff_t>(wanted);
    std::nth_element(tops.begin(), nth, tops.end(), std::greater<float>());
    return *nth;
  }
  // Few blocks: go down from the least top in growing steps until enough keys pass.
  const auto [least, most] = std::minmax_element(tops.begin(), tops.end());
  float bound = *least, step = std::max(*most - *least, 1e-3f * std::fabs(*most));
  for (int turn = 0; turn < 8 && step > 0.0f; ++turn) {
    std::size_t count = 0;
    for (const Scan& scan : unit.scans) {
      for (std::int64_t c = 0; c < scan.num_chunks; ++c) {
        const int threshold = scan.threshold(c, h, bound);
        if (threshold > 32767) continue;
        std::uint64_t masks[kChunkGroups];
        kernels().select(scan.bounds + h * scan.stride() + c * kChunkKeys, kChunkGroups,
                         static_cast<std::int16_t>(threshold), masks);
        for (int g = 0; g < kChunkGroups; ++g) {
          count += static_cast<std::size_t>(__builtin_popcountll(
              masks[g] & range_mask(scan.first_key(c) + g * kGroupKeys, scan.begin, scan.end)));
        }
      }
    }
    if (count >= wanted) return bound;
    bound -= step;
    step *= 2.0f;
  }
  return -kInfinity;
}

// Exact scores of the keys with the highest bounds, at least `wanted` if there are so many.
std::vector<float> Job::probe(Unit& unit, int h, std::size_t wanted) const {
  struct Probe {
    float bound;
    std::uint32_t scan;
    std::int32_t position;
  };
  std::vector<Probe> probes;
  const float reached = probe_bound(unit, h, wanted);
  for (std::size_t s = 0; s < unit.scans.size(); ++s) {
    const Scan& scan = unit.scans[s];
    for (std::int64_t b = 0; b < scan.tops_stride(); ++b) {
      const int threshold = scan.threshold(b / kBlocksPerChunk, h, reached);
      if (scan.tops[h * scan.tops_stride() + b] < threshold) continue;
      const std::int16_t* bounds = scan.bounds + h * scan.stride() + b * kBlockKeys;
      const float factor = scan.bound_unit(b / kBlocksPerChunk, h);
      std::uint64_t masks[kBlockKeys / kGroupKeys];
      kernels().select(bounds, kBlockKeys / kGroupKeys, static_cast<std::int16_t>(threshold), masks);
      for (int g = 0; g < kBlockKeys / kGroupKeys; ++g) {
        const std::int64_t start = scan.first_key(0) + b * kBlockKeys + g * kGroupKeys;
        for_each_bit(masks[g] & range_mask(start, scan.begin, scan.end), [&](int i) {
          probes.push_back({scan.query.base[h] + factor * static_cast<float>(bounds[g * kGroupKeys + i]),
                            static_cast<std::uint32_t>(s), static_cast<std::int32_t>(start + i)});
        });
      }
    }
  }
  const std::size_t kept = std::min(probes.size(), 2 * wanted);
  if (kept < probes.size()) {
    std::nth_element(probes.begin(), probes.begin() + static_cast<std::ptrdiff_t>(kept), probes.end(),
                     [](const Probe& a, const Probe& b) { return a.bound > b.bound; });
  }
  const Queries query{unit.queries.values + h * unit.queries.head_dim,
                      unit.queries.bf16 != nullptr ? unit.queries.bf16 + h * unit.queries.head_dim : nullptr, 1,
                      unit.queries.head_dim};
  std::vector<float> scores(kept);
  std::vector<std::int32_t> positions;
  std::size_t done = 0;
  for (std::size_t s = 0; s < unit.scans.size(); ++s) {
    positions.clear();
    for (std::size_t i = 0; i < kept; ++i) {
      if (probes[i].scan == s) positions.push_back(probes[i].position);
    }
    const auto count = static_cast<int>(positions.size());
    kernels().score(query, unit.scans[s].part->key_rows(unit.kv_head), positions.data(), 0, count, scores.data() + done, count);
    done += positions.size();
  }
  return scores;
}

// The score that a key must reach, given the best one and some scores.
float Job::floor_of(float best, std::vector<float>& scores, int k) const {
  const float floor = k > 0 ? kInfinity : best - budget_.beta / scale_;
  const auto least = static_cast<std::size_t>(k > 0 ? k : budget_.min_keys);
  if (k == 0 && least <= 1) return floor;  // the best key passes anyway
  if (least > scores.size()) return -kInfinity;  // fewer than asked for: all of them
  const auto nth = scores.begin() + static_cast<std::ptrdiff_t>(least - 1);
  std::nth_element(scores.begin(), nth, scores.end(), std::greater<float>());
  return std::min(floor, *nth);
}

// Groups taken at even distances tell how many keys pass the floor and what those below weigh. Too many, or
// too much: the head looks widely. It then takes about rest_keys keys, each with a chance in proportion to its
// weight, and those for certain whose chance would be 1 (sampling in proportion to size; Hajek 1964).
// known: weight of the keys seen so far, relative to the best one.
void Job::look_around(Unit& unit, int h, float known) const {
  std::vector<float> weights;
  float variance = 0.0f;  // of an estimated logit, in nats squared
  std::int64_t num_groups = 0, num_visible = 0, num_sampled = 0;
  for (const Scan& scan : unit.scans) num_groups += scan.num_chunks * kChunkGroups;
  const std::int64_t step = std::max<std::int64_t>(1, num_groups / kSampleGroups);
  std::int64_t group = step / 2;  // counted through all scans
  for (const Scan& scan : unit.scans) {
    num_visible += scan.end - scan.begin;
    for (; group < scan.num_chunks * kChunkGroups; group += step) {
      const std::int64_t c = group / kChunkGroups, slot = group % kChunkGroups * kGroupKeys;
      const std::uint64_t visible = range_mask(scan.first_key(c) + slot, scan.begin, scan.end);
      weights.resize(weights.size() + kGroupKeys, 0.0f);
      const std::int16_t* factors = scan.chunk(c).factors + slot;
      kernels().split(scan.bounds + h * scan.stride() + group * kGroupKeys, factors,
                      scan.weigher(c, h, scale_, unit.best[h]), kInfinity, visible, 1.0f, &weights[weights.size() - kGroupKeys]);
      num_sampled += __builtin_popcountll(visible);
      std::int64_t squares = 0;
      for (int i = 0; i < kGroupKeys; ++i) squares += std::int64_t{factors[i]} * factors[i];
      const float deviation = scale_ * scan.query.deviation[h] * scan.chunk(c).unit / 32768.0f;
      variance += deviation * deviation * static_cast<float>(squares);
    }
    group -= scan.num_chunks * kChunkGroups;
  }
  if (num_sampled == 0) return;
  const float per_sample = static_cast<float>(num_visible) / static_cast<float>(num_sampled);
  const auto wanted = static_cast<float>(budget_.rest_keys);
  // Keys of at least that weight, and what the others weigh together; sums side by side, or they would wait.
  const auto divide = [&](float weight) {
    constexpr std::size_t kLanes = 16;  // divides kGroupKeys
    float counts[kLanes] = {}, sums[kLanes] = {};
    for (std::size_t i = 0; i < weights.size(); i += kLanes) {
      for (std::size_t j = 0; j < kLanes; ++j) {
        const float each = weights[i + j];
        counts[j] += each >= weight ? 1.0f : 0.0f;
        sums[j] += each >= weight ? 0.0f : each;
      }
    }
    return std::pair<float, float>(per_sample * std::accumulate(counts, counts + kLanes, 0.0f),
                                   per_sample * std::accumulate(sums, sums + kLanes, 0.0f));
  };
  // Where estimates are off by more than that, chances by weight would be chances by error; their mean weight is
  // too large by e^(variance / 2).
  variance /= static_cast<float>(weights.size());
  if (variance > kLargestVariance) return;
  const auto [count, inflated] = divide(std::exp(scale_ * (unit.floor[h] - unit.best[h])));
  const float below = inflated * std::exp(-0.5f * variance);
  if (count <= wanted && below <= budget_.rest * (known + below)) return;
  float spacing = divide(kInfinity).second / wanted;
  for (int turn = 0; turn < 3; ++turn) {
    const auto [above, rest] = divide(spacing);
    spacing = rest / std::max(wanted - above, 0.25f * wanted);
  }
  if (!(spacing > 0.0f)) return;
  unit.draws[h] = 1.0f / spacing;
  unit.draws_any = true;
  unit.floor[h] = unit.best[h] + std::log(spacing) / scale_;
}

// Somewhere in [0, 1), the same for the same step: where the drawing of a task begins.
float Job::phase(const Unit& unit, std::int64_t first_key) const {
  std::uint32_t bits;
  std::memcpy(&bits, &unit.best[0], sizeof(bits));
  std::uint64_t z = (static_cast<std::uint64_t>(bits) << 32) + static_cast<std::uint64_t>(first_key);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<float>(z >> 40) * 0x1p-24f;
}

// Keys whose bound passes the floor become candidates; of a head that looks widely, those whose estimate does
// and some of the others, drawn once for all such heads of the unit.
void Job::refine(const Task& task, AttendStats& stats) {
  Unit& unit = units_[task.unit];
  Scan& scan = unit.scans[task.run];
  std::vector<Candidate>& found = scan.found[task.slot];
  float at = phase(unit, scan.first_key(task.begin));
  std::uint64_t masks[kMaxGroup][kChunkGroups];
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    const CodeChunk& chunk = scan.chunk(c);
    float measure[kChunkKeys];
    if (unit.draws_any) std::fill_n(measure, kChunkKeys, 0.0f);
    std::uint64_t any[kChunkGroups] = {};
    for (int h = 0; h < unit.queries.num; ++h) {
      const std::int16_t* bounds = scan.bounds + h * scan.stride() + c * kChunkKeys;
      if (unit.draws[h] > 0.0f) {
        const float floor = scale_ * kLog2E * (unit.floor[h] - unit.best[h]);
        const Weigher weigher = scan.weigher(c, h, scale_, unit.best[h]);
        for (int g = 0; g < kChunkGroups; ++g) {
          const std::uint64_t visible = range_mask(scan.first_key(c) + g * kGroupKeys, scan.begin, scan.end);
          masks[h][g] = kernels().split(bounds + g * kGroupKeys, chunk.factors + g * kGroupKeys, weigher, floor,
                                        visible, unit.draws[h], measure + g * kGroupKeys);
          any[g] |= masks[h][g];
        }
        continue;
      }
      const int threshold = scan.threshold(c, h, unit.floor[h]);
      for (int b = 0; b < kBlocksPerChunk; ++b) {
        constexpr int kGroups = kBlockKeys / kGroupKeys;
        std::uint64_t* mask = masks[h] + b * kGroups;
        std::fill_n(mask, kGroups, std::uint64_t{0});
        if (scan.tops[h * scan.tops_stride() + c * kBlocksPerChunk + b] < threshold) continue;
        kernels().select(bounds + b * kBlockKeys, kGroups, static_cast<std::int16_t>(threshold), mask);
        for (int g = 0; g < kGroups; ++g) any[b * kGroups + g] |= mask[g];
      }
    }
    for (int g = 0; g < kChunkGroups; ++g) {
      const std::int64_t first = scan.first_key(c) + g * kGroupKeys;
      const std::uint64_t visible = range_mask(first, scan.begin, scan.end);
      std::uint64_t sure = any[g] & visible, drawn = 0;
      if (unit.draws_any) drawn = kernels().draw(measure + g * kGroupKeys, sure | ~visible, &at, &sure);
      for_each_bit(sure, [&](int i) {
        Candidate candidate{static_cast<std::int32_t>(first + i), -kInfinity, 1.0f};
        for (int h = 0; h < unit.queries.num; ++h) {
          if ((masks[h][g] >> i & 1u) == 0) continue;
          const auto bound = static_cast<float>(scan.bounds[h * scan.stride() + c * kChunkKeys + g * kGroupKeys + i]);
          candidate.slack = std::max(candidate.slack, scan.query.base[h] + scan.bound_unit(c, h) * bound - unit.floor[h]);
        }
        found.push_back(candidate);
      });
      for_each_bit(drawn, [&](int i) {
        found.push_back({static_cast<std::int32_t>(first + i), kInfinity, 1.0f / measure[g * kGroupKeys + i]});
      });
      stats.num_drawn += __builtin_popcountll(drawn);
    }
  }
}

// Lists of the tasks become one per scan, cut to the budget, and are shared out again.
void Job::gather(std::size_t at) {
  Unit& unit = units_[at];
  std::vector<float> slacks;
  for (const Scan& scan : unit.scans) {
    for (const auto& found : scan.found) {
      for (const Candidate& candidate : found) slacks.push_back(candidate.slack);
    }
  }
  float least = -kInfinity;
  const auto limit = static_cast<std::size_t>(std::max({budget_.max_keys, budget_.k, 1}));
  if (slacks.size() > limit) {
    const auto nth = slacks.begin() + static_cast<std::ptrdiff_t>(limit - 1);
    std::nth_element(slacks.begin(), nth, slacks.end(), std::greater<float>());
    least = *nth;
  }
  for (std::size_t s = 0; s < unit.scans.size(); ++s) {
    Scan& scan = unit.scans[s];
    for (const auto& found : scan.found) {
      for (const Candidate& candidate : found) {
        if (candidate.slack < least) continue;
        scan.positions.push_back(candidate.position);
        scan.inverses.push_back(candidate.inverse);
      }
    }
    for (std::int64_t i = scan.end; i < scan.listed_end; ++i) scan.positions.push_back(static_cast<std::int32_t>(i));
    scan.inverses.resize(scan.positions.size(), 1.0f);
    const auto count = static_cast<std::int64_t>(scan.positions.size());
    scan.scores = arena_.take<float>(static_cast<std::size_t>(unit.queries.num * count));
    stats_.num_scored += unit.queries.num * count;
    stats_.bytes_read += count * scan.part->head_dim * element_bytes(scan.part->dtype);
    for (std::int64_t first = 0; first < count; first += kTileKeys) {
      score_tasks_.push_back({at, s, add_partial(unit), first, std::min<std::int64_t>(first + kTileKeys, count)});
    }
  }
}

void Job::settle_floor(Unit& unit, int k) {
  std::vector<float> scores;
  for (int h = 0; h < unit.queries.num; ++h) {
    scores.clear();
    for (const Scan& scan : unit.scans) {
      const std::size_t count = scan.positions.size();
      if (count == 0) continue;
      const float* row = scan.scores + static_cast<std::size_t>(h) * count;
      unit.best[h] = std::max(unit.best[h], kernels().maximum(row, static_cast<int>(count)));
      if (k > 0 || budget_.min_keys > 1) scores.insert(scores.end(), row, row + count);
    }
    unit.floor[h] = unit.draws[h] > 0.0f ? -kInfinity : floor_of(unit.best[h], scores, k);
  }
}

void Job::weigh() {
  std::vector<std::int64_t> retrieved(score_tasks_.size()), rows(score_tasks_.size());
  for_tasks(score_tasks_, [&](std::size_t i) { weigh_candidates(score_tasks_[i], retrieved[i], rows[i]); });
  for (std::size_t i = 0; i < score_tasks_.size(); ++i) {
    const Part& part = *units_[score_tasks_[i].unit].scans[score_tasks_[i].run].part;
    stats_.num_retrieved += retrieved[i];
    stats_.bytes_read += rows[i] * part.head_dim * element_bytes(part.dtype);
  }
}

void Job::weigh_candidates(const Task& task, std::int64_t& num_retrieved, std::int64_t& num_rows) {
  Unit& unit = units_[task.unit];
  Scan& scan = unit.scans[task.run];
  Partial& partial = unit.partials[task.slot];
  const std::size_t stride = scan.positions.size();
  float weights[kMaxGroup * kTileKeys];
  float inverses[kTileKeys];
  std::int32_t positions[kTileKeys];
  // Keys that matter to any head, moved together.
  int count = 0;
  for (std::int64_t i = task.begin; i < task.end; ++i) {
    bool is_kept = false;
    for (int h = 0; h < unit.queries.num; ++h) {
      const float score = scan.scores[static_cast<std::size_t>(h) * stride + static_cast<std::size_t>(i)];
      const bool is_mine = score >= unit.floor[h];
      weights[h * kTileKeys + count] = is_mine ? score : -kInfinity;
      is_kept |= is_mine;
      num_retrieved += is_mine ? 1 : 0;
    }
    positions[count] = scan.positions[static_cast<std::size_t>(i)];
    inverses[count] = scan.inverses[static_cast<std::size_t>(i)];
    count += is_kept ? 1 : 0;
  }
  if (count == 0) return;
  num_rows = count;
  for (int h = 0; h < unit.queries.num; ++h) {
    partial.top[h] = unit.best[h];
    partial.sum[h] = kernels().exponentiate(weights + h * kTileKeys, count, scale_, unit.best[h],
                                             std::numeric_limits<float>::lowest());
    if (unit.draws[h] == 0.0f) continue;
    // What was drawn stands for others too.
    float sum = 0.0f;
    for (int i = 0; i < count; ++i) {
      weights[h * kTileKeys + i] *= inverses[i];
      sum += weights[h * kTileKeys + i];
    }
    partial.sum[h] = sum;
  }
  kernels().accumulate(weights, kTileKeys, unit.queries.num, scan.part->value_rows(unit.kv_head), positions, 0, count,
                       partial.acc);
}

void Job::merge(float* out, float* lse) const {
  const int head_dim = queries_.head_dim;
  for (const Unit& unit : units_) {
    for (int h = 0; h < unit.queries.num; ++h) {
      const std::int64_t row = unit.first_row + h;
      float* target = out + row * head_dim;
      std::fill_n(target, head_dim, 0.0f);
      float top = -kInfinity, sum = 0.0f;
      for (const Partial& partial : unit.partials) top = std::max(top, partial.top[h]);
      for (const Partial& partial : unit.partials) {
        if (!(partial.sum[h] > 0.0f)) continue;
        const float factor = std::exp(scale_ * (partial.top[h] - top));
        const float* acc = partial.acc + h * head_dim;
        sum += factor * partial.sum[h];
        for (int j = 0; j < head_dim; ++j) target[j] += factor * acc[j];
      }
      lse[row] = sum > 0.0f ? scale_ * top + std::log(sum) : -kInfinity;
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      for (int j = 0; j < head_dim; ++j) target[j] *= inverse;
    }
  }
}

AttendStats Job::stats() const {
  AttendStats total = stats_;
  for (const Unit& unit : units_) total.num_scored += unit.num_probed;
  return total;
}

// One arena per calling thread: a layer call touches the same pages as the one before.
Arena& calling_arena() {
  thread_local Arena arena;
  return arena;
}

}  // namespace

AttendStats attend_layer(const LayerQueries& queries, const std::vector<std::vector<const Part*>>& parts, float scale,
                         const Budget& budget, ThreadPool& pool, float* out, float* lse) {
  Job job(queries, scale, budget, pool, calling_arena(), false);
  job.plan(parts);
  job.scan();
  job.search(budget.k);
  job.weigh();
  job.merge(out, lse);
  return job.stats();
}

AttendStats search_part(const LayerQueries& queries, const Part& part, int k, const Budget& budget, ThreadPool& pool,
                        std::int64_t* positions, float* scores) {
  Job job(queries, 1.0f, budget, pool, calling_arena(), true);
  job.plan({{&part}});
  job.scan();
  job.search(k);
  std::fill_n(positions, std::int64_t{queries.num_q_heads} * k, std::int64_t{-1});
  std::fill_n(scores, std::int64_t{queries.num_q_heads} * k, -kInfinity);
  pool.run(static_cast<std::int64_t>(job.units().size()), [&](std::int64_t u) {
    const Unit& unit = job.units()[static_cast<std::size_t>(u)];
    if (unit.scans.empty()) return;
    const Scan& scan = unit.scans.front();
    const std::size_t count = scan.positions.size();
    std::vector<std::uint32_t> order;
    for (int h = 0; h < unit.queries.num; ++h) {
      const float* row = scan.scores + static_cast<std::size_t>(h) * count;
      order.clear();
      for (std::size_t i = 0; i < count; ++i) {
        if (row[i] >= unit.floor[h]) order.push_back(static_cast<std::uint32_t>(i));
      }
      // Of equal scores the earlier position comes first.
      const std::size_t kept = std::min(order.size(), static_cast<std::size_t>(k));
      std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(),
                        [&](std::uint32_t a, std::uint32_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
      for (std::size_t i = 0; i < kept; ++i) {
        positions[(unit.first_row + h) * k + static_cast<std::int64_t>(i)] = scan.positions[order[i]];
        scores[(unit.first_row + h) * k + static_cast<std::int64_t>(i)] = row[order[i]];
      }
    }
  });
  return job.stats();
}

}  // namespace retrieval
