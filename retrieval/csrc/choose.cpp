#include "choose.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "luck.h"

namespace retrieval {
namespace {

constexpr int kRunsPerGroup = kGroupKeys / kRunKeys;
static_assert(kRunsPerGroup == 2);
constexpr std::size_t kFirstChunks = 8;     // chunks whose best groups a search begins with, per head
constexpr std::int64_t kChunksPerProbe = 4; // one of so many tells whether means do
constexpr float kAlike = 1.2f;              // nats
constexpr float kBestOfRun = 2.07f;         // deviations above the mean: the largest of 32 from a Gaussian
constexpr std::int64_t kProbedChunks = 8;   // of a part, about; they tell whether choosing pays
constexpr float kNear = 5.0f;               // nats below the best that a key within half the reach may not be missed
constexpr float kOddRadius = 1.75f;         // of the root mean square
constexpr float kKeysPerGroup = 14.0f;      // drawn from a drawn group, about

// Codes that will be scanned soon, on their way from memory.
void fetch(const CodeGroups& groups, int g, int head_dim) {
  const int size = groups.bits * plane_bytes(head_dim);
  for (int at = 0; at < size; at += 64) __builtin_prefetch(groups.planes + g * size + at, 0, 2);
  __builtin_prefetch(groups.factors + g * kGroupKeys, 0, 2);
  __builtin_prefetch(groups.factors + g * kGroupKeys + kGroupKeys / 2, 0, 2);
}

void fetch(const CodeChunk& chunk) {
  const auto* bytes = reinterpret_cast<const char*>(&chunk);
  for (std::size_t at = 0; at < sizeof(CodeChunk); at += 64) __builtin_prefetch(bytes + at);
}

// Runs with a key that is unlike all others: how far such keys lie off the mean tells nothing about it.
std::uint64_t odd_runs(const CodeChunk& chunk, float radius) {
  const auto limit = static_cast<std::int16_t>(std::min(32767.0f, kOddRadius * radius / std::max(chunk.radius_unit, 1e-30f)));
  std::uint64_t odd;
  kernels().select(chunk.radii, 1, limit, &odd);
  return odd;
}

// Runs where a key so many deviations above the mean would reach `distance` below the floor of any head.
class Reach {
 public:
  Reach(const Unit& unit, const Scan& scan, float deviations, float distance)
      : unit_(unit), scan_(scan), deviations_(deviations), distance_(distance) {}

  std::uint64_t runs_of(std::int64_t c) {
    const CodeChunk& chunk = scan_.chunk(c);
    if (chunk.means.unit != means_unit_ || chunk.radius_unit != radius_unit_) measure(chunk);
    if (reaches_all_) return chunk.full_runs;
    bool is_needed = false;
    for (int h = 0; h < unit_.queries.num; ++h) {
      is_needed |= scan_.crests[h * scan_.num_chunks + c] - draws_[h].lift >= draws_[h].floor;
    }
    if (!is_needed) return 0;
    static constexpr std::int16_t kNoLuck[kGroupKeys] = {};
    std::uint64_t masks[kMaxGroup], any = 0;
    kernels().draw(scan_.levels + c * kChunkRuns, scan_.num_chunks * kChunkRuns, unit_.queries.num, chunk.radii, kNoLuck,
                   draws_, masks);
    for (int h = 0; h < unit_.queries.num; ++h) any |= masks[h];
    return any & chunk.full_runs;
  }

 private:
  // In units of the chunk, which most chunks share.
  void measure(const CodeChunk& chunk) {
    means_unit_ = chunk.means.unit;
    radius_unit_ = chunk.radius_unit;
    reaches_all_ = false;
    for (int h = 0; h < unit_.queries.num; ++h) {
      const float unit_score = std::max(scan_.query.means.slope[h] * means_unit_, 1e-30f);
      // However far it lies from the mean, a key scores no more above it than this times the radius.
      float reach = scan_.query.norm[h];
      if (scan_.query.radius > 0.0f) reach = std::min(reach, deviations_ * scan_.query.own[h] / scan_.query.radius);
      const float steps = std::ceil(reach * radius_unit_ / unit_score * 32768.0f);
      // The mean itself is known but for the error of its code. Both deviate by themselves, so their squares add up; of
      // a narrow run the error is the larger part.
      const float error = deviations_ * scan_.query.means.deviation[h] * means_unit_;
      const float narrow = 0.5f * reach * scan_.query.radius;
      const float lowest = unit_.group_floor[h] - distance_ - (std::hypot(narrow, error) - narrow);
      const float floor = std::floor((lowest - scan_.query.base[h]) / unit_score) - 2.0f;
      reaches_all_ |= steps > 32767.0f || floor < -32767.0f;
      draws_[h].lift = to_word(-steps);
      draws_[h].floor = to_word(floor);
    }
  }

