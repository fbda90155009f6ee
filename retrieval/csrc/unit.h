// What a search works on: one KV head of one sequence, the parts it looks at and what it has found so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "attend.h"
#include "code_query.h"
#include "list.h"

namespace retrieval {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kLargestOwn = 2.0f;        // nats; keys that differ more from their run's mean are not told by it
inline constexpr int kTileKeys = 256;             // keys whose scores are held at once
inline constexpr int kBlockKeys = 8 * kGroupKeys; // keys per entry of tops
inline constexpr int kBlockGroups = kBlockKeys / kGroupKeys;
inline constexpr int kBlocksPerChunk = kChunkKeys / kBlockKeys;

// Bits of keys [64 g, 64 g + 64) that lie in [begin, end).
inline std::uint64_t range_mask(std::int64_t first, std::int64_t begin, std::int64_t end) {
  std::uint64_t mask = ~std::uint64_t{0};
  if (begin > first) mask &= begin - first >= 64 ? 0 : ~std::uint64_t{0} << (begin - first);
  if (end < first + 64) mask &= end <= first ? 0 : ~std::uint64_t{0} >> (first + 64 - end);
  return mask;
}

// Softmax over some keys, not yet divided: sum of exp(scale * (s - top)) and the values weighted with it.
struct Partial {
  float top[kMaxGroup];
  float sum[kMaxGroup];
  float* acc;  // [num][head_dim]
};

inline constexpr std::size_t kUsualCandidates = 512;  // of a chunk task

// What a chunk task has found, in order.
struct Found {
  List<std::int32_t> positions;
  List<float> inverses;              // one over the chance that a key was drawn; 1 if it was not left to chance; 0 if it
                                     // was drawn and is weighed by estimate
  List<float> weights[kMaxGroup];    // of a unit that is clear: by estimate, over the chance, relative to `reference`;
                                     // 0 where the head does not draw
  List<std::int16_t> bounds;         // [num][counts[i]] of each chunk i, of a long search: the scan keeps them else
  std::vector<int> counts;           // of each chunk that was scanned
  float best[kMaxGroup], listed[kMaxGroup];  // as the unit's, by what the task has come across
  bool draws[kMaxGroup];
  std::int64_t num_probed[kMaxGroup] = {};   // keys scored to know the best
  std::int64_t num_drawn = 0;

  // Nothing has been found. Lists that have grown far beyond the usual are not kept.
  void clear() {
    if (positions.capacity() > 8 * kUsualCandidates) *this = {};
    positions.clear();
    inverses.clear();
    bounds.clear();
    counts.clear();
    for (List<float>& each : weights) each.clear();
    num_drawn = 0;
  }
};

// Integer bounds of a chunk, each head's a stride apart.
struct ChunkBounds {
  std::int16_t* bounds;  // [num][kChunkKeys]
  std::int64_t stride;
  std::int16_t* tops;    // [num][kBlocksPerChunk] the largest of each block
  std::int64_t tops_stride;
};

// One searched part, seen by one unit.
struct Scan {
  const Part* part = nullptr;
  const HeadCodes* codes = nullptr;
  std::int64_t begin = 0, end = 0;  // searched through the codes
  std::int64_t listed_end = 0;      // candidates without a search: [end, listed_end)
  std::int64_t first_chunk = 0, num_chunks = 0;
  CodeQuery query;
  std::int16_t* bounds = nullptr;  // [num][num_chunks * kChunkKeys]
  std::int16_t* tops = nullptr;    // [num][num_chunks * kBlocksPerChunk]
  std::uint32_t* chosen = nullptr; // [num_chunks], bit g: group g is scanned; the rest are ruled out, or stood for
  // Only of long searches:
  std::int16_t* levels = nullptr;  // [num][num_chunks * kChunkRuns] estimates of the means of runs
  std::int16_t* crests = nullptr;  // [num][num_chunks] the largest of them
  float* peaks = nullptr;          // [num][num_chunks] the same as scores
  float* log_times = nullptr;      // [num_chunks * kChunkGroups] logarithm of how many like it a scanned group stands for
  std::vector<Found> found;                   // by chunk task
  std::vector<std::int64_t> firsts;           // keys found by the tasks before each, and by all
  // Where all scores are needed at once:
  List<std::int32_t> positions;               // all found, ascending
  List<float> inverses;                       // Found::inverses of each
  float* scores = nullptr;                    // [num][positions.size()]

