// The CUDA runtime, with errors that name the call and the device.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastinit {
namespace cuda {

[[noreturn]] inline void fail(const char* call, int device, cudaError_t error) {
    cudaGetLastError();  // this error is reported here: leave none behind for the program's next check
    throw std::runtime_error(std::string(call) + " failed on CUDA device " + std::to_string(device) + ": " +
                             cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

inline void check(cudaError_t error, const char* call, int device) {
    if (error != cudaSuccess) fail(call, device, error);
}

// Makes `device` current, and the previous one again at the end.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice", device);
        if (previous_ == device) return;
        check(cudaSetDevice(device), "cudaSetDevice", device);
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool changed_ = false;
};

}  // namespace cuda
}  // namespace fastinit
