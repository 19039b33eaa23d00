// The CPU backend: executes fills with the kernel of an instruction set, on several threads.
#pragma once

#include <cstddef>

#include "../fill.h"

namespace fastinit {

struct Kernel;

// Runs all fills and returns when they are written. The fills must not overlap in memory. `threads` is the most that
// take part, the caller among them; small work stays on the caller.
void fill_cpu(const Fill* fills, size_t count, int threads, const Kernel& kernel);

}  // namespace fastinit
