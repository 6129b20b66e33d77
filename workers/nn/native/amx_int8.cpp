// Products of rows, quantised here to 8 bits, with a weight in int8 or int4, in the tiles of AMX-INT8. oneDNN packs
// weights in int8 as the tiles take them.
#if defined(__x86_64__)
#include "kernels.h"
#if defined(__linux__) && (__GNUC__ >= 11 || defined(__clang__))
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-int8,prefer-vector-width=512")
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_tiles.h"
#include "avx512_rows.h"
#include "threads.h"

namespace amx_int8 {

constexpr long TILE_ROWS = 16, TILE = TILE_ROWS * BLOCK;  // bytes
constexpr long NEAR = 5 << 18;  // bytes of x that stay in the second cache while the panels pass by

// Numbers that were written before are in memory: gcc does not know that tiles are loaded from there.
static inline void settle() { asm volatile("" ::: "memory"); }

bool is_supported() {
    static const bool found = [] {
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (3u << 24))) return false;
        return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // the kernel gives tiles to processes that ask
    }();
    return found;
}

// Tiles of 16 rows and 64 inputs: all blocks of inputs of 16 rows, one behind the other.
static void quantize(const QuantizedRows& job, long row) {
    const long start = row * job.in_features, size = padded(job);
    char* out = job.scratch + row / TILE_ROWS * TILE_ROWS * size + row % TILE_ROWS * BLOCK;
    const float largest = largest_of(job, start);
    const __m512 scale = _mm512_set1_ps(127.0f / largest);
    for (long i = 0; i < size; i += WIDTH) {
        char* place = out + i / BLOCK * TILE + i % BLOCK;
        _mm_storeu_si128((__m128i*)place, _mm512_cvtsepi32_epi8(whole(job, start, i, scale)));
    }
    job.row_scales[row] = largest / 127.0f;
}

// sums[32][32] of 32 rows and 32 outputs. Meanwhile `lines` of each block of the `next` weight are fetched.
static void two_by_two(const char* x, const char* weight, long blocks, const char* next, long lines, int* sums) {
    const char* below = x + blocks * TILE;
    settle();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long i = 0; i < blocks; i++) {
        _tile_loadd(4, (x + i * TILE), BLOCK);
        _tile_loadd(6, (weight + i * STEP), 4 * OUTPUTS);
        _tile_loadd(7, (weight + i * STEP + BLOCK), 4 * OUTPUTS);
        _tile_loadd(5, (below + i * TILE), BLOCK);
        for (long line = 0; line < lines; line++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, (sums + 16), 128);
    _tile_stored(2, (sums + 16 * 32), 128);
    _tile_stored(3, (sums + 16 * 32 + 16), 128);
}

// 16 rows and one block of inputs, times a panel.
static inline void step_of_four(const char* x, const char* weight) {
    settle();
    _tile_loadd(4, x, BLOCK);
    _tile_loadd(5, weight, 4 * OUTPUTS);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, (weight + BLOCK), 4 * OUTPUTS);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(7, (weight + 2 * BLOCK), 4 * OUTPUTS);
    _tile_dpbssd(2, 4, 7);
    _tile_loadd(5, (weight + 3 * BLOCK), 4 * OUTPUTS);
    _tile_dpbssd(3, 4, 5);
}

// sums[16][64] of 16 rows and a panel's outputs. The weight comes from memory.
static void one_by_four(const QuantizedRows& job, const char* x, const char* weight, int* sums) {
    const long blocks = padded(job) / BLOCK;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (job.bits == 8) {
        for (long i = 0; i < blocks; i++) {
            for (long line = 0; line < STEP; line += 64) _mm_prefetch(weight + (i + 1) * STEP + line, _MM_HINT_T0);
            step_of_four(x + i * TILE, weight + i * STEP);
        }
    } else {
        alignas(64) char wide[2][STEP];  // two: tiles are loaded from one while the other is written
        weight = widen(weight, wide[0]);
        for (long i = 0; i < blocks; i++) {
            step_of_four(x + i * TILE, wide[i % 2]);
            if (i + 1 < blocks) weight = widen(weight, wide[(i + 1) % 2]);
        }
    }
    _tile_stored(0, sums, 256);
    _tile_stored(1, (sums + 16), 256);
    _tile_stored(2, (sums + 32), 256);
    _tile_stored(3, (sums + 48), 256);
}

static void finish_rows(const QuantizedRows& job, const int* sums, long width, long row, long count, long output) {
    for (long v = 0; v < width; v += WIDTH) {
        const __mmask16 mask = mask_of(job.out_features - output - v);
        if (!mask) break;
        const __m512 scales = _mm512_maskz_loadu_ps(mask, job.scales + output + v);
        for (long r = 0; r < count && row + r < job.rows; r++) {
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(job.row_scales[row + r]));
            finish(job, _mm512_load_si512(sums + r * width + v), row + r, output + v, mask, scale);
        }
    }
}

// The rows from `row` to `stop` times a panel. `wide`: for weights in 8 bits.
static void panel(const QuantizedRows& job, char* wide, long number, long row, long stop) {
    alignas(64) int sums[2 * TILE_ROWS * 32];
    const char* weight = (const char*)job.weight + number * job.panel_bytes;
    const char* next = weight + job.panel_bytes;
    const long size = padded(job), blocks = size / BLOCK, output = number * OUTPUTS;
    if (stop - row <= TILE_ROWS) {
        one_by_four(job, job.scratch + row * size, weight, sums);
        finish_rows(job, sums, OUTPUTS, row, TILE_ROWS, output);
        return;
    }
    if (job.bits == 4) {
        for (long i = 0; i < blocks; i++) weight = widen(weight, wide + i * STEP);
        weight = wide;
    }
    const long pairs = (stop - row + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
    const long lines = (job.panel_bytes / 64 + 2 * pairs * blocks - 1) / (2 * pairs * blocks);
    for (long half = 0; half < OUTPUTS; half += 32) {
        for (long r = row; r < stop; r += 2 * TILE_ROWS) {
            two_by_two(job.scratch + r * size, weight + 4 * half, blocks, next, lines, sums);
            next += 64 * lines * blocks;
            finish_rows(job, sums, 32, r, 2 * TILE_ROWS, output + half);
        }
    }
}

void rows(const QuantizedRows& job) {
    #pragma omp parallel for if (job.rows > 6)
    for (long row = 0; row < job.rows; row++) quantize(job, row);
    const long size = padded(job), count = (job.out_features + OUTPUTS - 1) / OUTPUTS;
    // Parts of one size, of whole pairs of tiles.
    const long most = NEAR / size > 2 * TILE_ROWS ? NEAR / size : 2 * TILE_ROWS, parts = (job.rows + most - 1) / most;
    const long part = (job.rows + 2 * TILE_ROWS * parts - 1) / (2 * TILE_ROWS * parts) * 2 * TILE_ROWS;
    const long share = count / (4 * omp_get_max_threads()), chunk = share ? share : 1;
    #pragma omp parallel
    {
        _tile_loadconfig(&WHOLE_TILES);
        for (long row = 0; row < job.rows; row += part) {
            const long stop = row + part < job.rows ? row + part : job.rows;
            #pragma omp for schedule(dynamic, chunk)
            for (long number = 0; number < count; number++)
                panel(job, job.panels + omp_get_thread_num() * size * OUTPUTS, number, row, stop);
        }
        _tile_release();
    }
}

}  // namespace amx_int8
#else
namespace amx_int8 {
bool is_supported() { return false; }
void rows(const QuantizedRows&) {}
}  // namespace amx_int8
#endif
#endif