  // A scan that goes on using the lists of one that is over.
  static Scan after(Scan&& last) {
    Scan scan;
    if (last.positions.capacity() <= 8 * kUsualCandidates) {
      scan.positions = std::move(last.positions);
      scan.inverses = std::move(last.inverses);
      scan.positions.clear();
      scan.inverses.clear();
    }
    scan.found = std::move(last.found);
    scan.firsts = std::move(last.firsts);
    return scan;
  }
  std::int64_t stride() const { return num_chunks * kChunkKeys; }
  std::int64_t tops_stride() const { return num_chunks * kBlocksPerChunk; }
  ChunkBounds bounds_of(std::int64_t i) const {
    return {bounds + i * kChunkKeys, stride(), tops + i * kBlocksPerChunk, tops_stride()};
  }
  const CodeChunk& chunk(std::int64_t i) const { return codes->chunks[static_cast<std::size_t>(first_chunk + i)]; }
  float bound_unit(std::int64_t i, int h) const { return query.keys.slope[h] * chunk(i).keys.unit; }
  float level_unit(std::int64_t i, int h) const { return query.means.slope[h] * chunk(i).means.unit; }

  std::int64_t first_key(std::int64_t chunk) const { return (first_chunk + chunk) * kChunkKeys; }

  // Keys of group g of chunk i that are searched, as bits.
  std::uint64_t visible(std::int64_t i, int g) const {
    return (chosen[i] >> g & 1u) != 0 ? range_mask(first_key(i) + g * kGroupKeys, begin, end) : 0;
  }
  float log_times_of(std::int64_t i, int g) const {
    return log_times != nullptr ? log_times[i * kChunkGroups + g] : 0.0f;
  }

  // How bounds of chunk i become weights relative to a key of score `best`.
  Weigher weigher(std::int64_t i, int h, float scale, float best) const {
    const float unit = scale * kLog2E;
    return {unit * (query.base[h] - best), unit * bound_unit(i, h),
            unit * query.keys.lift[h] * chunk(i).keys.unit / 32768.0f};
  }

  // Integer bounds of chunk i that reach `floor` are those >= the result; above 32767: none does.
  int threshold(std::int64_t i, int h, float floor) const {
    const float unit = bound_unit(i, h), distance = floor - query.base[h];
    if (unit <= 0.0f) return distance <= 0.0f ? -32768 : 32768;
    return static_cast<int>(std::clamp(std::floor(distance / unit) - 1.0f, -32768.0f, 32768.0f));
  }
};

// Where one task works: chunks or positions [begin, end) of a run, result in partials[slot] or what the run has found.
struct Task {
  std::size_t run, slot;
  std::int64_t begin, end;
};

// What has come of a task's candidates.
struct Weighed {
  std::int64_t num_scored = 0;     // keys that were read and scored
  std::int64_t num_read = 0;       // keys whose values were read
  std::int64_t num_retrieved = 0;  // weights that entered the output, of all heads
};

// Query heads of one KV head and sequence, at most kMaxGroup.
struct Unit {
  int kv_head = 0;
  std::int64_t first_row = 0;  // of out and lse
  Queries queries;
  std::vector<const Part*> exact;
  std::vector<Scan> scans, spare_scans;
  std::vector<Partial> partials;  // exact blocks first, then blocks of candidates
  std::vector<Task> exact_tasks, scan_tasks, score_tasks;
  std::vector<Weighed> weighed;   // by score task
  AttendStats stats;
  float best[kMaxGroup];   // best exact score known
  float floor[kMaxGroup];  // scores below do not matter
  float listed[kMaxGroup]; // of heads that do not draw: keys whose bound reaches it become candidates
  float spread[kMaxGroup] = {};  // deviation of a score from its estimate
  float heavy[kMaxGroup] = {};  // of heads that draw: keys whose bound reaches it are not left to chance
  float draws[kMaxGroup] = {};  // per weight: keys below the floor are drawn with that chance; 0: left out
  float total[kMaxGroup] = {};  // of all weights relative to a key of score `reference`, about; of heads that draw
  float reference[kMaxGroup] = {};
  float drawn_weight[kMaxGroup] = {};  // of heads that draw: of a key over its chance, where it is by estimate
  bool is_clear = false;        // estimates are good enough for that
  std::int64_t num_probed[kMaxGroup] = {};
  bool is_long = false;         // a first look at some groups tells what to look for in all (choose.h)
  bool chooses = false;         // and which groups need no scan
  bool is_raised = false;       // a better key came later, so that candidates were listed that do not reach `listed`
  std::int64_t start = 0;       // of luck in draws
  float group_floor[kMaxGroup] = {};  // groups that cannot reach it are not scanned for the head
  float group_certain[kMaxGroup] = {};  // and is drawn for it, for certain where a mean reaches this; infinite: is not

