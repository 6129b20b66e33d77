// Rows in bfloat16 times a weight with a scale for each group of inputs, in the tiles of AMX. A part of the weight is made
// dense, in bfloat16, and multiplied with all rows while it is in the first cache. Sums are in float.
//
// A tile of the weight has 16 outputs as they lie in memory, one of x 16 rows, in the order that tiles want.
#include "kernels.h"
#if defined(HAS_AMX)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#include <immintrin.h>

#include "amx_tiles.h"
#include "threads.h"
#define ISA amx_grouped
#define LANES 16

namespace amx_grouped {

#include "vectors.inc"
#include "grouped_weight.inc"

constexpr long TILE = 16, PAIR = 2 * TILE;  // outputs or rows
constexpr long STEP = 32, SPAN = 256;       // inputs of a tile, and of a part of the weight
constexpr long NEAR = 5 << 18;              // bytes of x that stay in the second cache while the weight passes by

// What is known of a job.
struct Layout {
    const GroupedRows& job;
    const long padded, num_groups, blocks, row_bytes, block_bytes;
    char* const x;        // [blocks of rows, padded / 2, TILE, 2]
    float* const totals;  // [threads, pairs of blocks, PAIR outputs, PAIR rows]
    explicit Layout(const GroupedRows& given)
        : job(given), padded(grouped_inputs(given)), num_groups(grouped_groups(given)), blocks((given.rows + TILE - 1) / TILE),
          row_bytes(given.kind == INT4 ? padded / 2 : padded), block_bytes(2 * TILE * padded), x(given.scratch),
          totals((float*)(x + blocks * block_bytes)) {}
    // Blocks, an even number, whose x stays near: parts of one size.
    long at_once() const {
        const long fitting = NEAR / block_bytes / 2, most = fitting ? fitting : 1, pairs = (blocks + 1) / 2;
        const long parts = (pairs + most - 1) / most;
        return (pairs + parts - 1) / parts * 2;
    }
    long totals_of_thread() const { return at_once() / 2 * PAIR * PAIR; }
};

long scratch(const GroupedRows& job) {
    const Layout layout(job);
    return (char*)(layout.totals + omp_get_max_threads() * layout.totals_of_thread()) - job.scratch;
}

// A row among those of its block. Behind the last row anything may stand: its products are not read.
static void put(const Layout& layout, long row) {
    char* out = layout.x + row / TILE * layout.block_bytes + row % TILE * 4;
    for (long i = 0; i < layout.padded; i += LANES) {
        int pairs[LANES / 2];
        store((bf16*)pairs, inputs(layout.job, row, i));
        for (int k = 0; k < LANES / 2; k++, out += 64) __builtin_memcpy(out, pairs + k, 4);
    }
}

// ---- The weight

// Inputs of one group, from `i` to `stop`, of an output.
template <int KIND>
static inline void open_group(const char* numbers, long i, long stop, int zero, float scale, bf16* out) {
    if constexpr (KIND == INT4) {  // what each number of 4 bits stands for
        const vi all = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh((__m512)(to_floats(all - zero) * scale)));
        for (; i < stop; i += STEP, out += STEP) {
            const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(numbers + i / 2)));
            const __m256i low = _mm256_and_si256(both, _mm256_set1_epi16(15)), high = _mm256_srli_epi16(both, 4);
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), table));
        }
    } else if (KIND == FP8 && !has_nan(numbers + i, stop - i)) {
        scale *= FP8_FACTOR;
        for (; i < stop; i += STEP, out += STEP) {
            const vf low = from_fp8(numbers + i) * scale, high = from_fp8(numbers + i + LANES) * scale;
            _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
        }
    } else {
        for (; i < stop; i += STEP, out += STEP) {
            const vf low = numbers_at<KIND>(numbers, i, zero) * scale, high = numbers_at<KIND>(numbers, i + LANES, zero) * scale;
            _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
        }
    }
}

template <int KIND>
static inline void open_output(const Layout& layout, const Output& of, long start, long stop, bf16* out) {
    for (long i = start, end; i < stop; i = end) {
        const long group = i / layout.job.group_size, behind = (group + 1) * layout.job.group_size;
        end = behind < stop ? behind : stop;
        if (group < layout.num_groups)
            open_group<KIND>(of.numbers, i, end, zero_of<KIND>(of, (int)group), of.scales[group], out + i - start);
        else
            __builtin_memset(out + i - start, 0, (end - i) * sizeof(bf16));
    }
}

// ---- Products