  const Unit& unit_;
  const Scan& scan_;
  const float deviations_, distance_;
  float means_unit_ = -1.0f, radius_unit_ = -1.0f;  // of the chunk that was measured last
  bool reaches_all_ = false;
  Draw draws_[kMaxGroup];
};

// Groups that some head draws.
class GroupLots {
 public:
  GroupLots(const Unit& unit, const Scan& scan, float scale) : unit_(unit), scan_(scan), scale_(scale) {
    for (int h = 0; h < unit.queries.num; ++h) {
      if (unit.group_certain[h] != kInfinity) heads_[num_++] = h;
    }
  }

  // Of chunk c, those in `left_out` excepted; each then stands for others.
  std::uint32_t draw(std::int64_t c, std::uint32_t left_out) {
    if (num_ == 0) return 0;
    const CodeChunk& chunk = scan_.chunk(c);
    for (int n = 0; n < num_ && chunk.means.unit != means_unit_; ++n) {
      const int h = heads_[n];
      lots_[n] = lot_above(unit_.group_certain[h], scan_.query.base[h], scan_.level_unit(c, h), scan_.query.means, h, scale_);
    }
    means_unit_ = chunk.means.unit;
    const std::int16_t* luck = lucks_of_groups(unit_.start + scan_.first_key(c) / kGroupKeys);
    const auto levels_of = [&](int n) { return scan_.levels + (heads_[n] * scan_.num_chunks + c) * kChunkRuns; };
    std::uint64_t runs = 0;
    for (int n = 0; n < num_; ++n) {
      std::uint64_t mask;
      kernels().draw(levels_of(n), 0, 1, chunk.means.factors, luck, &lots_[n].draw, &mask);
      runs |= mask;
    }
    std::uint32_t drawn = 0;
    for_each_bit(runs & chunk.full_runs, [&](int r) {
      const int g = r / kRunsPerGroup;
      if (((left_out | drawn) >> g & 1u) != 0) return;
      drawn |= 1u << g;
      float chance = -kInfinity;
      for (int n = 0; n < num_; ++n) {
        for (int each = kRunsPerGroup * g; each < kRunsPerGroup * (g + 1); ++each) {
          if ((chunk.full_runs >> each & 1u) == 0) continue;
          chance = std::max(chance, lots_[n].log_chance(levels_of(n)[each], chunk.means.factors[each]));
        }
      }
      scan_.stands_for[c * kChunkGroups + g] = 1.0f / std::max(kLeastChance, std::exp(std::min(0.0f, chance)));
    });
    return drawn;
  }

 private:
  const Unit& unit_;
  const Scan& scan_;
  const float scale_;
  int num_ = 0, heads_[kMaxGroup];
  float means_unit_ = -1.0f;  // of the chunk drawn from last
  Lot lots_[kMaxGroup];
};

// Groups of chunk c that hold any of the runs.
std::uint32_t groups_of(std::uint64_t runs) {
  std::uint32_t groups = 0;
  for_each_bit(runs, [&](int r) { groups |= 1u << r / kRunsPerGroup; });
  return groups;
}

class Chooser {
 public:
  Chooser(const Unit& unit, const Scan& scan, const Budget& budget, float scale)
      : scan_(scan), far_(unit, scan, budget.reach, 0.0f), near_(unit, scan, 0.5f * budget.reach, kNear / scale),
        lots_(unit, scan, scale) {}

  // Adds to what is chosen of chunk c.
  void choose(std::int64_t c) {
    const CodeChunk& chunk = scan_.chunk(c);
    const std::uint64_t passed =
        ~chunk.full_runs | odd_runs(chunk, scan_.query.radius) | far_.runs_of(c) | near_.runs_of(c);
    scan_.chosen[c] |= groups_of(passed);
    scan_.chosen[c] |= lots_.draw(c, scan_.chosen[c]);
  }

