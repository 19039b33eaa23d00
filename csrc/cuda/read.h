// A part of a file, into memory of a GPU. Without CUDA headers, as fill.h.
#pragma once

#include <cstdint>

#include "../read.h"

namespace fastinit {

// Reads rows of an open file into `buffer`, pinned memory of as many bytes, and copies them to `target` on `stream` of
// CUDA device `device`, each piece while the next one is read. Returns when all of it is there, with the number of
// bytes: fewer than asked for if the file ends. Throws std::system_error if the file cannot be read, and
// std::runtime_error naming the CUDA call and its error; then, too, nothing is being copied any more.
uint64_t read_cuda(int file, const Rows& rows, void* buffer, void* target, int device, void* stream);

}  // namespace fastinit
