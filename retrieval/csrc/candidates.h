// The keys that a search rescores exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "unit.h"

namespace retrieval {

// Lists the candidates of chunk c, scanned into `in`: keys whose bound passes the floor of a head; of a head that looks
// widely, those whose estimate does and some of the others, drawn once for all such heads of the unit. Returns how many
// were drawn.
std::int64_t refine(const Unit& unit, const Scan& scan, std::int64_t c, const ChunkBounds& in, float scale,
                    std::vector<Candidate>& found);

// Joins the lists of a unit's tasks into positions and inverses of its scans, at most limit keys in all. Of those that
// passed a floor the ones that passed it by least go; of those drawn, every second or third and so on stays and stands
// for the others.
void keep(Unit& unit, std::size_t limit);

}  // namespace retrieval