  // A unit that goes on using the lists of one that is over.
  static Unit after(Unit&& last) {
    Unit unit;
    const auto keep_room = [](auto& to, auto& from) {
      from.clear();
      to = std::move(from);
    };
    keep_room(unit.exact, last.exact);
    keep_room(unit.partials, last.partials);
    keep_room(unit.exact_tasks, last.exact_tasks);
    keep_room(unit.scan_tasks, last.scan_tasks);
    keep_room(unit.score_tasks, last.score_tasks);
    keep_room(unit.weighed, last.weighed);
    unit.spare_scans = std::move(last.spare_scans);
    for (Scan& scan : last.scans) unit.spare_scans.push_back(std::move(scan));
    keep_room(unit.scans, last.scans);
    return unit;
  }
  Scan next_scan() {
    if (spare_scans.empty()) return {};
    Scan scan = Scan::after(std::move(spare_scans.back()));
    spare_scans.pop_back();
    return scan;
  }

  // Deviation of a key's score from that of its run's mean.
  float own(int h) const {
    float largest = 0.0f;
    for (const Scan& scan : scans) largest = std::max(largest, scan.query.own[h]);
    return largest;
  }
  // How many times 2^17 keys are searched, 1 to 8. Among 2^20 keys a group takes twice as long to fetch and to scan as
  // among 2^17, whose codes stay in the caches, and twice as many heads draw: there time is worth more error.
  float length() const {
    std::int64_t num_keys = 0;
    for (const Scan& scan : scans) num_keys += scan.end - scan.begin;
    return std::clamp(static_cast<float>(num_keys) / 131072.0f, 1.0f, 8.0f);
  }
  bool draws_any() const {
    return std::any_of(draws, draws + queries.num, [](float each) { return each > 0.0f; });
  }
};

// Groups at even distances, that stand for all when it matters how weights are spread: visit(scan, chunk, group).
inline constexpr std::int64_t kSampleGroups = 32;
template <typename Visit>
void for_sample_groups(const Unit& unit, Visit visit) {
  std::int64_t num_groups = 0;
  for (const Scan& scan : unit.scans) num_groups += scan.num_chunks * kChunkGroups;
  const std::int64_t step = std::max<std::int64_t>(1, num_groups / kSampleGroups);
  std::int64_t group = step / 2;  // counted through all scans
  for (const Scan& scan : unit.scans) {
    for (; group < scan.num_chunks * kChunkGroups; group += step) {
      visit(scan, group / kChunkGroups, static_cast<int>(group % kChunkGroups));
    }
    group -= scan.num_chunks * kChunkGroups;
  }
}

template <typename Visit>
void for_each_bit(std::uint64_t mask, Visit visit) {
  while (mask != 0) {
    visit(__builtin_ctzll(mask));
    mask &= mask - 1;
  }
}

}  // namespace retrieval
