// Stream v1 on CUDA: kernels, then the launcher fill_cuda.
//
// Fills that agree in kind, dtype, distribution, steps, seed and geometry share a launch, whose parameters carry the
// whole table of them: nothing is allocated or copied, so a launch is asynchronous and can be captured. A slot is one
// 16-byte store; each entry of the table is cut into tiles of so many slots, and a persistent grid walks the tiles.
//
// Two kernels:
//   fill_plain    whole 16-byte-aligned runs that begin on a Philox block, without steps: nearly everything in a model.
//   fill_general  boxes, any alignment, any start, steps, short tails.
//
// The bits are those of distributions.h. Compile with -fmad=false and without --use_fast_math or --ftz=true: every
// operation is an explicit round-to-nearest intrinsic or exact.

#include "fill.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace fastinit {
namespace {

// fill_plain keeps to the registers with which its blocks fill a multiprocessor: 4 x 512 threads of 32 registers, or
// 3 x 512 of 40 where a multiprocessor holds 1536 threads.
constexpr int kThreads = 512;
#if defined(__CUDA_ARCH__) && ((__CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900) || __CUDA_ARCH__ >= 1100)
constexpr int kPlainBlocks = 3;
#else
constexpr int kPlainBlocks = 4;
#endif
constexpr int kGeneralBlocks = 2;
// Slots in a tile, at most: finding a tile's entry and preparing its Philox rounds is a small part of filling it.
constexpr uint32_t kMaxTile = 16 * kThreads;
// Slots in a table entry, at most. Keeps slot and tile numbers of a launch within 32 bits.
constexpr uint64_t kMaxSlots = uint64_t{1} << 30;
// Kernel parameters may take 32,764 bytes from CUDA 12.1, 4 KB before.
#if CUDART_VERSION >= 12010
constexpr int kEntries = 384;
#else
constexpr int kEntries = 80;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Launch parameters

// n / divisor by multiplication, for n < 2^31 (Granlund, Montgomery: "Division by invariant integers using
// multiplication", PLDI 1994).
struct Divider {
    uint32_t divisor;
    uint32_t magic;
    uint32_t shift;
};

// What a box adds to a run: the runs' arrangement. No outer dimensions: each entry is one run.
struct Geometry {
    int32_t outer_dims;
    // The runs' elements are not neighbours in memory and in the stream; every element is a run of its own.
    int32_t scattered;
    Divider slots_per_run;
    Divider size[Box::max_dims];
    uint64_t index_stride[Box::max_dims];
    uint64_t memory_stride[Box::max_dims];  // in bytes
};

struct Shared {
    uint32_t key0[Philox::rounds];  // the key schedule: its words become constant operands
    uint32_t key1[Philox::rounds];
    uint32_t one;  // 1.0f's bits; see icdf
    Distribution distribution;
    Steps steps;
    Geometry geometry;
};

struct Entry {
    char* data;
    uint64_t index_offset;
    uint64_t run;  // elements
    uint64_t stream;
    uint32_t first_tile;
    uint32_t slots;
};

struct Launch {
    Shared shared;
    uint32_t tile_slots;
    uint32_t tiles;
    uint32_t count;
    Entry entries[kEntries];
};

// ---------------------------------------------------------------------------------------------------------------------
// Device code

__device__ constexpr NormalTable device_table = normal_table;

// The table has to be read 16 bytes at once, one row per element.
// A single copy: hot rows are broadcast, and eight conflict-free copies were slower.
constexpr int kRows = 256;

__device__ __forceinline__ void load_rows(float4* rows) {
    if (threadIdx.x < kRows) rows[threadIdx.x] = *reinterpret_cast<const float4*>(device_table.rows[threadIdx.x]);
    __syncthreads();
}

// What rounds 1 and 2 of Philox make of everything but the low word of the block, which is all that changes between
// the blocks of a plain run: two of the twenty multiplications, the scarce operation, are done once per run.
struct PhiloxRun {
    uint32_t x, y, z, w, z_first;
};

__device__ __forceinline__ PhiloxRun philox_run(const Shared& s, uint32_t block_high, uint64_t stream) {
    const uint64_t p1 = uint64_t{Philox::multiplier1} * static_cast<uint32_t>(stream);
    const uint32_t x1 = static_cast<uint32_t>(p1 >> 32) ^ block_high ^ s.key0[0];
    const uint64_t p0 = uint64_t{Philox::multiplier0} * x1;
    return PhiloxRun{static_cast<uint32_t>(p1) ^ s.key0[1], 0u, static_cast<uint32_t>(p0 >> 32) ^ s.key1[1],
                     static_cast<uint32_t>(p0), static_cast<uint32_t>(stream >> 32) ^ s.key1[0]};
}

__device__ __forceinline__ void philox_rounds(const Shared& s, int from, uint32_t (&c)[4]) {
#pragma unroll
    for (int round = from; round < Philox::rounds; ++round) {
        const uint64_t p0 = uint64_t{Philox::multiplier0} * c[0];
        const uint64_t p1 = uint64_t{Philox::multiplier1} * c[2];
        c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ s.key0[round];
        c[1] = static_cast<uint32_t>(p1);
        c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ s.key1[round];
        c[3] = static_cast<uint32_t>(p0);
    }
}

__device__ __forceinline__ void philox_block(const Shared& s, const PhiloxRun& run, uint32_t block, uint32_t (&c)[4]) {
    const uint64_t p0 = uint64_t{Philox::multiplier0} * block;
    const uint64_t p1 = uint64_t{Philox::multiplier1} * (static_cast<uint32_t>(p0 >> 32) ^ run.z_first);
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ run.x;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0) ^ run.z;
    c[3] = run.w;
    philox_rounds(s, 2, c);
}

