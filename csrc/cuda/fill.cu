// Stream v1 on CUDA: kernels, then the launcher fill_cuda.
//
// Fills that agree in kind, dtype, distribution, steps, seed and geometry share a launch, whose parameters carry the
// whole table of them: nothing is allocated or copied, so a launch is asynchronous and can be captured. A slot is one
// 16-byte store; each entry of the table is cut into tiles of so many slots, and the blocks of a grid walk the tiles.
// Entries of one extent, as the tensors of a model's layers are, stand together in a section, which says it once: it is
// half as much to copy at each launch, which is what many small fills wait for.
//
// Four kernels:
//   fill_run      whole 16-byte-aligned runs that begin on a Philox block, without steps: nearly everything in a model.
//   fill_rows     rows so aligned, that is boxes of two dimensions, and runs with steps that are an Affine.
//   fill_any      the same in more dimensions and with any steps.
//   fill_general  any alignment, any start, any box, values that may be NaN, short tails.
//
// What was measured, and what was tried and dropped, is in docs/performance.md.
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
#include <iterator>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace fastinit {
namespace {

// Threads of a block and blocks of a multiprocessor. Both together fill it where it holds 2048 threads, at 32 registers
// each, or 1536, at 40.
#if defined(__CUDA_ARCH__) && ((__CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900) || __CUDA_ARCH__ >= 1100)
constexpr int kRunThreads = 512;
constexpr int kRunBlocks = 3;
#else
constexpr int kRunThreads = 1024;
constexpr int kRunBlocks = 2;
#endif
constexpr int kThreads = 512;
constexpr int kRowsBlocks = 3;
constexpr int kAnyBlocks = 3;
constexpr int kPlainBlocks = 4;
constexpr int kGeneralBlocks = 2;
constexpr uint32_t kWarp = 32;
// A tile, at most, in slots for each thread of a block: finding a tile's entry and preparing its Philox rounds is a
// small part of filling it.
constexpr uint32_t kMaxTile = 16;
// Tiles of an entry that take turns, at most: see Tile.
constexpr uint32_t kGroup = 64;
// Slots in a table entry, at most. Keeps slot and tile numbers of a launch and the elements of a run within 32 bits.
constexpr uint64_t kMaxSlots = uint64_t{1} << 27;
// Kernel parameters may take 32,764 bytes from CUDA 12.1, 4 KB before. A launch of one fill carries the whole table, too:
// it should not grow to all that it may.
#if CUDART_VERSION >= 12010
constexpr size_t kMaxParameters = 32764;
constexpr uint32_t kEntries = 1024;
constexpr uint32_t kSections = 32;
#else
constexpr size_t kMaxParameters = 4096;
constexpr uint32_t kEntries = 144;
constexpr uint32_t kSections = 24;
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
    uint32_t slot_stride[Box::max_dims];    // memory_stride in slots
};

// Steps that are a multiplication and then an addition, either of which may do nothing: x * 1 and x + -0 are x.
struct Affine {
    float multiply;
    float add;
};

// What the first elements' places in their streams have in common.
struct Origin {
    uint32_t block_high;
    uint32_t stream_high;
    uint32_t phase;  // index & 3
};

struct Shared {
    uint32_t key0[Philox::rounds];  // the key schedule: its words become constant operands
    uint32_t key1[Philox::rounds];
    uint32_t centre;  // see icdf
    Distribution distribution;
    Steps steps;
    Affine affine;
    Origin origin;
    Geometry geometry;
};

// From one pass over rows to the next: so many slots, which are so many rows and so far in a row. The same for all
// entries of a launch, so that constants serve.
struct RowStep {
    uint32_t stride;
    uint32_t rows;
    uint32_t at;
};

// Where in its stream an entry begins, and how much there is of it.
struct Extent {
    uint32_t block;  // of its first element, the low word
    uint32_t slots;
    uint32_t size;   // in slots; the elements of fill_general's single run
};

// Entries of one extent.
struct Section {
    Extent extent;
    Divider tiles;  // of each entry
    uint32_t first_entry;
    uint32_t first_tile;
};

struct Launch {
    Shared shared;
    uint32_t tile_slots;
    uint32_t tiles;
    uint32_t group_log2;  // fill_rows and fill_any: the tiles that take turns
    RowStep step;
    Section sections[kSections + 1];  // the one behind the last says where the last one's tiles end
    char* data[kEntries];
    uint32_t stream[kEntries];  // the low word
};

static_assert(sizeof(Launch) <= kMaxParameters);

// ---------------------------------------------------------------------------------------------------------------------
// Device code

// Truncated normals come in two forms: with equal sides that meet at 0 and no lower limit, as nearly all are, and any.
enum class Path { run, rows, affine_rows, any, any_erfinv, plain, general, general_erfinv };
enum class Form { constant, uniform, normal, symmetric, truncated };

__device__ constexpr NormalTable device_table = normal_table;

// The table has to be read 16 bytes at once, one row per element. Eight copies, side by side: threads 0 to 7 of a
// quarter warp, which the hardware serves together, read copies 0 to 7, each in its own banks.
constexpr uint32_t kTableRows = 256;
constexpr uint32_t kCopies = 8;

// The forms whose |f| is in [2, 2^32) or an integer below, so that one logic operation makes the centre of f's cell of
// it: see icdf. kCentre is what the bits of all centres have in common: biased exponents from 128 on, half a cell.
constexpr uint32_t kCentre = 0x40080000u;
template <Form kForm>
constexpr bool kCentred = kForm == Form::normal || kForm == Form::symmetric;

