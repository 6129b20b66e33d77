// For any processor.
#include "kernels.h"
#include "threads.h"
#define ISA base
#define LANES 4
#include "kernels.inc"
