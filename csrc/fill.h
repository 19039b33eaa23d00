// A fill: which values, of which stream, go to which elements of memory. Plain data shared by the CPU and the CUDA
// backend; validation.h makes it of what Python passes. Host code; torch-free.
#pragma once

#include <cstddef>
#include <cstdint>

#include "distributions.h"

namespace fastinit {

constexpr size_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// An N-dimensional box: the element at multi-index m lies at data + item_size * sum(m * memory_stride) and is element
// index_offset + sum(m * index_stride) of its stream. Dimensions are ordered by falling index stride, none has size
// 1, and neighbours that one loop can serve are merged: a whole contiguous tensor has one dimension, both strides 1.
// dims is at least 1 unless the box is empty. The last dimension is the run.
struct Box {
    static constexpr int max_dims = 8;
    int dims;
    uint64_t index_offset;
    uint64_t size[max_dims];
    uint64_t index_stride[max_dims];
    uint64_t memory_stride[max_dims];  // in elements

    uint64_t elements() const {
        uint64_t n = dims == 0 ? 0 : 1;
        for (int d = 0; d < dims; ++d) n *= size[d];
        return n;
    }
    uint64_t run() const { return dims == 0 ? 0 : size[dims - 1]; }
    // True if consecutive elements of a run are consecutive both in the stream and in memory.
    bool contiguous_runs() const { return dims > 0 && index_stride[dims - 1] == 1 && memory_stride[dims - 1] == 1; }
    bool contiguous() const { return dims == 1 && contiguous_runs(); }
};

// Which values, apart from the stream: the same for most fills of a model.
struct Values {
    Dtype dtype;
    Distribution distribution;
    Steps steps;
    uint64_t seed;
};

// Values and boxes are shared between the fills of a batch. A fill that repeated them would take 368 bytes, and a batch
// of thousands of small ones would wait for memory instead of the device.
struct Fill {
    void* data;
    uint64_t stream;
    const Values* values;
    const Box* box;

    uint64_t elements() const { return box->elements(); }
};

// A one-dimensional box over the first `elements` elements of the stream.
inline Box whole_tensor(uint64_t elements) {
    Box box{};
    box.dims = elements == 0 ? 0 : 1;
    box.size[0] = elements;
    box.index_stride[0] = box.memory_stride[0] = 1;
    return box;
}

}  // namespace fastinit
