#include "attend.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <tuple>

#include "arena.h"
#include "candidates.h"
#include "choose.h"
#include "floor.h"
#include "luck.h"
#include "unit.h"
#include "weigh.h"

namespace retrieval {
namespace {

constexpr std::int64_t kExactKeys = 1024;  // keys per task of exact attention
constexpr std::int64_t kChunksPerTask = 2;   // where every key is scanned
constexpr std::int64_t kChunksPerChoice = 8; // where few are
constexpr std::size_t kUsualCandidates = 256;  // of a task
constexpr std::int64_t kLeastChosen = 16384;  // keys: a search of fewer scans them all
constexpr std::int64_t kSmallProducts = std::int64_t{1} << 19;  // of a call: tens of microseconds of one core

class Job {
 public:
  // With will_list, keys without codes become candidates instead of being attended.
  Job(const LayerQueries& queries, float scale, const Budget& budget, ThreadPool& pool, Arena& arena, bool will_list,
      int first_kv_head = 0)
      : queries_(queries), scale_(scale), budget_(budget), pool_(pool), arena_(arena), will_list_(will_list),
        first_kv_head_(first_kv_head), has_ranks_(will_list || budget.k > 0 || budget.min_keys > 1) {
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
  void add_part(Unit& unit, std::size_t at, const Part& part, bool is_searched);
  std::size_t add_partial(Unit& unit);
  void prepare(Unit& unit);
  void choose();
  void choose_all(Unit& unit);
  bool is_enough(const Unit& unit) const;
  void find_floors(int k);
  void count_codes();    // of what has been scanned
  void scan_chunks(const Task& task);
  void scan_chunk(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& out);
  std::int64_t refine_chunks(const Task& task);
  std::int64_t search_chunks(const Task& task);
  void gather(Unit& unit);
  void share_out(std::size_t at);
  void settle_floor(Unit& unit, int k);
  template <typename Work>
  void for_units(Work work) {
    run(static_cast<std::int64_t>(units_.size()), [&](std::int64_t u) { work(units_[static_cast<std::size_t>(u)]); });
  }
  template <typename Work>
  void for_tasks(const std::vector<Task>& tasks, Work work) {
    run(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i) { work(static_cast<std::size_t>(i)); });
  }

  const LayerQueries& queries_;
  const float scale_;
  const Budget& budget_;
  template <typename Work>
  void run(std::int64_t count, Work work) {
    if (!is_small_) return pool_.run(count, work);
    for (std::int64_t i = 0; i < count; ++i) work(i);
  }

