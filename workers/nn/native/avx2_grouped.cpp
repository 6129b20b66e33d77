// For processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "kernels.h"
#include "threads.h"
#define ISA avx2_grouped
#define LANES 8
#include "grouped.inc"
#endif