// Tiles 0 to 3 are sums, 4 and 5 the weight, 6 and 7 x. Pointers are in parentheses, since early versions of gcc 11 add to them as to numbers of bytes.
// `BLOCKS` blocks of rows times opened inputs of PAIR outputs, added to totals.
template <int BLOCKS>
static inline void multiply(const bf16* weight, long num_inputs, const char* x, long block_bytes, float* totals) {
    asm volatile("" ::: "memory");  // gcc does not know that tiles are loaded from memory
    _tile_loadd(0, totals, 4 * PAIR);
    _tile_loadd(1, (totals + TILE * PAIR), 4 * PAIR);
    if (BLOCKS == 2) _tile_loadd(2, (totals + TILE), 4 * PAIR);
    if (BLOCKS == 2) _tile_loadd(3, (totals + TILE * PAIR + TILE), 4 * PAIR);
    constexpr long BYTES = 2 * TILE * STEP;  // of a tile
    for (long i = 0; i < num_inputs; i += STEP, x += BYTES) {
        for (long line = BYTES; line < 2 * BYTES && BLOCKS == 2; line += 64) {  // the next tiles
            _mm_prefetch(x + line, _MM_HINT_T0);
            _mm_prefetch(x + block_bytes + line, _MM_HINT_T0);
        }
        _tile_loadd(6, x, 64);
        _tile_loadd(4, (weight + i), 2 * SPAN);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, (weight + TILE * SPAN + i), 2 * SPAN);
        _tile_dpbf16ps(1, 5, 6);
        if (BLOCKS == 2) _tile_loadd(7, x + block_bytes, 64);
        if (BLOCKS == 2) _tile_dpbf16ps(2, 4, 7);
        if (BLOCKS == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, totals, 4 * PAIR);
    _tile_stored(1, (totals + TILE * PAIR), 4 * PAIR);
    if (BLOCKS == 2) _tile_stored(2, (totals + TILE), 4 * PAIR);
    if (BLOCKS == 2) _tile_stored(3, (totals + TILE * PAIR + TILE), 4 * PAIR);
    asm volatile("" ::: "memory");
}

static inline void write(const GroupedRows& job, vf y, long row, long output, long width) {
    const long at = row * job.out_features + output;
    const bf16 *bias = (const bf16*)job.bias + output, *residual = (const bf16*)job.residual + at;
    bf16* out = (bf16*)job.out + at;
    if (width == TILE) {
        if (job.bias) y += load(bias);
        if (job.residual) y += load(residual);
        store(out, y);
        return;
    }
    for (long i = 0; i < width; i++) {
        float one = y[i];
        if (job.bias) one += to_float(bias[i]);
        if (job.residual) one += to_float(residual[i]);
        from_float(out + i, one);
    }
}

// Totals of 16 outputs to the rows of their block.
static void finish(const Layout& layout, const float* totals, long block, long output) {
    const GroupedRows& job = layout.job;
    const long left = job.out_features - output, width = left < TILE ? left : TILE;
    __m512i r[TILE];
    for (int i = 0; i < TILE; i++) r[i] = _mm512_load_si512(totals + i * PAIR);
    transpose(r);
    for (long i = 0, row = block * TILE; i < TILE && row < job.rows; i++, row++) write(job, (vf)r[i], row, output, width);
}

// The blocks of rows from `first` to `stop` times PAIR outputs.
template <int KIND>
static void panel(const Layout& layout, float* totals, long output, long first, long stop) {
    alignas(64) bf16 weight[PAIR][SPAN];
    const long last = layout.job.out_features - 1, bytes = SPAN * layout.row_bytes / layout.padded;
    Output outputs[PAIR];
    for (long o = 0; o < PAIR; o++)
        outputs[o] = output_of(layout.job, layout.row_bytes, layout.num_groups, output + o < last ? output + o : last);
    __builtin_memset(totals, 0, (stop - first + 1) / 2 * PAIR * PAIR * sizeof(float));
    for (long start = 0; start < layout.padded; start += SPAN) {
        const long end = start + SPAN < layout.padded ? start + SPAN : layout.padded;
        // Asks for the numbers behind these, or for those of the next outputs.
        const long next = end < layout.padded ? end * layout.row_bytes / layout.padded : PAIR * layout.row_bytes;
        for (long o = 0; o < PAIR; o++) {
            for (long i = 0; i < bytes; i += 64) _mm_prefetch(outputs[o].numbers + next + i, _MM_HINT_T0);
            open_output<KIND>(layout, outputs[o], start, end, weight[o]);
        }
        float* of_pair = totals;
        for (long block = first; block < stop; block += 2, of_pair += PAIR * PAIR) {
            const char* x = layout.x + block * layout.block_bytes + start * 2 * TILE;
            if (stop - block == 1) multiply<1>(weight[0], end - start, x, layout.block_bytes, of_pair);
            else multiply<2>(weight[0], end - start, x, layout.block_bytes, of_pair);
        }
    }
    for (long block = first; block < stop; block++) {
        const float* of_block = totals + (block - first) / 2 * PAIR * PAIR + (block - first) % 2 * TILE;
        for (long o = 0; o < PAIR && output + o < layout.job.out_features; o += TILE)
            finish(layout, of_block + o * PAIR, block, output + o);
    }
}

void rows(const GroupedRows& job) {
    const Layout layout(job);
    #pragma omp parallel for if (job.rows > 4)
    for (long row = 0; row < job.rows; row++) put(layout, row);
    const auto multiply = job.kind == INT4 ? panel<INT4> : job.kind == INT8 ? panel<INT8> : panel<FP8>;
    const long count = (job.out_features + PAIR - 1) / PAIR, at_once = layout.at_once();
    const long share = count / (4 * omp_get_max_threads()), chunk = share ? share : 1;
    #pragma omp parallel
    {
        float* totals = layout.totals + omp_get_thread_num() * layout.totals_of_thread();
        _tile_loadconfig(&WHOLE_TILES);
        for (long block = 0; block < layout.blocks; block += at_once) {
            const long stop = block + at_once < layout.blocks ? block + at_once : layout.blocks;
            #pragma omp for schedule(dynamic, chunk)
            for (long number = 0; number < count; number++) multiply(layout, totals, number * PAIR, block, stop);
        }
        _tile_release();
    }
}

}  // namespace amx_grouped
#endif