  ThreadPool& pool_;
  Arena& arena_;
  const bool will_list_;
  bool is_small_ = false;  // waking a worker takes longer than all the work
  const int first_kv_head_;
  const bool has_ranks_;  // all candidates' scores are needed at once, to find the k best
  std::vector<std::shared_lock<std::shared_mutex>> locks_;
  std::vector<Unit> units_;
  std::vector<Task> exact_tasks_, scan_tasks_, score_tasks_;
  std::vector<std::int64_t> drawn_;  // keys, by scan task
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

// Where the positions of a part end that its codes cover.
std::int64_t coded_end(const Part& part) {
  return part.codes ? std::clamp(part.codes->num_keys_locked(), part.begin, std::max(part.begin, part.end)) : part.begin;
}

void Job::add_part(Unit& unit, std::size_t at, const Part& part, bool is_searched) {
  const std::int64_t num_heads = unit.queries.num;
  if (part.end <= part.begin) return;
  stats_.num_visible += num_heads * (part.end - part.begin);
  const std::int64_t coded = is_searched ? coded_end(part) : part.begin;
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
    scan.chosen = arena_.take<std::uint32_t>(static_cast<std::size_t>(scan.num_chunks));
    std::fill_n(scan.chosen, scan.num_chunks, ~0u);
    const auto num_chunks = static_cast<std::size_t>(scan.num_chunks), num = static_cast<std::size_t>(num_heads);
    if (unit.choice != Unit::Choice::kAll) {
      scan.levels = arena_.take<std::int16_t>(num * num_chunks * kChunkRuns);
      scan.crests = arena_.take<std::int16_t>(num * num_chunks);
    }
    if (unit.choice == Unit::Choice::kByFirst) scan.stands_for = arena_.take<float>(num_chunks * kChunkGroups);
    const std::int64_t each = unit.choice == Unit::Choice::kByFirst ? kChunksPerChoice : kChunksPerTask;
    for (std::int64_t c = 0; c < scan.num_chunks; c += each) {
      scan_tasks_.push_back({at, unit.scans.size(), scan.found.size(), c, std::min(c + each, scan.num_chunks)});
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
    const auto& sequence = parts[static_cast<std::size_t>(seq)];
    std::int64_t num_coded = 0;
    for (const Part* part : sequence) num_coded += std::max<std::int64_t>(0, coded_end(*part) - part->begin);
    Unit::Choice choice = Unit::Choice::kAll;
    if (budget_.reach > 0.0f && !has_ranks_) {
      if (num_coded >= kLeastChosen) choice = Unit::Choice::kByBest;
      if (num_coded * group * queries_.head_dim >= budget_.reach_products) choice = Unit::Choice::kByFirst;
    }
    const bool is_searched = budget_.k > 0 || will_list_ || num_coded >= budget_.exact_keys;
    for (int head = 0; head < queries_.num_q_heads;) {
      const int num = std::min(kMaxGroup, group - head % group);
      const auto at = static_cast<std::size_t>((seq * queries_.num_q_heads + head) * queries_.head_dim);
      Unit unit;
      unit.kv_head = first_kv_head_ + head / group;
      unit.choice = choice;
      unit.first_row = seq * queries_.num_q_heads + head;
      unit.queries = {queries_.values + at, queries_.bf16 != nullptr ? queries_.bf16 + at : nullptr, num, queries_.head_dim};
      for (const Part* part : sequence) add_part(unit, units_.size(), *part, is_searched);
      units_.push_back(std::move(unit));
      head += num;
    }
  }
  drawn_.resize(scan_tasks_.size());
  is_small_ = scan_tasks_.empty() && !will_list_ && stats_.num_scored * queries_.head_dim <= kSmallProducts;
}

void Job::scan() {
  const auto num_exact = static_cast<std::int64_t>(exact_tasks_.size());
  const auto num_prepared = static_cast<std::int64_t>(scan_tasks_.empty() ? 0 : units_.size());
  run(num_exact + num_prepared, [&](std::int64_t i) {
    if (i < num_exact) {
      const Task& task = exact_tasks_[static_cast<std::size_t>(i)];
      attend_exactly(units_[task.unit], task, scale_);
    } else {
      prepare(units_[static_cast<std::size_t>(i - num_exact)]);
    }
  });
  if (scan_tasks_.empty()) return;
  choose();
  for_tasks(scan_tasks_, [&](std::size_t i) {
    const Task& task = scan_tasks_[i];
    Unit& unit = units_[task.unit];
    if (unit.choice == Unit::Choice::kByFirst) {
      drawn_[i] = search_chunks(task);
      return;
    }
    if (unit.choice == Unit::Choice::kByBest) {
      score_means(unit, task);
      choose_groups(unit, task, budget_, scale_);
    }
    scan_chunks(task);
  });
  for (Unit& unit : units_) unit.is_refined = unit.choice == Unit::Choice::kByFirst && is_enough(unit);
}

// Of long contexts those groups are scanned that can matter by the best key known; of very long ones a few groups
// first, then those that can matter by what the few have shown.
void Job::choose() {
  using Choice = Unit::Choice;
  const auto any = [&](Choice choice) {
    return std::any_of(units_.begin(), units_.end(), [=](const Unit& unit) { return unit.choice == choice; });
  };
  if (any(Choice::kByFirst)) {
    for_tasks(scan_tasks_, [&](std::size_t i) {
      Unit& unit = units_[scan_tasks_[i].unit];
      if (unit.choice == Choice::kByFirst) score_means(unit, scan_tasks_[i]);
    });
  } else if (!any(Choice::kByBest)) {
    return;
  }
  for_units([&](Unit& unit) {
    if (unit.choice == Choice::kByBest && !pays_by_best(unit, budget_, scale_)) {
      unit.choice = Choice::kAll;
      choose_all(unit);
    }
    if (unit.choice != Choice::kByFirst) return;
    choose_first(unit);
    for (const Scan& scan : unit.scans) {
      for (std::int64_t c = 0; c < scan.num_chunks; ++c) scan_chunk(unit, scan, c, scan.bounds_of(c));
    }
    for (int h = 0; h < unit.queries.num; ++h) find_floor(unit, h, 0, budget_, scale_, true);
    set_group_floors(unit, scale_);
    set_start(unit);
  });
}

void Job::choose_all(Unit& unit) {
  for (Scan& scan : unit.scans) std::fill_n(scan.chosen, scan.num_chunks, ~0u);
}

// Whether the candidates listed by the floors of the first groups will do. A better key among them means that those
// floors were too low and the list is too long, not wrong.
bool Job::is_enough(const Unit& unit) const {
  std::size_t num_found = 0;
  for (const Scan& scan : unit.scans) {
    for (const auto& found : scan.found) num_found += found.size();
  }
  return num_found <= static_cast<std::size_t>(budget_.max_keys);
}

void Job::prepare(Unit& unit) {
  for (Scan& scan : unit.scans) {
    if (scan.num_chunks == 0) continue;
    scan.query = prepare_query(*scan.part->codes, unit.kv_head, unit.queries, budget_.deviations);
  }
}

void Job::scan_chunks(const Task& task) {
  Unit& unit = units_[task.unit];
  const Scan& scan = unit.scans[task.run];
  for (std::int64_t c = task.begin; c < task.end; ++c) scan_chunk(unit, scan, c, scan.bounds_of(c));
}

void Job::scan_chunk(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& out) {
  if (scan.chosen[c] == 0) return;
  const CodeGroups& keys = scan.chunk(c).keys;
  kernels().scan(scan.query.tables.data(), scan.query.keys.offsets, unit.queries.num, unit.queries.head_dim,
                 scan.query.keys.shift, reinterpret_cast<const std::uint8_t*>(keys.planes), keys.bits, scan.chosen[c],
                 keys.factors, out.bounds, out.stride, out.tops, out.tops_stride);
}

std::int64_t Job::refine_chunks(const Task& task) {
  Unit& unit = units_[task.unit];
  Scan& scan = unit.scans[task.run];
  std::vector<Candidate>& found = scan.found[task.slot];
  std::int64_t num_drawn = 0;
  found.clear();
  found.reserve(kUsualCandidates);
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    num_drawn += refine(unit, scan, c, scan.bounds_of(c), scale_, found);
  }
  return num_drawn;
}

void Job::count_codes() {
  for (const Unit& unit : units_) {
    for (const Scan& scan : unit.scans) {
      std::int64_t num_groups = 0;
      for (std::int64_t c = 0; c < scan.num_chunks; ++c) num_groups += __builtin_popcount(scan.chosen[c]);
      if (scan.num_chunks == 0) continue;
      const auto bytes_of = [&](int bits) { return kGroupKeys * (bits * scan.part->head_dim / 8 + 2); };
      stats_.bytes_read += num_groups * bytes_of(scan.part->codes->bits());
      if (unit.choice != Unit::Choice::kAll) stats_.bytes_read += scan.num_chunks * bytes_of(kMeanBits);
    }
  }
}

// Chooses, scans and lists in one go: few of a chunk's keys are looked at, and their bounds stay in the cache.
std::int64_t Job::search_chunks(const Task& task) {
  Unit& unit = units_[task.unit];
  Scan& scan = unit.scans[task.run];
  std::int16_t bounds[kMaxGroup * kChunkKeys], tops[kMaxGroup * kBlocksPerChunk];
  const ChunkBounds here{bounds, kChunkKeys, tops, kBlocksPerChunk};
  choose_groups(unit, task, budget_, scale_);
  scan.found[task.slot].reserve(kUsualCandidates);
  std::int64_t num_drawn = 0;
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    scan_chunk(unit, scan, c, here);
    num_drawn += refine(unit, scan, c, here, scale_, scan.found[task.slot]);
  }
  return num_drawn;
}

void Job::find_floors(int k) {
  const auto find = [&](auto is_wanted) {
    run(static_cast<std::int64_t>(units_.size()) * kMaxGroup, [&](std::int64_t i) {
      Unit& unit = units_[static_cast<std::size_t>(i / kMaxGroup)];
      const auto h = static_cast<int>(i % kMaxGroup);
      if (h < unit.queries.num && is_wanted(unit)) find_floor(unit, h, k, budget_, scale_, !will_list_);
    });
  };
  for_tasks(scan_tasks_, [&](std::size_t i) {
    const Unit& unit = units_[scan_tasks_[i].unit];
    if (unit.choice == Unit::Choice::kByFirst && !unit.is_refined) scan_chunks(scan_tasks_[i]);
  });
  find([](const Unit& unit) { return !unit.is_refined; });
  // The best key attended exactly does not tell that a head looks widely.
  const auto is_wide = [](const Unit& unit) { return unit.choice == Unit::Choice::kByBest && unit.draws_any(); };
  if (std::none_of(units_.begin(), units_.end(), is_wide)) return;
  for_tasks(scan_tasks_, [&](std::size_t i) {
    Unit& unit = units_[scan_tasks_[i].unit];
    if (!is_wide(unit)) return;
    Scan& scan = unit.scans[scan_tasks_[i].run];
    std::fill(scan.chosen + scan_tasks_[i].begin, scan.chosen + scan_tasks_[i].end, ~0u);
    scan_chunks(scan_tasks_[i]);
  });
  find(is_wide);
}

void Job::search(int k) {
  if (scan_tasks_.empty() && !will_list_) return;
  find_floors(k);
  count_codes();
  for (Unit& unit : units_) set_start(unit);
  for_tasks(scan_tasks_, [&](std::size_t i) {
    if (!units_[scan_tasks_[i].unit].is_refined) drawn_[i] = refine_chunks(scan_tasks_[i]);
  });
  for (const std::int64_t count : drawn_) stats_.num_drawn += count;
  for_units([&](Unit& unit) { gather(unit); });
  for (std::size_t u = 0; u < units_.size(); ++u) share_out(u);
  if (!has_ranks_) return;
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

// What was found is cut to the budget.
void Job::gather(Unit& unit) {
  keep(unit, static_cast<std::size_t>(std::max({budget_.max_keys, budget_.k, 1})));
  for (Scan& scan : unit.scans) {
    for (std::int64_t i = scan.end; i < scan.listed_end; ++i) scan.positions.push_back(static_cast<std::int32_t>(i));
    scan.inverses.resize(scan.positions.size(), 1.0f);
  }
}

void Job::share_out(std::size_t at) {
  Unit& unit = units_[at];
  for (std::size_t s = 0; s < unit.scans.size(); ++s) {
    Scan& scan = unit.scans[s];
    const auto count = static_cast<std::int64_t>(scan.positions.size());
    if (has_ranks_) scan.scores = arena_.take<float>(static_cast<std::size_t>(unit.queries.num * count));
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
    unit.floor[h] = floor_of(unit.best[h], scores, k, budget_, scale_);
  }
}

void Job::weigh() {
  std::vector<std::int64_t> retrieved(score_tasks_.size()), rows(score_tasks_.size());
  for_tasks(score_tasks_, [&](std::size_t i) {
    const Task& task = score_tasks_[i];
    std::tie(retrieved[i], rows[i]) = weigh_candidates(units_[task.unit], task, scale_, has_ranks_);
  });
  for (std::size_t i = 0; i < score_tasks_.size(); ++i) {
    const Part& part = *units_[score_tasks_[i].unit].scans[score_tasks_[i].run].part;
    stats_.num_retrieved += retrieved[i];
    stats_.bytes_read += rows[i] * part.head_dim * element_bytes(part.dtype);
  }
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
  for (const Unit& unit : units_) {
    total.num_scored += std::accumulate(unit.num_probed, unit.num_probed + kMaxGroup, std::int64_t{0});
  }
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

AttendStats search_part(const LayerQueries& queries, const Part& part, int kv_head, int k, const Budget& budget,
                        ThreadPool& pool, std::int64_t* positions, float* scores) {
  Job job(queries, 1.0f, budget, pool, calling_arena(), true, kv_head);
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
