// Fills made of what Python passes, and the validation that each one passes before it reaches a backend. Whatever is
// refused raises std::invalid_argument with the argument, its value and the remedy. Host code; torch-free.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "fill.h"

namespace fastinit {

namespace detail {

[[noreturn]] inline void refuse(const std::string& argument, const std::string& value, const std::string& remedy) {
    throw std::invalid_argument(argument + " is " + value + ": " + remedy);
}

inline std::string text(double x) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.9g", x);
    return buffer;
}

// x * y + z, refusing a sum that does not fit: no element may be addressed beyond 2^63.
inline uint64_t checked_multiply_add(const char* argument, uint64_t x, uint64_t y, uint64_t z) {
    constexpr uint64_t limit = uint64_t{1} << 63;
    if (x != 0 && y > (limit - 1) / x) refuse(argument, std::to_string(y), "the region must end below element 2^63");
    if (z >= limit || x * y >= limit - z) refuse(argument, std::to_string(y), "the region must end below element 2^63");
    return x * y + z;
}

inline float finite(const char* argument, double x) {
    const float f = static_cast<float>(x);
    if (!std::isfinite(f)) refuse(argument, text(x), "it must be finite in float32");
    return f;
}

inline float not_nan(const char* argument, double x) {
    if (std::isnan(x)) refuse(argument, text(x), "it must be a number");
    return static_cast<float>(x);
}

inline bool same_bits(const TailMap& a, const TailMap& b) {
    return bits_of(a.scale) == bits_of(b.scale) && bits_of(a.offset) == bits_of(b.offset) &&
           bits_of(a.low) == bits_of(b.low) && bits_of(a.high) == bits_of(b.high);
}

}  // namespace detail

// The region's dimensions in Box's canonical form: size-1 dimensions dropped, ordered by index stride, neighbours
// merged.
inline Box make_box(uint64_t index_offset, const std::vector<int64_t>& sizes, const std::vector<int64_t>& index_strides,
                    const std::vector<int64_t>& memory_strides) {
    const size_t n = sizes.size();
    if (n < 1 || n > Box::max_dims)
        detail::refuse("sizes", "of length " + std::to_string(n), "a region has 1 to 8 dimensions");
    if (index_strides.size() != n)
        detail::refuse("index_strides", "of length " + std::to_string(index_strides.size()),
                       "it must be as long as sizes, " + std::to_string(n));
    if (memory_strides.size() != n)
        detail::refuse("memory_strides", "of length " + std::to_string(memory_strides.size()),
                       "it must be as long as sizes, " + std::to_string(n));
    Box box{};
    box.index_offset = index_offset;
    bool empty = false;
    for (size_t d = 0; d < n; ++d) {
        const std::string place = "[" + std::to_string(d) + "]";
        if (sizes[d] < 0) detail::refuse("sizes" + place, std::to_string(sizes[d]), "it must not be negative");
        if (sizes[d] == 0) empty = true;
        if (sizes[d] <= 1) continue;
        if (index_strides[d] < 1)
            detail::refuse("index_strides" + place, std::to_string(index_strides[d]), "it must be positive");
        if (memory_strides[d] < 1)
            detail::refuse("memory_strides" + place, std::to_string(memory_strides[d]),
                           "it must be positive: elements of a region must not share memory");
        int at = box.dims++;
        for (; at > 0 && box.index_stride[at - 1] < static_cast<uint64_t>(index_strides[d]); --at) {
            box.size[at] = box.size[at - 1];
            box.index_stride[at] = box.index_stride[at - 1];
            box.memory_stride[at] = box.memory_stride[at - 1];
        }
        box.size[at] = static_cast<uint64_t>(sizes[d]);
        box.index_stride[at] = static_cast<uint64_t>(index_strides[d]);
        box.memory_stride[at] = static_cast<uint64_t>(memory_strides[d]);
    }
    if (empty) {
        box.dims = 0;
        return box;
    }
    uint64_t last_index = index_offset, last_memory = 0, elements = 1;
    for (int d = 0; d < box.dims; ++d) {
        last_index = detail::checked_multiply_add("index_strides", box.size[d] - 1, box.index_stride[d], last_index);
        last_memory =
            detail::checked_multiply_add("memory_strides", box.size[d] - 1, box.memory_stride[d], last_memory);
        elements = detail::checked_multiply_add("sizes", elements, box.size[d], 0);
    }
    if (box.dims == 0) {  // a single element
        box.dims = 1;
        box.size[0] = box.index_stride[0] = box.memory_stride[0] = 1;
        return box;
    }
    int kept = 0;
    for (int d = 1; d < box.dims; ++d) {
        if (box.index_stride[kept] == box.size[d] * box.index_stride[d] &&
            box.memory_stride[kept] == box.size[d] * box.memory_stride[d]) {
            box.size[kept] *= box.size[d];
        } else {
            box.size[++kept] = box.size[d];
        }
        box.index_stride[kept] = box.index_stride[d];
        box.memory_stride[kept] = box.memory_stride[d];
    }
    box.dims = kept + 1;
    return box;
}

