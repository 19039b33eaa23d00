// From fills to launches. Host code that knows no CUDA: the device is an interface, so that tests need none.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.h"

namespace fastinit::cuda {

struct KernelId {
    Form form;
    Dtype dtype;
    Path path;
};

inline bool operator==(const KernelId& a, const KernelId& b) {
    return a.form == b.form && a.dtype == b.dtype && a.path == b.path;
}

// The device that the launches are for.
class Device {
public:
    virtual ~Device() = default;
    virtual uint32_t multiprocessors() = 0;
    // Of a block.
    virtual uint32_t max_threads(const KernelId& kernel) = 0;
    // That run at a time.
    virtual uint32_t blocks_per_multiprocessor(const KernelId& kernel, uint32_t threads) = 0;
    // Enqueues a launch. `launch` is used again for the next one.
    virtual void start(const KernelId& kernel, Launch& launch, uint32_t blocks, uint32_t threads) = 0;
};

// Starts the launches that write all fills, each as soon as its table is full. Reads nothing of `fills` afterwards.
void plan(const Fill* fills, size_t count, Device& device);

}  // namespace fastinit::cuda
