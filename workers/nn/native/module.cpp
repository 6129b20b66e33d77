// The Python module: addresses and sizes in, nothing out. Its callers (operators.py, panels.py, quantized_panels.py) ask
// `takes` or read a layout before they pass an address.
#define PY_SSIZE_T_CLEAN

#include <Python.h>

#include <cstring>

#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr long INTERFACE = 10;  // to be raised with every change of arguments; operators.py has the same

struct Version {
    const char* name;
    bool (*is_supported)();
    Kernels (*table)(bool);
};

bool any() { return true; }
bool none() { return false; }
#if defined(__x86_64__)
// Conversions of floats of 16 bits: a name that GCC 10 does not know.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Version VERSIONS[] = {  // the best one first
#if defined(__x86_64__)
    {"avx512", has_avx512, avx512::table},
    {"avx2", has_avx2, avx2::table},
#endif
    {"base", any, base::table},
};

Kernels chosen[2];  // by `is_half`

struct Arguments {
    PyObject* const* values;
    void* address() { return PyLong_AsVoidPtr(*values++); }
    long number() { return PyLong_AsLong(*values++); }
    float real() { return (float)PyFloat_AsDouble(*values++); }
};

template <class Job>
PyObject* run(void (*kernel)(const Job&), const Job& job) {
    if (PyErr_Occurred()) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    kernel(job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

bool has_count(Py_ssize_t given, Py_ssize_t wanted) {
    if (given != wanted) PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", given, wanted);
    return given == wanted;
}

PyObject* rms_norm(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 8)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    RmsNorm job{a.address(), a.address(), a.address(), a.number(), a.number(), a.real(), a.number() != 0};
    return run(chosen[is_half].rms_norm, job);
}

PyObject* activation(void (*Kernels::*kernel)(const Activation&), PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 5)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    Activation job{a.address(), a.address(), a.number(), a.number()};
    return run(chosen[is_half].*kernel, job);
}

PyObject* silu_mul(PyObject*, PyObject* const* values, Py_ssize_t count) { return activation(&Kernels::silu_mul, values, count); }
PyObject* quick_gelu(PyObject*, PyObject* const* values, Py_ssize_t count) { return activation(&Kernels::quick_gelu, values, count); }
PyObject* gelu_tanh(PyObject*, PyObject* const* values, Py_ssize_t count) { return activation(&Kernels::gelu_tanh, values, count); }

PyObject* write_cache(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 17)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    CacheWrite job{a.address(), a.address(), (float*)a.address(), (const long*)a.address(), (const float*)a.address(), (const float*)a.address(),
                   a.address(), a.address(), a.real(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number() != 0, (CacheKind)a.number()};
    return run(chosen[is_half].write_cache, job);
}

PyObject* read_cache(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 9)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    CacheRead job{a.address(), a.address(), (const float*)a.address(), (const long*)a.address(), a.number(), a.number(), a.number(), (CacheKind)a.number()};
    return run(chosen[is_half].read_cache, job);
}

PyObject* split_rotated(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 11)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    SplitRotated job{a.address(), a.address(), a.address(), a.address(), (const float*)a.address(), (const float*)a.address(),
                     a.number(), a.number(), a.number(), a.number()};
    return run(chosen[is_half].split_rotated, job);
}

PyObject* attend(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 20)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    Attend job{a.address(), a.address(), a.address(), (const float*)a.address(), (const int*)a.address(), (const int*)a.address(), (float*)a.address(),
               a.real(), (const long*)a.address(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), (CacheKind)a.number()};
    return run(chosen[is_half].attend, job);
}

PyObject* delta_step(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 14)) return nullptr;
    Arguments a{values};
    DeltaStep job{(float*)a.address(), (float*)a.address(), (const long*)a.address(), (const float*)a.address(), (const float*)a.address(),
                  (const float*)a.address(), (const float*)a.address(), (const float*)a.address(),
                  a.number(), a.number(), a.number(), a.number(), a.number(), a.number()};
    return run(chosen[0].delta_step, job);
}

bool has_bf16() {
#if defined(__x86_64__)
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

PyObject* has_few_rows(PyObject*, PyObject* vectors) {
    const long count = PyLong_AsLong(vectors);
    if (PyErr_Occurred()) return nullptr;
    return PyBool_FromLong(has_bf16() && 1 <= count && count <= 4);
}

PyObject* few_rows(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 10)) return nullptr;
    Arguments a{values};
    FewRows job{a.address(), a.address(), a.address(), a.address(), a.address(), a.number(), a.number(), a.number(), a.number(), a.number()};
