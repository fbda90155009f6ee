#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "candidates.h"
#include "choose.h"
#include "chooser.h"
#include "floor.h"
#include "job.h"
#include "luck.h"
#include "weigh.h"

namespace retrieval {
namespace {

constexpr std::int64_t kFewExactTasks = 4;  // per unit
constexpr std::int64_t kGroupsAhead = 24;  // chosen, and on their way from memory, before they are scanned

void begin(const Unit& unit, const Task& task, Found& found) {
  for (int h = 0; h < unit.queries.num; ++h) {
    found.best[h] = unit.best[h];
    found.listed[h] = unit.listed[h];
    found.draws[h] = unit.draws[h] > 0.0f;
    found.num_probed[h] = 0;
  }
  found.positions.reserve(kUsualCandidates);
  found.inverses.reserve(kUsualCandidates);
  found.bounds.reserve(4 * kUsualCandidates);
  found.counts.reserve(static_cast<std::size_t>(task.end - task.begin));
}

}  // namespace

void Job::scan() {
  if (begins_by_unit()) {
    scan_by_unit();
  } else {
    begin_by_task();
    for_tasks(scan_tasks_, [&](std::size_t i) { scan_task(i); });
  }
  is_long_ = !scan_tasks_.empty() && std::all_of(units_.begin(), units_.end(), [](const Unit& unit) { return unit.is_long; });
}

// Whether each thread begins with units of its own: it finds in the cache what it has just computed. Not where some
// threads would have more units than others, or a unit much to do before the scan.
bool Job::begins_by_unit() const {
  const auto num_units = static_cast<std::int64_t>(units_.size()), num_threads = std::int64_t{pool_.num_threads()};
  const auto num_exact = static_cast<std::int64_t>(exact_tasks_.size());
  const auto is_like_first = [&](const Unit& unit) { return unit.scan_tasks.size() == units_.front().scan_tasks.size(); };
  return !scan_tasks_.empty() && num_units % num_threads == 0 && num_exact <= kFewExactTasks * num_units &&
         std::all_of(units_.begin(), units_.end(), is_like_first);
}

// A unit's scan begins when the unit is ready, whatever the others are at.
void Job::scan_by_unit() {
  enum State : int { kPending, kReady, kFailed };
  std::vector<std::atomic<int>> states(units_.size());
  const std::size_t num_tasks = units_.front().scan_tasks.size() + 1;
  run(static_cast<std::int64_t>(units_.size() * num_tasks), [&](std::int64_t i) {
    const std::size_t u = static_cast<std::size_t>(i) / num_tasks, number = static_cast<std::size_t>(i) % num_tasks;
    std::atomic<int>& state = states[u];
    if (number == 0) {
      try {
        begin_unit(units_[u]);
      } catch (...) {
        state.store(kFailed, std::memory_order_release);
        throw;
      }
      state.store(kReady, std::memory_order_release);
      return;
    }
    // A thread's own tasks are of whole units, and taken in order: somebody is at it.
    while (state.load(std::memory_order_acquire) == kPending) relax();
    if (state.load(std::memory_order_acquire) == kReady) scan_task(units_[u].scan_tasks.begin + number - 1);
  });
}

void Job::begin_unit(Unit& unit) {
  for (std::size_t i = unit.exact_tasks.begin; i < unit.exact_tasks.end; ++i) attend_exactly(unit, exact_tasks_[i], scale_);
  prepare(unit);
  if (!unit.is_long) return;
  for (std::size_t i = unit.scan_tasks.begin; i < unit.scan_tasks.end; ++i) score_means(unit, scan_tasks_[i]);
  look_first(unit);
}

void Job::scan_task(std::size_t i) {
  const Task& task = scan_tasks_[i];
  if (units_[task.unit].is_long) {
    drawn_[i] = search_chunks(task);
  } else {
    scan_chunks(task);
  }
}

void Job::begin_by_task() {
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
  if (std::none_of(units_.begin(), units_.end(), [](const Unit& unit) { return unit.is_long; })) return;
  for_tasks(scan_tasks_, [&](std::size_t i) {
    Unit& unit = units_[scan_tasks_[i].unit];
    if (unit.is_long) score_means(unit, scan_tasks_[i]);
  });
  for_units([&](Unit& unit) {
    if (unit.is_long) look_first(unit);
  });
}

// A long search looks at some groups of keys, and then for what can matter by what they have shown.
void Job::look_first(Unit& unit) {
  if (!means_tell(unit, budget_, scale_)) return scan_all(unit);
  choose_first(unit);
  for (const Scan& scan : unit.scans) {
    for (std::int64_t c = 0; c < scan.num_chunks; ++c) scan_chunk(unit, scan, c, scan.bounds_of(c));
  }
  for (int h = 0; h < unit.queries.num; ++h) find_floor(unit, h, 0, budget_, scale_, true);
  set_start(unit);
  choose_whether(unit, budget_, scale_);
}

void Job::scan_all(Unit& unit) {
  unit.is_long = false;
  for (Scan& scan : unit.scans) scan.stands_for = nullptr;
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
  kernels().scan(scan.query.tables.data(), scan.query.keys.offsets, unit.queries.num, keys.shape.dims,
                 scan.query.keys.shift, reinterpret_cast<const std::uint8_t*>(keys.planes), keys.shape.bits,
                 scan.chosen[c], keys.factors, out.bounds, out.stride, out.tops, out.tops_stride);
}

std::int64_t Job::refine_chunks(const Task& task) {
  Unit& unit = units_[task.unit];
  Scan& scan = unit.scans[task.run];
  Found& found = scan.found[task.slot];
  std::int64_t num_drawn = 0;
  begin(unit, task, found);
  Refiner refiner(unit, scan, scale_, found);
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    num_drawn += refiner.refine(c, scan.bounds_of(c));
  }
  return num_drawn;
}