// Truncated normals come in two forms: with equal sides that meet at 0 and no lower limit, as nearly all are, and any.
enum class Form { constant, uniform, normal, symmetric, truncated };

// normal_icdf. `one` is 1.0f's bits in a register: as an immediate it would cost the mantissa a second instruction.
__device__ __forceinline__ float icdf(uint32_t f, const float4* rows, uint32_t one) {
    const uint32_t offset = (f & 0x0FF00000u) >> 16;  // 16 bytes a row
    const float4 c = *reinterpret_cast<const float4*>(reinterpret_cast<const char*>(rows) + offset);
    const float t = __fadd_rn(__uint_as_float((f & 0x000FFFFFu) | one), -1.0625f);
    return __fmaf_rn(__fmaf_rn(__fmaf_rn(c.w, t, c.z), t, c.y), t, c.x);
}

__device__ __forceinline__ float with_sign_of(float x, uint32_t sign) {
    return __uint_as_float(__float_as_uint(x) ^ (sign & sign_bit));
}

// kScaled: the factor 2^-24 of a uniform's u is in the distribution's scale already, exactly.
template <Form kForm, bool kScaled>
__device__ __forceinline__ float value(const Shared& shared, uint32_t w, const float4* rows) {
    const Distribution& d = shared.distribution;
    if constexpr (kForm == Form::constant) {
        return d.location;
    } else if constexpr (kForm == Form::uniform) {
        if constexpr (kScaled) return __fmaf_rn(__uint2float_rn(w >> 8), d.scale, d.location);
        return uniform_value(d, w);
    } else if constexpr (kForm == Form::normal) {
        const uint32_t f = __float_as_uint(__int2float_rn(static_cast<int32_t>(w)));
        return __fmaf_rn(with_sign_of(icdf(f, rows, shared.one), f), d.scale, d.location);
    } else if constexpr (kForm == Form::symmetric) {
        const float g = __int2float_rn(static_cast<int32_t>(w));
        const float f = __fmaf_rn(fabsf(g), d.positive.scale, d.positive.offset);
        // No NaN and no two zeros of unlike sign meet here (the launcher sees to high > 0), so that fminf is at_most.
        const float z = fminf(icdf(__float_as_uint(f), rows, shared.one), d.positive.high);
        return __fmaf_rn(with_sign_of(z, __float_as_uint(g)), d.scale, d.location);
    } else {
        const bool negative = static_cast<int32_t>(w) < d.threshold;
        const uint32_t k = w - static_cast<uint32_t>(d.threshold);
        const float g = __uint2float_rn(negative ? 0u - k : k);
        const float f = __fmaf_rn(g, negative ? d.negative.scale : d.positive.scale,
                                  negative ? d.negative.offset : d.positive.offset);
        float z = icdf(__float_as_uint(f), rows, shared.one);
        z = at_least(z, negative ? d.negative.low : d.positive.low);
        z = at_most(z, negative ? d.negative.high : d.positive.high);
        return __fmaf_rn(with_sign_of(z, negative ? sign_bit : 0u), d.scale, d.location);
    }
}

