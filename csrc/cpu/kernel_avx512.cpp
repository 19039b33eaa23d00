// The kernel for AVX-512 F, BW, DQ and VL.
#include "kernel.h"
#include "simd_avx512.h"

namespace fastinit {

extern const Kernel avx512_kernel;
const Kernel avx512_kernel = {"avx512", &generate<Avx512>, &erfinv_all<Avx512>};

}  // namespace fastinit
