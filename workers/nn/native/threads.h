// OpenMP where the compiler has it; else one thread.
#pragma once
#if defined(_OPENMP)
extern "C" {
int omp_get_thread_num(void);
int omp_get_max_threads(void);
}
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_max_threads(void) { return 1; }
#endif
