// The twin that every other level is tested against.
#define LEVEL_NAME "scalar"
#define LEVEL_TABLE scalar_kernels
#include "distance_generic.inc"
