// What a sample of the keys tells of the weights of a head: how widely it looks, and how many keys stand for all.
#pragma once

#include "attend.h"
#include "unit.h"

namespace retrieval {

// Some groups at even distances have been scanned. Sets spread of head h, and where drawing keys takes fewer than listing
// them, also draws, total, floor and heavy. known: weight of the keys scored exactly so far, relative to the best one;
// those of the search have bounds above `rest`.
void look_around(Unit& unit, int h, float known, float rest, const Budget& budget, float scale);

// Whether estimates of all heads are as good as exact scores where many keys are weighed; known before a scan.
bool are_clear(const Unit& unit, float scale);

// Whether those of all heads that draw are: then what they draw is weighed by estimate. Sets is_clear and drawn_weight.
void settle_weights(Unit& unit, float scale);

}  // namespace retrieval
