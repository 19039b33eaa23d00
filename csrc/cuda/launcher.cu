// fill_cuda: plans launches and enqueues them on a stream.
#include "fill.h"

#include "kernels.cuh"
#include "plan.h"
#include "runtime.h"

#if CUDART_VERSION < 12010 && !defined(FASTINIT_SMALL_LAUNCHES)
#error "Kernel parameters take 4 KB before CUDA 12.1: define FASTINIT_SMALL_LAUNCHES for all files"
#endif

namespace fastinit {
namespace cuda {
namespace {

class Launcher final : public Device {
public:
    Launcher(int device, cudaStream_t stream) : device_(device), stream_(stream), guard_(device) {
        multiprocessors_ = attribute(cudaDevAttrMultiProcessorCount);
        overlap_ = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    }

    uint32_t multiprocessors() override { return static_cast<uint32_t>(multiprocessors_); }

    uint32_t max_threads(const KernelId& id) override {
        const void* const kernel = pointer(id);
        if (kernel != kernel_) {
            cudaFuncAttributes attributes;
            check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes", device_);
            kernel_ = kernel;
            max_threads_ = static_cast<uint32_t>(attributes.maxThreadsPerBlock) / 128 * 128;
            threads_ = 0;
        }
        return max_threads_;
    }

    uint32_t blocks_per_multiprocessor(const KernelId& id, uint32_t threads) override {
        max_threads(id);
        if (threads != threads_) {
            int blocks = 0;
            check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel_, static_cast<int>(threads), 0),
                  "cudaOccupancyMaxActiveBlocksPerMultiprocessor", device_);
            threads_ = threads;
            blocks_ = static_cast<uint32_t>(blocks);
        }
        return blocks_;
    }

    void start(const KernelId& id, Launch& launch, uint32_t blocks, uint32_t threads) override {
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(threads);
        config.stream = stream_;
        // See begin_launch. The call's first launch waits for what was in the stream before.
        cudaLaunchAttribute overlap{};
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &overlap;
        config.numAttrs = launched_ && overlap_ ? 1 : 0;
        void* arguments[] = {&launch};
        check(cudaLaunchKernelExC(&config, pointer(id), arguments), "cudaLaunchKernelExC", device_);
        launched_ = true;
    }

private:
    static const void* pointer(const KernelId& id) {
        return reinterpret_cast<const void*>(kernel_for(id.form, id.dtype, id.path));
    }

    int attribute(cudaDeviceAttr which) const {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, which, device_), "cudaDeviceGetAttribute", device_);
        return value;
    }

    int device_;
    cudaStream_t stream_;
    DeviceGuard guard_;
    int multiprocessors_ = 0;
    bool overlap_ = false;  // the device knows griddepcontrol
    bool launched_ = false;
    const void* kernel_ = nullptr;  // the kernel of the last launch, and what is known of it:
    uint32_t max_threads_ = 0;      // threads that a block may have,
    uint32_t threads_ = 0;          // those that it had,
    uint32_t blocks_ = 0;           // blocks of so many threads that a multiprocessor runs at a time
};

}  // namespace
}  // namespace cuda

void fill_cuda(const Fill* fills, size_t count, int device, void* stream) {
    cuda::Launcher launcher(device, static_cast<cudaStream_t>(stream));
    cuda::plan(fills, count, launcher);
}

}  // namespace fastinit
