// read_cuda: pread into pinned memory, and copies behind it.
#include "read.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "runtime.h"

namespace fastinit {

uint64_t read_cuda(int file, uint64_t offset, uint64_t nbytes, void* buffer, void* target, int device, void* stream) {
    // Long enough for a copy to be worth its launch, short enough for the last one to be soon done.
    constexpr uint64_t piece = uint64_t{2} << 20;
    const cuda::DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    uint64_t done = 0;
    int failed = 0;
    cudaError_t copied = cudaSuccess;
    while (done < nbytes && copied == cudaSuccess) {
        char* const from = static_cast<char*>(buffer) + done;
        const ssize_t count = pread(file, from, std::min(piece, nbytes - done), static_cast<off_t>(offset + done));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) failed = errno;
        if (count <= 0) break;
        copied = cudaMemcpyAsync(static_cast<char*>(target) + done, from, static_cast<size_t>(count),
                                 cudaMemcpyHostToDevice, queue);
        done += static_cast<uint64_t>(count);
    }
    const cudaError_t synchronized = cudaStreamSynchronize(queue);
    cuda::check(copied, "cudaMemcpyAsync", device);
    cuda::check(synchronized, "cudaStreamSynchronize", device);
    if (failed) throw std::system_error(failed, std::generic_category(), "pread");
    return done;
}

}  // namespace fastinit
