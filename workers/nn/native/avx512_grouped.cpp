// For processors with AVX-512 (F, BW, DQ, VL) and VNNI.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#include <immintrin.h>

#include "kernels.h"
#include "threads.h"
#define ISA avx512_grouped
#define LANES 16
#include "grouped.inc"
#endif
