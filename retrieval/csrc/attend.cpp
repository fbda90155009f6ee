#include "attend.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <utility>

#include "job.h"
#include "weigh.h"

namespace retrieval {
namespace {

constexpr std::int64_t kExactKeys = 1024;       // keys per task of exact attention
constexpr std::int64_t kChunksPerTask = 2;
constexpr std::int64_t kChunksPerLongTask = 8;  // at least
constexpr std::int64_t kLongTasks = 16;         // of a part, about
constexpr std::int64_t kSmallProducts = std::int64_t{1} << 19;  // of a call: tens of microseconds of one core

// Where the positions of a part end that its codes cover.
std::int64_t coded_end(const Part& part) {
  return part.codes ? std::clamp(part.codes->num_keys_locked(), part.begin, std::max(part.begin, part.end))
                    : part.begin;
}

// One per calling thread: a layer call touches the same pages as the one before.
Scratch& callers_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace

std::size_t add_partial(Desk& desk) {
  const Unit& unit = desk.unit;
  Partial partial;
  std::fill_n(partial.top, kMaxGroup, -kInfinity);
  std::fill_n(partial.sum, kMaxGroup, 0.0f);
  const auto size = static_cast<std::size_t>(unit.queries.num * unit.queries.head_dim);
  partial.acc = desk.arena.take<float>(size);
  std::fill_n(partial.acc, size, 0.0f);
  desk.unit.partials.push_back(partial);
  return unit.partials.size() - 1;
}

Job::Job(const LayerQueries& queries, const std::vector<std::vector<const Part*>>& parts, float scale,
         const Budget& budget, Scratch& scratch, bool will_list, int first_kv_head)
    : queries_(queries), parts_(parts), scale_(scale), budget_(budget), scratch_(scratch), will_list_(will_list),
      first_kv_head_(first_kv_head), has_ranks_(will_list || budget.k > 0 || budget.min_keys > 1) {
  // Codes may be shared by sequences; each is locked once, in address order.
  std::set<const LayerCodes*> codes;
  for (const auto& sequence : parts) {
    for (const Part* part : sequence) {
      if (part->codes) codes.insert(part->codes.get());
    }
  }
  for (const LayerCodes* each : codes) locks_.emplace_back(each->mutex());
  const int group = queries.num_q_heads / queries.num_kv_heads;
  for (int seq = 0; seq < queries.num_seqs; ++seq) {
    for (int head = 0; head < queries.num_q_heads; head += places_.back().num) {
      places_.push_back({seq, head, std::min(kMaxGroup, group - head % group)});
    }
  }
  scratch.provide(places_.size());
}

// Keys of a sequence that are searched, not attended.
std::int64_t Job::num_searched(const std::vector<const Part*>& sequence) const {
  std::int64_t num_coded = 0;
  for (const Part* part : sequence) num_coded += std::max<std::int64_t>(0, coded_end(*part) - part->begin);
  return budget_.k > 0 || will_list_ || num_coded >= budget_.exact_keys ? num_coded : 0;
}

// Whether all is attended exactly, and waking a worker takes longer.
bool Job::is_small() const {
  if (will_list_) return false;
  std::int64_t num_keys = 0;
  for (const auto& sequence : parts_) {
    if (num_searched(sequence) > 0) return false;
    for (const Part* part : sequence) num_keys += std::max<std::int64_t>(0, part->end - part->begin);
  }
  return num_keys * queries_.num_q_heads * queries_.head_dim <= kSmallProducts;
}

void Job::add_part(Desk& desk, const Part& part, bool is_searched) const {
  Unit& unit = desk.unit;
  Arena& arena = desk.arena;
  const std::int64_t num_heads = unit.queries.num;
  if (part.end <= part.begin) return;
  unit.stats.num_visible += num_heads * (part.end - part.begin);
  const std::int64_t coded = is_searched ? coded_end(part) : part.begin;
  if (coded > part.begin || will_list_) {
    Scan scan = unit.next_scan();
    scan.part = &part;
    scan.codes = part.codes ? &part.codes->head(unit.kv_head) : nullptr;
    scan.begin = part.begin;
    scan.end = coded;
    scan.listed_end = will_list_ ? part.end : coded;
    scan.first_chunk = part.begin / kChunkKeys;
    scan.num_chunks = coded > part.begin ? (coded + kChunkKeys - 1) / kChunkKeys - scan.first_chunk : 0;
    scan.bounds = arena.take<std::int16_t>(static_cast<std::size_t>(num_heads * scan.stride()));
    scan.tops = arena.take<std::int16_t>(static_cast<std::size_t>(num_heads * scan.tops_stride()));
    scan.chosen = arena.take<std::uint32_t>(static_cast<std::size_t>(scan.num_chunks));
    std::fill_n(scan.chosen, scan.num_chunks, ~0u);
    const auto num_chunks = static_cast<std::size_t>(scan.num_chunks), num = static_cast<std::size_t>(num_heads);
    if (unit.is_long) {
      scan.levels = arena.take<std::int16_t>(num * num_chunks * kChunkRuns);
      scan.crests = arena.take<std::int16_t>(num * num_chunks);
      scan.peaks = arena.take<float>(num * num_chunks);
      scan.log_times = arena.take<float>(num_chunks * kChunkGroups);
    }
    const std::int64_t each = unit.is_long ? std::max(kChunksPerLongTask, scan.num_chunks / kLongTasks) : kChunksPerTask;
    std::size_t slot = 0;
    for (std::int64_t c = 0; c < scan.num_chunks; c += each) {
      unit.scan_tasks.push_back({unit.scans.size(), slot++, c, std::min(c + each, scan.num_chunks)});
    }
    scan.found.resize(slot);
    unit.scans.push_back(std::move(scan));
  }
  if (will_list_) return;
  if (coded < part.end) {
    const std::int64_t row_bytes = std::int64_t{part.head_dim} * element_bytes(part.dtype);
    unit.stats.num_scored += num_heads * (part.end - coded);
    unit.stats.bytes_read += 2 * row_bytes * (part.end - coded);
    for (std::int64_t first = coded; first < part.end; first += kExactKeys) {
      unit.exact_tasks.push_back({unit.exact.size(), add_partial(desk), first, std::min(first + kExactKeys, part.end)});
    }
    unit.exact.push_back(&part);
  }
}

// By the thread whose unit it is.
void Job::plan(Desk& desk, const Place& place) const {
  const int group = queries_.num_q_heads / queries_.num_kv_heads;
  const auto& sequence = parts_[static_cast<std::size_t>(place.seq)];
  const std::int64_t num_keys = num_searched(sequence);
  desk.arena.reset();
  desk.unit = Unit::after(std::move(desk.unit));
  Unit& unit = desk.unit;
  unit.kv_head = first_kv_head_ + place.head / group;
  unit.is_long = budget_.reach > 0.0f && !has_ranks_ && num_keys * group * queries_.head_dim >= budget_.reach_products;
  unit.first_row = place.seq * queries_.num_q_heads + place.head;
  const auto at = static_cast<std::size_t>(unit.first_row * queries_.head_dim);
  unit.queries = {queries_.values + at, queries_.bf16 != nullptr ? queries_.bf16 + at : nullptr, place.num,
                  queries_.head_dim};
  for (const Part* part : sequence) add_part(desk, *part, num_keys > 0);
}

void Job::weigh(Unit& unit, std::size_t i) {
  const Task& task = unit.score_tasks[i];
  unit.weighed[i] = unit.is_clear ? weigh_by_estimate(unit, task, scale_) : weigh_candidates(unit, task, scale_, has_ranks_);
}

void Job::merge(Unit& unit, float* out, float* lse) const {
  for (std::size_t i = 0; i < unit.weighed.size(); ++i) {
    const Part& part = *unit.scans[unit.score_tasks[i].run].part;
    const Weighed& weighed = unit.weighed[i];
    unit.stats.num_scored += unit.queries.num * weighed.num_scored;
    unit.stats.num_retrieved += weighed.num_retrieved;
    unit.stats.bytes_read += (weighed.num_scored + weighed.num_read) * part.head_dim * element_bytes(part.dtype);
  }
  const int head_dim = queries_.head_dim;
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

AttendStats Job::stats() const {
  AttendStats total;
  for (std::size_t i = 0; i < num_units(); ++i) {
    const AttendStats& stats = unit(i).stats;
    total.num_visible += stats.num_visible;
    total.num_scored += stats.num_scored;
    total.num_retrieved += stats.num_retrieved;
    total.num_drawn += stats.num_drawn;
    total.bytes_read += stats.bytes_read;
  }
  return total;
}

AttendStats attend_layer(const LayerQueries& queries, const std::vector<std::vector<const Part*>>& parts, float scale,
                         const Budget& budget, ThreadPool& pool, float* out, float* lse) {
  Job job(queries, parts, scale, budget, callers_scratch(), false);
  job.run(pool, budget.k, out, lse);
  return job.stats();
}

AttendStats search_part(const LayerQueries& queries, const Part& part, int kv_head, int k, const Budget& budget,
                        ThreadPool& pool, std::int64_t* positions, float* scores) {
  const std::vector<std::vector<const Part*>> parts{{&part}};
  Job job(queries, parts, 1.0f, budget, callers_scratch(), true, kv_head);
  job.run(pool, k, nullptr, nullptr);
  std::fill_n(positions, std::int64_t{queries.num_q_heads} * k, std::int64_t{-1});
  std::fill_n(scores, std::int64_t{queries.num_q_heads} * k, -kInfinity);
  pool.run(static_cast<std::int64_t>(job.num_units()), [&](std::int64_t u) {
    const Unit& unit = job.unit(static_cast<std::size_t>(u));
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
