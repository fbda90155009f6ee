#include <algorithm>
#include <cstdint>
#include <numeric>

#include "candidates.h"
#include "choose.h"
#include "chooser.h"
#include "floor.h"
#include "job.h"
#include "luck.h"
#include "sample.h"
#include "weigh.h"

namespace retrieval {
namespace {

constexpr std::int64_t kGroupsAhead = 24;  // chosen, and on their way from memory, before they are scanned

void begin(const Unit& unit, const Task& task, Found& found) {
  found.clear();
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

// Of scan tasks those that a thread has scanned last come first when it lists, for their bounds are still in its cache.
// The chain's own thread began with the first ones, others, who did num_helped, with the last ones.
std::size_t last_first(std::size_t i, std::size_t num_tasks, std::int64_t num_helped) {
  const std::size_t num_own = num_tasks - static_cast<std::size_t>(num_helped);
  return i < num_own ? num_own - 1 - i : num_own + num_tasks - 1 - i;
}

}  // namespace

Chains::Stage Job::advance(std::size_t at, int stage, std::int64_t num_helped, int k, float* out, float* lse) {
  Desk& desk = scratch_.desk(at);
  Unit& unit = desk.unit;
  if (stage == kBegin) plan(desk, places_[at]);
  const auto num_scans = static_cast<std::int64_t>(unit.scan_tasks.size());
  switch (stage) {
    case kBegin:
      return {static_cast<std::int64_t>(unit.exact_tasks.size()) + (num_scans > 0 ? 1 : 0)};
    case kMeans:
      return {unit.is_long ? num_scans : 0};
    case kScan:
      if (unit.is_long && num_scans > 0) look_first(unit);
      return {num_scans};
    case kFloors:
      desk.num_helped = num_helped;
      if (num_scans == 0 && !will_list_) return {0};
      if (!unit.is_long) return {unit.queries.num};
      for (int h = 0; h < unit.queries.num; ++h) settle_best(unit, h, budget_, scale_);
      return {0};
    case kList:
      if (!unit.is_long) {
        set_start(unit);
        if (!has_ranks_) settle_weights(unit, scale_);
      }
      // Who scanned lists: to fetch another thread's bounds takes longer than to look through them.
      return {!unit.is_long || unit.is_raised ? num_scans : 0, desk.num_helped};
    case kScore:
      count_found(unit);
      gather(unit);
      share_out(desk);
      return {has_ranks_ ? static_cast<std::int64_t>(unit.score_tasks.size()) : 0};
    case kWeigh:
      if (has_ranks_) settle_floor(unit, k);
      return {out != nullptr ? static_cast<std::int64_t>(unit.score_tasks.size()) : 0};
    default:
      unit.stats.num_scored += std::accumulate(unit.num_probed, unit.num_probed + kMaxGroup, std::int64_t{0});
      if (out != nullptr) merge(unit, out, lse);
      return {Chains::kEnd};
  }
}

void Job::work(Desk& desk, int stage, std::size_t i, int k) {
  Unit& unit = desk.unit;
  switch (stage) {
    case kBegin:
      return i < unit.exact_tasks.size() ? attend_exactly(unit, unit.exact_tasks[i], scale_) : prepare(desk);
    case kMeans:
      return score_means(unit, unit.scan_tasks[i]);
    case kScan:
      return unit.is_long ? search_chunks(unit, unit.scan_tasks[i]) : scan_chunks(unit, unit.scan_tasks[i]);
    case kFloors:
      return find_floor(unit, static_cast<int>(i), k, budget_, scale_, !will_list_);
    case kList:
      return list_chunks(unit, unit.scan_tasks[last_first(i, unit.scan_tasks.size(), desk.num_helped)]);
    case kScore:
      return score(unit, unit.score_tasks[i]);
    default:
      return weigh(unit, i);
  }
}

void Job::run(ThreadPool& pool, int k, float* out, float* lse) {
  Chains chains(
      num_units(), [=](std::size_t u, int stage, std::int64_t helped) { return advance(u, stage, helped, k, out, lse); },
      [=](std::size_t u, int stage, std::int64_t i) { work(scratch_.desk(u), stage, static_cast<std::size_t>(i), k); });
  is_small() ? chains.run_alone() : chains.run(pool);
}

// A long search looks at some groups of keys, and then for what can matter by what they have shown. Where means tell, that
// is in some groups only; where only estimates are clear, in all, listed while their bounds are in the cache.
void Job::look_first(Unit& unit) {
  if (!means_tell(unit, budget_, scale_) && !are_clear(unit, scale_)) return scan_all(unit);
  choose_first(unit);
  for (const Scan& scan : unit.scans) {
    for (std::int64_t c = 0; c < scan.num_chunks; ++c) scan_chunk(unit, scan, c, scan.bounds_of(c));
  }
  for (int h = 0; h < unit.queries.num; ++h) find_floor(unit, h, 0, budget_, scale_, true);
  set_start(unit);
  settle_weights(unit, scale_);
  choose_whether(unit, budget_, scale_);
}

void Job::scan_all(Unit& unit) {
  unit.is_long = false;
  for (Scan& scan : unit.scans) scan.log_times = nullptr;
}

void Job::prepare(Desk& desk) const {
  for (Scan& scan : desk.unit.scans) {
    if (scan.num_chunks == 0) continue;
    scan.query = prepare_query(*scan.part->codes, desk.unit.kv_head, desk.unit.queries, budget_.deviations, desk.arena);
  }
}

void Job::scan_chunks(const Unit& unit, const Task& task) {
  const Scan& scan = unit.scans[task.run];
  for (std::int64_t c = task.begin; c < task.end; ++c) scan_chunk(unit, scan, c, scan.bounds_of(c));
}

void Job::scan_chunk(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& out) {
  if (scan.chosen[c] == 0) return;
  const CodeGroups& keys = scan.chunk(c).keys;
  const CodeReading& reading = scan.query.keys;
  kernels().scan(reading.tables, reading.offsets, unit.queries.num, keys.shape.num_pieces(), reading.shift,
                 keys.codes, scan.chosen[c], keys.factors, out.bounds, out.stride, out.tops, out.tops_stride);
}

// What has been scanned is listed; or what has been listed is cut to what a better key has left of it.
void Job::list_chunks(Unit& unit, const Task& task) {
  Scan& scan = unit.scans[task.run];
  Found& found = scan.found[task.slot];
  if (unit.is_long) return drop(unit, scan, found);
  begin(unit, task, found);
  Refiner refiner(unit, scan, scale_, found);
  for (std::int64_t c = task.begin; c < task.end; ++c) refiner.refine(c, scan.bounds_of(c));
  refiner.finish();
}

void Job::count_found(Unit& unit) {
  AttendStats& stats = unit.stats;
  for (const Scan& scan : unit.scans) {
    for (const Found& found : scan.found) stats.num_drawn += found.num_drawn;
    if (scan.num_chunks == 0) continue;
    std::int64_t num_groups = 0;
    for (std::int64_t c = 0; c < scan.num_chunks; ++c) num_groups += __builtin_popcount(scan.chosen[c]);
    const CodeChunk& like = scan.chunk(0);
    stats.bytes_read += num_groups * static_cast<std::int64_t>(like.keys.nbytes()) / kChunkGroups;
    if (scan.levels != nullptr) stats.bytes_read += scan.num_chunks * static_cast<std::int64_t>(like.means.nbytes());
  }
}

// Chooses, scans and lists in one go: bounds stay in the cache, and codes of groups further on are on their way there. A
// better key on the way raises what is listed.
void Job::search_chunks(Unit& unit, const Task& task) {
  Scan& scan = unit.scans[task.run];
  Found& found = scan.found[task.slot];
  std::int16_t bounds[kMaxGroup * kChunkKeys], tops[kMaxGroup * kBlocksPerChunk];
  const ChunkBounds here{bounds, kChunkKeys, tops, kBlocksPerChunk};
  begin(unit, task, found);
  Chooser chooser(unit, scan, budget_, scale_);
  Refiner refiner(unit, scan, scale_, found);
  std::int64_t num_ahead = 0;
  for (std::int64_t c = task.begin, next = c; c < task.end; ++c) {
    for (; next < task.end && (next == c || num_ahead < kGroupsAhead); ++next) {
      num_ahead += chooser.choose_and_fetch(next);
    }
    if (scan.chosen[c] == 0) continue;
    num_ahead -= __builtin_popcount(scan.chosen[c]);
    scan_chunk(unit, scan, c, here);
    look_for_best(unit, scan, c, here, budget_, scale_, found);
    refiner.refine(c, here);
  }
  refiner.finish();
}

// What was found is cut to the budget; and joined, where all scores are needed at once.
void Job::gather(Unit& unit) {
  keep(unit, static_cast<std::size_t>(std::max({budget_.max_keys, budget_.k, 1})));
  for (Scan& scan : unit.scans) {
    scan.firsts.assign(1, 0);
    for (const Found& found : scan.found) {
      scan.firsts.push_back(scan.firsts.back() + static_cast<std::int64_t>(found.positions.size()));
      if (has_ranks_) {
        scan.positions.insert(scan.positions.end(), found.positions.begin(), found.positions.end());
        scan.inverses.insert(scan.inverses.end(), found.inverses.begin(), found.inverses.end());
      }
    }
    for (std::int64_t i = scan.end; i < scan.listed_end; ++i) scan.positions.push_back(static_cast<std::int32_t>(i));
    scan.inverses.resize(scan.positions.size(), 1.0f);
  }
}

void Job::share_out(Desk& desk) const {
  Unit& unit = desk.unit;
  for (std::size_t s = 0; s < unit.scans.size(); ++s) {
    Scan& scan = unit.scans[s];
    const auto count = has_ranks_ ? static_cast<std::int64_t>(scan.positions.size()) : scan.firsts.back();
    if (has_ranks_) {
      scan.scores = desk.arena.take<float>(static_cast<std::size_t>(unit.queries.num * count));
      unit.stats.num_scored += unit.queries.num * count;
      unit.stats.bytes_read += count * scan.part->head_dim * element_bytes(scan.part->dtype);
    }
    for (std::int64_t first = 0; first < count; first += kTileKeys) {
      unit.score_tasks.push_back({s, add_partial(desk), first, std::min<std::int64_t>(first + kTileKeys, count)});
    }
  }
  unit.weighed.resize(unit.score_tasks.size());
}

void Job::score(Unit& unit, const Task& task) {
  Scan& scan = unit.scans[task.run];
  kernels().score(unit.queries, scan.part->key_rows(unit.kv_head), scan.positions.data() + task.begin, 0,
                  static_cast<int>(task.end - task.begin), scan.scores + task.begin,
                  static_cast<int>(scan.positions.size()));
}

void Job::settle_floor(Unit& unit, int k) {
  List<float> scores;
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
