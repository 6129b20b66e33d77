// Attention of many rows for processors with AMX, whose registers are tiles.
#include "kernels.h"
#if defined(HAS_AMX)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>

#include "amx_tiles.h"
#include "threads.h"
#define ISA amx_bf16
#define LANES 16

namespace amx_bf16 {

#include "vectors.inc"

static inline void begin() { _tile_loadconfig(&WHOLE_TILES); }
static inline void end() { _tile_release(); }

// out = a · b, or out += a · b: A by 2 tiles, over `steps`. Each step has two tiles of a, of which A are used, and two of b.
constexpr long PARTS = 8;

// `beside` does its parts while tiles are multiplied, before the products are stored: behind a store that waits for its
// tile nothing gets ahead. It gains some percent; beside tiles a Xeon has half as many vectors of floats per clock.
template <int A, class Beside>
static inline void multiply(float* out, const bf16* a, const bf16* b, long steps, bool adds, Beside&& beside) {
    const long share = PARTS / steps;
    __asm__ volatile("" ::: "memory");  // the compiler does not see what tiles read and write
    if (adds) {
        _tile_loadd(0, out, 64);
        _tile_loadd(1, (out + 256), 64);
        if (A == 2) _tile_loadd(2, (out + 512), 64);
        if (A == 2) _tile_loadd(3, (out + 768), 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (A == 2) _tile_zero(2);
        if (A == 2) _tile_zero(3);
    }
    for (long step = 0; step < steps; step++, a += 1024, b += 1024) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, 64);
        _tile_loadd(7, (b + 512), 64);
        _tile_dpbf16ps(0, 4, 6);
        if (A == 2) _tile_loadd(5, (a + 512), 64);
        _tile_dpbf16ps(1, 4, 7);
        if (A == 2) _tile_dpbf16ps(2, 5, 6);
        if (A == 2) _tile_dpbf16ps(3, 5, 7);
        beside(step * share, (step + 1) * share);
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, (out + 256), 64);
    if (A == 2) _tile_stored(2, (out + 512), 64);
    if (A == 2) _tile_stored(3, (out + 768), 64);
    beside(steps * share, PARTS);
    __asm__ volatile("" ::: "memory");
}

#include "attend_rows.inc"
#include "delta.inc"
#include "delta_net.inc"
#include "half_products.inc"

// Two by two tiles of c, or two by one.
template <int B>
static inline void product_tiles(const DeltaProduct<bf16>& job, float* c, const bf16* a, const bf16* b) {
    const long c_bytes = 4 * job.c_stride, a_bytes = 2 * job.a_stride, b_bytes = 4 * job.b_stride;
    float* lower = c + 16 * job.c_stride;
    __asm__ volatile("" ::: "memory");  // the compiler does not see what tiles read and write
    if (job.factor == 0) {
        _tile_zero(0);
        _tile_zero(2);
        if (B == 2) _tile_zero(1);
        if (B == 2) _tile_zero(3);
    } else {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(2, lower, c_bytes);
        if (B == 2) _tile_loadd(1, (c + 16), c_bytes);
        if (B == 2) _tile_loadd(3, (lower + 16), c_bytes);
    }
    for (long k = 0; k < job.depth; k += 32) {
        const bf16* right = b + k * job.b_stride;
        _tile_loadd(6, right, b_bytes);
        _tile_loadd(4, (a + k), a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, (a + 16 * job.a_stride + k), a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (B == 2) _tile_loadd(7, (right + 32), b_bytes);
        if (B == 2) _tile_dpbf16ps(1, 4, 7);
        if (B == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(2, lower, c_bytes);
    if (B == 2) _tile_stored(1, (c + 16), c_bytes);
    if (B == 2) _tile_stored(3, (lower + 16), c_bytes);
    __asm__ volatile("" ::: "memory");
}

void HalfProducts::multiply(const DeltaProduct<bf16>& job) {
    if (job.factor != 0 && job.factor != 1)
        for (long row = 0; row < job.rows; row++)
            for (long i = 0; i < job.columns; i += LANES)
                store(job.c + row * job.c_stride + i, job.factor * load(job.c + row * job.c_stride + i));
    for (long row = 0; row < job.rows; row += 32) {
        float* c = job.c + row * job.c_stride;
        const bf16* a = job.a + row * job.a_stride;
        long column = 0;
        for (; column + 32 <= job.columns; column += 32) product_tiles<2>(job, c + column, a, job.b + 2 * column);
        if (column < job.columns) product_tiles<1>(job, c + column, a, job.b + 2 * column);
    }
}

void delta_net_half(const DeltaNet& job) { delta_net<bf16, HalfProducts>(job); }

}  // namespace amx_bf16
#endif
