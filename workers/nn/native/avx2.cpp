// For processors with AVX2 and FMA.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "kernels.h"
#include "threads.h"
#define ISA avx2
#define LANES 8
#include "kernels.inc"
#endif
