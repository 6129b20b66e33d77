// Attention of many rows for processors with AMX, whose registers are tiles.
#include "kernels.h"
#if defined(HAS_AMX)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>

#include "threads.h"

namespace amx_bf16 {

static inline void begin() {
    struct alignas(64) { unsigned char palette, start, reserved[14]; unsigned short bytes[16]; unsigned char rows[16]; } sizes = {};
    sizes.palette = 1;
    for (int tile = 0; tile < 8; tile++) sizes.bytes[tile] = 64, sizes.rows[tile] = 16;
    __asm__ volatile("" ::"r"(&sizes) : "memory");  // GCC 12 takes what is loaded here for unused
    _tile_loadconfig(&sizes);
}
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
        _tile_loadd(1, out + 256, 64);
        if (A == 2) _tile_loadd(2, out + 512, 64);
        if (A == 2) _tile_loadd(3, out + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (A == 2) _tile_zero(2);
        if (A == 2) _tile_zero(3);
    }
    for (long step = 0; step < steps; step++, a += 1024, b += 1024) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, 64);
        _tile_loadd(7, b + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (A == 2) _tile_loadd(5, a + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (A == 2) _tile_dpbf16ps(2, 5, 6);
        if (A == 2) _tile_dpbf16ps(3, 5, 7);
        beside(step * share, (step + 1) * share);
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    if (A == 2) _tile_stored(2, out + 512, 64);
    if (A == 2) _tile_stored(3, out + 768, 64);
    beside(steps * share, PARTS);
    __asm__ volatile("" ::: "memory");
}

#include "attend_rows.inc"

}  // namespace amx_bf16
#endif
