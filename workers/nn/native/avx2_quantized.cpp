// Products of rows, quantised here to 8 bits, with a weight in int8 or int4: the panels of avx512_vnni.cpp, and its whole
// numbers. For processors with AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "kernels.h"
#include "threads.h"

namespace avx2_quantized {

#define LANES 8  // outputs of a vector of sums
#include "vectors.inc"

constexpr int OUTPUTS = 64, VECTORS = OUTPUTS / LANES;  // of a panel
constexpr long MOST = 4;                                // rows that a panel is multiplied by at a time
constexpr long AHEAD = 2048;                            // bytes of weights that are asked for before they are used
constexpr long GROUP_BYTES = OUTPUTS + OUTPUTS * GROUP / 2;

static inline float number_at(const void* p, long place, bool is_half) {
    return is_half ? to_float(((const bf16*)p)[place]) : ((const float*)p)[place];
}

// Eight numbers of a row; behind its end zeros.
static inline __m256 load(const void* p, long place, long count, bool is_half) {
    alignas(32) float few[LANES] = {};
    if (count < LANES) {
        for (long i = 0; i < count; i++) few[i] = number_at(p, place + i, is_half);
        return _mm256_load_ps(few);
    }
    return (__m256)(is_half ? load((const bf16*)p + place) : load((const float*)p + place));
}

// The largest number of a row; NaN where there is one.
static float largest_of(const QuantizedRows& job, long start) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_set1_ps(1e-8f), is_nan = _mm256_setzero_ps();
    for (long i = 0; i < job.in_features; i += LANES) {
        const __m256 v = load(job.x, start + i, job.in_features - i, job.is_half);
        is_nan = _mm256_or_ps(is_nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v));
    }
    if (_mm256_movemask_ps(is_nan)) return __builtin_nanf("");
    alignas(32) float all[LANES];
    _mm256_store_ps(all, most);
    float found = all[0];
    for (float one : all) found = one > found ? one : found;
    return found;
}

// From -127 to 127. Of a weight in 4 bits also the sum of each group, which its zeros are multiplied by.
static void quantize(const QuantizedRows& job, long row) {
    const long size = job.in_features, start = row * size, stride = padded(job);
    signed char* out = (signed char*)job.scratch + row * stride;
    const float largest = largest_of(job, start);
    const __m256 scale = _mm256_set1_ps(127.0f / largest);
    for (long i = 0; i < stride; i += LANES) {
        const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(load(job.x, start + i, size - i, job.is_half), scale));
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storel_epi64((__m128i*)(out + i), _mm_packs_epi16(words, words));
    }
    job.row_scales[row] = largest / 127.0f;
    if (job.bits == 8) return;
    int* sums = (int*)job.panels + row * (stride / GROUP);
    for (long group = 0; group < stride / GROUP; group++) {
        sums[group] = 0;
        for (long i = 0; i < GROUP; i++) sums[group] += out[group * GROUP + i];
    }
}

static inline __m256i four_of(const signed char* x) {
    int four;
    __builtin_memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

static inline void add_to(int* sums, __m256i more) {
    __m256i* place = (__m256i*)sums;
    _mm256_store_si256(place, _mm256_add_epi32(_mm256_load_si256(place), more));
}

// Weights in 8 bits. The unsigned factor is the weight's magnitude, its sign goes to x: 128 · 127 · 2 is within 16 bits.
struct Bytes {
    template <int ROWS>
    static void sum(const QuantizedRows& job, const char* weight, long row, int (&sums)[ROWS][OUTPUTS]) {
        constexpr int AT_ONCE = ROWS == 1 ? VECTORS : ROWS == 2 ? VECTORS / 2 : VECTORS / 4;
        const long stride = padded(job);
        const signed char* x = (const signed char*)job.scratch + row * stride;
        const __m256i ones = _mm256_set1_epi16(1);
        for (long first = 0; first < stride; first += BLOCK, weight += BLOCK * OUTPUTS) {
            for (int v = 0; v < VECTORS; v += AT_ONCE) {
                __m256i found[ROWS][AT_ONCE];
                for (int r = 0; r < ROWS; r++)
                    for (int k = 0; k < AT_ONCE; k++) found[r][k] = _mm256_setzero_si256();
                #pragma GCC unroll 1  // more leaves no registers
                for (long i = 0; i < BLOCK; i += 4) {
                    __m256i four[ROWS];
                    for (int r = 0; r < ROWS; r++) four[r] = four_of(x + r * stride + first + i);
                    for (int k = 0; k < AT_ONCE; k++) {
                        const char* place = weight + i * OUTPUTS + 32 * (v + k);
                        if (k % 2 == 0) _mm_prefetch(place + AHEAD, _MM_HINT_T0);
                        const __m256i w = _mm256_loadu_si256((const __m256i*)place), magnitude = _mm256_abs_epi8(w);
                        for (int r = 0; r < ROWS; r++) {
                            const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four[r], w));
                            found[r][k] = _mm256_add_epi32(found[r][k], _mm256_madd_epi16(pairs, ones));
                        }
                    }
                }
                for (int r = 0; r < ROWS; r++)
                    for (int k = 0; k < AT_ONCE; k++) add_to(sums[r] + LANES * (v + k), found[r][k]);
            }
        }
    }
};

