// What a sample of the keys tells of the weights of a head: how widely it looks, and how many keys stand for all.
#pragma once

#include "attend.h"
#include "unit.h"

namespace retrieval {

// Some groups at even distances have been scanned. Sets spread of head h, and where drawing keys takes fewer than listing
// them, also draws, total, floor and heavy. known: weight of the keys scored exactly so far, relative to the best one;
// those of the search have bounds above `rest`.
void look_around(Unit& unit, int h, float known, float rest, const Budget& budget, float scale);

// Whether the estimates of all heads that draw are good enough to weigh what is drawn by them; sets drawn_weight.
bool weighs_drawn(Unit& unit, float scale);

// Whether estimates of all heads are as good as that.
bool are_clear(const Unit& unit, float scale);

}  // namespace retrieval
