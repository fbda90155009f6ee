// Compiled with -mavx2 -mfma.
#define LEVEL_NAME "avx2"
#define LEVEL_TABLE avx2_kernels
#include "distance_generic.inc"