// A row for the variable 2^e t, where 2^e is f's octave: exactly the same polynomial. The row of |f| = 1 and that of
// 2 <= |f| < 2.25 become constants for a normal, whose f is an integer and which meets them nowhere but at their left
// ends, t = -1/16, and, the latter, at f = 0, which has the value of 2: with a constant, icdf may get t wrong there.
template <Form kForm>
__device__ __forceinline__ float4 centred(float4 c, uint32_t row) {
    if (kForm == Form::normal && (row == 0 || row == 248)) {
        constexpr float t = -0.0625f;
        return make_float4(__fmaf_rn(__fmaf_rn(__fmaf_rn(c.w, t, c.z), t, c.y), t, c.x), 0.0f, 0.0f, 0.0f);
    }
    const uint32_t octave = ((row >> 3) + 1) & 31;
    const float scale = __uint_as_float((127 - octave) << 23);
    c.y = __fmul_rn(c.y, scale);
    c.z = __fmul_rn(__fmul_rn(c.z, scale), scale);
    c.w = __fmul_rn(__fmul_rn(__fmul_rn(c.w, scale), scale), scale);
    return c;
}

// The calling thread's copy. Each row is read from memory once: a small launch waits for little else.
template <Form kForm>
__device__ __forceinline__ const float4* load_rows(float4* rows) {
    for (uint32_t row = threadIdx.x; row < kTableRows; row += blockDim.x) {
        float4 c = *reinterpret_cast<const float4*>(device_table.rows[row]);
        if constexpr (kCentred<kForm>) c = centred<kForm>(c, row);
#pragma unroll
        for (uint32_t i = 0; i < kCopies; ++i) rows[row * kCopies + (row + i) % kCopies] = c;  // each in other banks
    }
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

__device__ __forceinline__ PhiloxRun philox_run(const Shared& s, uint32_t stream) {
    const uint64_t p1 = uint64_t{Philox::multiplier1} * stream;
    const uint32_t x1 = static_cast<uint32_t>(p1 >> 32) ^ s.origin.block_high ^ s.key0[0];
    const uint64_t p0 = uint64_t{Philox::multiplier0} * x1;
    return PhiloxRun{static_cast<uint32_t>(p1) ^ s.key0[1], static_cast<uint32_t>(p0 >> 32) ^ s.key1[1],
                     static_cast<uint32_t>(p0), s.origin.stream_high ^ s.key1[0]};
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

__device__ __forceinline__ float polynomial(float4 c, float t) {
    return __fmaf_rn(__fmaf_rn(__fmaf_rn(c.w, t, c.z), t, c.y), t, c.x);
}

// normal_icdf. In the centred form, f's distance from the centre of its cell, 2^e t, is one subtraction from |f|, and
// the centre's bits are the row's offset as well. For f = 0 and |f| = 1 it would be the centre of another octave: their
// row is right and its polynomial a constant. `centre` is kCentre in a register: as an immediate it would cost a second
// instruction beside the mask.
template <Form kForm>
__device__ __forceinline__ float icdf(float f, const float4* rows, uint32_t centre) {
    const uint32_t bits = __float_as_uint(f);
    if constexpr (kCentred<kForm>) {
        const uint32_t middle = (bits & 0x0FF00000u) | centre;
        const char* const row = reinterpret_cast<const char*>(rows) - (kCentre >> 13) + (middle >> 13);
        return polynomial(*reinterpret_cast<const float4*>(row), __fadd_rn(fabsf(f), -__uint_as_float(middle)));
    } else {
        const uint32_t offset = (bits & 0x0FF00000u) >> 13;  // a row's copies are 128 bytes
        const char* const row = reinterpret_cast<const char*>(rows) + offset;
        const float t = __fadd_rn(__uint_as_float((bits & 0x000FFFFFu) | 0x3F800000u), -1.0625f);
        return polynomial(*reinterpret_cast<const float4*>(row), t);
    }
}

__device__ __forceinline__ float with_sign_of(float x, uint32_t sign) {
    return __uint_as_float(__float_as_uint(x) ^ (sign & sign_bit));
}

// kPlain: fills that the launcher has chosen. A uniform's scale has u's factor 2^-24,
// exactly. A truncated normal meets no NaN, and zeros of unlike sign nowhere: no z is -0 and no bound `high` is a
// zero. So fmaxf is at_least and fminf is at_most.
template <Form kForm, bool kPlain>
__device__ __forceinline__ float value(const Shared& shared, uint32_t w, const float4* rows) {
    const Distribution& d = shared.distribution;
    if constexpr (kForm == Form::constant) {
        return d.location;
    } else if constexpr (kForm == Form::uniform) {
        if constexpr (kPlain) return __fmaf_rn(__uint2float_rn(w >> 8), d.scale, d.location);
        return uniform_value(d, w);
    } else if constexpr (kForm == Form::normal) {
        const float f = __int2float_rn(static_cast<int32_t>(w));
        return __fmaf_rn(with_sign_of(icdf<kForm>(f, rows, shared.centre), __float_as_uint(f)), d.scale, d.location);
    } else if constexpr (kForm == Form::symmetric) {
        const float g = __int2float_rn(static_cast<int32_t>(w));
        const float f = __fmaf_rn(fabsf(g), d.positive.scale, d.positive.offset);
        const float z = fminf(icdf<kForm>(f, rows, shared.centre), d.positive.high);
        return __fmaf_rn(with_sign_of(z, __float_as_uint(g)), d.scale, d.location);
    } else {
        const bool negative = static_cast<int32_t>(w) < d.threshold;
        const uint32_t k = w - static_cast<uint32_t>(d.threshold);
        const float g = __uint2float_rn(negative ? 0u - k : k);
        const float f = __fmaf_rn(g, negative ? d.negative.scale : d.positive.scale,
                                  negative ? d.negative.offset : d.positive.offset);
        float z = icdf<kForm>(f, rows, shared.centre);
        const float low = negative ? d.negative.low : d.positive.low;
        const float high = negative ? d.negative.high : d.positive.high;
        z = kPlain ? fminf(fmaxf(z, low), high) : at_most(at_least(z, low), high);
        return __fmaf_rn(negative ? -z : z, d.scale, d.location);
    }
}

// Step by step rather than element by element: the choice of operation is uniform. kErfinv: erfinv may be among them,
// which has kernels of its own, since its code in the loop costs all other steps 2 to 8 %.
template <bool kErfinv, int kCount>
__device__ __forceinline__ void apply_steps(const Steps& steps, float (&x)[kCount]) {
#pragma unroll 1
    for (int i = 0; i < steps.count; ++i) {
        const Step& step = steps.items[i];
        const float a = step.a;
        if constexpr (kErfinv) {
            if (step.op == StepOp::erfinv) {
#pragma unroll
                for (float& v : x) v = erfinv(v);
                continue;
            }
        }
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

template <int kCount>
__device__ __forceinline__ void apply_affine(const Affine& affine, float (&x)[kCount]) {
#pragma unroll
    for (float& v : x) v = __fadd_rn(__fmul_rn(v, affine.multiply), affine.add);
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
        apply_steps<true>(shared.steps, value);
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

// The launches of one call write apart from each other and need not wait for each other: the next one may begin as soon
// as all blocks of this one run, and ends after it. So a launch's beginning hides behind the one before it, which for
// small fills is most of its time.
__device__ __forceinline__ void begin_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void end_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blockIdx.x == 0 && threadIdx.x == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divider& by) {
    return (__umulhi(n, by.magic) + n) >> by.shift;
}

// A tile's entry, which of its tiles it is, and how many it has.
struct Work {
    uint32_t entry;
    uint32_t stream;
    uint32_t block;
    uint32_t size;
    uint32_t tile;
    uint32_t tiles;
};

// Tiles come in rising order: the tile's section is the one of the tile before, or a later one.
__device__ __forceinline__ Work find_work(const Launch& launch, uint32_t tile, uint32_t& section) {
    while (tile >= launch.sections[section + 1].first_tile) ++section;
    const Section& s = launch.sections[section];
    const uint32_t at = tile - s.first_tile;
    const uint32_t number = divide(at, s.tiles);
    const uint32_t entry = s.first_entry + number;
    return Work{entry, launch.stream[entry], s.extent.block, s.extent.size, at - number * s.tiles.divisor,
                s.tiles.divisor};
}

// The slots of a tile: from `begin`, pass after pass, `stride` apart, to `end`. Neighbouring tiles of an entry take
// turns, so that blocks which run side by side write side by side: memory takes that faster.
struct Tile {
    uint32_t begin, stride, end;
};

// Up to kGroup tiles take turns.
__device__ __forceinline__ Tile tile_of_run(const Launch& launch, const Work& work) {
    const uint32_t group = work.tile / kGroup * kGroup;
    const uint32_t tiles = min(kGroup, work.tiles - group);
    const uint32_t begin = group * launch.tile_slots;
    return Tile{begin + (work.tile - group) * blockDim.x, tiles * blockDim.x,
                min(begin + tiles * launch.tile_slots, work.size)};
}

// As many as the launch says, for one stride in all entries; the last tiles may find nothing to do.
__device__ __forceinline__ Tile tile_of_rows(const Launch& launch, const Work& work) {
    const uint32_t group = work.tile >> launch.group_log2, groups = launch.tile_slots << launch.group_log2;
    return Tile{group * groups + (work.tile - (group << launch.group_log2)) * blockDim.x, launch.step.stride,
                min((group + 1) * groups, work.size)};
}

// Where an aligned slot lies: its first Philox block and its address, as distances from the entry's.
struct Spot {
    uint32_t block;
    uint32_t slot;
};

__device__ __forceinline__ Spot spot_in_box(const Geometry& g, uint32_t slot, uint32_t blocks) {
    uint32_t row = divide(slot, g.slots_per_run);
    const uint32_t at = slot - row * g.slots_per_run.divisor;
    Spot spot{at * blocks, at};
#pragma unroll 1
    for (int d = g.outer_dims - 1; d > 0; --d) {
        const uint32_t quotient = divide(row, g.size[d]);
        row -= quotient * g.size[d].divisor;
        spot.block += row * g.block_stride[d];
        spot.slot += row * g.slot_stride[d];
        row = quotient;
    }
    spot.block += row * g.block_stride[0];
    spot.slot += row * g.slot_stride[0];
    return spot;
}

template <Form kForm, Dtype kDtype, Path kPath>
__device__ __forceinline__ void fill_aligned(const Launch& launch) {
    begin_launch();
    using S = Slot<kDtype>;
    constexpr bool kRows = kPath == Path::rows || kPath == Path::affine_rows;
    constexpr bool kAny = kPath == Path::any || kPath == Path::any_erfinv;
    __shared__ float4 table[kTabulated<kForm> ? kTableRows * kCopies : 1];
    const float4* const rows = kTabulated<kForm> ? load_rows<kForm>(table) : table;
    const Shared& shared = launch.shared;
    const Geometry& g = shared.geometry;
    S out;
    if constexpr (kForm == Form::constant) out.set_constant(shared);

    uint32_t section = 0;
    for (uint32_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
        const Work work = find_work(launch, tile, section);
        PhiloxRun run = philox_run(shared, work.stream);
        // Keeps the compiler from doing it again for every slot, to save registers that only the truncated form lacks.
        if constexpr (kPath != Path::run && kForm != Form::truncated)
            asm volatile("" : "+r"(run.x), "+r"(run.z), "+r"(run.w), "+r"(run.z_first));
        const Tile t = kPath == Path::run ? tile_of_run(launch, work) : tile_of_rows(launch, work);
        uint32_t slot = t.begin + threadIdx.x, stride = t.stride, end = t.end, block = work.block;
        // These, too, would be computed anew for every slot.
        if constexpr (kPath == Path::run) asm volatile("" : "+r"(stride), "+r"(end), "+r"(block));
        uint32_t row = 0, at = slot;
        if constexpr (kRows) {
            row = divide(slot, g.slots_per_run);
            at = slot - row * g.slots_per_run.divisor;
        }
        for (; slot < end; slot += stride) {
            Spot spot{slot * S::kBlocks, slot};
            if constexpr (kRows) spot = Spot{at * S::kBlocks + row * g.block_stride[0], at + row * g.slot_stride[0]};
            if constexpr (kAny) spot = spot_in_box(g, slot, S::kBlocks);
            if constexpr (kForm != Form::constant) {
                float x[S::kLanes];
#pragma unroll
                for (int b = 0; b < S::kBlocks; ++b) {
                    uint32_t w[4];
                    philox_block(shared, run, block + spot.block + b, w);
#pragma unroll
                    for (int i = 0; i < 4; ++i) x[4 * b + i] = value<kForm, true>(shared, w[i], rows);
                }
                if constexpr (kPath == Path::affine_rows) apply_affine(shared.affine, x);
                if constexpr (kAny) apply_steps<kPath == Path::any_erfinv>(shared.steps, x);
                out.set(x);
            }
            out.store(launch.data[work.entry] + uint64_t{spot.slot} * 16);
            if constexpr (kRows) {
                row += launch.step.rows;
                at += launch.step.at;
                if (at >= g.slots_per_run.divisor) {
                    at -= g.slots_per_run.divisor;
                    ++row;
                }
            }
        }
    }
    end_launch();
}

template <Form kForm, Dtype kDtype>
__global__ void __launch_bounds__(kRunThreads, kRunBlocks) fill_run(const __grid_constant__ Launch launch) {
    fill_aligned<kForm, kDtype, Path::run>(launch);
}

template <Form kForm, Dtype kDtype, bool kAffine>
__global__ void __launch_bounds__(kThreads, kRowsBlocks) fill_rows(const __grid_constant__ Launch launch) {
    fill_aligned<kForm, kDtype, kAffine ? Path::affine_rows : Path::rows>(launch);
}

template <Form kForm, Dtype kDtype, bool kErfinv>
__global__ void __launch_bounds__(kThreads, kAnyBlocks) fill_any(const __grid_constant__ Launch launch) {
    fill_aligned<kForm, kDtype, kErfinv ? Path::any_erfinv : Path::any>(launch);
}

// Where a slot lies: its run's first element, in the stream as a distance from the block of the entry's first element,
// and in memory, and which of the run's slots it is.
struct Place {
    int64_t index;
    char* memory;
    uint32_t slot;
};

__device__ __forceinline__ Place locate(const Shared& shared, char* data, uint32_t slot) {
    const Geometry& g = shared.geometry;
    Place p{shared.origin.phase, data, slot};
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
__device__ __forceinline__ uint32_t existing(int32_t first, int32_t run, int lanes) {
    const int32_t left = run - first;
    if (left <= 0) return 0;
    const uint32_t below_end = left >= lanes ? (1u << lanes) - 1u : (1u << left) - 1u;
    return first < 0 ? below_end & (~0u << -first) : below_end;
}

// A thread makes the elements of whole Philox blocks. Where a slot begins inside a block, its last elements are the
// first ones that the next thread makes; the last thread of a warp only helps the one before it.
// kPlain: the high word of the block number is one and the same, no value is NaN, and the steps are an Affine.
template <Form kForm, Dtype kDtype, bool kPlain, bool kErfinv>
__global__ void __launch_bounds__(kThreads, kPlain ? kPlainBlocks : kGeneralBlocks)
    fill_general(const __grid_constant__ Launch launch) {
    begin_launch();
    using S = Slot<kDtype>;
    constexpr uint32_t kAll = (1u << S::kLanes) - 1u;
    __shared__ float4 table[kTabulated<kForm> ? kTableRows * kCopies : 1];
    const float4* const rows = kTabulated<kForm> ? load_rows<kForm>(table) : table;
    const Shared& shared = launch.shared;
    const Geometry& g = shared.geometry;
    const uint32_t lane = threadIdx.x % kWarp;
    const uint32_t step = blockDim.x / kWarp * (kWarp - 1);
    S out;
    if constexpr (kForm == Form::constant) out.set_constant(shared);

    uint32_t section = 0;
    for (uint32_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
        const Work work = find_work(launch, tile, section);
        const PhiloxRun run = philox_run(shared, work.stream);
        const uint32_t begin = work.tile * launch.tile_slots;
        // Of a single run, a bound will do: `existing` finds the end.
        const uint32_t end = min(begin + launch.tile_slots, g.outer_dims == 0 ? work.size / S::kLanes + 2 : g.slots);
        const auto elements = static_cast<int32_t>(g.outer_dims == 0 ? work.size : g.run);
        // The condition is the same for a whole warp: its threads have to meet in Slot::shift.
        for (uint32_t from = begin + threadIdx.x / kWarp * (kWarp - 1); from < end; from += step) {
            const uint32_t slot = from + lane;
            const Place place = locate(shared, launch.data[work.entry], slot);
            // A run's first slot begins up to kLanes - 1 elements before the run: at a 16-byte boundary, or, where
            // elements are stored one by one anyway, at a Philox block.
            const uint32_t misaligned = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(place.memory)) & 15u;
            const auto head = static_cast<int32_t>(g.scattered ? place.index & 3 : misaligned / S::kItemSize);
            const int32_t first = static_cast<int32_t>(place.slot) * S::kLanes - head;
            const uint32_t which = lane != kWarp - 1 && slot < end ? existing(first, elements, S::kLanes) : 0;

            if constexpr (kForm != Form::constant) {
                // Before element 0 of the stream the index wraps and so does the block: block -1 is never stored.
                const int64_t index = place.index + first;
                float x[S::kLanes];
#pragma unroll
                for (int b = 0; b < S::kBlocks; ++b) {
                    uint32_t w[4];
                    if constexpr (kPlain) {
                        philox_block(shared, run, work.block + static_cast<uint32_t>(index >> 2) + b, w);
                    } else {
                        const uint64_t origin = uint64_t{shared.origin.block_high} << 32 | work.block;
                        const uint64_t block = origin + static_cast<uint64_t>((index >> 2) + b);
                        w[0] = static_cast<uint32_t>(block);
                        w[1] = static_cast<uint32_t>(block >> 32);
                        w[2] = work.stream;
                        w[3] = shared.origin.stream_high;
                        philox_rounds(shared, 0, w);
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        x[4 * b + i] = value<kForm, kPlain>(shared, w[i], rows);
                }
                if constexpr (kPlain) {
                    apply_affine(shared.affine, x);
                    out.set(x);
                } else {
                    apply_steps<kErfinv>(shared.steps, x);
                    out.set_canonical(x);
                }
                out.shift(static_cast<uint32_t>(index) & 3u);
            }
            char* const address = place.memory + int64_t{first} * S::kItemSize;
            if (which == kAll) {
                out.store(address);
            } else if (which != 0) {
                out.store_elements(address, which);
            }
        }
    }
    end_launch();
}

// ---------------------------------------------------------------------------------------------------------------------
// Host code

using Kernel = void (*)(Launch);



template <Form kForm, Dtype kDtype>
Kernel kernel_for(Path path) {
    switch (path) {
        case Path::run: return fill_run<kForm, kDtype>;
        case Path::rows: return fill_rows<kForm, kDtype, false>;
        case Path::affine_rows: return fill_rows<kForm, kDtype, true>;
        case Path::any: return fill_any<kForm, kDtype, false>;
        case Path::any_erfinv: return fill_any<kForm, kDtype, true>;
        case Path::plain: return fill_general<kForm, kDtype, true, false>;
        case Path::general_erfinv: return fill_general<kForm, kDtype, false, true>;
        default: return fill_general<kForm, kDtype, false, false>;
    }
}

// Which of a form's kernels exist follows from Launcher::add_piece.
template <Dtype kDtype>
Kernel kernel_for(Form form, Path path) {
    switch (form) {
        case Form::constant:
            if (path == Path::run) return fill_run<Form::constant, kDtype>;
            return fill_general<Form::constant, kDtype, false, false>;
        case Form::uniform: return kernel_for<Form::uniform, kDtype>(path);
        case Form::normal: return kernel_for<Form::normal, kDtype>(path);
        case Form::symmetric: return fill_run<Form::symmetric, kDtype>;
        default:
            if (path == Path::rows) return fill_rows<Form::truncated, kDtype, false>;
            if (path == Path::affine_rows) return fill_rows<Form::truncated, kDtype, true>;
            if (path == Path::any) return fill_any<Form::truncated, kDtype, false>;
            if (path == Path::any_erfinv) return fill_any<Form::truncated, kDtype, true>;
            if (path == Path::general_erfinv) return fill_general<Form::truncated, kDtype, false, true>;
            return fill_general<Form::truncated, kDtype, false, false>;
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
    Origin origin;
    Geometry geometry;
};

struct KeyHash {
    size_t operator()(const Key& key) const {
        uint64_t parts[4];
        std::memcpy(parts, &key.distribution.location, 8);
        parts[1] = key.seed;
        parts[2] = (key.geometry.slots_per_run.divisor ^ key.geometry.index_stride[0] << 20) + key.origin.phase;
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

// Whether all elements' block numbers have the same high word.
bool in_one_window(const Box& box) {
    uint64_t last = box.index_offset;
    for (int d = 0; d < box.dims; ++d) last += (box.size[d] - 1) * box.index_stride[d];
    return box.index_offset >> 34 == last >> 34;
}

// Whether fill_run, fill_rows or fill_any may fill the piece: all its runs begin on a Philox block and at a 16-byte
// boundary and, but for a single run's tail, end so, and the block numbers' high word is one and the same.
bool is_aligned(const Piece& piece, Dtype dtype) {
    const uint64_t item = item_size(dtype), lanes = 16 / item;
    const Box& box = piece.box;
    if (!box.contiguous_runs() || reinterpret_cast<uintptr_t>(piece.data) % 16 != 0 || box.index_offset % 4 != 0)
        return false;
    if (box.dims == 1 ? box.run() < lanes : box.run() % lanes != 0) return false;
    uint64_t span = 0;
    for (int d = 0; d < box.dims - 1; ++d) {
        if (box.index_stride[d] % 4 != 0 || box.memory_stride[d] * item % 16 != 0) return false;
        span += (box.size[d] - 1) * box.memory_stride[d] * item;
    }
    return span >> 35 == 0 && in_one_window(box);  // the kernel counts slots of memory in 32 bits
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
        g.slot_stride[d] = static_cast<uint32_t>(g.memory_stride[d] / 16);
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
    // f has to be in [2, 2^32) for icdf's centred form, but in a normal.
    if (tail.offset < 2.0f || tail.scale < 0.0f || tail.scale * 0x1p31f + tail.offset > 0x1.8p31f) {
        // Bounds that no z reaches: the same words give a normal's bits.
        const bool normal = tail.scale == 1.0f && tail.offset == 0.0f && tail.high >= 7.0f;
        return normal ? Form::normal : Form::truncated;
    }
    return tail.high > 0 ? Form::symmetric : Form::truncated;
}

// The steps as an Affine, if they are one. Only exact rewritings: a division by a power of two is a multiplication.
bool make_affine(const Steps& steps, Affine& affine) {
    affine = Affine{1.0f, -0.0f};
    for (int i = 0; i < steps.count; ++i) {
        const Step& step = steps.items[i];
        const bool last = i + 1 == steps.count;
        if (i == 0 && step.op == StepOp::multiply) {
            affine.multiply = step.a;
        } else if (i == 0 && step.op == StepOp::divide) {
            const uint32_t exponent = bits_of(step.a) >> 23 & 255;
            if ((bits_of(step.a) & 0x007FFFFFu) != 0 || exponent < 1 || exponent > 252) return false;
            affine.multiply = float_of((bits_of(step.a) & sign_bit) | (254 - exponent) << 23);
        } else if (last && step.op == StepOp::add) {
            affine.add = step.a;
        } else {
            return false;
        }
    }
    return true;
}

// What the values of an interval are after a step, in double precision and a little wider, since the step rounds.
struct Interval {
    double low, high;
};

Interval after(const Step& step, Interval x) {
    const double a = step.a, b = step.b;
    switch (step.op) {
        case StepOp::multiply: x = {x.low * a, x.high * a}; break;
        case StepOp::add: x = {x.low + a, x.high + a}; break;
        case StepOp::divide:
            if (a == 0) return {-INFINITY, INFINITY};
            x = {x.low / a, x.high / a};
            break;
        case StepOp::erfinv:
            // The largest erfinv(x) of a float32 below 1 is 3.84.
            return x.low > -1 && x.high < 1 ? Interval{-4, 4} : Interval{-INFINITY, INFINITY};
        default: return {std::min(std::max(x.low, a), b), std::min(std::max(x.high, a), b)};
    }
    const double error = std::max(std::fabs(x.low), std::fabs(x.high)) * 0x1p-23;
    return {std::min(x.low, x.high) - error, std::max(x.low, x.high) + error};
}

// Whether every value is finite after the distribution and after each step: no NaN then.
bool stays_finite(const Values& fill) {
    const Distribution& d = fill.distribution;
    Interval x{0, 1};
    if (d.kind != Kind::uniform) {
        x.high = 7;
        if (d.kind == Kind::truncated_normal) {
            for (const TailMap* side : {&d.negative, &d.positive})
                x.high = std::max({x.high, static_cast<double>(side->low), -static_cast<double>(side->high)});
        }
        x.low = -x.high;
    }
    // False for a NaN, too, which an infinite operand may make.
    const auto finite = [&x] { return std::fabs(x.low) < 1e38 && std::fabs(x.high) < 1e38; };
    x = after(Step{StepOp::add, d.location, 0}, after(Step{StepOp::multiply, d.scale, 0}, x));
    for (int i = 0; i < fill.steps.count && finite(); ++i) x = after(fill.steps.items[i], x);
    return finite();
}

// What follows from a fill's distribution and steps.
struct Style {
    Form form;
    bool plain;    // kernels that rest on what `value` says of kPlain may be used
    bool affine;   // the steps are an Affine
    bool erfinv;   // one of them is erfinv
    Distribution scaled;  // the distribution as those kernels want it
};

Style style_of(const Values& fill) {
    Affine affine;
    const Step* const end = fill.steps.items + fill.steps.count;
    const bool erfinv =
        std::any_of(fill.steps.items, end, [](const Step& step) { return step.op == StepOp::erfinv; });
    Style style{form_of(fill.distribution), true, make_affine(fill.steps, affine), erfinv, fill.distribution};
    if (style.form == Form::constant) return style;
    style.plain = stays_finite(fill);
    if (style.form == Form::truncated)
        style.plain = style.plain && fill.distribution.negative.high != 0 && fill.distribution.positive.high != 0;
    if (style.form == Form::uniform) {
        // The scale times 2^-24, exact unless it is tiny; in integers, since the caller may flush subnormals.
        const uint32_t bits = bits_of(style.scaled.scale), magnitude = bits & ~sign_bit;
        if (magnitude == 0) return style;
        style.plain = style.plain && magnitude >> 23 > 24;
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
        int major = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute",
              device);
        overlap_ = major >= 9;
        std::memset(&key_, 0, sizeof key_);
    }

    // Most fills of a model are whole tensors that differ from an earlier one in address and stream alone. The device
    // should not wait for the host: these are an entry of a table with hardly a look at them.
    void add(const Fill& fill) {
        for (const Whole& whole : whole_) {
            if (whole.box != fill.box || whole.values != fill.values) continue;
            if (reinterpret_cast<uintptr_t>(fill.data) % 16 != 0 || fill.stream >> 32 != whole.stream_high) break;
            push(*whole.group, fill, static_cast<char*>(fill.data), whole.extent);
            return;
        }
        if (fill.box->dims == 0) return;
        Known& known = known_as(fill.values);
        if (!add_like_others(fill, known)) add_pieces(fill, known);
    }

    void launch() {
        for (auto& group : groups_) launch_group(group);
    }

private:
    struct Entry {
        char* data;
        uint32_t stream;
        uint32_t extent;  // which of its group's
    };

    // Fills that wait for their launch.
    struct Group {
        std::vector<Entry> entries;
        std::vector<Extent> extents;  // at most kSections; also those of earlier launches
    };
    using KeyedGroup = std::pair<const Key, Group>;

    // Values and a box whose aligned fills are an entry of this extent each, in that group.
    struct Whole {
        const Values* values;
        const Box* box;
        KeyedGroup* group;
        uint32_t stream_high;
        uint32_t extent;
    };

    void remember(const Fill& fill, KeyedGroup& group, uint32_t extent) {
        oldest_whole_ = (oldest_whole_ + 1) % std::size(whole_);
        whole_[oldest_whole_] = Whole{fill.values, fill.box, &group, static_cast<uint32_t>(fill.stream >> 32), extent};
    }

    // Values met before, what follows from them, and the group that their whole tensors are in, if any.
    struct Known {
        const Values* values;
        Style style;
        KeyedGroup* run;
    };

    Known& known_as(const Values* values) {
        for (Known& known : known_)
            if (known.values == values) return known;
        oldest_known_ = (oldest_known_ + 1) % std::size(known_);
        return known_[oldest_known_] = Known{values, style_of(*values), nullptr};
    }

    // Whole tensors of known values, of another size: is_aligned and add_piece, less what is known of them.
    bool add_like_others(const Fill& fill, const Known& known) {
        if (known.run == nullptr) return false;
        const Box& box = *fill.box;
        const Origin& origin = known.run->first.origin;
        const uint64_t index = box.index_offset, run = box.run();
        const int lanes_log2 = known.run->first.dtype == Dtype::float32 ? 2 : 3;
        const uint64_t slots = run >> lanes_log2;
        if (!box.contiguous() || slots << lanes_log2 != run || slots > kMaxSlots ||
            reinterpret_cast<uintptr_t>(fill.data) % 16 != 0 || index % 4 != 0 || index >> 34 != origin.block_high ||
            (index + run - 1) >> 34 != origin.block_high || fill.stream >> 32 != origin.stream_high)
            return false;
        const uint32_t extent = extent_in(*known.run, index, slots, slots);
        remember(fill, *known.run, extent);
        push(*known.run, fill, static_cast<char*>(fill.data), extent);
        return true;
    }

    // The number of an extent among the group's: see Extent for its size. May launch what the group has.
    uint32_t extent_in(KeyedGroup& keyed, uint64_t index, uint64_t slots, uint64_t size) {
        const Extent extent{static_cast<uint32_t>(index >> 2), static_cast<uint32_t>(slots),
                            static_cast<uint32_t>(size)};
        std::vector<Extent>& extents = keyed.second.extents;
        for (uint32_t i = 0; i < extents.size(); ++i)
            if (std::memcmp(&extents[i], &extent, sizeof extent) == 0) return i;
        if (extents.size() == kSections) {
            launch_group(keyed);
            extents.clear();
            for (Whole& whole : whole_)
                if (whole.group == &keyed) whole = Whole{};
        }
        extents.push_back(extent);
        return static_cast<uint32_t>(extents.size() - 1);
    }

    // Apart from add, which would set up a large frame for every fill.
    [[gnu::noinline]] void add_pieces(const Fill& fill, Known& known) {
        const Style& style = known.style;
        const Dtype dtype = fill.values->dtype;
        std::vector<Piece>& pieces = pieces_;
        pieces.assign(1, Piece{static_cast<char*>(fill.data), *fill.box});
        while (!pieces.empty()) {
            const Piece piece = pieces.back();
            pieces.pop_back();
            const bool aligned = style.plain && is_aligned(piece, dtype) &&
                                 (style.form != Form::constant || piece.box.dims == 1);
            const Shape shape = shape_of(piece, dtype, aligned);
            if (shape.slots > kMaxSlots) {
                split(piece, dtype, pieces);
            } else {
                add_piece(fill, known, piece, shape, aligned);
            }
        }
    }

    void add_piece(const Fill& fill, Known& known, const Piece& piece, const Shape& shape, bool aligned) {
        const Style& style = known.style;
        const Values& values = *fill.values;
        const uint64_t item = item_size(values.dtype), lanes = 16 / item;
        const Box& box = piece.box;
        const uint64_t index = box.index_offset;
        const bool plain = style.plain && style.affine && in_one_window(box) &&
                           (style.form == Form::uniform || style.form == Form::normal);
        const Path unaligned = plain ? Path::plain : style.erfinv ? Path::general_erfinv : Path::general;
        if (!aligned) {
            const uint64_t slots = shape.geometry.outer_dims != 0 ? shape.slots : unaligned_slots(box.run(), lanes);
            KeyedGroup& group = group_for(fill, style, unaligned, shape, index);
            push(group, fill, piece.data, extent_in(group, index, slots, box.run()));
            return;
        }
        // Only fill_run knows the symmetric form, and only it does not know the general truncated one.
        const bool bare = box.dims == 1 && (values.steps.count == 0 || style.form == Form::constant) &&
                          style.form != Form::truncated;
        const Path path = bare                            ? Path::run
                          : style.erfinv                  ? Path::any_erfinv
                          : box.dims > 2 || !style.affine ? Path::any
                          : values.steps.count == 0       ? Path::rows
                                                          : Path::affine_rows;
        const uint64_t body = box.dims == 1 ? box.run() / lanes * lanes : box.run();
        KeyedGroup& group = group_for(fill, style, path, shape, index);
        const uint32_t extent = extent_in(group, index, shape.slots, shape.slots);
        if (bare && values.steps.count == 0) known.run = &group;
        if (shape.slots * lanes == fill.elements()) remember(fill, group, extent);
        push(group, fill, piece.data, extent);
        const uint64_t tail = box.run() - body;
        if (tail == 0) return;
        KeyedGroup& tails = group_for(fill, style, unaligned, shape, index + body);
        push(tails, fill, piece.data + body * item,
             extent_in(tails, index + body, unaligned_slots(tail, lanes), tail));
    }

    // Of a run that fill_general fills; the kernel knows this, too.
    static uint64_t unaligned_slots(uint64_t run, uint64_t lanes) { return run / lanes + 2; }

    KeyedGroup& group_for(const Fill& fill, const Style& style, Path path, const Shape& shape, uint64_t index) {
        const Values& values = *fill.values;
        const bool truncated = style.form == Form::symmetric && path != Path::run;
        key_.form = truncated ? Form::truncated : style.form;
        key_.dtype = values.dtype;
        key_.path = path;
        key_.seed = style.form == Form::constant ? 0 : values.seed;
        key_.distribution = is_general(path) ? values.distribution : style.scaled;
        key_.steps = values.steps;
        key_.origin = Origin{static_cast<uint32_t>(index >> 34), static_cast<uint32_t>(fill.stream >> 32),
                             static_cast<uint32_t>(index & 3)};
        key_.geometry = shape.geometry;
        if (last_ == nullptr || !KeyEqual{}(last_->first, key_)) last_ = &*groups_.try_emplace(key_).first;
        return *last_;
    }

    static bool is_general(Path path) { return path == Path::general || path == Path::general_erfinv; }
    static bool is_unaligned(Path path) { return path == Path::plain || is_general(path); }

    void push(KeyedGroup& keyed, const Fill& fill, char* data, uint32_t extent) {
        std::vector<Entry>& entries = keyed.second.entries;
        entries.emplace_back();  // and not push_back: see docs/performance.md
        entries.back() = Entry{data, static_cast<uint32_t>(fill.stream), extent};
        if (entries.size() == kEntries) launch_group(keyed);
    }

    // Launches the group's entries, at most kEntries, and leaves none.
    void launch_group(KeyedGroup& keyed) {
        const Key& key = keyed.first;
        std::vector<Entry>& entries = keyed.second.entries;
        const std::vector<Extent>& extents = keyed.second.extents;
        if (entries.empty()) return;
        uint32_t counts[kSections] = {};
        if (extents.size() == 1) {
            counts[0] = static_cast<uint32_t>(entries.size());
        } else {
            for (const Entry& entry : entries) ++counts[entry.extent];
        }
        uint64_t slots = 0;
        uint32_t largest = 0;
        for (size_t i = 0; i < extents.size(); ++i) {
            if (counts[i] == 0) continue;
            slots += uint64_t{counts[i]} * extents[i].slots;
            largest = std::max(largest, extents[i].slots);
        }
        Launch& launch = launch_;
        Shared& shared = launch.shared;
        for (uint32_t round = 0; round < Philox::rounds; ++round) {
            shared.key0[round] = static_cast<uint32_t>(key.seed) + round * Philox::key_step0;
            shared.key1[round] = static_cast<uint32_t>(key.seed >> 32) + round * Philox::key_step1;
        }
        shared.centre = kCentre;
        shared.distribution = key.distribution;
        shared.steps = key.steps;
        make_affine(key.steps, shared.affine);
        shared.origin = key.origin;
        shared.geometry = key.geometry;

        const void* const kernel = reinterpret_cast<const void*>(kernel_for(key.form, key.dtype, key.path));
        const uint32_t threads = prepare(kernel, largest);

        // Tiles of whole passes of a block; eight or more for every resident block where there is work enough, so that
        // blocks end together.
        const uint32_t pass = is_unaligned(key.path) ? threads / kWarp * (kWarp - 1) : threads;
        const uint64_t passes = slots / (uint64_t{8} * resident_) / pass;
        launch.tile_slots = pass * static_cast<uint32_t>(std::min<uint64_t>(std::max<uint64_t>(passes, 1), kMaxTile));
        launch.group_log2 = 0;
        if (key.path == Path::rows || key.path == Path::affine_rows || key.path == Path::any ||
            key.path == Path::any_erfinv)
            set_row_step(key.geometry, slots / entries.size(), threads);
        const uint32_t group_slots = launch.tile_slots << launch.group_log2;
        launch.tiles = 0;
        uint32_t next[kSections];  // the place of the section's next entry
        uint32_t first_entry = 0;
        Section* section = launch.sections;
        for (size_t i = 0; i < extents.size(); ++i) {
            if (counts[i] == 0) continue;
            const uint32_t tiles = ((extents[i].slots + group_slots - 1) / group_slots) << launch.group_log2;
            *section++ = Section{extents[i], make_divider(tiles), first_entry, launch.tiles};
            next[i] = first_entry;
            first_entry += counts[i];
            launch.tiles += counts[i] * tiles;
        }
        section->first_tile = launch.tiles;
        // Most entries are of the extent of the one before: its next place stays in a register.
        uint32_t extent = entries[0].extent, at = next[extent];
        for (const Entry& entry : entries) {
            if (entry.extent != extent) {
                next[extent] = at;
                extent = entry.extent;
                at = next[extent];
            }
            launch.data[at] = entry.data;
            launch.stream[at++] = entry.stream;
        }
        // As many blocks as run at a time, where each has a table to load. Without one, a block for each tile: the
        // device then hands them out as multiprocessors become free, and these do not all write equally fast.
        const bool tabulated = key.form != Form::constant && key.form != Form::uniform;
        start(kernel, tabulated ? std::min(launch.tiles, resident_) : launch.tiles, threads);
        entries.clear();
    }

    // Of a launch of fill_rows or fill_any, with entries of `slots` slots on average: group_log2 and RowStep.
    void set_row_step(const Geometry& g, uint64_t slots, uint32_t threads) {
        while (2u << launch_.group_log2 <= kGroup && uint64_t{launch_.tile_slots} << (launch_.group_log2 + 2) <= slots)
            ++launch_.group_log2;
        RowStep& step = launch_.step;
        step.stride = threads << launch_.group_log2;
        step.rows = step.stride / g.slots_per_run.divisor;
        step.at = step.stride % g.slots_per_run.divisor;
    }

    void start(const void* kernel, uint32_t blocks, uint32_t threads) {
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
        void* arguments[] = {&launch_};
        check(cudaLaunchKernelExC(&config, kernel, arguments), "cudaLaunchKernelExC", device_);
        launched_ = true;
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
        if (threads > kThreads && largest <= static_cast<uint32_t>(threads)) threads = kThreads;
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
    bool overlap_ = false;   // the device knows griddepcontrol
    bool launched_ = false;
    uint32_t multiprocessors_ = 0;
    const void* kernel_ = nullptr;  // the kernel of the last launch, and what is known of it:
    int most_threads_ = 0;          // threads that a block may have,
    int threads_ = 0;               // those that it had,
    uint32_t resident_ = 0;         // blocks of so many threads that the device runs at a time
    Key key_;
    std::unordered_map<Key, Group, KeyHash, KeyEqual> groups_;
    Whole whole_[4] = {};
    size_t oldest_whole_ = 0;
    Known known_[4] = {};
    size_t oldest_known_ = 0;
    KeyedGroup* last_ = nullptr;
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