// Step by step rather than element by element: the choice of operation is uniform.
__device__ __forceinline__ void apply_steps(const Steps& steps, float (&x)[4]) {
    for (int i = 0; i < steps.count; ++i) {
        const Step step = steps.items[i];
        switch (step.op) {
            case StepOp::multiply:
#pragma unroll
                for (float& v : x) v = __fmul_rn(v, step.a);
                break;
            case StepOp::add:
#pragma unroll
                for (float& v : x) v = __fadd_rn(v, step.a);
                break;
            case StepOp::divide:
#pragma unroll
                for (float& v : x) v = __fdiv_rn(v, step.a);
                break;
            default:
#pragma unroll
                for (float& v : x) v = at_most(at_least(v, step.a), step.b);
        }
    }
}

// One slot: kLanes elements in the 16 bytes of one store.
template <Dtype kDtype>
struct Slot {
    static constexpr int kItemSize = kDtype == Dtype::float32 ? 4 : 2;
    static constexpr int kLanes = 16 / kItemSize;
    static constexpr int kBlocks = kLanes / 4;
    uint32_t word[4];

    // The slot's elements 4 * block to 4 * block + 3. No NaN among them.
    __device__ __forceinline__ void set(int block, const float (&x)[4]) {
        if constexpr (kDtype == Dtype::float32) {
#pragma unroll
            for (int i = 0; i < 4; ++i) word[i] = __float_as_uint(x[i]);
        } else {
            word[2 * block] = pair(x[0], x[1]);
            word[2 * block + 1] = pair(x[2], x[3]);
        }
    }

    // The same with every NaN as quiet_nan: the hardware's conversions give another.
    __device__ __forceinline__ void set_canonical(int block, const float (&x)[4]) {
        set(block, x);
        constexpr uint32_t nan = kDtype == Dtype::float32 ? quiet_nan : kDtype == Dtype::float16 ? 0x7E00u : 0x7FC0u;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (x[i] == x[i]) continue;
            if constexpr (kDtype == Dtype::float32) {
                word[i] = nan;
            } else {
                uint32_t& w = word[2 * block + i / 2];
                w = i & 1 ? (w & 0x0000FFFFu) | nan << 16 : (w & 0xFFFF0000u) | nan;
            }
        }
    }

    __device__ __forceinline__ void store(char* address) const {
        *reinterpret_cast<uint4*>(address) = make_uint4(word[0], word[1], word[2], word[3]);
    }

    // The elements whose bits are set in `which`, each by itself.
    __device__ __forceinline__ void store_elements(char* address, uint32_t which) const {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            if (!(which >> i & 1u)) continue;
            if constexpr (kDtype == Dtype::float32) {
                reinterpret_cast<uint32_t*>(address)[i] = word[i];
            } else {
                reinterpret_cast<uint16_t*>(address)[i] = static_cast<uint16_t>(word[i / 2] >> (16 * (i & 1)));
            }
        }
    }

private:
    static __device__ __forceinline__ uint32_t pair(float low, float high) {
        uint32_t bits;
        if constexpr (kDtype == Dtype::float16) {
            const __half2 h = __floats2half2_rn(low, high);
            memcpy(&bits, &h, sizeof bits);
        } else {
            const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
            memcpy(&bits, &h, sizeof bits);
        }
        return bits;
    }
};