inline void check_data(const void* data, Dtype dtype, uint64_t elements) {
    if (elements == 0) return;
    const auto address = reinterpret_cast<uintptr_t>(data);
    if (address == 0) detail::refuse("data_ptr", "0", "the tensor must have storage");
    if (address % item_size(dtype) != 0)
        detail::refuse("data_ptr", std::to_string(address), "it must be aligned to the element size");
}

inline Dtype make_dtype(int64_t id) {
    if (id < 0 || id > 2)
        detail::refuse("dtype", std::to_string(id), "choose 0 (float32), 1 (float16) or 2 (bfloat16)");
    return static_cast<Dtype>(id);
}

// Parameters as the Python side passes them, by kind:
//     constant (value)   uniform (low, high)   normal (mean, std)
//     truncated_normal (mean, std, threshold, then offset, scale, low, high of the negative and of the positive side)
inline Distribution make_distribution(int64_t kind, const std::vector<double>& p) {
    static constexpr size_t lengths[] = {1, 2, 2, 11};
    if (kind < 0 || kind > 3)
        detail::refuse("kind", std::to_string(kind),
                       "choose 0 (constant), 1 (uniform), 2 (normal) or 3 (truncated normal)");
    if (p.size() != lengths[kind])
        detail::refuse("parameters", "of length " + std::to_string(p.size()),
                       "kind " + std::to_string(kind) + " takes " + std::to_string(lengths[kind]));
    Distribution d{};
    d.kind = static_cast<Kind>(kind);
    switch (d.kind) {
        case Kind::constant: d.location = static_cast<float>(p[0]); break;
        case Kind::uniform:
            if (p[1] < p[0])
                detail::refuse("high", detail::text(p[1]), "it must not be below low, " + detail::text(p[0]));
            d.location = detail::finite("low", p[0]);
            detail::finite("high", p[1]);
            d.scale = detail::finite("high - low", p[1] - p[0]);
            break;
        default:
            d.location = detail::finite("mean", p[0]);
            d.scale = detail::finite("std", p[1]);
            // A truncated normal's sign of std says on which side of the mean its one-sided interval lies.
            if (d.kind == Kind::normal && p[1] < 0)
                detail::refuse("std", detail::text(p[1]), "it must not be negative");
    }
    if (d.kind == Kind::truncated_normal) {
        if (!(p[2] >= -2147483648.0 && p[2] <= 2147483647.0) || p[2] != std::floor(p[2]))
            detail::refuse("threshold", detail::text(p[2]), "it must be an integer in [-2^31, 2^31 - 1]");
        d.threshold = static_cast<int32_t>(p[2]);
        const auto side = [&](size_t at) {
            return TailMap{detail::finite("scale", p[at + 1]), detail::finite("offset", p[at]),
                           detail::not_nan("low", p[at + 2]), detail::not_nan("high", p[at + 3])};
        };
        d.negative = side(3);
        d.positive = side(7);
        d.symmetric = d.threshold == 0 && detail::same_bits(d.negative, d.positive);
    }
    return d;
}

inline Step make_step(int64_t op, double a, double b) {
    if (op < 0 || op > 4)
        detail::refuse("step", std::to_string(op), "choose 0 (multiply), 1 (add), 2 (divide), 3 (clamp) or 4 (erfinv)");
    if (static_cast<StepOp>(op) == StepOp::erfinv) return Step{StepOp::erfinv, 0.0f, 0.0f};
    const bool clamp = static_cast<StepOp>(op) == StepOp::clamp;
    return Step{static_cast<StepOp>(op), detail::not_nan("step operand", a),
                clamp ? detail::not_nan("step operand", b) : 0.0f};
}

inline void append_step(Steps& steps, Step step) {
    if (steps.count == Steps::capacity)
        detail::refuse("steps", "longer than " + std::to_string(Steps::capacity), "materialize the tensor first");
    steps.items[steps.count++] = step;
}

}  // namespace fastinit
