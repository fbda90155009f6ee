// As distance_avx512.cpp, and -mavx512bf16: bf16 keys meet bf16 queries without conversion.
#define LEVEL_NAME "avx512_bf16"
#define LEVEL_TABLE avx512_bf16_kernels
#include "distance_avx512.inc"
