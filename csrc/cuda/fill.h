// The CUDA backend's one entry point. Torch-free and CUDA-header-free, so that bindings.cpp needs no CUDA headers.
#pragma once

#include <cstddef>

#include "../fill.h"

namespace fastinit {

// Enqueues `count` fills on `stream` (a cudaStream_t handle, null for the default stream) of CUDA device `device`,
// whose memory they write. Returns once the launches are queued, allocates and synchronizes nothing, reads nothing of
// `fills` afterwards, and may be captured into a CUDA graph. The fills run in no particular order among each other. The
// calling thread's current device is as before on return. Throws std::runtime_error naming the CUDA call and its error.
void fill_cuda(const Fill* fills, size_t count, int device, void* stream);

}  // namespace fastinit
