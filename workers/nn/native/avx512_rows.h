// What the kernels of quantised products share: rows in 8 bits, weights of 4 bits made 8, and what follows a product.
// To be included behind the target's pragma.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace {

constexpr int WIDTH = 16;  // numbers of a vector
constexpr int VECTORS = 4, OUTPUTS = VECTORS * WIDTH;  // of a panel
constexpr long AHEAD = 2048;  // bytes of weights that are asked for before they are used

constexpr long STEP = BLOCK * OUTPUTS;  // bytes of a panel in 8 bits that one block of inputs is multiplied by

inline __mmask16 mask_of(long count) { return count >= WIDTH ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1); }

inline __m512 load(const void* p, long place, __mmask16 mask, bool is_half) {
    if (!is_half) return _mm512_maskz_loadu_ps(mask, (const float*)p + place);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const bf16*)p + place);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(void* p, long place, __mmask16 mask, bool is_half, __m512 v) {
    if (!is_half) { _mm512_mask_storeu_ps((float*)p + place, mask, v); return; }
#if defined(__AVX512BF16__)
    _mm256_mask_storeu_epi16((bf16*)p + place, mask, (__m256i)_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16((bf16*)p + place, mask, _mm512_cvtepi32_epi16(rounded));
#endif
}

// The largest number of a row; NaN where there is one.
inline float largest_of(const QuantizedRows& job, long start) {
    __m512 most = _mm512_set1_ps(1e-8f);
    __mmask16 is_nan = 0;
    for (long i = 0; i < job.in_features; i += WIDTH) {
        const __m512 v = load(job.x, start + i, mask_of(job.in_features - i), job.is_half);
        is_nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
    }
    return is_nan ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
}

// 16 numbers of a row, from -127 to 127: rows have scales of their own, so that an outlier affects no other row.
inline __m512i whole(const QuantizedRows& job, long start, long i, __m512 scale) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(load(job.x, start + i, mask_of(job.in_features - i), job.is_half), scale));
}

// Scales of 4-bit weights: of 16 outputs and one group, whole numbers of the output's own scale.
struct Steps {
    __m512i sizes, zeros;  // sizes in 16 bits, zeros · sizes in 8
};

inline Steps steps_of(const char* bytes) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
    const __m512i size = _mm512_add_epi32(_mm512_and_si512(both, _mm512_set1_epi32(15)), _mm512_set1_epi32(1));
    const __m512i zero = _mm512_mullo_epi16(_mm512_srli_epi32(both, 4), size);
    return {_mm512_or_si512(size, _mm512_slli_epi32(size, 16)), _mm512_mullo_epi32(zero, _mm512_set1_epi32(0x01010101))};
}

// (q - zero) · size of 64 numbers q of 4 bits, each in a byte. No product is above 255, so 16 bits hold two of them.
inline __m512i widened(__m512i q, const Steps& steps) {
    return _mm512_sub_epi8(_mm512_mullo_epi16(q, steps.sizes), steps.zeros);
}

// A block of 4-bit weights, for BLOCK inputs, in 8 bits, as oneDNN packs those. Returns where the next one begins.
inline const char* widen(const char* from, char* to) {
    const __m512i low = _mm512_set1_epi8(15);
    for (long group = 0; group < BLOCK / GROUP; group++) {
        Steps steps[VECTORS];
        for (int v = 0; v < VECTORS; v++) steps[v] = steps_of(from + WIDTH * v);
        from += OUTPUTS;
        for (long i = 0; i < GROUP; i += 4) {
            for (int v = 0; v < VECTORS; v += 2) {
                _mm_prefetch(from + AHEAD, _MM_HINT_T0);
                const __m512i two = _mm512_loadu_si512(from);
                _mm512_store_si512(to, widened(_mm512_and_si512(two, low), steps[v]));
                _mm512_store_si512(to + 64, widened(_mm512_and_si512(_mm512_srli_epi16(two, 4), low), steps[v + 1]));
                from += 64;
                to += 128;
            }
        }
    }
    return from;
}

// Of 16 int32 sums: scaled, and added to bias and residual.
inline void finish(const QuantizedRows& job, __m512i sums, long row, long output, __mmask16 mask, __m512 scales) {
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales);
    const long at = row * job.out_features + output;
    if (job.bias) y = _mm512_add_ps(y, load(job.bias, output, mask, job.is_half));
    if (job.residual) y = _mm512_add_ps(y, load(job.residual, at, mask, job.is_half));
    store(job.out, at, mask, job.is_half, y);
}

}  // namespace
