// Stream v1 on CUDA: kernels, then the launcher fill_cuda.
//
// Fills that agree in kind, dtype, distribution, steps, seed and geometry share a launch, whose parameters carry the
// whole table of them: nothing is allocated or copied, so a launch is asynchronous and can be captured. A slot is one
// 16-byte store; each entry of the table is cut into tiles of so many slots, and a persistent grid walks the tiles.
//
// Three kernels:
//   fill_run      whole 16-byte-aligned runs that begin on a Philox block, without steps: nearly everything in a model.
//   fill_rows     the same with steps, and boxes all of whose runs are so aligned.
//   fill_general  any alignment, any start, any box, values that may be NaN, short tails.
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

// Threads of a block and blocks of a multiprocessor. Both together fill it where it holds 2048 threads, at 32 registers
// each, or 1536, at 40. On an H200, blocks of 1024 make 2-byte normals 3 % faster than blocks of 512; float32 was
// measured with 512 alone.
#if defined(__CUDA_ARCH__) && ((__CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900) || __CUDA_ARCH__ >= 1100)
constexpr int run_threads(Dtype) { return 512; }
constexpr int run_blocks(Dtype) { return 3; }
#else
constexpr int run_threads(Dtype dtype) { return dtype == Dtype::float32 ? 512 : 1024; }
constexpr int run_blocks(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }
#endif
constexpr int kGeneralThreads = 512;
constexpr int kGeneralBlocks = 2;
constexpr int kRowsBlocks = 3;
constexpr uint32_t kWarp = 32;
// A tile, at most, in slots for each thread of a block: finding a tile's entry and preparing its Philox rounds is a
// small part of filling it.
constexpr uint32_t kMaxTile = 16;
// Slots in a table entry, at most. Keeps slot and tile numbers of a launch and the elements of a run within 32 bits.
constexpr uint64_t kMaxSlots = uint64_t{1} << 28;
// Kernel parameters may take 32,764 bytes from CUDA 12.1, 4 KB before. With more than 16 KB a launch takes longer.
#if CUDART_VERSION >= 12010
constexpr int kEntries = 480;
#else
constexpr int kEntries = 100;
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
    uint32_t slots;  // of all runs
    Divider slots_per_run;
    uint64_t run;  // elements
    Divider size[Box::max_dims];
    uint64_t index_stride[Box::max_dims];
    uint64_t memory_stride[Box::max_dims];  // in bytes
    uint32_t block_stride[Box::max_dims];   // index_stride in Philox blocks, as an offset to a block number's low word
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
    uint64_t stream;
    uint32_t first_tile;
    uint32_t size;  // in slots; the elements of fill_general's single run
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

// Truncated normals come in two forms: with equal sides that meet at 0 and no lower limit, as nearly all are, and any.
enum class Form { constant, uniform, normal, symmetric, truncated };

__device__ constexpr NormalTable device_table = normal_table;

// The table has to be read 16 bytes at once, one row per element. Eight copies, side by side: threads 0 to 7 of a
// quarter warp, which the hardware serves together, read copies 0 to 7, each in its own banks.
constexpr uint32_t kTableRows = 256;
constexpr uint32_t kCopies = 8;

// The calling thread's copy.
__device__ __forceinline__ const float4* load_rows(float4* rows) {
    for (uint32_t i = threadIdx.x; i < kTableRows * kCopies; i += blockDim.x)
        rows[i] = *reinterpret_cast<const float4*>(device_table.rows[i / kCopies]);
    __syncthreads();
    return rows + threadIdx.x % kCopies;
}

template <Form kForm>
constexpr bool kTabulated = kForm != Form::constant && kForm != Form::uniform;

// What rounds 1 and 2 of Philox make of everything but the low word of the block, which is all that changes between
// the blocks of an entry: two of the twenty multiplications, the scarce operation, are done once per run.
struct PhiloxRun {
    uint32_t x, z, w, z_first;
};