// Which table entry a tile belongs to: the last one that begins at or before it. Tiles come in rising order: it is the
// entry of the tile before, or a later one.
__device__ __forceinline__ uint32_t find_entry(const Launch& launch, uint32_t tile, uint32_t from) {
    if (from + 1 == launch.count || tile < launch.entries[from + 1].first_tile) return from;
    uint32_t below = launch.count;
    while (below - from > 1) {
        const uint32_t middle = (from + below) / 2;
        if (launch.entries[middle].first_tile <= tile) {
            from = middle;
        } else {
            below = middle;
        }
    }
    return from;
}

template <Form kForm, Dtype kDtype>
__global__ void __launch_bounds__(kThreads, kPlainBlocks)
    fill_plain(const __grid_constant__ Launch launch) {
    using S = Slot<kDtype>;
    __shared__ float4 rows[kForm == Form::uniform ? 1 : kRows];
    if constexpr (kForm != Form::uniform) load_rows(rows);
    const Shared& shared = launch.shared;

    uint32_t entry = 0;
    for (uint32_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
        entry = find_entry(launch, tile, entry);
        const Entry& e = launch.entries[entry];
        const uint64_t block = e.index_offset >> 2;
        const PhiloxRun run = philox_run(shared, static_cast<uint32_t>(block >> 32), e.stream);
        const uint32_t begin = (tile - e.first_tile) * launch.tile_slots;
        const uint32_t end = min(begin + launch.tile_slots, e.slots);
        for (uint32_t slot = begin + threadIdx.x; slot < end; slot += kThreads) {
            S out;
#pragma unroll
            for (int b = 0; b < S::kBlocks; ++b) {
                uint32_t w[4];
                philox_block(shared, run, static_cast<uint32_t>(block) + slot * S::kBlocks + b, w);
                float x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = value<kForm, true>(shared, w[i], rows);
                out.set(b, x);
            }
            out.store(e.data + uint64_t{slot} * 16);
        }
    }
}

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divider& by) {
    return (__umulhi(n, by.magic) + n) >> by.shift;
}

// Where a slot lies: its run's first element in the stream and in memory, and which of the run's slots it is.
struct Place {
    uint64_t index;
    char* memory;
    uint32_t slot;
};

__device__ __forceinline__ Place locate(const Geometry& g, const Entry& e, uint32_t slot) {
    Place p{e.index_offset, e.data, slot};
    if (g.outer_dims == 0) return p;
    uint32_t rest = divide(slot, g.slots_per_run);
    p.slot = slot - rest * g.slots_per_run.divisor;
    for (int d = g.outer_dims - 1; d >= 0; --d) {
        const uint32_t quotient = d == 0 ? 0 : divide(rest, g.size[d]);
        const uint32_t at = rest - quotient * g.size[d].divisor;
        p.index += at * g.index_stride[d];
        p.memory += at * g.memory_stride[d];
        rest = quotient;
    }
    return p;
}

// Elements [first, first + lanes) of a run fill the slot, of which those in [0, run) exist: their bits.
__device__ __forceinline__ uint32_t existing(int64_t first, uint64_t run, int lanes) {
    const int64_t left = static_cast<int64_t>(run) - first;
    if (left <= 0) return 0;
    const uint32_t below_end = left >= lanes ? (1u << lanes) - 1u : (1u << left) - 1u;
    return first < 0 ? below_end & (~0u << -first) : below_end;
}

