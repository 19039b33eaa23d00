// read_rows: pread, as often as there are rows.
#include "read.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace fastinit {

uint64_t read_rows(int file, const Rows& rows, uint64_t begin, uint64_t end, void* buffer) {
    uint64_t done = begin;
    while (done < end) {
        const uint64_t row = done / rows.nbytes, behind = done % rows.nbytes;
        const uint64_t wanted = std::min(rows.nbytes - behind, end - done);
        char* const to = static_cast<char*>(buffer) + (done - begin);
        const ssize_t count = pread(file, to, wanted, static_cast<off_t>(rows.offset + row * rows.stride + behind));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw std::system_error(errno, std::generic_category(), "pread");
        if (count == 0) break;
        done += static_cast<uint64_t>(count);
    }
    return done - begin;
}

}  // namespace fastinit