// Weights in 4 bits, unsigned: a group's sums have room in 16 bits. Its sizes and zeros follow once.
struct Nibbles {
    template <int ROWS>
    static void sum(const QuantizedRows& job, const char* weight, long row, int (&sums)[ROWS][OUTPUTS]) {
        constexpr int SLICES = 4, AT_ONCE = ROWS == 1 ? SLICES : ROWS == 2 ? SLICES / 2 : 1;  // of 16 outputs
        const long stride = padded(job), groups = stride / GROUP;
        const signed char* x = (const signed char*)job.scratch + row * stride;
        const int* group_sums = (const int*)job.panels + row * groups;
        const __m256i low = _mm256_set1_epi8(15);
        for (long group = 0; group < groups; group++, weight += GROUP_BYTES, x += GROUP) {
            for (int s = 0; s < SLICES; s += AT_ONCE) {
                __m256i found[ROWS][2 * AT_ONCE];
                for (int r = 0; r < ROWS; r++)
                    for (int k = 0; k < 2 * AT_ONCE; k++) found[r][k] = _mm256_setzero_si256();
                #pragma GCC unroll 1  // more leaves no registers
                for (long i = 0; i < GROUP; i += 4) {
                    __m256i four[ROWS];
                    for (int r = 0; r < ROWS; r++) four[r] = four_of(x + r * stride + i);
                    for (int k = 0; k < AT_ONCE; k++) {
                        const char* place = weight + OUTPUTS + i * OUTPUTS / 2 + 32 * (s + k);
                        if ((s + k) % 2 == 0) _mm_prefetch(place + AHEAD, _MM_HINT_T0);
                        const __m256i two = _mm256_loadu_si256((const __m256i*)place);
                        const __m256i first = _mm256_and_si256(two, low);
                        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(two, 4), low);
                        for (int r = 0; r < ROWS; r++) {
                            found[r][2 * k] = _mm256_add_epi16(found[r][2 * k], _mm256_maddubs_epi16(first, four[r]));
                            found[r][2 * k + 1] = _mm256_add_epi16(found[r][2 * k + 1], _mm256_maddubs_epi16(second, four[r]));
                        }
                    }
                }
                for (int k = 0; k < 2 * AT_ONCE; k++) {
                    const int slice = s + k / 2, output = slice / 2 * 32 + k % 2 * 16 + slice % 2 * LANES;
                    const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(weight + output)));
                    const __m256i size = _mm256_add_epi32(_mm256_and_si256(both, _mm256_set1_epi32(15)), _mm256_set1_epi32(1));
                    const __m256i sizes = _mm256_or_si256(size, _mm256_slli_epi32(size, 16));
                    const __m256i zeros = _mm256_mullo_epi16(_mm256_srli_epi32(both, 4), size);
                    for (int r = 0; r < ROWS; r++) {
                        const __m256i of_x = _mm256_set1_epi32(group_sums[r * groups + group]);
                        const __m256i products = _mm256_madd_epi16(found[r][k], sizes);
                        // The upper halves of `zeros` are zero: those of the sums do not count.
                        add_to(sums[r] + output, _mm256_sub_epi32(products, _mm256_madd_epi16(zeros, of_x)));
                    }
                }
            }
        }
    }
};

template <class Weights, int ROWS>
static void panel(const QuantizedRows& job, const char* weight, long number, long row) {
    alignas(32) int sums[ROWS][OUTPUTS] = {};
    Weights::sum(job, weight, row, sums);
    const long first = number * OUTPUTS, left = job.out_features - first, count = left < OUTPUTS ? left : OUTPUTS;
    for (int r = 0; r < ROWS; r++) {
        const long at = (row + r) * job.out_features + first;
        float y[OUTPUTS];
        for (long o = 0; o < count; o++) y[o] = (float)sums[r][o] * (job.scales[first + o] * job.row_scales[row + r]);
        if (job.bias)
            for (long o = 0; o < count; o++) y[o] += number_at(job.bias, first + o, job.is_half);
        if (job.residual)
            for (long o = 0; o < count; o++) y[o] += number_at(job.residual, at + o, job.is_half);
        if (!job.is_half) __builtin_memcpy((float*)job.out + at, y, 4 * count);
        else
            for (long o = 0; o < count; o++) from_float((bf16*)job.out + at + o, y[o]);
    }
}

template <class Weights>
static void all_rows(const QuantizedRows& job, const char* weight, long number) {
    long row = 0;
    for (; row + MOST <= job.rows; row += MOST) panel<Weights, MOST>(job, weight, number, row);
    switch (job.rows - row) {
        case 1: panel<Weights, 1>(job, weight, number, row); break;
        case 2: panel<Weights, 2>(job, weight, number, row); break;
        case 3: panel<Weights, 3>(job, weight, number, row); break;
    }
}

void rows(const QuantizedRows& job) {
    #pragma omp parallel for if (job.rows > MOST)
    for (long row = 0; row < job.rows; row++) quantize(job, row);
    const long count = (job.out_features + OUTPUTS - 1) / OUTPUTS;
    const long share = count / (4 * omp_get_max_threads()), chunk = share ? share : 1;
    #pragma omp parallel for schedule(dynamic, chunk)
    for (long number = 0; number < count; number++) {
        const char* weight = (const char*)job.weight + number * job.panel_bytes;
        if (job.bits == 8) all_rows<Bytes>(job, weight, number);
        else all_rows<Nibbles>(job, weight, number);
    }
}

}  // namespace avx2_quantized
#endif
