// The Python module: addresses and sizes in, nothing out. Its callers (operators.py, panels.py, int8_panels.py) ask
// `takes` or read a layout before they pass an address.
#define PY_SSIZE_T_CLEAN

#include <Python.h>

#include <cstring>

#include "kernels.h"

namespace {

constexpr long INTERFACE = 2;  // to be raised with every change of arguments; operators.py has the same

struct Version {
    const char* name;
    bool (*is_supported)();
    Kernels (*table)(bool);
};

bool any() { return true; }
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
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
    if (!has_count(count, 7)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    RmsNorm job{a.address(), a.address(), a.address(), a.number(), a.number(), a.real()};
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
    if (!has_count(count, 14)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    CacheWrite job{a.address(), a.address(), (const long*)a.address(), (const float*)a.address(), (const float*)a.address(),
                   a.address(), a.address(), a.real(), a.number(), a.number(), a.number(), a.number(), a.number()};
    return run(chosen[is_half].write_cache, job);
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
    if (!has_count(count, 18)) return nullptr;
    Arguments a{values};
    const bool is_half = a.number();
    Attend job{a.address(), a.address(), a.address(), (const int*)a.address(), (const int*)a.address(), (float*)a.address(),
               a.real(), (const long*)a.address(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number(), a.number()};
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

PyObject* has_few_rows_int8(PyObject*, PyObject*) {
#if defined(__x86_64__)
    return PyBool_FromLong(has_avx512() && __builtin_cpu_supports("avx512vnni"));
#else
    Py_RETURN_FALSE;
#endif
}

PyObject* few_rows_int8(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!has_count(count, 13)) return nullptr;
    Arguments a{values};
    FewRowsInt8 job{a.address(), a.address(), a.address(), a.address(), a.address(), (const int*)a.address(), (const float*)a.address(),
                    (unsigned char*)a.address(), a.number(), a.number(), a.number(), a.number(), a.number() != 0};
#if defined(__x86_64__)
    return run(avx512_vnni::few_rows, job);
#else
    PyErr_SetString(PyExc_NotImplementedError, "no kernel for this processor");
    return nullptr;
#endif
}

PyObject* versions(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (const Version& version : VERSIONS) {
        if (!names || !version.is_supported()) continue;
        PyObject* name = PyUnicode_FromString(version.name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
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
    FAST(rms_norm), FAST(silu_mul), FAST(quick_gelu), FAST(gelu_tanh), FAST(write_cache), FAST(split_rotated), FAST(attend), FAST(delta_step), FAST(few_rows), FAST(few_rows_int8),
    {"versions", versions, METH_NOARGS, nullptr},
    {"has_few_rows", has_few_rows, METH_O, nullptr},
    {"has_few_rows_int8", has_few_rows_int8, METH_NOARGS, nullptr},
    {"use", use, METH_O, nullptr},
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
    PyObject* module = PyModule_Create(&MODULE);
    if (module && PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) < 0) Py_CLEAR(module);
    return module;
}
