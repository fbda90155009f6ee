#include "choose.h"

#include <algorithm>
#include <cmath>

#include "chooser.h"
#include "luck.h"

namespace retrieval {
namespace {

constexpr int kFirstChunks = 8;             // chunks whose best groups a search begins with, per head
constexpr std::int64_t kChunksPerProbe = 4; // one of so many tells whether means do
constexpr std::int64_t kCachedMeans = 128;  // chunks; the means of more do not stay in the caches, and are sent for
constexpr std::int64_t kMeansAhead = 2;     // chunks early
constexpr float kAlike = 1.2f;              // nats
constexpr float kBestOfRun = 2.07f;         // deviations above the mean: the largest of 32 from a Gaussian
constexpr std::int64_t kProbedChunks = 8;   // of a part, about; they tell whether choosing pays
constexpr float kKeysPerGroup = 14.0f;      // drawn from a drawn group, about, of up to 2^17 keys

struct Peak {
  float level;
  const Scan* scan;
  std::int64_t chunk;
};

// The chunks with the highest peaks of head h, highest first; at most kFirstChunks.
int best_chunks(const Unit& unit, int h, Peak* best) {
  int num = 0;
  for (const Scan& scan : unit.scans) {
    const float* peaks = scan.peaks + h * scan.num_chunks;
    for (std::int64_t c = 0; c < scan.num_chunks; ++c) {
      if (num == kFirstChunks && peaks[c] <= best[num - 1].level) continue;
      int at = num < kFirstChunks ? num++ : num - 1;
      for (; at > 0 && best[at - 1].level < peaks[c]; --at) best[at] = best[at - 1];
      best[at] = {peaks[c], &scan, c};
    }
  }
  return num;
}

// How many keys to draw from a drawn group, about. More keys from fewer groups save time, but keys of a group err together
// (0.4 % of the output at 2^17 keys, 1.8 % at 2^20).
float keys_per_group(const Unit& unit) { return kKeysPerGroup * std::pow(unit.length(), 0.7f); }

// From floor, draws and total of each head: what a group must reach, or how it is drawn.
void set_group_floors(Unit& unit, float scale) {
  const float per_group = keys_per_group(unit);
  for (int h = 0; h < unit.queries.num; ++h) {
    // A run is left out when none of its keys can become the best, or of a head that draws, weigh as much as the rest.
    unit.group_floor[h] = unit.floor[h] == -kInfinity ? -kInfinity : unit.best[h];
    unit.group_certain[h] = kInfinity;
    if (unit.draws[h] == 0.0f) continue;
    const float own = scale * unit.own(h);
    if (!(own > 0.0f && own <= kLargestOwn)) {
      unit.group_floor[h] = -kInfinity;
      continue;
    }
    unit.group_floor[h] = unit.best[h] + std::log(std::max(1.0f, unit.total[h])) / scale;
    const float draws = unit.draws[h] / per_group * kGroupKeys * std::exp(0.5f * own * own);  // per weight of a key
    unit.group_certain[h] = unit.best[h] - std::log(draws) / scale;
  }
}

}  // namespace

void score_means(Unit& unit, const Task& task) {
  Scan& scan = unit.scans[task.run];
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    const CodeGroups& means = scan.chunk(c).means;
    if (scan.num_chunks > kCachedMeans && c + kMeansAhead < task.end) fetch(scan.chunk(c + kMeansAhead).means, 0);
    std::int16_t tops[kMaxGroup * kBlocksPerChunk];
    const CodeReading& reading = scan.query.means;
    kernels().scan(reading.tables, reading.offsets, unit.queries.num, means.shape.num_pieces(), reading.shift,
                   means.codes, 1u, means.factors,
                   scan.levels + c * kChunkRuns, scan.num_chunks * kChunkRuns, tops, kBlocksPerChunk);
    for (int h = 0; h < unit.queries.num; ++h) {
      const std::int16_t crest = tops[h * kBlocksPerChunk];
      scan.crests[h * scan.num_chunks + c] = crest;
      scan.peaks[h * scan.num_chunks + c] = scan.query.base[h] + scan.level_unit(c, h) * static_cast<float>(crest);
    }
  }
}

