// Rows of a file, one behind the other into memory: the whole of a tensor, or the columns of it that a rank holds.
#pragma once

#include <cstdint>

namespace fastinit {

// `count` ranges of `nbytes` each, whose beginnings are `stride` bytes apart. What is contiguous is a single one.
struct Rows {
    uint64_t offset;
    uint64_t nbytes;
    uint64_t count;
    uint64_t stride;

    uint64_t size() const { return nbytes * count; }
};

// Reads bytes [begin, end) of rows that lie one behind the other, of an open file. Returns how many there were: fewer
// than asked for if the file ends. Throws std::system_error if it cannot be read.
uint64_t read_rows(int file, const Rows& rows, uint64_t begin, uint64_t end, void* buffer);

}  // namespace fastinit
