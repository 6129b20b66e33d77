// Products of rows, quantised here to 8 bits, with a weight in int8 or int4. A few rows at the rate at which memory is
// read. For processors with AVX512-VNNI.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#include "avx512_rows.h"
#include "threads.h"

namespace avx512_vnni {

constexpr int ZERO = 128;  // activations are unsigned: dpbusd takes them so
constexpr long MOST = 6;   // rows that a panel is multiplied by at a time

static void quantize(const QuantizedRows& job, long row) {
    const long size = job.in_features, start = row * size, stride = padded(job);
    unsigned char* out = (unsigned char*)job.scratch + row * stride;
    const float largest = largest_of(job, start);
    const __m512 scale = _mm512_set1_ps(127.0f / largest);
    for (long i = 0; i < stride; i += WIDTH) {  // behind the row the weight has zeros
        const __m512i v = _mm512_add_epi32(whole(job, start, i, scale), _mm512_set1_epi32(ZERO));
        _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtepi32_epi8(v));
    }
    job.row_scales[row] = largest / 127.0f;
}

// Weights in 8 bits: four inputs at a time, and for each four the outputs side by side.
struct Bytes {
    const char* next;
    void open_group() {}
    void take(__m512i (&w)[VECTORS]) {
        for (int v = 0; v < VECTORS; v++) {
            _mm_prefetch(next + AHEAD + 64 * v, _MM_HINT_T0);
            w[v] = _mm512_loadu_si512(next + 64 * v);
        }
        next += 64 * VECTORS;
    }
};

// Weights in 4 bits: a group's scales, then as above, with two vectors of outputs in one.
struct Nibbles {
    const char* next;
    Steps steps[VECTORS];
    void open_group() {
        for (int v = 0; v < VECTORS; v++) steps[v] = steps_of(next + WIDTH * v);
        next += OUTPUTS;
    }
    void take(__m512i (&w)[VECTORS]) {
        const __m512i low = _mm512_set1_epi8(15);
        for (int v = 0; v < VECTORS; v += 2) {
            _mm_prefetch(next + AHEAD, _MM_HINT_T0);
            const __m512i two = _mm512_loadu_si512(next);
            w[v] = widened(_mm512_and_si512(two, low), steps[v]);
            w[v + 1] = widened(_mm512_and_si512(_mm512_srli_epi16(two, 4), low), steps[v + 1]);
            next += 64;
        }
    }
};

template <int ROWS, class Weights>
static inline void panel(const QuantizedRows& job, Weights weights, long number, long row) {
    const long stride = padded(job);
    const unsigned char* x = (const unsigned char*)job.scratch + row * stride;
    __m512i sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_si512();
    for (long first = 0; first < stride; first += GROUP) {
        weights.open_group();
        for (long i = first; i < first + GROUP; i += 4) {
            __m512i w[VECTORS];
            weights.take(w);
            for (int r = 0; r < ROWS; r++) {
                int four;
                __builtin_memcpy(&four, x + r * stride + i, 4);
                for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], _mm512_set1_epi32(four), w[v]);
            }
        }
    }
    for (int v = 0; v < VECTORS; v++) {
        const long output = number * OUTPUTS + v * WIDTH;
        if (output >= job.out_features) break;
        const __mmask16 mask = mask_of(job.out_features - output);
        const __m512i offset = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, job.sums + output), 7);
        const __m512 scales = _mm512_maskz_loadu_ps(mask, job.scales + output);
        for (int r = 0; r < ROWS; r++) {
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(job.row_scales[row + r]));
            finish(job, _mm512_sub_epi32(sums[r][v], offset), row + r, output, mask, scale);
        }
    }
}

template <class Weights>
static void all_rows(const QuantizedRows& job, Weights weights, long number) {
    long row = 0;
    for (; row + MOST <= job.rows; row += MOST) panel<MOST>(job, weights, number, row);
    switch (job.rows - row) {
        case 1: panel<1>(job, weights, number, row); break;
        case 2: panel<2>(job, weights, number, row); break;
        case 3: panel<3>(job, weights, number, row); break;
        case 4: panel<4>(job, weights, number, row); break;
        case 5: panel<5>(job, weights, number, row); break;
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
        if (job.bits == 8) {
            all_rows(job, Bytes{weight}, number);
        } else if (job.rows <= MOST) {
            all_rows(job, Nibbles{weight, {}}, number);
        } else {
            char* wide = job.panels + omp_get_thread_num() * padded(job) * OUTPUTS;
            for (long i = 0; i < padded(job); i += BLOCK) weight = widen(weight, wide + i * OUTPUTS);
            all_rows(job, Bytes{wide}, number);
        }
    }
}

}  // namespace avx512_vnni
#endif