// The best key is about as good as that of the run with the best mean, or better. Where even so most runs could hold it,
// few can be left out, unless keys of a run are so alike that groups can be drawn.
bool means_tell(const Unit& unit, const Budget& budget, float scale) {
  for (int h = 0; h < unit.queries.num; ++h) {
    const float own = unit.own(h);
    if (scale * own <= kAlike) continue;
    float crest = -kInfinity, best = -kInfinity;
    for (const Partial& partial : unit.partials) best = std::max(best, partial.top[h]);
    for (const Scan& scan : unit.scans) {
      const float* peaks = scan.peaks + h * scan.num_chunks;
      crest = std::max(crest, kernels().maximum(peaks, static_cast<int>(scan.num_chunks)));
    }
    best = std::max(best, crest + kBestOfRun * own);
    std::int64_t num_within = 0, num_runs = 0;
    for (const Scan& scan : unit.scans) {
      for (std::int64_t c = 0; c < scan.num_chunks; c += kChunksPerProbe) {
        const float unit_score = std::max(scan.level_unit(c, h), 1e-30f);
        const float floor = (best - budget.reach * own - scan.query.base[h]) / unit_score;
        std::uint64_t mask;
        kernels().select(scan.levels + (h * scan.num_chunks + c) * kChunkRuns, 1, to_word(floor), &mask);
        num_within += __builtin_popcountll(mask & scan.chunk(c).full_runs);
        num_runs += kChunkRuns;
      }
    }
    if (2 * num_within > num_runs) return false;
  }
  return true;
}

void choose_first(Unit& unit) {
  for (Scan& scan : unit.scans) {
    std::fill_n(scan.chosen, scan.num_chunks, 0u);
    std::fill_n(scan.log_times, scan.num_chunks * kChunkGroups, 0.0f);
  }
  const auto choose = [&](const Scan& scan, std::int64_t c, int g) {
    scan.chosen[c] |= 1u << g;
    fetch(scan.chunk(c).keys, g);
  };
  for_sample_groups(unit, choose);
  for (int h = 0; h < unit.queries.num; ++h) {
    Peak peaks[kFirstChunks];
    const int num = best_chunks(unit, h, peaks);
    for (int i = 0; i < num; ++i) {
      const auto [level, scan, c] = peaks[i];
      const std::int16_t* levels = scan->levels + (h * scan->num_chunks + c) * kChunkRuns;
      for (int r = 0; r < kChunkRuns; ++r) {
        const float each = scan->query.base[h] + scan->level_unit(c, h) * levels[r];
        if (each >= peaks[num - 1].level) choose(*scan, c, r * kRunKeys / kGroupKeys);
      }
    }
  }
}

// Chunks at even distances tell.
void choose_whether(Unit& unit, const Budget& budget, float scale) {
  set_group_floors(unit, scale);
  unit.chooses = std::all_of(unit.group_floor, unit.group_floor + unit.queries.num, [](float f) { return f > -kInfinity; });
  if (!unit.chooses) return;
  std::int64_t num_chosen = 0, num_groups = 0;
  for (const Scan& scan : unit.scans) {
    Chooser chooser(unit, scan, budget, scale);
    const std::int64_t step = std::max<std::int64_t>(1, scan.num_chunks / kProbedChunks);
    for (std::int64_t c = step / 2; c < scan.num_chunks; c += step) {
      num_chosen += chooser.choose(c);
      num_groups += kChunkGroups;
    }
  }
  unit.chooses = 2 * num_chosen <= num_groups;
  if (unit.chooses) return;
  for (const Scan& scan : unit.scans) std::fill_n(scan.log_times, scan.num_chunks * kChunkGroups, 0.0f);
}

}  // namespace retrieval
