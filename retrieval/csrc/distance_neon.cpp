// AArch64: NEON is the baseline, so the portable loops vectorize and the look-up is vqtbl1q.
#define LEVEL_NAME "neon"
#define LEVEL_TABLE neon_kernels
#include "distance_generic.inc"
