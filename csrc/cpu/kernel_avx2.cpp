// The kernel for AVX2, FMA and F16C.
#include "kernel.h"
#include "simd_avx2.h"

namespace fastinit {

extern const Kernel avx2_kernel;
const Kernel avx2_kernel = {"avx2", &generate<Avx2>, &erfinv_all<Avx2>};

}  // namespace fastinit
