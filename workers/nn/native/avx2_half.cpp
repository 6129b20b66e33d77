// Rows in float times a weight of 16 bits that lies as in its file, each output's inputs side by side, plus bias and
// residual. For processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "kernels.h"
#include "threads.h"

namespace avx2_half {
namespace {

constexpr long VECTOR = 8, AHEAD = 512;  // numbers; the second: of weights that are asked for before they are used
constexpr int OUTPUTS = 4, MOST = 4, FEWER = 3;  // outputs of one row, rows at a time, and outputs of these
// Of many rows: inputs, so that those of MOST rows stay in the first cache, and numbers of weights, which stay in the second.
constexpr long INPUTS = 1536, WEIGHTS = 96 << 10;

template <bool IS_BF16>
__m256 load(const unsigned short* p) {
    const __m128i half = _mm_loadu_si128((const __m128i*)p);
    return IS_BF16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)) : _mm256_cvtph_ps(half);
}

float sum(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_hadd_ps(four, four);
    return _mm_cvtss_f32(_mm_hadd_ps(four, four));
}

struct Part { long start, stop; };

// Some inputs. `outs` and `rows`: how many there are; others repeat the last one, and are not kept.
template <bool IS_BF16, int ROWS, int OUTS>
void block(const HalfRows& job, Part inputs, long output, long outs, long row, long rows) {
    const long size = inputs.stop - inputs.start, whole = size / VECTOR * VECTOR;
    const float* x[ROWS];
    const unsigned short* w[OUTS];
    for (int r = 0; r < ROWS; r++) x[r] = job.x + (row + (r < rows ? r : rows - 1)) * job.in_features + inputs.start;
    for (int o = 0; o < OUTS; o++) w[o] = job.weight + (output + (o < outs ? o : outs - 1)) * job.in_features + inputs.start;
    const bool is_streamed = job.rows <= ROWS;  // else only the first rows find weights that no cache has
    __m256 sums[OUTS][ROWS];
    for (int o = 0; o < OUTS; o++)
        for (int r = 0; r < ROWS; r++) sums[o][r] = _mm256_setzero_ps();
    const auto add = [&](const float* const* some_x, const unsigned short* const* some_w, long i) {
        __m256 of_x[ROWS];
        for (int r = 0; r < ROWS; r++) of_x[r] = _mm256_loadu_ps(some_x[r] + i);
        for (int o = 0; o < OUTS; o++) {
            const __m256 of_w = load<IS_BF16>(some_w[o] + i);
            for (int r = 0; r < ROWS; r++) sums[o][r] = _mm256_fmadd_ps(of_w, of_x[r], sums[o][r]);
        }
    };
    for (long i = 0; i < whole; i += VECTOR) {
        if (is_streamed && i % (4 * VECTOR) == 0)
            for (int o = 0; o < OUTS; o++) _mm_prefetch((const char*)(w[o] + i + AHEAD), _MM_HINT_T0);
        add(x, w, i);
    }
    if (whole < size) {  // the last ones, with zeros behind
        float of_x[ROWS][VECTOR] = {};
        unsigned short of_w[OUTS][VECTOR] = {};
        const float* some_x[ROWS];
        const unsigned short* some_w[OUTS];
        for (int r = 0; r < ROWS; r++) some_x[r] = of_x[r], __builtin_memcpy(of_x[r], x[r] + whole, (size - whole) * sizeof(float));
        for (int o = 0; o < OUTS; o++) some_w[o] = of_w[o], __builtin_memcpy(of_w[o], w[o] + whole, (size - whole) * sizeof(short));
        add(some_x, some_w, 0);
    }
    for (long o = 0; o < outs; o++) {
        for (long r = 0; r < rows; r++) {
            const long at = (row + r) * job.out_features + output + o;
            float y = sum(sums[o][r]);
            if (inputs.start) y += job.out[at];
            else y += (job.bias ? job.bias[output + o] : 0.0f) + (job.residual ? job.residual[at] : 0.0f);
            job.out[at] = y;
        }
    }
}

long least(long a, long b) { return a < b ? a : b; }

template <bool IS_BF16, int ROWS, int OUTS>
void all(const HalfRows& job) {
    const long step = job.rows > ROWS && job.in_features > INPUTS ? INPUTS : job.in_features;
    const long fair = job.out_features / (4 * omp_get_max_threads()), fitting = job.rows > ROWS ? least(fair, WEIGHTS / step) : fair;
    const long outs = fitting > OUTS ? fitting / OUTS * OUTS : OUTS;  // at a time
    #pragma omp parallel for schedule(dynamic)
    for (long number = 0; number < (job.out_features + outs - 1) / outs; number++) {
        const long first = number * outs, stop = least(first + outs, job.out_features);
        for (long start = 0; start < job.in_features; start += step) {
            const Part inputs{start, least(start + step, job.in_features)};
            for (long row = 0; row < job.rows; row += ROWS)
                for (long output = first; output < stop; output += OUTS)
                    block<IS_BF16, ROWS, OUTS>(job, inputs, output, least(OUTS, stop - output), row, least(ROWS, job.rows - row));
        }
    }
}

}  // namespace

void rows(const HalfRows& job) {
    if (job.rows == 1) job.is_bf16 ? all<true, 1, OUTPUTS>(job) : all<false, 1, OUTPUTS>(job);
    else if (job.rows == 2) job.is_bf16 ? all<true, 2, OUTPUTS>(job) : all<false, 2, OUTPUTS>(job);
    else job.is_bf16 ? all<true, MOST, FEWER>(job) : all<false, MOST, FEWER>(job);
}

}  // namespace avx2_half
#endif
