// Quantises weights to the 4 bits that the kernels of quantised products read, as `quantize_int4` in int4.py does with
// torch. For processors with AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "avx512_rows.h"
#include "threads.h"

namespace avx512_int4 {

constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
constexpr int HALVES = GROUP / WIDTH;

// How a group of one output is rounded: to (q - zero) · size.
struct Rounded {
    float size, zero, error;
    __m512 q[HALVES];
};

static inline float within(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

static inline Rounded round_to(const __m512 (&x)[HALVES], float size, float zero) {
    Rounded found{size, zero, 0, {}};
    const __m512 sizes = _mm512_set1_ps(size), zeros = _mm512_set1_ps(zero);
    const __m512 least = _mm512_set1_ps(std::fmax(zero - std::floor(128 / size), 0.0f));
    const __m512 most = _mm512_set1_ps(std::fmin(zero + std::floor(127 / size), 15.0f));
    __m512 errors = _mm512_setzero_ps();
    for (int h = 0; h < HALVES; h++) {
        const __m512 q = _mm512_add_ps(_mm512_roundscale_ps(_mm512_div_ps(x[h], sizes), NEAREST), zeros);
        found.q[h] = _mm512_min_ps(_mm512_max_ps(q, least), most);
        const __m512 off = _mm512_sub_ps(_mm512_mul_ps(_mm512_sub_ps(found.q[h], zeros), sizes), x[h]);
        errors = _mm512_fmadd_ps(off, off, errors);
    }
    found.error = _mm512_reduce_add_ps(errors);
    return found;
}

// Of the sizes around the one that covers the range, the one with the least squared error.
static inline Rounded best_of(const __m512 (&x)[HALVES]) {
    __m512 least = _mm512_setzero_ps(), most = least;
    for (int h = 0; h < HALVES; h++) {
        least = _mm512_min_ps(least, x[h]);
        most = _mm512_max_ps(most, x[h]);
    }
    const float low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most);
    const float covering = std::nearbyint((high - low) / 15), middle = (low + high) / 2;
    Rounded best{};
    for (float step : {0.0f, -1.0f, 1.0f}) {
        const float size = within(covering + step, 1, 16);
        const Rounded found = round_to(x, size, within(std::nearbyint(7.5f - middle / size), 0, 15));
        if (step == 0 || found.error < best.error) best = found;
    }
    return best;
}

// One output's numbers to their places in a panel, whose bytes are zero before.
static void output(const Int4Weight& job, long number) {
    const long size = job.in_features, start = number * size, place = number % OUTPUTS;
    char* panel = (char*)job.numbers + number / OUTPUTS * job.panel_bytes;
    __m512 largest = _mm512_set1_ps(1e-8f);
    for (long i = 0; i < size; i += WIDTH)
        largest = _mm512_max_ps(largest, _mm512_abs_ps(load(job.weight, start + i, mask_of(size - i), job.is_half)));
    const float scale = _mm512_reduce_max_ps(largest) / 127;
    const __m512 scales = _mm512_set1_ps(scale);
    const int shift = place / WIDTH % 2 * 4;
    float sum = 0;
    for (long first = 0; first < size; first += GROUP, panel += OUTPUTS + OUTPUTS * GROUP / 2) {
        __m512 x[HALVES];
        for (int h = 0; h < HALVES; h++) {
            const long i = first + h * WIDTH;
            x[h] = _mm512_div_ps(load(job.weight, start + i, mask_of(size - i), job.is_half), scales);
        }
        const Rounded best = best_of(x);
        panel[place] = (char)((int)best.size - 1 + 16 * (int)best.zero);
        alignas(64) unsigned char q[GROUP];
        for (int h = 0; h < HALVES; h++) {
            _mm_store_si128((__m128i*)(q + h * WIDTH), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(best.q[h])));
            sum += best.size * _mm512_reduce_add_ps(_mm512_sub_ps(best.q[h], _mm512_set1_ps(best.zero)));
        }
        for (long i = 0; i < GROUP; i += 4) {
            char* four = panel + OUTPUTS + i * OUTPUTS / 2 + place / (2 * WIDTH) * 64 + place % WIDTH * 4;
            int before, more;
            std::memcpy(&before, four, 4);
            std::memcpy(&more, q + i, 4);
            before |= more << shift;  // numbers have 4 bits: none reaches its neighbour's byte
            std::memcpy(four, &before, 4);
        }
    }
    job.scales[number] = scale;
    job.sums[number] = (int)sum;
}

void quantize(const Int4Weight& job) {
    const long count = (job.out_features + OUTPUTS - 1) / OUTPUTS;
    #pragma omp parallel for schedule(dynamic)
    for (long number = 0; number < count; number++) {
        std::memset((char*)job.numbers + number * job.panel_bytes, 0, job.panel_bytes);
        const long stop = (number + 1) * OUTPUTS < job.out_features ? (number + 1) * OUTPUTS : job.out_features;
        for (long one = number * OUTPUTS; one < stop; one++) output(job, one);
    }
}

}  // namespace avx512_int4
#endif