#if defined(__x86_64__)
    return run(avx512_bf16::few_rows, job);
#else
    PyErr_SetString(PyExc_NotImplementedError, "no kernel for this processor");
    return nullptr;
#endif
}

bool has_vnni() {
#if defined(__x86_64__)
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

// Of a table, by its name. Null, and an error, where this processor has none of this name.
template <class Version, size_t COUNT>
const Version* version_of(const Version (&versions)[COUNT], PyObject* given) {
    const char* name = PyUnicode_AsUTF8AndSize(given, nullptr);
    if (!name) return nullptr;
    for (const Version& version : versions)
        if (!std::strcmp(name, version.name) && version.is_supported()) return &version;
    PyErr_Format(PyExc_ValueError, "this processor has no %s", name);
    return nullptr;
}

struct QuantizedVersion {
    const char* name;
    bool (*is_supported)();
    void (*rows)(const QuantizedRows&);
};

#if defined(HAS_AMX)
bool has_int8_tiles() { return has_vnni() && amx_int8::is_supported(); }
#endif
const QuantizedVersion QUANTIZED_VERSIONS[] = {
#if defined(__x86_64__)
    {"avx2", has_avx2, avx2_quantized::rows},
    {"vnni", has_vnni, avx512_vnni::rows},
#endif
#if defined(HAS_AMX)
    {"amx", has_int8_tiles, amx_int8::rows},
#endif
    {"none", none, nullptr},
};

PyObject* quantized_rows(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 17)) return nullptr;
    const QuantizedVersion* found = version_of(QUANTIZED_VERSIONS, *values++);
    if (!found) return nullptr;
    Arguments a{values};
    QuantizedRows job{a.address(), a.address(), a.address(), a.address(), a.address(), (const int*)a.address(), (const float*)a.address(),
                      (char*)a.address(), (float*)a.address(), (char*)a.address(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number() != 0};
    return run(found->rows, job);
}

// Tiles are a state that a process asks Linux for.
bool has_amx() {
#if defined(HAS_AMX)
    constexpr long ASK_FOR_STATE = 0x1023, TILES = 18;
    static const bool has = [] {
        unsigned a, b, c, d;
        if (!has_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
        const bool has_tiles = d >> 22 & 1 && d >> 24 & 1;  // AMX-BF16, AMX-TILE
        return has_tiles && syscall(SYS_arch_prctl, ASK_FOR_STATE, TILES) == 0;
    }();
    return has;
#else
    return false;
#endif
}

struct GroupedVersion {
    const char* name;
    bool (*is_supported)();
    long (*scratch)(const GroupedRows&);  // bytes
    void (*rows)(const GroupedRows&);
    void (*widen)(const GroupedRows&);
};

#if defined(__x86_64__)
bool has_half_floats() {  // F16C: compilers before GCC 11 cannot be asked
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}
#endif
const GroupedVersion GROUPED_VERSIONS[] = {
#if defined(__x86_64__)
    {"avx2", has_half_floats, avx2_grouped::scratch, avx2_grouped::rows, avx2_grouped::widen},
    {"vnni", has_vnni, avx512_grouped::scratch, avx512_grouped::rows, avx512_grouped::widen},
#endif
#if defined(HAS_AMX)
    {"amx", [] { return has_vnni() && has_amx(); }, amx_grouped::scratch, amx_grouped::rows, avx512_grouped::widen},
#endif
    {"none", none, nullptr, nullptr, nullptr},
};

// The name of a version, then all of a job.
PyObject* grouped(void (*GroupedVersion::*kernel)(const GroupedRows&), PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 18)) return nullptr;
    const GroupedVersion* found = version_of(GROUPED_VERSIONS, *values++);
    if (!found) return nullptr;
    Arguments a{values};
    GroupedRows job{a.address(), a.address(), a.address(), (const float*)a.address(), (const unsigned char*)a.address(), a.address(),
                    a.address(), (const long*)a.address(), (char*)a.address(), a.number(), a.number(), a.number(), a.number(),
                    a.number(), a.number(), a.number() != 0, a.number() != 0};
    if (!PyErr_Occurred() && (job.kind < 0 || job.kind > 2 || (job.kind == 2 && job.is_quantized)))
        PyErr_SetString(PyExc_ValueError, "no kernel for this weight");
    return run(found->*kernel, job);
}

