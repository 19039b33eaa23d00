// Which instruction set the CPU kernels use: the best that this machine runs, or FASTINIT_CPU_ISA's choice.
#pragma once

#include <string>
#include <vector>

#include "../fill.h"

namespace fastinit {

// One compilation of kernel.h.
struct Kernel {
    const char* isa;
    // Elements [index, index + count) of the fill's stream, contiguously to `out`. The caller has put the float
    // environment in order.
    void (*generate)(const Fill& fill, uint64_t index, uint64_t count, void* out) noexcept;
    // The step of that name on `count` floats where they are; likewise.
    void (*erfinv)(void* data, uint64_t count) noexcept;
};

// The kernels this machine can run, best first; the last is always "portable".
const std::vector<Kernel>& available_kernels();

// Throws std::invalid_argument naming the choices.
const Kernel& kernel_named(const std::string& isa);

// The kernel in use. FASTINIT_CPU_ISA is read the first time; a bad value throws, every time.
const Kernel& default_kernel();

}  // namespace fastinit
