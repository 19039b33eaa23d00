// read_cuda: rows read into pinned memory, and copies behind that.
#include "read.h"

#include <algorithm>
#include <exception>
#include <system_error>

#include "runtime.h"

namespace fastinit {

uint64_t read_cuda(int file, const Rows& rows, void* buffer, void* target, int device, void* stream) {
    // Long enough for a copy to be worth its launch, short enough for the last one to be soon done.
    constexpr uint64_t piece = uint64_t{2} << 20;
    const cuda::DeviceGuard guard(device);
    const auto queue = static_cast<cudaStream_t>(stream);
    uint64_t done = 0;
    std::exception_ptr unread;
    cudaError_t copied = cudaSuccess;
    while (done < rows.size() && copied == cudaSuccess) {
        char* const from = static_cast<char*>(buffer) + done;
        uint64_t count = 0;
        try {
            count = read_rows(file, rows, done, std::min(done + piece, rows.size()), from);
        } catch (const std::system_error&) {
            unread = std::current_exception();
        }
        if (count == 0) break;
        copied = cudaMemcpyAsync(static_cast<char*>(target) + done, from, count, cudaMemcpyHostToDevice, queue);
        done += count;
    }
    const cudaError_t synchronized = cudaStreamSynchronize(queue);
    cuda::check(copied, "cudaMemcpyAsync", device);
    cuda::check(synchronized, "cudaStreamSynchronize", device);
    if (unread) std::rethrow_exception(unread);
    return done;
}

}  // namespace fastinit
