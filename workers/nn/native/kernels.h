// What a kernel is told, and the table of the kernels that this processor runs.
#pragma once

struct bf16 { unsigned short bits; };
struct i8 { signed char bits; };
struct e4m3 { unsigned char bits; };  // a float: sign, 4 bits of exponent, 3 behind

constexpr long SERIAL = 1 << 14;  // numbers; below, a second thread costs more than it saves

// `is_wide`: the weights of norms are in float.
struct RmsNorm { void* out; const void *x, *weight; long rows, size; float eps; bool is_wide; };
struct Activation { void* out; const void* x; long rows, size; };
// What a cache of keys and values has: numbers as queries are, or 8 bits with a scale for each head of each token.
enum CacheKind : long { AS_QUERIES, WHOLE_NUMBERS, SMALL_FLOATS };
struct CacheWrite {
    void *qkv, *cache; float* scales; const long* slots; const float *cos, *sin; const void *query_norm, *key_norm; float eps;
    long rows, num_heads, num_kv_heads, head_dim, turned; bool is_wide; CacheKind kind;
};
// Rows of such a cache in 8 bits, in the type of queries; `num_heads`: of keys and of values together.
struct CacheRead { void* out; const void* cache; const float* scales; const long* slots; long rows, num_heads, head_dim; CacheKind kind; };
struct SplitRotated { void *q, *k, *v; const void* qkv; const float *cos, *sin; long stride, rows, num_heads, head_dim; };
struct Attend {
    void* out; const void *q, *cache; const float* scales; const int *tables, *lengths; float* scratch; float scale;
    const long* starts; long rows, q_stride, table_stride, block_size, num_heads, num_kv_heads, head_dim, part, num_threads;
    CacheKind kind;
};

// A few rows times a weight that lies in panels: of `vectors` · 16 outputs, and within a panel by pairs of inputs.
struct FewRows {
    void* out; const void *x, *weight, *bias, *residual;  // bias and residual may be null
    long rows, in_features, out_features, vectors, panel_bytes;
};

// Rows that are quantised to 8 bits, each with a scale of its own, times a weight of 8 or 4 bits with a scale for each
// output, plus bias and residual. The weight lies in panels of 64 outputs; within a panel by four inputs, padded to a
// multiple of BLOCK. Of 4 bits each group of inputs begins with 64 bytes, its steps in whole numbers of the scale.
constexpr long BLOCK = 64, GROUP = 32;  // inputs
struct QuantizedRows {
    void* out; const void *x, *weight, *bias, *residual;  // bias and residual may be null
    const int* sums; const float* scales;  // of each output: its weights' sum, and its scale
    char* scratch; float* row_scales; char* panels;  // x in 8 bits; of 4 bits a panel in 8 for each thread, for
                                                       // AVX2 the sum of each group of x
    long rows, in_features, out_features, panel_bytes, bits; bool is_half;
};
static inline long padded(const QuantizedRows& job) { return (job.in_features + BLOCK - 1) / BLOCK * BLOCK; }

// Rows times a weight of numbers with a scale for each group of inputs, as workers/nn/weights/grouped.py lays it out, plus
// bias and residual. `kind`: 0 for 4 bits, 1 for 8, 2 for e4m3. `order` says which input of x stands where in the layout.
// To widen a weight only `out` [out_features, num_inputs], the weight and the sizes are told.
struct GroupedRows {
    void* out; const void *x, *numbers; const float* scales; const unsigned char* zeros;  // zeros may be null
    const void *bias, *residual; const long* order;  // each may be null
    char* scratch; long rows, in_features, num_inputs, out_features, kind, group_size; bool is_quantized, is_half;
};
static inline long grouped_inputs(const GroupedRows& job) { return (job.num_inputs + 127) / 128 * 128; }
static inline long grouped_groups(const GroupedRows& job) { return (job.num_inputs + job.group_size - 1) / job.group_size; }

// Rows in float times a weight of 16 bits [out_features, in_features], plus bias and residual, which may be null.
struct HalfRows {
    float* out; const float* x; const unsigned short* weight; const float *bias, *residual;
    long rows, in_features, out_features; bool is_bf16;
};

// Words of a file, each with eight numbers of 4 bits, into that layout. A word has eight outputs of one input
// (`has_outputs`; `skipped` of the first word are left out), or eight inputs of one output. `order` says which input stands
// where in the layout, and may be null. num_inputs: a multiple of 32. Strides are in words, that of `out` in bytes.
struct Repack {
    unsigned char* out; const unsigned* words; const long* order;
    long out_stride, num_outputs, num_inputs, input_stride, output_stride, skipped; bool has_outputs;
};