 private:
  const Scan& scan_;
  Reach far_, near_;
  GroupLots lots_;
};

// From floor, draws and total of each head: what a group must reach, or how it is drawn.
void set_group_floors(Unit& unit, float scale) {
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
    const float draws = unit.draws[h] / kKeysPerGroup * kGroupKeys * std::exp(0.5f * own * own);  // per weight of a key
    unit.group_certain[h] = unit.best[h] - std::log(draws) / scale;
  }
}

}  // namespace

void score_means(Unit& unit, const Task& task) {
  Scan& scan = unit.scans[task.run];
  const int head_dim = unit.queries.head_dim;
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    const CodeGroups& means = scan.chunk(c).means;
    std::int16_t tops[kMaxGroup * kBlocksPerChunk];
    const CodeReading& reading = scan.query.means;
    kernels().scan(scan.query.tables.data(), reading.offsets, unit.queries.num, head_dim, reading.shift,
                   reinterpret_cast<const std::uint8_t*>(means.planes), means.bits, 1u, means.factors,
                   scan.levels + c * kChunkRuns, scan.num_chunks * kChunkRuns, tops, kBlocksPerChunk);
    for (int h = 0; h < unit.queries.num; ++h) scan.crests[h * scan.num_chunks + c] = tops[h * kBlocksPerChunk];
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
      for (std::int64_t c = 0; c < scan.num_chunks; ++c) {
        crest = std::max(crest, scan.query.base[h] + scan.level_unit(c, h) * scan.crests[h * scan.num_chunks + c]);
      }
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
  struct Crest {
    float level;
    const Scan* scan;
    std::int64_t chunk;
  };
  for (Scan& scan : unit.scans) {
    std::fill_n(scan.chosen, scan.num_chunks, 0u);
    std::fill_n(scan.stands_for, scan.num_chunks * kChunkGroups, 1.0f);
  }
  const auto choose = [&](const Scan& scan, std::int64_t c, int g) {
    scan.chosen[c] |= 1u << g;
    fetch(scan.chunk(c).keys, g, unit.queries.head_dim);
  };
  for_sample_groups(unit, choose);
  std::vector<Crest> crests;
  for (int h = 0; h < unit.queries.num; ++h) {
    crests.clear();
    for (const Scan& scan : unit.scans) {
      for (std::int64_t c = 0; c < scan.num_chunks; ++c) {
        crests.push_back({scan.query.base[h] + scan.level_unit(c, h) * scan.crests[h * scan.num_chunks + c], &scan, c});
      }
    }
    const std::size_t num = std::min(kFirstChunks, crests.size());
    std::partial_sort(crests.begin(), crests.begin() + static_cast<std::ptrdiff_t>(num), crests.end(),
                      [](const Crest& a, const Crest& b) { return a.level > b.level; });
    for (std::size_t i = 0; i < num; ++i) {
      const auto [level, scan, c] = crests[i];
      const std::int16_t* levels = scan->levels + (h * scan->num_chunks + c) * kChunkRuns;
      for (int r = 0; r < kChunkRuns; ++r) {
        const float each = scan->query.base[h] + scan->level_unit(c, h) * levels[r];
        if (each >= crests[num - 1].level) choose(*scan, c, r / kRunsPerGroup);
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
      chooser.choose(c);
      num_chosen += __builtin_popcount(scan.chosen[c]);
      num_groups += kChunkGroups;
    }
  }
  unit.chooses = 2 * num_chosen <= num_groups;
  if (unit.chooses) return;
  for (const Scan& scan : unit.scans) std::fill_n(scan.stands_for, scan.num_chunks * kChunkGroups, 1.0f);
}

void choose_groups(Unit& unit, const Task& task, const Budget& budget, float scale) {
  Scan& scan = unit.scans[task.run];
  Chooser chooser(unit, scan, budget, scale);
  for (std::int64_t c = task.begin; c < task.end; ++c) {
    if (c + 1 < task.end) fetch(scan.chunk(c + 1));
    chooser.choose(c);
    if (__builtin_popcount(scan.chosen[c]) > kChunkGroups / 2) continue;
    for_each_bit(scan.chosen[c], [&](int g) { fetch(scan.chunk(c).keys, g, unit.queries.head_dim); });
  }
}

}  // namespace retrieval
