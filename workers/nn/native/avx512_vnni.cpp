// Products of a few rows, quantised here to 8 bits, with a weight in int8, at the rate at which memory is read. For
// processors with AVX512-VNNI.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>

#include "kernels.h"
#include "threads.h"

namespace avx512_vnni {

constexpr int WIDTH = 16;     // outputs of a vector
constexpr long AHEAD = 2048;  // bytes that are asked for before they are used
constexpr int ZERO = 128;     // activations are unsigned: dpbusd takes them so

static inline __mmask16 mask_of(long count) { return count >= WIDTH ? 0xffff : (__mmask16)((1u << count) - 1); }

static inline __m512 load(const void* p, long place, __mmask16 mask, bool is_half) {
    if (!is_half) return _mm512_maskz_loadu_ps(mask, (const float*)p + place);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const bf16*)p + place);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void store(void* p, long place, __mmask16 mask, bool is_half, __m512 v) {
    if (!is_half) { _mm512_mask_storeu_ps((float*)p + place, mask, v); return; }
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16((bf16*)p + place, mask, _mm512_cvtepi32_epi16(rounded));
}

// A row in 8 bits, with its own scale, which is returned: an outlier affects no other row.
static float quantize(const FewRowsInt8& job, long row, unsigned char* out) {
    const long size = job.in_features, start = row * size;
    __m512 most = _mm512_set1_ps(1e-8f);
    __mmask16 is_nan = 0;
    for (long i = 0; i < size; i += WIDTH) {
        const __m512 v = load(job.x, start + i, mask_of(size - i), job.is_half);
        is_nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
    }
    const float largest = is_nan ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
    const __m512 scale = _mm512_set1_ps(127.0f / largest);
    for (long i = 0; i < size; i += WIDTH) {
        const __mmask16 mask = mask_of(size - i);
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load(job.x, start + i, mask, job.is_half), scale));
        _mm_mask_storeu_epi8(out + i, mask, _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(ZERO))));
    }
    for (long i = size; i % 4; i++) out[i] = ZERO;  // the weight has zeros there
    return largest / 127.0f;
}

template <int ROWS>
static inline void panel(const FewRowsInt8& job, long number, long row, const float* row_scales) {
    constexpr int VECTORS = 4;
    const char* weight = (const char*)job.weight + number * job.panel_bytes;
    const long stride = (job.in_features + 3) / 4 * 4;
    const unsigned char* x = job.scratch + row * stride;
    __m512i sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_si512();
    for (long i = 0; i < stride; i += 4) {
        for (int v = 0; v < VECTORS; v++) {
            _mm_prefetch(weight + AHEAD + 64 * v, _MM_HINT_T0);
            const __m512i w = _mm512_loadu_si512(weight + 64 * v);
            for (int r = 0; r < ROWS; r++) {
                int four;
                __builtin_memcpy(&four, x + r * stride + i, 4);
                sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], _mm512_set1_epi32(four), w);
            }
        }
        weight += 64 * VECTORS;
    }
    for (int v = 0; v < VECTORS; v++) {
        const long output = (number * VECTORS + v) * WIDTH;
        if (output >= job.out_features) break;
        const __mmask16 mask = mask_of(job.out_features - output);
        const __m512i offset = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, job.sums + output), 7);
        const __m512 scales = _mm512_maskz_loadu_ps(mask, job.scales + output);
        for (int r = 0; r < ROWS; r++) {
            __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][v], offset));
            y = _mm512_mul_ps(y, _mm512_mul_ps(scales, _mm512_set1_ps(row_scales[row + r])));
            const long at = (row + r) * job.out_features + output;
            if (job.bias) y = _mm512_add_ps(y, load(job.bias, output, mask, job.is_half));
            if (job.residual) y = _mm512_add_ps(y, load(job.residual, at, mask, job.is_half));
            store(job.out, at, mask, job.is_half, y);
        }
    }
}

void few_rows(const FewRowsInt8& job) {
    float row_scales[MAX_FEW_ROWS];
    for (long row = 0; row < job.rows; row++)
        row_scales[row] = quantize(job, row, job.scratch + row * ((job.in_features + 3) / 4 * 4));
    const long count = (job.out_features + 4 * WIDTH - 1) / (4 * WIDTH);
    const long share = count / (8 * omp_get_max_threads()), chunk = share ? share : 1;
    #pragma omp parallel for schedule(dynamic, chunk)
    for (long number = 0; number < count; number++) {
        long row = 0;
        for (; row + 4 <= job.rows; row += 4) panel<4>(job, number, row, row_scales);
        switch (job.rows - row) {
            case 1: panel<1>(job, number, row, row_scales); break;
            case 2: panel<2>(job, number, row, row_scales); break;
            case 3: panel<3>(job, number, row, row_scales); break;
        }
    }
}

}  // namespace avx512_vnni
#endif