PyObject* grouped_scratch(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 5)) return nullptr;
    const GroupedVersion* found = version_of(GROUPED_VERSIONS, *values++);
    if (!found) return nullptr;
    Arguments a{values};
    GroupedRows job{};
    job.rows = a.number(), job.num_inputs = a.number(), job.group_size = a.number(), job.is_quantized = a.number() != 0;
    return PyErr_Occurred() ? nullptr : PyLong_FromLong(found->scratch(job));
}

PyObject* grouped_rows(PyObject*, PyObject* const* values, Py_ssize_t count) { return grouped(&GroupedVersion::rows, values, count); }
PyObject* widen_grouped(PyObject*, PyObject* const* values, Py_ssize_t count) { return grouped(&GroupedVersion::widen, values, count); }

PyObject* has_half_rows(PyObject*, PyObject*) {
#if defined(__x86_64__)
    return PyBool_FromLong(has_half_floats());
#else
    Py_RETURN_FALSE;
#endif
}

PyObject* half_rows(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 9)) return nullptr;
    Arguments a{values};
    HalfRows job{(float*)a.address(), (const float*)a.address(), (const unsigned short*)a.address(), (const float*)a.address(),
                 (const float*)a.address(), a.number(), a.number(), a.number(), a.number() != 0};
#if defined(__x86_64__)
    return run(avx2_half::rows, job);
#else
    PyErr_SetString(PyExc_NotImplementedError, "no kernel for this processor");
    return nullptr;
#endif
}

PyObject* repack(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 10)) return nullptr;
    Arguments a{values};
    Repack job{(unsigned char*)a.address(), (const unsigned*)a.address(), (const long*)a.address(), a.number(), a.number(), a.number(),
               a.number(), a.number(), a.number(), a.number() != 0};
    return run(base::repack, job);
}

PyObject* quantize_int4(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 8)) return nullptr;
    Arguments a{values};
    Int4Weight job{a.address(), (int*)a.address(), (float*)a.address(), a.address(), a.number(), a.number(), a.number(), a.number() != 0};
#if defined(__x86_64__)
    return run(avx512_int4::quantize, job);
#else
    PyErr_SetString(PyExc_NotImplementedError, "no kernel for this processor");
    return nullptr;
#endif
}

struct RowsVersion {
    const char* name;
    bool (*is_supported)();
    void (*attend)(const RowsAttend&);
    long (*scratch)(long head_dim);
    void (*delta_net)(const DeltaNet&);
};

const RowsVersion ROWS_VERSIONS[] = {  // the best one first
#if defined(HAS_AMX)
    {"amx_bf16", has_amx, amx_bf16::attend_rows, amx_bf16::attend_rows_scratch, amx_bf16::delta_net_half},
#endif
#if defined(__x86_64__)
    {"avx512_bf16", has_bf16, avx512_bf16::attend_rows, avx512_bf16::attend_rows_scratch, avx512_bf16::delta_net_half},
#endif
    {"none", none, nullptr, nullptr, nullptr},
};
const RowsVersion* chosen_rows = nullptr;

// The bytes that each thread needs; 0 if there is no kernel.
PyObject* attend_rows_scratch(PyObject*, PyObject* head_dim) {
    const long dim = PyLong_AsLong(head_dim);
    if (PyErr_Occurred()) return nullptr;
    return PyLong_FromLong(chosen_rows ? chosen_rows->scratch(dim) : 0);
}

PyObject* attend_rows(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 24)) return nullptr;
    if (!chosen_rows) {
        PyErr_SetString(PyExc_NotImplementedError, "no kernel for this processor");
        return nullptr;
    }
    Arguments a{values};
    RowsAttend job{a.address(), a.address(), a.address(), a.address(), (const int*)a.address(), (RowsSegment*)a.address(),
                   (char*)a.address(), (bf16*)a.address(), a.real(), a.number(), a.number(), a.number(), a.number(), a.number(),
                   a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number() != 0};
    return run(chosen_rows->attend, job);
}

// The bytes that each thread needs.
PyObject* delta_net_scratch(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 2)) return nullptr;
    Arguments a{values};
    const long key_dim = a.number(), value_dim = a.number();
    if (PyErr_Occurred()) return nullptr;
    return PyLong_FromLong(delta_net_bytes(key_dim, value_dim));
}

