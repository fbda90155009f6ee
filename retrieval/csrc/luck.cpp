#include "luck.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace retrieval {
namespace {

constexpr float kLuckSteps = 2340.0f;  // of a binary logarithm; -log2(0.5 / kNumLucks) = 14 just fits 16 bits

// -log2 of even numbers, in an order that spreads those of neighbours evenly too (multiples of the golden ratio);
// each `times` times, and the first ones again behind the last.
std::vector<std::int16_t> draw_lucks(std::size_t times, std::size_t again) {
  constexpr auto kCount = static_cast<std::size_t>(kNumLucks);
  std::vector<std::pair<std::uint64_t, std::size_t>> order;
  for (std::size_t i = 0; i < kCount; ++i) order.emplace_back(i * 0x9e3779b97f4a7c15ull, i);
  std::sort(order.begin(), order.end());
  std::vector<std::int16_t> lucks(times * kCount);
  for (std::size_t rank = 0; rank < kCount; ++rank) {
    const float even = (static_cast<float>(rank) + 0.5f) / static_cast<float>(kCount);
    std::fill_n(lucks.begin() + static_cast<std::ptrdiff_t>(times * order[rank].second), times,
                static_cast<std::int16_t>(-kLuckSteps * std::log2(even) + 0.5f));
  }
  for (std::size_t i = 0; i < again; ++i) lucks.push_back(lucks[i]);
  return lucks;
}

}  // namespace

const std::int16_t* lucks_of_keys(std::int64_t start) {
  static const std::vector<std::int16_t> lucks = draw_lucks(1, kChunkKeys);
  return lucks.data() + start % kNumLucks;
}

const std::int16_t* lucks_of_groups(std::int64_t start) {
  static const std::vector<std::int16_t> lucks = draw_lucks(kGroupKeys / kRunKeys, kChunkRuns);
  return lucks.data() + kGroupKeys / kRunKeys * (start % kNumLucks);
}

std::int16_t most_luck_of_groups(std::int64_t start) {
  static const std::vector<std::int16_t> most = [] {
    std::vector<std::int16_t> largest;
    for (std::int64_t first = 0; first < kNumLucks; ++first) {
      const std::int16_t* lucks = lucks_of_groups(first);
      largest.push_back(*std::max_element(lucks, lucks + kChunkRuns));
    }
    return largest;
  }();
  return most[static_cast<std::size_t>(start % kNumLucks)];
}

void set_start(Unit& unit) {
  std::uint32_t bits;
  std::memcpy(&bits, &unit.best[0], sizeof(bits));
  std::uint64_t z = static_cast<std::uint64_t>(bits) << 32;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  unit.start = static_cast<std::int64_t>(z >> 40);
}

std::int16_t to_word(float value) {
  const float cut = std::clamp(value, -32767.0f, 32767.0f);
  return static_cast<std::int16_t>(static_cast<int>(cut + (cut < 0.0f ? -0.5f : 0.5f)));
}

Lot lot_above(float floor, float base, float unit, const CodeReading& reading, int h, float scale) {
  Lot lot;
  const float score = std::max(unit, 1e-30f);
  lot.step = scale * score;
  lot.draw.floor = to_word((floor - base) / score);
  lot.draw.lift = to_word(reading.lift[h] / reading.slope[h]);
  float spread = 32768.0f / (kLuckSteps * kLog2E * lot.step);
  while (spread > 32767.0f && lot.draw.doublings < 15) {
    spread *= 0.5f;
    ++lot.draw.doublings;
  }
  lot.draw.spread = to_word(spread);
  return lot;
}

}  // namespace retrieval
