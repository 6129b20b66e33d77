// Products of a few rows with a weight in bfloat16, at the rate at which memory is read, and attention of many rows.
// For processors with AVX512-BF16.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>

#include "kernels.h"
#include "threads.h"
#define ISA avx512_bf16
#define LANES 16

namespace avx512_bf16 {

#include "vectors.inc"

constexpr int WIDTH = 16;       // outputs of a vector
constexpr long AHEAD = 2048;    // bytes that are asked for before they are used

static inline __m512 widen(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

constexpr long MAX_ROWS = 16;   // that share one reading of the weight from memory
constexpr int GROUP = 4;        // rows whose sums are in registers
constexpr long NEAR = 64;       // pairs of inputs whose weights stay in the first cache until all rows have met them

// Adds `pairs` pairs of inputs, of ROWS rows, to their sums [ROWS][VECTORS · 16]. Only the first rows wait for memory.
template <int ROWS, int VECTORS, bool IS_FIRST>
static inline void add_pairs(float* sums, const bf16* x, const char* weight, long pairs, long in_features) {
    __m512 y[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) y[r][v] = _mm512_load_ps(sums + (r * VECTORS + v) * WIDTH);
    for (long pair = 0; pair < pairs; pair++) {
        __m512i w[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            if (IS_FIRST) _mm_prefetch(weight + AHEAD + 64 * v, _MM_HINT_T0);
            w[v] = _mm512_loadu_si512(weight + 64 * v);
        }
        weight += 64 * VECTORS;
        for (int r = 0; r < ROWS; r++) {
            int two;
            __builtin_memcpy(&two, x + r * in_features + 2 * pair, sizeof two);
            const __m512i both = _mm512_set1_epi32(two);
            for (int v = 0; v < VECTORS; v++) y[r][v] = _mm512_dpbf16_ps(y[r][v], (__m512bh)w[v], (__m512bh)both);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) _mm512_store_ps(sums + (r * VECTORS + v) * WIDTH, y[r][v]);
}

template <int VECTORS, bool IS_FIRST>
static inline void add_group(long rows, float* sums, const bf16* x, const char* weight, long pairs, long in_features) {
    switch (rows) {
        case 1: add_pairs<1, VECTORS, IS_FIRST>(sums, x, weight, pairs, in_features); break;
        case 2: add_pairs<2, VECTORS, IS_FIRST>(sums, x, weight, pairs, in_features); break;
        case 3: add_pairs<3, VECTORS, IS_FIRST>(sums, x, weight, pairs, in_features); break;
        default: add_pairs<4, VECTORS, IS_FIRST>(sums, x, weight, pairs, in_features);
    }
}

// Up to MAX_ROWS rows of x times the VECTORS · 16 outputs of one panel.
template <int VECTORS>
static inline void panel(const FewRows& job, long number, long first, long rows) {
    alignas(64) float sums[MAX_ROWS * VECTORS * WIDTH];
    __builtin_memset(sums, 0, rows * VECTORS * WIDTH * sizeof(float));
    const char* weight = (const char*)job.weight + number * job.panel_bytes;
    const bf16* x = (const bf16*)job.x + first * job.in_features;
    const long pairs = job.in_features / 2, near = rows > GROUP ? NEAR : pairs;
    for (long pair = 0; pair < pairs; pair += near) {
        const long some = pairs - pair < near ? pairs - pair : near;
        const char* part = weight + 64 * VECTORS * pair;
        add_group<VECTORS, true>(rows, sums, x + 2 * pair, part, some, job.in_features);
        for (long row = GROUP; row < rows; row += GROUP)
            add_group<VECTORS, false>(rows - row, sums + row * VECTORS * WIDTH, x + row * job.in_features + 2 * pair, part, some, job.in_features);
    }
    for (int v = 0; v < VECTORS; v++) {
        const long output = (number * VECTORS + v) * WIDTH, left = job.out_features - output;
        if (left <= 0) break;
        const __mmask16 mask = left >= WIDTH ? 0xffff : (__mmask16)((1u << left) - 1);
        for (long row = 0; row < rows; row++) {
            __m512 y = _mm512_load_ps(sums + (row * VECTORS + v) * WIDTH);
            const long at = (first + row) * job.out_features + output;
            auto add = [&](const void* p, long place) {
                const __m256i half = _mm256_maskz_loadu_epi16(mask, (const bf16*)p + place);
                y = _mm512_add_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
            };
            if (job.bias) add(job.bias, output);
            if (job.residual) add(job.residual, at);
            _mm256_mask_storeu_epi16((bf16*)job.out + at, mask, (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
}

template <int VECTORS>
static void panels(const FewRows& job) {
    const long count = (job.out_features + WIDTH * VECTORS - 1) / (WIDTH * VECTORS);
    const long share = count / (8 * omp_get_max_threads()), chunk = share ? share : 1;
    #pragma omp parallel for schedule(dynamic, chunk)
    for (long number = 0; number < count; number++)
        for (long first = 0; first < job.rows; first += MAX_ROWS)
            panel<VECTORS>(job, number, first, job.rows - first < MAX_ROWS ? job.rows - first : MAX_ROWS);
}

void few_rows(const FewRows& job) {
    switch (job.vectors) {
        case 1: panels<1>(job); break;
        case 2: panels<2>(job); break;
        case 3: panels<3>(job); break;
        case 4: panels<4>(job); break;
    }
}

constexpr long PARTS = 8;

static inline void begin() {}
static inline void end() {}

// Eight rows of a tile of a, and two tiles of b: what instructions on tiles do in amx_bf16.cpp.
static inline void eight_rows(float* out, const bf16* a, const bf16* b, long steps, bool adds) {
    __m512 sums[8][2];
    for (int row = 0; row < 8; row++)
        for (int half = 0; half < 2; half++)
            sums[row][half] = adds ? _mm512_loadu_ps(out + half * 256 + row * 16) : _mm512_setzero_ps();
    for (long step = 0; step < steps; step++, a += 1024, b += 1024) {
        for (int pair = 0; pair < 16; pair++) {
            const __m512bh first = (__m512bh)_mm512_loadu_si512(b + pair * 32), second = (__m512bh)_mm512_loadu_si512(b + 512 + pair * 32);
            for (int row = 0; row < 8; row++) {
                int two;
                __builtin_memcpy(&two, a + row * 32 + 2 * pair, sizeof two);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
                sums[row][0] = _mm512_dpbf16_ps(sums[row][0], first, both);
                sums[row][1] = _mm512_dpbf16_ps(sums[row][1], second, both);
            }
        }
    }
    for (int row = 0; row < 8; row++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(out + half * 256 + row * 16, sums[row][half]);
}

template <int A, class Beside>
static inline void multiply(float* out, const bf16* a, const bf16* b, long steps, bool adds, Beside&& beside) {
    for (int tile = 0; tile < A; tile++)
        for (int row = 0; row < 16; row += 8)
            eight_rows(out + tile * 512 + row * 16, a + tile * 512 + row * 32, b, steps, adds);
    beside(0, PARTS);
}

#include "attend_rows.inc"
#include "delta.inc"
#include "delta_net.inc"
#include "half_products.inc"

template <int ROWS, int VECTORS>
static inline void product_part(const DeltaProduct<bf16>& job, long row, long column) {
    vf sums[ROWS][VECTORS];
    float* c = job.c + row * job.c_stride + column;
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            sums[r][v] = job.factor == 0 ? splat(0) : job.factor * load(c + r * job.c_stride + v * LANES);
    const bf16 *a = job.a + row * job.a_stride, *b = job.b + 2 * column;
    for (long k = 0; k < job.depth; k += 2, b += 2 * job.b_stride) {
        __m512bh right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * LANES);
        for (int r = 0; r < ROWS; r++) {
            int two;
            __builtin_memcpy(&two, a + r * job.a_stride + k, sizeof two);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(two);
            for (int v = 0; v < VECTORS; v++) sums[r][v] = (vf)_mm512_dpbf16_ps((__m512)sums[r][v], right[v], left);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(c + r * job.c_stride + v * LANES, sums[r][v]);
}

void HalfProducts::multiply(const DeltaProduct<bf16>& job) {
    long column = 0;
    for (; column + 4 * LANES <= job.columns; column += 4 * LANES)
        for (long row = 0; row < job.rows; row += 4) product_part<4, 4>(job, row, column);
    for (; column < job.columns; column += LANES)
        for (long row = 0; row < job.rows; row += 16) product_part<16, 1>(job, row, column);
}

void delta_net_half(const DeltaNet& job) { delta_net<bf16, HalfProducts>(job); }

}  // namespace avx512_bf16
#endif