// With products in bfloat16 where the model is in bfloat16 and its heads fit tiles, else in float.
PyObject* delta_net(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 28)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    DeltaNet job{a.address(), a.address(), a.address(), a.address(), a.address(), (const float*)a.address(), (const float*)a.address(),
                 (const float*)a.address(), (const float*)a.address(), a.address(), (float*)a.address(), (const DeltaSequence*)a.address(),
                 (const long*)a.address(), (char*)a.address(), a.real(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number()};
    const bool has_tiles = is_half && chosen_rows && job.key_dim % 32 == 0;
    return run(has_tiles ? chosen_rows->delta_net : chosen[is_half].delta_net, job);
}

template <class Any, size_t N>
PyObject* names_of(const Any (&all)[N]) {
    PyObject* names = PyList_New(0);
    for (const Any& version : all) {
        if (!names || !version.is_supported()) continue;
        PyObject* name = PyUnicode_FromString(version.name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

PyObject* versions(PyObject*, PyObject*) { return names_of(VERSIONS); }
PyObject* rows_versions(PyObject*, PyObject*) { return names_of(ROWS_VERSIONS); }
PyObject* quantized_versions(PyObject*, PyObject*) { return names_of(QUANTIZED_VERSIONS); }

PyObject* grouped_versions(PyObject*, PyObject*) { return names_of(GROUPED_VERSIONS); }

PyObject* use_rows(PyObject*, PyObject* name) {
    PyObject* bytes = PyUnicode_AsUTF8String(name);
    if (!bytes) return nullptr;
    const RowsVersion* found = nullptr;
    for (const RowsVersion& version : ROWS_VERSIONS)
        if (!std::strcmp(PyBytes_AsString(bytes), version.name) && version.is_supported()) found = &version;
    Py_DECREF(bytes);
    if (!found) return PyErr_Format(PyExc_ValueError, "this processor has no %R", name);
    chosen_rows = found;
    Py_RETURN_NONE;
}

PyObject* use(PyObject*, PyObject* name) {
    PyObject* bytes = PyUnicode_AsUTF8String(name);
    if (!bytes) return nullptr;
    for (const Version& version : VERSIONS) {
        if (std::strcmp(PyBytes_AsString(bytes), version.name) || !version.is_supported()) continue;
        chosen[0] = version.table(false);
        chosen[1] = version.table(true);
        Py_DECREF(bytes);
        Py_RETURN_NONE;
    }
    Py_DECREF(bytes);
    PyErr_Format(PyExc_ValueError, "this processor has no %R", name);
    return nullptr;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, nullptr}
PyMethodDef METHODS[] = {
    FAST(rms_norm), FAST(silu_mul), FAST(quick_gelu), FAST(gelu_tanh), FAST(write_cache), FAST(read_cache), FAST(split_rotated), FAST(attend), FAST(delta_step), FAST(few_rows), FAST(quantized_rows), FAST(grouped_scratch), FAST(grouped_rows), FAST(widen_grouped), FAST(repack), FAST(half_rows), FAST(quantize_int4), FAST(attend_rows), FAST(delta_net_scratch), FAST(delta_net),
    {"versions", versions, METH_NOARGS, nullptr},
    {"has_half_rows", has_half_rows, METH_NOARGS, nullptr},
    {"has_few_rows", has_few_rows, METH_O, nullptr},
    {"quantized_versions", quantized_versions, METH_NOARGS, nullptr},
    {"grouped_versions", grouped_versions, METH_NOARGS, nullptr},
    {"use", use, METH_O, nullptr},
    {"attend_rows_scratch", attend_rows_scratch, METH_O, nullptr},
    {"rows_versions", rows_versions, METH_NOARGS, nullptr},
    {"use_rows", use_rows, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, METHODS, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
    for (const Version& version : VERSIONS) {
        if (!version.is_supported()) continue;
        chosen[0] = version.table(false);
        chosen[1] = version.table(true);
        break;
    }
    for (const RowsVersion& version : ROWS_VERSIONS)
        if (!chosen_rows && version.is_supported()) chosen_rows = &version;
    PyObject* module = PyModule_Create(&MODULE);
    if (module && PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) < 0) Py_CLEAR(module);
#if defined(DIGEST)
    if (module && PyModule_AddStringConstant(module, "DIGEST", DIGEST) < 0) Py_CLEAR(module);  // setup.py looks for it
#endif
    return module;
}