void Job::count_codes() {
  for (const Unit& unit : units_) {
    for (const Scan& scan : unit.scans) {
      std::int64_t num_groups = 0;
      for (std::int64_t c = 0; c < scan.num_chunks; ++c) num_groups += __builtin_popcount(scan.chosen[c]);
      if (scan.num_chunks == 0) continue;
      const CodeChunk& like = scan.chunk(0);
      stats_.bytes_read += num_groups * static_cast<std::int64_t>(like.keys.nbytes()) / kChunkGroups;
      if (scan.levels != nullptr) stats_.bytes_read += scan.num_chunks * static_cast<std::int64_t>(like.means.nbytes());
    }
  }
}

// Chooses, scans and lists in one go: bounds stay in the cache, and codes of groups further on are on their way there. A
// better key on the way raises what is listed.
std::int64_t Job::search_chunks(const Task& task) {
  Unit& unit = units_[task.unit];
  Scan& scan = unit.scans[task.run];
  Found& found = scan.found[task.slot];
  std::int16_t bounds[kMaxGroup * kChunkKeys], tops[kMaxGroup * kBlocksPerChunk];
  const ChunkBounds here{bounds, kChunkKeys, tops, kBlocksPerChunk};
  begin(unit, task, found);
  Chooser chooser(unit, scan, budget_, scale_);
  Refiner refiner(unit, scan, scale_, found);
  std::int64_t num_drawn = 0, num_ahead = 0;
  for (std::int64_t c = task.begin, next = c; c < task.end; ++c) {
    for (; next < task.end && (next == c || num_ahead < kGroupsAhead); ++next) {
      num_ahead += chooser.choose_and_fetch(next);
    }
    if (scan.chosen[c] == 0) continue;
    num_ahead -= __builtin_popcount(scan.chosen[c]);
    scan_chunk(unit, scan, c, here);
    look_for_best(unit, scan, c, here, budget_, scale_, found);
    num_drawn += refiner.refine(c, here);
  }
  return num_drawn;
}

void Job::find_floors(int k) {
  for (Unit& unit : units_) {
    for (int h = 0; unit.is_long && h < unit.queries.num; ++h) settle_best(unit, h, budget_, scale_);
  }
  if (is_long_) return;
  run(static_cast<std::int64_t>(units_.size()) * kMaxGroup, [&](std::int64_t i) {
    Unit& unit = units_[static_cast<std::size_t>(i / kMaxGroup)];
    const auto h = static_cast<int>(i % kMaxGroup);
    if (unit.is_long || h >= unit.queries.num) return;
    find_floor(unit, h, k, budget_, scale_, !will_list_);
    if (h == 0) set_start(unit);
  });
}

void Job::search(int k) {
  if (scan_tasks_.empty() && !will_list_) return;
  find_floors(k);
  count_codes();
  const bool is_raised = std::any_of(units_.begin(), units_.end(), [](const Unit& unit) { return unit.is_raised; });
  if (!is_long_ || is_raised) {
    for_tasks(scan_tasks_, [&](std::size_t i) {
      const Task& task = scan_tasks_[i];
      Unit& unit = units_[task.unit];
      if (!unit.is_long) {
        drawn_[i] = refine_chunks(task);
      } else if (unit.is_raised) {
        drop(unit, unit.scans[task.run], unit.scans[task.run].found[task.slot]);
      }
    });
  }
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

}  // namespace retrieval
