// A query against codes: the tables that a scan looks up, and what is made of the sums it finds.
#pragma once

#include <cstdint>

#include "arena.h"
#include "codes.h"
#include "distance.h"

namespace retrieval {

// How the sums that scan finds in codes of so many bits become scores, and how far off they may be.
struct CodeReading {
  std::uint8_t* tables = nullptr;   // [num][num_tables][kTableBytes], of the arena
  std::int16_t offsets[kMaxGroup] = {};
  int shift = 0;
  float slope[kMaxGroup] = {};      // bound = base + slope * unit * integer bound
  float lift[kMaxGroup] = {};       // what was added to <u, q'> to make an estimate a bound
  float deviation[kMaxGroup] = {};  // of <u, q'> from its estimate
};

// A group's queries against the codes of one head: what scans and weights need.
struct CodeQuery {
  CodeReading keys;            // as bounds
  CodeReading means;           // as estimates
  float base[kMaxGroup] = {};  // <q, centroid>
  float norm[kMaxGroup] = {};  // |q'|
  float own[kMaxGroup] = {};   // deviation of a key's score from that of its run's mean; 0 if unknown
  float radius = 0.0f;         // root mean square distance of keys from the means of their runs
};

// deviations: how many standard deviations above its estimate a key may score and still be found.
CodeQuery prepare_query(const LayerCodes& codes, int head, const Queries& queries, float deviations, Arena& arena);

}  // namespace retrieval
