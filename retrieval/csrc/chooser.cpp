#include "chooser.h"

#include <algorithm>
#include <cmath>

namespace retrieval {
namespace {

constexpr int kRunsPerGroup = kGroupKeys / kRunKeys;
static_assert(kRunsPerGroup == 2);
constexpr float kNear = 5.0f;       // nats below the best that a key within half the reach may not be missed
constexpr float kOddRadius = 1.75f; // of the root mean square

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

// Groups of a chunk that hold any of the runs.
std::uint32_t groups_of(std::uint64_t runs) {
  std::uint64_t pairs = (runs | runs >> 1) & 0x5555555555555555u;  // every second bit; then they move together
  pairs = (pairs | pairs >> 1) & 0x3333333333333333u;
  pairs = (pairs | pairs >> 2) & 0x0f0f0f0f0f0f0f0fu;
  pairs = (pairs | pairs >> 4) & 0x00ff00ff00ff00ffu;
  pairs = (pairs | pairs >> 8) & 0x0000ffff0000ffffu;
  return static_cast<std::uint32_t>(pairs | pairs >> 16);
}

}  // namespace

bool Reach::may_be_in(std::int64_t c) const {
  bool may_be = false;
  const std::int16_t* crest = scan_.crests + c;
  for (int h = 0; h < unit_.queries.num; ++h, crest += scan_.num_chunks) may_be |= *crest >= limits_[h];
  return may_be;
}

std::uint64_t Reach::runs_of(std::int64_t c) {
  const CodeChunk& chunk = scan_.chunk(c);
  if (chunk.means.unit != means_unit_ || chunk.radius_unit != radius_unit_) measure(chunk);
  if (reaches_all_) return chunk.full_runs;
  if (!may_be_in(c)) return 0;
  static constexpr std::int16_t kNoLuck[kGroupKeys] = {};
  std::uint64_t masks[kMaxGroup], any = 0;
  kernels().draw(scan_.levels + c * kChunkRuns, scan_.num_chunks * kChunkRuns, unit_.queries.num, chunk.radii, kNoLuck,
                 draws_, masks);
  for (int h = 0; h < unit_.queries.num; ++h) any |= masks[h];
  return any & chunk.full_runs;
}

// In units of the chunk, which most chunks share.
void Reach::measure(const CodeChunk& chunk) {
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
    limits_[h] = draws_[h].floor + draws_[h].lift;
  }
}

GroupLots::GroupLots(const Unit& unit, const Scan& scan, float scale) : unit_(unit), scan_(scan), scale_(scale) {
  for (int h = 0; h < unit.queries.num; ++h) {
    if (unit.group_certain[h] != kInfinity) heads_[num_++] = h;
  }
}

std::uint32_t GroupLots::draw(std::int64_t c, std::uint32_t left_out) {
  if (num_ == 0) return 0;
  const CodeChunk& chunk = scan_.chunk(c);
  for (int n = 0; n < num_ && chunk.means.unit != means_unit_; ++n) {
    const int h = heads_[n];
    lots_[n] = lot_above(unit_.group_certain[h], scan_.query.base[h], scan_.level_unit(c, h), scan_.query.means, h, scale_);
  }
  means_unit_ = chunk.means.unit;
  const std::int64_t number = unit_.start + scan_.first_key(c) / kGroupKeys;
  const std::int16_t *luck = lucks_of_groups(number), most_luck = most_luck_of_groups(number);
  const auto levels_of = [&](int n) { return scan_.levels + (heads_[n] * scan_.num_chunks + c) * kChunkRuns; };
  std::uint64_t runs = 0;
  for (int n = 0; n < num_; ++n) {
    if (!lots_[n].may_draw(scan_.crests[heads_[n] * scan_.num_chunks + c], most_luck)) continue;
    std::uint64_t mask;
    kernels().draw(levels_of(n), 0, 1, chunk.means.factors, luck, &lots_[n].draw, &mask);
    runs |= mask;
  }
  const std::uint32_t drawn = groups_of(runs & chunk.full_runs) & ~left_out;
  for_each_bit(drawn, [&](int g) {
    float chance = -kInfinity;
    for (int n = 0; n < num_; ++n) {
      for (int each = kRunsPerGroup * g; each < kRunsPerGroup * (g + 1); ++each) {
        if ((chunk.full_runs >> each & 1u) == 0) continue;
        chance = std::max(chance, lots_[n].log_chance(levels_of(n)[each], chunk.means.factors[each]));
      }
    }
    scan_.log_times[c * kChunkGroups + g] = -std::clamp(chance, kLogLeastChance, 0.0f);
  });
  return drawn;
}

Chooser::Chooser(const Unit& unit, const Scan& scan, const Budget& budget, float scale)
    : unit_(unit), scan_(scan), far_(unit, scan, budget.reach, 0.0f),
      near_(unit, scan, 0.5f * budget.reach, kNear / scale), lots_(unit, scan, scale) {}

int Chooser::choose(std::int64_t c) {
  const CodeChunk& chunk = scan_.chunk(c);
  const std::uint64_t passed = ~chunk.full_runs | odd_runs(chunk, scan_.query.radius) | far_.runs_of(c) | near_.runs_of(c);
  scan_.chosen[c] |= groups_of(passed);
  scan_.chosen[c] |= lots_.draw(c, scan_.chosen[c]);
  return __builtin_popcount(scan_.chosen[c]);
}

int Chooser::choose_and_fetch(std::int64_t c) {
  if (!unit_.chooses) {
    scan_.chosen[c] = ~0u;
    return kChunkGroups;
  }
  if (c + 1 < scan_.num_chunks) fetch(scan_.chunk(c + 1));
  const int num_chosen = choose(c);
  if (num_chosen > kChunkGroups / 2) return num_chosen;  // read in order, or nearly so
  for_each_bit(scan_.chosen[c], [&](int g) { fetch(scan_.chunk(c).keys, g); });
  return num_chosen;
}

void fetch(const CodeGroups& groups, int g) {
  const int size = groups.group_bytes();
  for (int at = 0; at < size; at += 64) __builtin_prefetch(groups.codes + g * size + at, 0, 2);
  __builtin_prefetch(groups.factors + g * kGroupKeys, 0, 2);
  __builtin_prefetch(groups.factors + g * kGroupKeys + kGroupKeys / 2, 0, 2);
}

}  // namespace retrieval