template <Form kForm, Dtype kDtype>
__global__ void __launch_bounds__(kThreads, kGeneralBlocks) fill_general(const __grid_constant__ Launch launch) {
    using S = Slot<kDtype>;
    constexpr bool kTabulated = kForm != Form::constant && kForm != Form::uniform;
    constexpr uint32_t kAll = (1u << S::kLanes) - 1u;
    __shared__ float4 rows[kTabulated ? kRows : 1];
    if constexpr (kTabulated) load_rows(rows);
    const Shared& shared = launch.shared;

    uint32_t entry = 0;
    for (uint32_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
        entry = find_entry(launch, tile, entry);
        const Entry& e = launch.entries[entry];
        const uint32_t begin = (tile - e.first_tile) * launch.tile_slots;
        const uint32_t end = min(begin + launch.tile_slots, e.slots);
        for (uint32_t slot = begin + threadIdx.x; slot < end; slot += kThreads) {
            const Place place = locate(shared.geometry, e, slot);
            // A run's first slot begins up to kLanes - 1 elements before the run: at a 16-byte boundary, or, where
            // elements are stored one by one anyway, at a Philox block.
            const int head = shared.geometry.scattered
                                 ? static_cast<int>(place.index & 3)
                                 : static_cast<int>(reinterpret_cast<uintptr_t>(place.memory) & 15) / S::kItemSize;
            const int64_t first = int64_t{place.slot} * S::kLanes - head;
            const uint32_t which = existing(first, e.run, S::kLanes);
            if (which == 0) continue;

            S out;
            uint32_t phase = 0;
            uint32_t current[4];
            // Before the start of stream element 0 the index wraps and so does the block: block -1 is never stored.
            const int64_t index = static_cast<int64_t>(place.index) + first;
            const auto words = [&](int64_t block, uint32_t(&w)[4]) {
                w[0] = static_cast<uint32_t>(block);
                w[1] = static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32);
                w[2] = static_cast<uint32_t>(e.stream);
                w[3] = static_cast<uint32_t>(e.stream >> 32);
                philox_rounds(shared, 0, w);
            };
            if constexpr (kForm != Form::constant) {
                phase = static_cast<uint32_t>(index) & 3u;
                words(index >> 2, current);
            }
#pragma unroll
            for (int b = 0; b < S::kBlocks; ++b) {
                float x[4];
                if constexpr (kForm == Form::constant) {
#pragma unroll
                    for (float& v : x) v = shared.distribution.location;
                } else {
                    uint32_t w[8];
#pragma unroll
                    for (int i = 0; i < 4; ++i) w[i] = current[i];
                    if (phase != 0 || b + 1 < S::kBlocks) {
                        words((index >> 2) + b + 1, current);
#pragma unroll
                        for (int i = 0; i < 4; ++i) w[4 + i] = current[i];
                    }
                    if (phase & 1u) {
#pragma unroll
                        for (int i = 0; i < 7; ++i) w[i] = w[i + 1];
                    }
                    if (phase & 2u) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) w[i] = w[i + 2];
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) x[i] = value<kForm, false>(shared, w[i], rows);
                }
                if (kForm == Form::constant || shared.steps.count > 0) {
                    apply_steps(shared.steps, x);
                    out.set_canonical(b, x);
                } else {
                    out.set(b, x);
                }
            }
            char* address = place.memory + first * S::kItemSize;
            if (which == kAll) {
                out.store(address);
            } else {
                out.store_elements(address, which);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host code

using Kernel = void (*)(Launch);

template <Form kForm>
Kernel general_kernel(Dtype dtype) {
    switch (dtype) {
        case Dtype::float16: return fill_general<kForm, Dtype::float16>;
        case Dtype::bfloat16: return fill_general<kForm, Dtype::bfloat16>;
        default: return fill_general<kForm, Dtype::float32>;
    }
}

template <Form kForm>
Kernel plain_kernel(Dtype dtype) {
    switch (dtype) {
        case Dtype::float16: return fill_plain<kForm, Dtype::float16>;
        case Dtype::bfloat16: return fill_plain<kForm, Dtype::bfloat16>;
        default: return fill_plain<kForm, Dtype::float32>;
    }
}

Kernel kernel_for(Form form, Dtype dtype, bool plain) {
    switch (form) {
        case Form::constant: return general_kernel<Form::constant>(dtype);
        case Form::uniform: return plain ? plain_kernel<Form::uniform>(dtype) : general_kernel<Form::uniform>(dtype);
        case Form::normal: return plain ? plain_kernel<Form::normal>(dtype) : general_kernel<Form::normal>(dtype);
        case Form::symmetric: return plain_kernel<Form::symmetric>(dtype);
        default: return general_kernel<Form::truncated>(dtype);
    }
}

[[noreturn]] void fail(const char* call, int device, cudaError_t error) {
    cudaGetLastError();  // this error is reported here: leave none behind for the program's next check
    throw std::runtime_error(std::string(call) + " failed on CUDA device " + std::to_string(device) + ": " +
                             cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

void check(cudaError_t error, const char* call, int device) {
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

Divider make_divider(uint64_t divisor) {
    uint32_t shift = 0;
    while (uint64_t{1} << shift < divisor) ++shift;
    const uint64_t magic = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1;
    return Divider{static_cast<uint32_t>(divisor), static_cast<uint32_t>(magic), shift};
}

// What fills must have in common to share a launch. Zeroed before it is filled in, so that it compares bytewise.
struct Key {
    Form form;
    Dtype dtype;
    bool plain;
    uint64_t seed;
    Distribution distribution;
    Steps steps;
    Geometry geometry;
};

struct KeyHash {
    size_t operator()(const Key& key) const {
        uint64_t parts[4];
        std::memcpy(parts, &key.distribution.location, 8);
        parts[1] = key.seed;
        parts[2] = key.geometry.slots_per_run.divisor ^ key.geometry.index_stride[0] << 20;
        parts[3] = static_cast<uint64_t>(key.form) << 16 | static_cast<uint64_t>(key.dtype) << 8 |
                   static_cast<uint64_t>(key.plain) << 4 | static_cast<uint64_t>(key.steps.count);
        uint64_t hash = 0;
        for (uint64_t part : parts) hash = (hash ^ part ^ part >> 32) * 0x9E3779B97F4A7C15u;
        return static_cast<size_t>(hash >> 16);
    }
};

struct KeyEqual {
    bool operator()(const Key& a, const Key& b) const { return std::memcmp(&a, &b, sizeof(Key)) == 0; }
};

// A part of a fill that fits one table entry.
struct Piece {
    char* data;
    Box box;
};

uint64_t ceil_divide(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }

// The geometry of a piece's kernel, its slots, and the length of its runs.
struct Shape {
    Geometry geometry;
    uint64_t slots;
    uint64_t run;
};

// Of a piece of more than kMaxSlots slots, only that holds.
Shape shape_of(const Piece& piece, Dtype dtype) {
    const uint64_t item = item_size(dtype), lanes = 16 / item;
    const Box& box = piece.box;
    const auto address = reinterpret_cast<uintptr_t>(piece.data);
    Shape shape;
    std::memset(&shape, 0, sizeof shape);
    Geometry& g = shape.geometry;
    g.scattered = !box.contiguous_runs();
    g.outer_dims = g.scattered ? box.dims : box.dims - 1;
    shape.run = g.scattered ? 1 : box.run();

    // Runs have equally many slots, enough for the least aligned of them.
    bool aligned = address % 16 == 0;
    uint64_t runs = 1;
    for (int d = 0; d < g.outer_dims; ++d) {
        aligned = aligned && box.memory_stride[d] * item % 16 == 0;
        runs *= box.size[d];
    }
    const uint64_t head = g.outer_dims == 0 ? address % 16 / item : aligned ? 0 : lanes - 1;
    const uint64_t per_run = g.scattered ? 1 : ceil_divide(head + shape.run, lanes);
    shape.slots = runs > kMaxSlots / per_run ? kMaxSlots + 1 : runs * per_run;
    if (g.outer_dims == 0 || shape.slots > kMaxSlots) return shape;
    g.slots_per_run = make_divider(per_run);
    for (int d = 0; d < g.outer_dims; ++d) {
        g.size[d] = make_divider(box.size[d]);
        g.index_stride[d] = box.index_stride[d];
        g.memory_stride[d] = box.memory_stride[d] * item;
    }
    return shape;
}

// Halves a piece across its first dimension. A run is cut where a slot and a Philox block end.
void split(const Piece& piece, Dtype dtype, std::vector<Piece>& pieces) {
    Piece low = piece, high = piece;
    uint64_t cut = piece.box.size[0] / 2;
    if (piece.box.contiguous()) cut = cut / 16 * 16;
    low.box.size[0] = cut;
    high.box.size[0] -= cut;
    high.box.index_offset += cut * piece.box.index_stride[0];
    high.data += cut * piece.box.memory_stride[0] * item_size(dtype);
    // A dimension of size 1 is harmless to the kernel; the next call may need to halve the one after it.
    for (Piece* part : {&low, &high}) {
        Box& box = part->box;
        if (box.dims > 1 && box.size[0] == 1) {
            for (int d = 1; d < box.dims; ++d) {
                box.size[d - 1] = box.size[d];
                box.index_stride[d - 1] = box.index_stride[d];
                box.memory_stride[d - 1] = box.memory_stride[d];
            }
            --box.dims;
        }
    }
    pieces.push_back(high);
    pieces.push_back(low);
}

Form form_of(const Fill& fill) {
    const Distribution& d = fill.distribution;
    switch (d.kind) {
        case Kind::constant: return Form::constant;
        case Kind::uniform: return Form::uniform;
        case Kind::normal: return Form::normal;
        default: break;
    }
    const TailMap& tail = d.positive;
    if (!d.symmetric || !std::isinf(tail.low) || tail.low > 0) return Form::truncated;
    // Bounds that no z reaches: the same words give a normal's bits.
    if (tail.scale == 1.0f && tail.offset == 0.0f && tail.high >= 7.0f) return Form::normal;
    return tail.high > 0 && fill.steps.count == 0 ? Form::symmetric : Form::truncated;
}

// Collects table entries by key and launches them.
class Launcher {
public:
    Launcher(int device, cudaStream_t stream) : device_(device), stream_(stream), guard_(device) {
        int multiprocessors = 0, threads = 0;
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
              "cudaDeviceGetAttribute", device);
        check(cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device),
              "cudaDeviceGetAttribute", device);
        resident_ = static_cast<uint32_t>(multiprocessors * std::max(threads / kThreads, 1));
        std::memset(&key_, 0, sizeof key_);
    }

    void add(const Fill& fill) {
        if (fill.elements() == 0) return;
        std::vector<Piece>& pieces = pieces_;
        pieces.assign(1, Piece{static_cast<char*>(fill.data), fill.box});
        while (!pieces.empty()) {
            const Piece piece = pieces.back();
            pieces.pop_back();
            const Shape shape = shape_of(piece, fill.dtype);
            if (shape.slots > kMaxSlots) {
                split(piece, fill.dtype, pieces);
            } else {
                add_piece(fill, piece, shape);
            }
        }
    }

    void launch() {
        for (const auto& [key, entries] : groups_) launch_group(key, entries);
    }

private:
    void add_piece(const Fill& fill, const Piece& piece, const Shape& shape) {
        const uint64_t item = item_size(fill.dtype), lanes = 16 / item;
        const Box& box = piece.box;
        const Form form = form_of(fill);
        const uint64_t first_block = box.index_offset >> 2;
        const uint64_t last_block = (box.index_offset + (shape.run | (lanes - 1))) >> 2;
        // A uniform's scale times 2^-24, exact unless it is tiny; in integers, since the caller may flush subnormals.
        Distribution scaled = fill.distribution;
        const uint32_t scale_bits = bits_of(scaled.scale);
        const bool zero = (scale_bits & ~sign_bit) == 0;
        const bool scales = form != Form::uniform || zero || (scale_bits & ~sign_bit) >> 23 > 24;
        if (!zero) scaled.scale = float_of(scale_bits - (24u << 23));
        const bool plain = form != Form::constant && form != Form::truncated && fill.steps.count == 0 && scales &&
                           box.contiguous() && reinterpret_cast<uintptr_t>(piece.data) % 16 == 0 &&
                           box.index_offset % 4 == 0 && first_block >> 32 == last_block >> 32 && shape.run >= lanes;
        if (!plain) {
            add_entry(fill, form == Form::symmetric ? Form::truncated : form, false, fill.distribution, shape,
                      Entry{piece.data, box.index_offset, shape.run, fill.stream, 0, 0}, shape.slots);
            return;
        }
        const uint64_t slots = shape.run / lanes, body = slots * lanes;
        add_entry(fill, form, true, form == Form::uniform ? scaled : fill.distribution, shape,
                  Entry{piece.data, box.index_offset, body, fill.stream, 0, 0}, slots);
        if (body == shape.run) return;
        const Form general = form == Form::symmetric ? Form::truncated : form;
        add_entry(fill, general, false, fill.distribution, shape,
                  Entry{piece.data + body * item, box.index_offset + body, shape.run - body, fill.stream, 0, 0}, 1);
    }

    void add_entry(const Fill& fill, Form form, bool plain, const Distribution& distribution, const Shape& shape,
                   Entry entry, uint64_t slots) {
        key_.form = form;
        key_.dtype = fill.dtype;
        key_.plain = plain;
        key_.seed = form == Form::constant ? 0 : fill.seed;
        key_.distribution = distribution;
        key_.steps = fill.steps;
        key_.geometry = shape.geometry;
        entry.slots = static_cast<uint32_t>(slots);
        // Neighbours in a list of fills are mostly alike.
        if (last_ == nullptr || !KeyEqual{}(last_->first, key_)) last_ = &*groups_.try_emplace(key_).first;
        last_->second.push_back(entry);
    }

    void launch_group(const Key& key, const std::vector<Entry>& entries) {
        Launch launch{};
        Shared& shared = launch.shared;
        for (uint32_t round = 0; round < Philox::rounds; ++round) {
            shared.key0[round] = static_cast<uint32_t>(key.seed) + round * Philox::key_step0;
            shared.key1[round] = static_cast<uint32_t>(key.seed >> 32) + round * Philox::key_step1;
        }
        shared.one = 0x3F800000u;
        shared.distribution = key.distribution;
        shared.steps = key.steps;
        shared.geometry = key.geometry;
        const Kernel kernel = kernel_for(key.form, key.dtype, key.plain);
        for (size_t done = 0; done < entries.size(); done += launch.count) {
            launch.count = static_cast<uint32_t>(std::min<size_t>(entries.size() - done, kEntries));
            launch.tile_slots = tile_slots(&entries[done], launch.count);
            launch.tiles = 0;
            for (uint32_t i = 0; i < launch.count; ++i) {
                Entry& entry = launch.entries[i] = entries[done + i];
                entry.first_tile = launch.tiles;
                launch.tiles += (entry.slots + launch.tile_slots - 1) / launch.tile_slots;
            }
            void* arguments[] = {&launch};
            check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(std::min(launch.tiles, resident_)),
                                   dim3(kThreads), arguments, 0, stream_),
                  "cudaLaunchKernel", device_);
        }
    }

    // At least eight tiles for every resident block where there is work enough, so that blocks end together.
    uint32_t tile_slots(const Entry* entries, uint32_t count) const {
        uint64_t slots = 0;
        for (uint32_t i = 0; i < count; ++i) slots += entries[i].slots;
        const uint64_t wanted = slots / (uint64_t{8} * resident_) / kThreads * kThreads;
        return static_cast<uint32_t>(std::min<uint64_t>(std::max<uint64_t>(wanted, kThreads), kMaxTile));
    }

    int device_;
    cudaStream_t stream_;
    DeviceGuard guard_;
    uint32_t resident_ = 0;  // blocks that the device runs at a time
    Key key_;
    std::unordered_map<Key, std::vector<Entry>, KeyHash, KeyEqual> groups_;
    std::pair<const Key, std::vector<Entry>>* last_ = nullptr;
    std::vector<Piece> pieces_;
};

}  // namespace

void fill_cuda(const Fill* fills, size_t count, int device, void* stream) {
    Launcher launcher(device, static_cast<cudaStream_t>(stream));
    for (size_t i = 0; i < count; ++i) launcher.add(fills[i]);
    launcher.launch();
}

}  // namespace fastinit
