// What a kernel is told, and the table of the kernels that this processor runs.
#pragma once

struct bf16 { unsigned short bits; };

constexpr long SERIAL = 1 << 14;  // numbers; below, a second thread costs more than it saves

struct RmsNorm { void* out; const void *x, *weight; long rows, size; float eps; };
struct Activation { void* out; const void* x; long rows, size; };
struct CacheWrite {
    void *qkv, *cache; const long* slots; const float *cos, *sin; const void *query_norm, *key_norm; float eps;
    long rows, num_heads, num_kv_heads, head_dim, turned;
};
struct SplitRotated { void *q, *k, *v; const void* qkv; const float *cos, *sin; long stride, rows, num_heads, head_dim; };
struct Attend {
    void* out; const void *q, *cache; const int *tables, *lengths; float* scratch; float scale;
    const long* starts; long rows, q_stride, table_stride, block_size, num_heads, num_kv_heads, head_dim, part, num_threads;
};

// A few rows times a weight that lies in panels: of `vectors` · 16 outputs, and within a panel by pairs of inputs.
struct FewRows {
    void* out; const void *x, *weight, *bias, *residual;  // bias and residual may be null
    long rows, in_features, out_features, vectors, panel_bytes;
};

// The same with a weight in int8 and activations that are quantised by rows: panels of 64 outputs, within a panel by
// four inputs. `sums` of each output's weights. scratch: a row of bytes for each row.
constexpr long MAX_FEW_ROWS = 16;
struct FewRowsInt8 {
    void* out; const void *x, *weight, *bias, *residual; const int* sums; const float* scales; unsigned char* scratch;
    long rows, in_features, out_features, panel_bytes; bool is_half;
};

// The next token of each of `rows` sequences, whose states lie in slots of `slot_stride` floats.
struct DeltaStep {
    float *out, *memory; const long* slots; const float *q, *k, *v, *fade, *share;
    long rows, slot_stride, num_heads, num_key_heads, key_dim, value_dim;
};

struct Kernels {
    void (*rms_norm)(const RmsNorm&);
    void (*silu_mul)(const Activation&);
    void (*quick_gelu)(const Activation&);
    void (*gelu_tanh)(const Activation&);
    void (*write_cache)(const CacheWrite&);
    void (*split_rotated)(const SplitRotated&);
    void (*attend)(const Attend&);
    void (*delta_step)(const DeltaStep&);
};

namespace base { Kernels table(bool is_half); }
#if defined(__x86_64__)
namespace avx2 { Kernels table(bool is_half); }
namespace avx512 { Kernels table(bool is_half); }
namespace avx512_vnni { void few_rows(const FewRowsInt8&); }
namespace avx512_bf16 { void few_rows(const FewRows&); }
#endif
