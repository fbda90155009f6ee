// The keys that a search rescores exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "unit.h"

namespace retrieval {

// Lists the candidates of chunk c, scanned into `in`: keys whose bound reaches `listed` of a head; of a head that looks
// widely, those whose estimate reaches its floor and some of the others, drawn once for all such heads of the unit.
// Returns how many were drawn.
std::int64_t refine(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& in, float scale, Found& found);

// Drops keys whose bounds no longer reach what is listed, since a better key came later; those that were drawn if no head
// draws any more.
void drop(const Unit& unit, const Scan& scan, Found& found);

// Joins the lists of a unit's tasks into positions and inverses of its scans, at most limit keys in all. Of those that
// reach what is listed the ones that reach it by least go; of those drawn, every second or third and so on stays and
// stands for the others.
void keep(Unit& unit, std::size_t limit);

}  // namespace retrieval