__device__ __forceinline__ PhiloxRun philox_run(const Shared& s, uint32_t block_high, uint64_t stream) {
    const uint64_t p1 = uint64_t{Philox::multiplier1} * static_cast<uint32_t>(stream);
    const uint32_t x1 = static_cast<uint32_t>(p1 >> 32) ^ block_high ^ s.key0[0];
    const uint64_t p0 = uint64_t{Philox::multiplier0} * x1;
    return PhiloxRun{static_cast<uint32_t>(p1) ^ s.key0[1], static_cast<uint32_t>(p0 >> 32) ^ s.key1[1],
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

// normal_icdf. `one` is 1.0f's bits in a register: as an immediate it would cost the mantissa a second instruction.
__device__ __forceinline__ float icdf(uint32_t f, const float4* rows, uint32_t one) {
    const uint32_t offset = (f & 0x0FF00000u) >> 13;  // a row's copies are 128 bytes
    const float4 c = *reinterpret_cast<const float4*>(reinterpret_cast<const char*>(rows) + offset);
    const float t = __fadd_rn(__uint_as_float((f & 0x000FFFFFu) | one), -1.0625f);
    return __fmaf_rn(__fmaf_rn(__fmaf_rn(c.w, t, c.z), t, c.y), t, c.x);
}

__device__ __forceinline__ float with_sign_of(float x, uint32_t sign) {
    return __uint_as_float(__float_as_uint(x) ^ (sign & sign_bit));
}

// kAligned: for fill_run and fill_rows, whose fills the launcher has chosen. A uniform's scale has u's factor 2^-24,
// exactly. A truncated normal meets no NaN, and zeros of unlike sign nowhere: no z is -0 and no bound `high` is a
// zero. So fmaxf is at_least and fminf is at_most.
template <Form kForm, bool kAligned>
__device__ __forceinline__ float value(const Shared& shared, uint32_t w, const float4* rows) {
    const Distribution& d = shared.distribution;
    if constexpr (kForm == Form::constant) {
        return d.location;
    } else if constexpr (kForm == Form::uniform) {
        if constexpr (kAligned) return __fmaf_rn(__uint2float_rn(w >> 8), d.scale, d.location);
        return uniform_value(d, w);
    } else if constexpr (kForm == Form::normal) {
        const uint32_t f = __float_as_uint(__int2float_rn(static_cast<int32_t>(w)));
        return __fmaf_rn(with_sign_of(icdf(f, rows, shared.one), f), d.scale, d.location);
    } else if constexpr (kForm == Form::symmetric) {
        const float g = __int2float_rn(static_cast<int32_t>(w));
        const float f = __fmaf_rn(fabsf(g), d.positive.scale, d.positive.offset);
        const float z = fminf(icdf(__float_as_uint(f), rows, shared.one), d.positive.high);
        return __fmaf_rn(with_sign_of(z, __float_as_uint(g)), d.scale, d.location);
    } else {
        const bool negative = static_cast<int32_t>(w) < d.threshold;
        const uint32_t k = w - static_cast<uint32_t>(d.threshold);
        const float g = __uint2float_rn(negative ? 0u - k : k);
        const float f = __fmaf_rn(g, negative ? d.negative.scale : d.positive.scale,
                                  negative ? d.negative.offset : d.positive.offset);
        float z = icdf(__float_as_uint(f), rows, shared.one);
        const float low = negative ? d.negative.low : d.positive.low;
        const float high = negative ? d.negative.high : d.positive.high;
        z = kAligned ? fminf(fmaxf(z, low), high) : at_most(at_least(z, low), high);
        return __fmaf_rn(negative ? -z : z, d.scale, d.location);
    }
}

// Step by step rather than element by element: the choice of operation is uniform.
template <int kCount>
__device__ __forceinline__ void apply_steps(const Steps& steps, float (&x)[kCount]) {
#pragma unroll 1
    for (int i = 0; i < steps.count; ++i) {
        const Step& step = steps.items[i];
        const float a = step.a;
        switch (step.op) {
            case StepOp::multiply:
#pragma unroll
                for (float& v : x) v = __fmul_rn(v, a);
                break;
            case StepOp::add:
#pragma unroll
                for (float& v : x) v = __fadd_rn(v, a);
                break;
            case StepOp::divide:
#pragma unroll
                for (float& v : x) v = __fdiv_rn(v, a);
                break;
            default:
#pragma unroll
                for (float& v : x) v = at_most(at_least(v, a), step.b);
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

    // No NaN among them.
    __device__ __forceinline__ void set(const float (&x)[kLanes]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kDtype == Dtype::float32) {
                word[i] = __float_as_uint(x[i]);
            } else {
                word[i] = pair(x[2 * i], x[2 * i + 1]);
            }
        }
    }

    // The same with every NaN as quiet_nan: the hardware's conversions give another.
    __device__ __forceinline__ void set_canonical(const float (&x)[kLanes]) {
        set(x);
        constexpr uint32_t nan = kDtype == Dtype::float32 ? quiet_nan : kDtype == Dtype::float16 ? 0x7E00u : 0x7FC0u;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            if (x[i] == x[i]) continue;
            if constexpr (kDtype == Dtype::float32) {
                word[i] = nan;
            } else {
                uint32_t& w = word[i / 2];
                w = i & 1 ? (w & 0x0000FFFFu) | nan << 16 : (w & 0xFFFF0000u) | nan;
            }
        }
    }

    // Moves the elements down by `phase`, 0 to 3, and takes in the first ones of the next thread's slot.
    // Every thread of the warp must call this; the last one's slot is spoilt.
    __device__ __forceinline__ void shift(uint32_t phase) {
        uint32_t w[7];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = word[i];
        constexpr int kNext = kDtype == Dtype::float32 ? 3 : 2;
#pragma unroll
        for (int i = 0; i < kNext; ++i) w[4 + i] = __shfl_down_sync(0xFFFFFFFFu, word[i], 1);
        if constexpr (kDtype == Dtype::float32) {
            if (phase & 2u) {
#pragma unroll
                for (int i = 0; i < 5; ++i) w[i] = w[i + 2];
            }
            if (phase & 1u) {
#pragma unroll
                for (int i = 0; i < 4; ++i) w[i] = w[i + 1];
            }
        } else {
            if (phase & 2u) {
#pragma unroll
                for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
            }
            if (phase & 1u) {
#pragma unroll
                for (int i = 0; i < 4; ++i) w[i] = __funnelshift_r(w[i], w[i + 1], 16);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = w[i];
    }

    __device__ __forceinline__ void set_constant(const Shared& shared) {
        float value[1] = {shared.distribution.location};
        apply_steps(shared.steps, value);
        float x[kLanes];
#pragma unroll
        for (float& v : x) v = value[0];
        set_canonical(x);
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

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divider& by) {
    return (__umulhi(n, by.magic) + n) >> by.shift;
}

// kRows: the entries may be boxes and have steps.
template <Form kForm, Dtype kDtype, bool kRows>
__device__ __forceinline__ void fill_aligned(const Launch& launch) {
    using S = Slot<kDtype>;
    __shared__ float4 table[kTabulated<kForm> ? kTableRows * kCopies : 1];
    const float4* const rows = kTabulated<kForm> ? load_rows(table) : table;
    const Shared& shared = launch.shared;
    const Geometry& g = shared.geometry;
    S out;
    if constexpr (kForm == Form::constant) out.set_constant(shared);

    uint32_t entry = 0;
    for (uint32_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
        entry = find_entry(launch, tile, entry);
        const Entry& e = launch.entries[entry];
        const uint64_t block = e.index_offset >> 2;
        PhiloxRun run = philox_run(shared, static_cast<uint32_t>(block >> 32), e.stream);
        // Keeps the compiler from doing it again for every slot, to save registers that only the truncated form lacks.
        if constexpr (kRows && kForm != Form::truncated)
            asm volatile("" : "+r"(run.x), "+r"(run.z), "+r"(run.w), "+r"(run.z_first));
        const uint32_t begin = (tile - e.first_tile) * launch.tile_slots;
        const uint32_t end = min(begin + launch.tile_slots, e.size);
        for (uint32_t slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
            uint32_t first_block = static_cast<uint32_t>(block);
            char* address = e.data;
            uint32_t at = slot;  // in its run
            if constexpr (kRows) {
                uint32_t row = divide(slot, g.slots_per_run);
                at = slot - row * g.slots_per_run.divisor;
#pragma unroll 1
                for (int d = g.outer_dims - 1; d > 0; --d) {
                    const uint32_t quotient = divide(row, g.size[d]);
                    row -= quotient * g.size[d].divisor;
                    first_block += row * g.block_stride[d];
                    address += row * g.memory_stride[d];
                    row = quotient;
                }
                first_block += row * g.block_stride[0];
                address += row * g.memory_stride[0];
            }
            if constexpr (kForm != Form::constant) {
                float x[S::kLanes];
#pragma unroll
                for (int b = 0; b < S::kBlocks; ++b) {
                    uint32_t w[4];
                    philox_block(shared, run, first_block + at * S::kBlocks + b, w);
#pragma unroll
                    for (int i = 0; i < 4; ++i) x[4 * b + i] = value<kForm, true>(shared, w[i], rows);
                }
                if constexpr (kRows) apply_steps(shared.steps, x);
                out.set(x);
            }
            out.store(address + uint64_t{at} * 16);
        }
    }
}

template <Form kForm, Dtype kDtype>
__global__ void __launch_bounds__(run_threads(kDtype), run_blocks(kDtype))
    fill_run(const __grid_constant__ Launch launch) {
    fill_aligned<kForm, kDtype, false>(launch);
}

template <Form kForm, Dtype kDtype>
__global__ void __launch_bounds__(kGeneralThreads, kRowsBlocks) fill_rows(const __grid_constant__ Launch launch) {
    fill_aligned<kForm, kDtype, true>(launch);
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
#pragma unroll 1
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

// A thread makes the elements of whole Philox blocks. Where a slot begins inside a block, its last elements are the
// first ones that the next thread makes; the last thread of a warp only helps the one before it.
template <Form kForm, Dtype kDtype>
__global__ void __launch_bounds__(kGeneralThreads, kGeneralBlocks) fill_general(const __grid_constant__ Launch launch) {
    using S = Slot<kDtype>;
    constexpr uint32_t kAll = (1u << S::kLanes) - 1u;
    __shared__ float4 table[kTabulated<kForm> ? kTableRows * kCopies : 1];
    const float4* const rows = kTabulated<kForm> ? load_rows(table) : table;
    const Shared& shared = launch.shared;
    const Geometry& g = shared.geometry;
    const uint32_t lane = threadIdx.x % kWarp;
    const uint32_t step = blockDim.x / kWarp * (kWarp - 1);
    S out;
    if constexpr (kForm == Form::constant) out.set_constant(shared);

    uint32_t entry = 0;
    for (uint32_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
        entry = find_entry(launch, tile, entry);
        const Entry& e = launch.entries[entry];
        const uint32_t begin = (tile - e.first_tile) * launch.tile_slots;
        // Of a single run, a bound will do: `existing` finds the end.
        const uint32_t end = min(begin + launch.tile_slots, g.outer_dims == 0 ? e.size / S::kLanes + 2 : g.slots);
        const uint64_t elements = g.outer_dims == 0 ? e.size : g.run;
        // The condition is the same for a whole warp: its threads have to meet in Slot::shift.
        for (uint32_t from = begin + threadIdx.x / kWarp * (kWarp - 1); from < end; from += step) {
            const uint32_t slot = from + lane;
            const Place place = locate(g, e, slot);
            // A run's first slot begins up to kLanes - 1 elements before the run: at a 16-byte boundary, or, where
            // elements are stored one by one anyway, at a Philox block.
            const uint32_t misaligned = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(place.memory)) & 15u;
            const int head = static_cast<int>(g.scattered ? place.index & 3 : misaligned / S::kItemSize);
            const int64_t first = int64_t{place.slot} * S::kLanes - head;
            const uint32_t which = lane != kWarp - 1 && slot < end ? existing(first, elements, S::kLanes) : 0;

            if constexpr (kForm != Form::constant) {
                // Before element 0 of the stream the index wraps and so does the block: block -1 is never stored.
                const int64_t index = static_cast<int64_t>(place.index) + first;
                float x[S::kLanes];
#pragma unroll
                for (int b = 0; b < S::kBlocks; ++b) {
                    const uint64_t block = static_cast<uint64_t>((index >> 2) + b);
                    uint32_t w[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                     static_cast<uint32_t>(e.stream), static_cast<uint32_t>(e.stream >> 32)};
                    philox_rounds(shared, 0, w);
#pragma unroll
                    for (int i = 0; i < 4; ++i) x[4 * b + i] = value<kForm, false>(shared, w[i], rows);
                }
                apply_steps(shared.steps, x);
                out.set_canonical(x);
                out.shift(static_cast<uint32_t>(index) & 3u);
            }
            char* const address = place.memory + first * S::kItemSize;
            if (which == kAll) {
                out.store(address);
            } else if (which != 0) {
                out.store_elements(address, which);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Host code

using Kernel = void (*)(Launch);

enum class Path { run, rows, general };

template <Dtype kDtype>
Kernel kernel_for(Form form, Path path) {
    switch (form) {
        case Form::constant:
            return path == Path::general ? fill_general<Form::constant, kDtype> : fill_run<Form::constant, kDtype>;
        case Form::uniform:
            return path == Path::run    ? fill_run<Form::uniform, kDtype>
                   : path == Path::rows ? fill_rows<Form::uniform, kDtype>
                                        : fill_general<Form::uniform, kDtype>;
        case Form::normal:
            return path == Path::run    ? fill_run<Form::normal, kDtype>
                   : path == Path::rows ? fill_rows<Form::normal, kDtype>
                                        : fill_general<Form::normal, kDtype>;
        case Form::symmetric:
            return fill_run<Form::symmetric, kDtype>;
        default:
            return path == Path::general ? fill_general<Form::truncated, kDtype> : fill_rows<Form::truncated, kDtype>;
    }
}

Kernel kernel_for(Form form, Dtype dtype, Path path) {
    switch (dtype) {
        case Dtype::float16: return kernel_for<Dtype::float16>(form, path);
        case Dtype::bfloat16: return kernel_for<Dtype::bfloat16>(form, path);
        default: return kernel_for<Dtype::float32>(form, path);
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
    Path path;
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
                   static_cast<uint64_t>(key.path) << 4 | static_cast<uint64_t>(key.steps.count);
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

// Whether fill_run or fill_rows may fill the piece: all its runs begin on a Philox block and at a 16-byte boundary and,
// but for a single run's tail, end so, and the high word of the block number is one and the same.
bool is_aligned(const Piece& piece, Dtype dtype) {
    const uint64_t item = item_size(dtype), lanes = 16 / item;
    const Box& box = piece.box;
    if (!box.contiguous_runs() || reinterpret_cast<uintptr_t>(piece.data) % 16 != 0 || box.index_offset % 4 != 0)
        return false;
    if (box.dims == 1 ? box.run() < lanes : box.run() % lanes != 0) return false;
    uint64_t last = box.index_offset + box.run() - 1;
    for (int d = 0; d < box.dims - 1; ++d) {
        if (box.index_stride[d] % 4 != 0 || box.memory_stride[d] * item % 16 != 0) return false;
        last += (box.size[d] - 1) * box.index_stride[d];
    }
    return box.index_offset >> 34 == last >> 34;
}

// A piece's slots and how they are arranged. Of a piece of more than kMaxSlots slots, the number alone holds.
struct Shape {
    Geometry geometry;
    uint64_t slots;
};

Shape shape_of(const Piece& piece, Dtype dtype, bool aligned) {
    const uint64_t item = item_size(dtype), lanes = 16 / item;
    const Box& box = piece.box;
    Shape shape;
    std::memset(&shape, 0, sizeof shape);
    Geometry& g = shape.geometry;
    g.scattered = !box.contiguous_runs();
    g.outer_dims = g.scattered ? box.dims : box.dims - 1;
    const uint64_t run = g.scattered ? 1 : box.run();

    uint64_t per_run = 1;
    if (aligned) {
        per_run = run / lanes;
    } else if (!g.scattered) {
        // Enough for a run that begins on a slot's last element, and one more, whose thread helps the one before it.
        per_run = ceil_divide(lanes - 1 + run, lanes) + 1;
    }
    uint64_t runs = 1;
    for (int d = 0; d < g.outer_dims; ++d) runs *= box.size[d];
    shape.slots = runs > kMaxSlots / per_run ? kMaxSlots + 1 : runs * per_run;
    if (shape.slots > kMaxSlots) return shape;
    if (g.outer_dims == 0) {
        g.slots_per_run = make_divider(uint64_t{1} << 31);  // beyond all slots: fill_rows finds every one in row 0
        return shape;
    }
    g.slots = static_cast<uint32_t>(shape.slots);
    g.slots_per_run = make_divider(per_run);
    g.run = run;
    for (int d = 0; d < g.outer_dims; ++d) {
        g.size[d] = make_divider(box.size[d]);
        g.index_stride[d] = box.index_stride[d];
        g.block_stride[d] = static_cast<uint32_t>(box.index_stride[d] >> 2);
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

Form form_of(const Distribution& d) {
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
    return tail.high > 0 ? Form::symmetric : Form::truncated;
}

// Whether every value is finite after the distribution and after each step, by a bound on its magnitude: no NaN then.
bool stays_finite(const Fill& fill) {
    const Distribution& d = fill.distribution;
    double z = 1;
    if (d.kind == Kind::normal || d.kind == Kind::truncated_normal) z = 7;
    if (d.kind == Kind::truncated_normal) {
        for (const TailMap* side : {&d.negative, &d.positive})
            z = std::max({z, static_cast<double>(side->low), -static_cast<double>(side->high)});
    }
    constexpr double limit = 1e38;
    double bound = z * std::fabs(static_cast<double>(d.scale)) + std::fabs(static_cast<double>(d.location));
    for (int i = 0; i < fill.steps.count && bound < limit; ++i) {
        const Step& step = fill.steps.items[i];
        const double a = std::fabs(static_cast<double>(step.a));
        switch (step.op) {
            case StepOp::multiply: bound *= a; break;
            case StepOp::add: bound += a; break;
            case StepOp::divide: bound = a > 0 ? bound / a : INFINITY; break;
            default:
                if (step.a > 0) bound = std::max(bound, a);
                if (step.b < 0) bound = std::max(bound, -static_cast<double>(step.b));
        }
    }
    return bound < limit;  // false, too, if an infinite step made the bound NaN
}

// What follows from a fill's distribution and steps.
struct Style {
    Form form;
    bool aligned_ok;  // fill_run and fill_rows may be used
    Distribution scaled;  // the distribution as they want it
};

Style style_of(const Fill& fill) {
    Style style{form_of(fill.distribution), true, fill.distribution};
    if (style.form == Form::constant) return style;
    style.aligned_ok = stays_finite(fill);
    if (style.form == Form::truncated)
        style.aligned_ok =
            style.aligned_ok && fill.distribution.negative.high != 0 && fill.distribution.positive.high != 0;
    if (style.form == Form::uniform) {
        // The scale times 2^-24, exact unless it is tiny; in integers, since the caller may flush subnormals.
        const uint32_t bits = bits_of(style.scaled.scale), magnitude = bits & ~sign_bit;
        if (magnitude == 0) return style;
        style.aligned_ok = style.aligned_ok && magnitude >> 23 > 24;
        style.scaled.scale = float_of(bits - (24u << 23));
    }
    return style;
}

// Collects table entries by key and launches them, each table when it is full: the device begins while the host goes
// on.
class Launcher {
public:
    Launcher(int device, cudaStream_t stream) : device_(device), stream_(stream), guard_(device) {
        int multiprocessors = 0;
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
              "cudaDeviceGetAttribute", device);
        multiprocessors_ = static_cast<uint32_t>(multiprocessors);
        std::memset(&key_, 0, sizeof key_);
    }

    void add(const Fill& fill) {
        if (fill.box.dims == 0 || add_like_previous(fill)) return;
        previous_ = nullptr;
        const Style style = style_of(fill);
        std::vector<Piece>& pieces = pieces_;
        pieces.assign(1, Piece{static_cast<char*>(fill.data), fill.box});
        while (!pieces.empty()) {
            const Piece piece = pieces.back();
            pieces.pop_back();
            const bool aligned = style.aligned_ok && is_aligned(piece, fill.dtype) &&
                                 (style.form != Form::constant || piece.box.dims == 1);
            const Shape shape = shape_of(piece, fill.dtype, aligned);
            if (shape.slots > kMaxSlots) {
                split(piece, fill.dtype, pieces);
            } else {
                add_piece(fill, style, piece, shape, aligned);
            }
        }
    }

    void launch() {
        for (auto& group : groups_) launch_group(group);
    }

private:
    using Group = std::pair<const Key, std::vector<Entry>>;

    // Most fills of a model are whole tensors that differ from the one before in address, size and stream alone.
    bool add_like_previous(const Fill& fill) {
        if (previous_ == nullptr) return false;
        const Fill& p = *previous_;
        if (fill.dtype != p.dtype || fill.seed != p.seed || fill.steps.count != 0 || p.steps.count != 0 ||
            std::memcmp(&fill.distribution, &p.distribution, sizeof p.distribution) != 0 || !fill.box.contiguous())
            return false;
        // is_aligned, less what is known here: the device should not wait for the host.
        const uint64_t index = fill.box.index_offset, run = fill.box.run();
        const int lanes_log2 = fill.dtype == Dtype::float32 ? 2 : 3;
        const uint64_t slots = run >> lanes_log2;
        if (slots << lanes_log2 != run || slots > kMaxSlots || reinterpret_cast<uintptr_t>(fill.data) % 16 != 0 ||
            index % 4 != 0 || index >> 34 != (index + run - 1) >> 34)
            return false;
        push(*previous_group_,
             Entry{static_cast<char*>(fill.data), index, fill.stream, 0, static_cast<uint32_t>(slots)});
        return true;
    }

    void add_piece(const Fill& fill, const Style& style, const Piece& piece, const Shape& shape, bool aligned) {
        const uint64_t item = item_size(fill.dtype), lanes = 16 / item;
        const Box& box = piece.box;
        const uint64_t index = box.index_offset;
        // Only fill_run knows the symmetric form, and only it does not know the general truncated one.
        const bool bare = box.dims == 1 && (fill.steps.count == 0 || style.form == Form::constant) &&
                          style.form != Form::truncated;
        const Form form = aligned && bare ? style.form : style.form == Form::symmetric ? Form::truncated : style.form;
        if (!aligned) {
            add_entry(fill, form, Path::general, fill.distribution, shape,
                      Entry{piece.data, index, fill.stream, 0, static_cast<uint32_t>(box.run())});
            return;
        }
        const uint64_t body = box.dims == 1 ? box.run() / lanes * lanes : box.run();
        add_entry(fill, form, bare ? Path::run : Path::rows, style.scaled, shape,
                  Entry{piece.data, index, fill.stream, 0, static_cast<uint32_t>(shape.slots)});
        if (bare && fill.steps.count == 0 && fill.box.dims == 1) {
            previous_ = &fill;
            previous_group_ = last_;
        }
        if (body == box.run()) return;
        const auto tail = static_cast<uint32_t>(box.run() - body);
        add_entry(fill, style.form == Form::symmetric ? Form::truncated : style.form, Path::general, fill.distribution,
                  shape, Entry{piece.data + body * item, index + body, fill.stream, 0, tail});
    }

    void add_entry(const Fill& fill, Form form, Path path, const Distribution& distribution, const Shape& shape,
                   const Entry& entry) {
        key_.form = form;
        key_.dtype = fill.dtype;
        key_.path = path;
        key_.seed = form == Form::constant ? 0 : fill.seed;
        key_.distribution = distribution;
        key_.steps = fill.steps;
        key_.geometry = shape.geometry;
        if (last_ == nullptr || !KeyEqual{}(last_->first, key_)) last_ = &*groups_.try_emplace(key_).first;
        push(*last_, entry);
    }

    void push(Group& group, const Entry& entry) {
        group.second.push_back(entry);
        if (group.second.size() == kEntries) launch_group(group);
    }

    // Launches the group's entries, at most kEntries, and leaves it empty.
    void launch_group(Group& group) {
        const Key& key = group.first;
        std::vector<Entry>& entries = group.second;
        if (entries.empty()) return;
        Launch& launch = launch_;
        Shared& shared = launch.shared;
        for (uint32_t round = 0; round < Philox::rounds; ++round) {
            shared.key0[round] = static_cast<uint32_t>(key.seed) + round * Philox::key_step0;
            shared.key1[round] = static_cast<uint32_t>(key.seed >> 32) + round * Philox::key_step1;
        }
        shared.one = 0x3F800000u;
        shared.distribution = key.distribution;
        shared.steps = key.steps;
        shared.geometry = key.geometry;

        const uint32_t lanes = key.dtype == Dtype::float32 ? 4 : 8;
        const auto slots = [&](const Entry& entry) {
            if (key.geometry.outer_dims != 0) return key.geometry.slots;
            return key.path == Path::general ? entry.size / lanes + 2 : entry.size;
        };
        uint64_t total = 0;
        uint32_t largest = 0;
        for (const Entry& entry : entries) {
            total += slots(entry);
            largest = std::max(largest, slots(entry));
        }
        const void* const kernel = reinterpret_cast<const void*>(kernel_for(key.form, key.dtype, key.path));
        const uint32_t threads = prepare(kernel, largest);

        // Tiles of whole passes of a block; eight or more for every resident block where there is work enough, so that
        // blocks end together.
        const uint32_t pass = key.path == Path::general ? threads / kWarp * (kWarp - 1) : threads;
        const uint64_t passes = total / (uint64_t{8} * resident_) / pass;
        launch.tile_slots = pass * static_cast<uint32_t>(std::min<uint64_t>(std::max<uint64_t>(passes, 1), kMaxTile));
        launch.tiles = 0;
        launch.count = static_cast<uint32_t>(entries.size());
        for (uint32_t i = 0; i < launch.count; ++i) {
            launch.entries[i] = entries[i];
            launch.entries[i].first_tile = launch.tiles;
            launch.tiles += (slots(entries[i]) + launch.tile_slots - 1) / launch.tile_slots;
        }
        void* arguments[] = {&launch};
        check(cudaLaunchKernel(kernel, dim3(std::min(launch.tiles, resident_)), dim3(threads), arguments, 0, stream_),
              "cudaLaunchKernel", device_);
        entries.clear();
    }

    // The threads of a block for entries of at most `largest` slots; sees to resident_.
    uint32_t prepare(const void* kernel, uint32_t largest) {
        if (kernel != kernel_) {
            cudaFuncAttributes attributes;
            check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes", device_);
            kernel_ = kernel;
            most_threads_ = attributes.maxThreadsPerBlock / 128 * 128;
            threads_ = 0;
        }
        // As many as the kernel was compiled for, but no more than an entry gives work to.
        int threads = most_threads_;
        while (threads > 256 && largest <= static_cast<uint32_t>(threads) / 2) threads /= 2;
        if (threads != threads_) {
            int blocks = 0;
            check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0),
                  "cudaOccupancyMaxActiveBlocksPerMultiprocessor", device_);
            threads_ = threads;
            resident_ = multiprocessors_ * static_cast<uint32_t>(std::max(blocks, 1));
        }
        return static_cast<uint32_t>(threads);
    }

    int device_;
    cudaStream_t stream_;
    DeviceGuard guard_;
    uint32_t multiprocessors_ = 0;
    const void* kernel_ = nullptr;  // the kernel of the last launch, and what is known of it:
    int most_threads_ = 0;          // threads that a block may have,
    int threads_ = 0;               // those that it had,
    uint32_t resident_ = 0;         // blocks of so many threads that the device runs at a time
    Key key_;
    std::unordered_map<Key, std::vector<Entry>, KeyHash, KeyEqual> groups_;
    Group* last_ = nullptr;
    const Fill* previous_ = nullptr;  // a fill in previous_group_, by fill_run and without steps
    Group* previous_group_ = nullptr;
    std::vector<Piece> pieces_;
    Launch launch_{};
};

}  // namespace

void fill_cuda(const Fill* fills, size_t count, int device, void* stream) {
    Launcher launcher(device, static_cast<cudaStream_t>(stream));
    for (size_t i = 0; i < count; ++i) launcher.add(fills[i]);
    launcher.launch();
}

}  // namespace fastinit
