// For processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>

#include "kernels.h"
#include "threads.h"
#define ISA avx512
#define LANES 16
#include "kernels.inc"
#endif