// Attention of many rows in bfloat16. A segment's places are rows of q, of out and of the keys; with `blocks`, the
// first of its blocks. The last segment is only the end of the others. The last two numbers are the kernel's own.
// `packed` has room for so many heads of keys of all segments at once, or with `heads_at_once` 0 for one head of the
// longest segment for each thread, `packed_each` numbers.
struct RowsSegment { long q_at, out_at, keys_at, rows, keys, first_chunk, first_task; };
struct RowsAttend {
    void* out; const void *q, *keys, *values; const int* blocks; RowsSegment* segments; char* scratch; bf16* packed; float scale;
    long num_segments, q_stride, q_head, out_stride, out_head, key_stride, key_head, block_size, num_heads, num_kv_heads,
        head_dim, heads_at_once, packed_each, num_threads;
    bool is_causal;
};

// A weight to be quantised to such panels of 4 bits.
struct Int4Weight { void* numbers; int* sums; float* scales; const void* weight; long out_features, in_features, panel_bytes; bool is_half; };

// The next token of each of `rows` sequences, whose states lie in slots of `slot_stride` floats.
struct DeltaStep {
    float *out, *memory; const long* slots; const float *q, *k, *v, *fade, *share;
    long rows, slot_stride, num_heads, num_key_heads, key_dim, value_dim;
};

// Sequences through what stands between the projections of a layer of Gated DeltaNet. A sequence: its slot, its first row
// of x, z, b, a and out, its tokens, the tokens before them, and where in `targets` the rows are to which the state behind
// each of its tokens goes; -1: all goes to the slot. Rows of x have the channels of all queries, of all keys
// and of all values. `scratch` has `delta_net_bytes` for each thread.
struct DeltaSequence { long slot, first, count, start, targets; };
struct DeltaNet {
    void* out; const void *x, *z, *b, *a; const float *taps, *decay, *bias, *gain; void* inputs; float* memory;
    const DeltaSequence* sequences; const long* targets; char* scratch; float eps;
    long num_sequences, x_stride, z_stride, gate_stride, inputs_stride, memory_stride, channels, num_heads, num_key_heads, key_dim,
        value_dim, num_threads;
};
static inline long delta_net_bytes(long key_dim, long value_dim) {
    const long wider = key_dim > value_dim ? key_dim : value_dim;
    return 4 * (4 * 64 + 3 * 64 * 64 + 5 * 64 * key_dim + 5 * 64 * value_dim + 64 * wider + key_dim * value_dim);
}

struct Kernels {
    void (*rms_norm)(const RmsNorm&);
    void (*silu_mul)(const Activation&);
    void (*quick_gelu)(const Activation&);
    void (*gelu_tanh)(const Activation&);
    void (*write_cache)(const CacheWrite&);
    void (*read_cache)(const CacheRead&);
    void (*split_rotated)(const SplitRotated&);
    void (*attend)(const Attend&);
    void (*delta_step)(const DeltaStep&);
    void (*delta_net)(const DeltaNet&);
};

namespace base { Kernels table(bool is_half); void repack(const Repack&); }
#if defined(__x86_64__)
namespace avx2 { Kernels table(bool is_half); }
namespace avx512 { Kernels table(bool is_half); }
namespace avx2_half { void rows(const HalfRows&); }
namespace avx2_quantized { void rows(const QuantizedRows&); }
namespace avx512_vnni { void rows(const QuantizedRows&); }
namespace avx2_grouped { long scratch(const GroupedRows&); void rows(const GroupedRows&); void widen(const GroupedRows&); }
namespace avx512_grouped { long scratch(const GroupedRows&); void rows(const GroupedRows&); void widen(const GroupedRows&); }
namespace avx512_int4 { void quantize(const Int4Weight&); }
namespace avx512_bf16 {
void few_rows(const FewRows&);
void attend_rows(const RowsAttend&);
long attend_rows_scratch(long head_dim);
void delta_net_half(const DeltaNet&);
}
#if !defined(NO_AMX)
#define HAS_AMX
namespace amx_int8 { bool is_supported(); void rows(const QuantizedRows&); }
namespace amx_grouped { long scratch(const GroupedRows&); void rows(const GroupedRows&); }
namespace amx_bf16 {
void attend_rows(const RowsAttend&);
long attend_rows_scratch(long head_dim);
void delta_net_half(const DeltaNet&);
}
#endif
#endif
