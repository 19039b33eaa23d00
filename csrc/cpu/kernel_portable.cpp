// The kernel for any machine.
#include "kernel.h"
#include "simd_portable.h"

namespace fastinit {

extern const Kernel portable_kernel;
const Kernel portable_kernel = {"portable", &generate<Portable>, &erfinv_all<Portable>};

}  // namespace fastinit
