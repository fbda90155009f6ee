// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2 -mgfni -mfma.
#define LEVEL_NAME "avx512"
#define LEVEL_TABLE avx512_kernels
#include "distance_avx512.inc"
