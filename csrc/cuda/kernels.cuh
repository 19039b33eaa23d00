// The kernels: which elements a thread makes, and where they go.
//
//   fill_run      whole 16-byte-aligned runs that begin on a Philox block, without steps: nearly everything in a model.
//   fill_rows     rows so aligned, that is boxes of two or three dimensions, and runs with steps that are an Affine.
//   fill_any      the same in more dimensions and with any steps.
//   fill_general  any alignment, any start, any box, values that may be NaN, short tails.
//
// What was measured, and what was tried and dropped, is in docs/performance.md.
#pragma once

#include "values.cuh"

namespace fastinit::cuda {
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
constexpr int kRowsThreads = 768;
constexpr int kRowsBlocks = 2;
constexpr int kAnyBlocks = 3;
constexpr int kPlainBlocks = 4;
constexpr int kGeneralBlocks = 2;

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
    return Work{
        entry, launch.stream[entry], s.extent.block, s.extent.size, at - number * s.tiles.divisor, s.tiles.divisor,
    };
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

__device__ __forceinline__ Spot spot_in_box(const Geometry& g, uint32_t slot, uint32_t blocks, uint32_t block) {
    uint32_t row = divide(slot, g.slots_per_run);
    const uint32_t at = slot - row * g.slots_per_run.divisor;
    Spot spot{block + at * blocks, at};
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
    constexpr bool kPlanes = kPath == Path::planes || kPath == Path::affine_planes;
    constexpr bool kRows = kPlanes || kPath == Path::rows || kPath == Path::affine_rows;
    constexpr bool kAffine = kPath == Path::affine_rows || kPath == Path::affine_planes;
    constexpr bool kAny = kPath == Path::any || kPath == Path::any_erfinv;
    __shared__ float4 table[kTabulated<kForm> ? kTableRows * kCopies : 1];
    const float4* rows = kTabulated<kForm> ? load_rows<kForm>(table) : table;
    const Shared& shared = launch.shared;
    const Geometry& g = shared.geometry;
    Distribution d = shared.distribution;
    // By way of shared memory: operands that a predicate chooses would otherwise be loaded for every element.
    if constexpr (kForm == Form::lopsided) {
        __shared__ volatile float kept[6];
        float* const operands[] = {&d.negative.scale, &d.negative.offset, &d.negative.high,
                                   &d.positive.scale, &d.positive.offset, &d.positive.high};
#pragma unroll
        for (int i = 0; i < 6; ++i) kept[i] = *operands[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 6; ++i) *operands[i] = kept[i];
        // The table's address would be computed anew for every slot, in seven instructions.
        auto address = static_cast<uint32_t>(__cvta_generic_to_shared(rows));
        asm volatile("" : "+r"(address));
        rows = static_cast<const float4*>(__cvta_shared_to_generic(address));
    }
    S out;
    if constexpr (kForm == Form::constant) out.set_constant(shared);

    uint32_t section = 0;
    for (uint32_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
        const Work work = find_work(launch, tile, section);
        PhiloxRun run = philox_run(shared, work.stream);
        // Keeps the compiler from doing it again for every slot, to save registers that only the truncated form lacks.
        if constexpr ((kPath != Path::run && kForm != Form::truncated) || kForm == Form::lopsided)
            asm volatile("" : "+r"(run.x), "+r"(run.z), "+r"(run.w), "+r"(run.z_first));
        const Tile t = kPath == Path::run ? tile_of_run(launch, work) : tile_of_rows(launch, work);
        uint32_t slot = t.begin + threadIdx.x, stride = t.stride, end = t.end, block = work.block;
        // These, too, would be computed anew for every slot.
        if constexpr (kPath == Path::run) asm volatile("" : "+r"(stride), "+r"(end), "+r"(block));
        Spot spot{block, 0};
        uint32_t at = slot, row = 0;  // in the row, in the plane
        if constexpr (kRows) {
            row = divide(slot, g.slots_per_run);
            at -= row * g.slots_per_run.divisor;
            if constexpr (kPlanes) {
                const uint32_t plane = divide(row, g.size[1]);
                row -= plane * g.size[1].divisor;
                spot.block += plane * g.block_stride[0];
                spot.slot += plane * g.slot_stride[0];
            }
            constexpr int kRow = kPlanes ? 1 : 0;  // the dimension
            spot.block += row * g.block_stride[kRow] + at * S::kBlocks;
            spot.slot += row * g.slot_stride[kRow] + at;
        }
        for (; slot < end; slot += stride) {
            if constexpr (!kRows && !kAny) spot = Spot{block + slot * S::kBlocks, slot};
            if constexpr (kAny) spot = spot_in_box(g, slot, S::kBlocks, block);
            if constexpr (kForm != Form::constant) {
                float x[S::kLanes];
#pragma unroll
                for (int b = 0; b < S::kBlocks; ++b) {
                    uint32_t w[4];
                    philox_block(shared, run, spot.block + b, w);
#pragma unroll
                    for (int i = 0; i < 4; ++i) x[4 * b + i] = value<kForm, true>(d, shared.centre, w[i], rows);
                }
                if constexpr (kAffine) apply_affine(shared.affine, x);
                if constexpr (kAny) apply_steps<kPath == Path::any_erfinv>(shared.steps, x);
                out.set(x);
            }
            out.store(launch.data[work.entry] + uint64_t{spot.slot} * 16);
            // The empty asm keeps a carry a branch, which ptxas makes predicated additions of. As a choice between an
            // addend and zero it would take another instruction for each of them.
            if constexpr (kRows) {
                const RowStep& step = launch.step;
                at += step.at;
                if constexpr (kPlanes) row += step.rows;
                spot.block += step.distance.block;
                spot.slot += step.distance.slot;
                if (at >= g.slots_per_run.divisor) {
                    asm volatile("");
                    at -= g.slots_per_run.divisor;
                    if constexpr (kPlanes) ++row;
                    spot.block += step.next_row.block;
                    spot.slot += step.next_row.slot;
                }
                if constexpr (kPlanes) {
                    if (row >= g.size[1].divisor) {
                        asm volatile("");
                        row -= g.size[1].divisor;
                        spot.block += step.next_plane.block;
                        spot.slot += step.next_plane.slot;
                    }
                }
            }
        }
    }
    end_launch();
}

// The lopsided form needs 40 registers.
template <Form kForm, Dtype kDtype>
__global__ void __launch_bounds__(kForm == Form::lopsided ? kRowsThreads : kRunThreads,
                                  kForm == Form::lopsided ? kRowsBlocks : kRunBlocks)
    fill_run(const __grid_constant__ Launch launch) {
    fill_aligned<kForm, kDtype, Path::run>(launch);
}

template <Form kForm, Dtype kDtype, Path kPath>
__global__ void __launch_bounds__(kRowsThreads, kRowsBlocks) fill_rows(const __grid_constant__ Launch launch) {
    fill_aligned<kForm, kDtype, kPath>(launch);
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
                        x[4 * b + i] = value<kForm, kPlain>(shared.distribution, shared.centre, w[i], rows);
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

using Kernel = void (*)(Launch);

template <Form kForm, Dtype kDtype>
Kernel kernel_for(Path path) {
    switch (path) {
        case Path::rows: return fill_rows<kForm, kDtype, Path::rows>;
        case Path::affine_rows: return fill_rows<kForm, kDtype, Path::affine_rows>;
        case Path::planes: return fill_rows<kForm, kDtype, Path::planes>;
        case Path::affine_planes: return fill_rows<kForm, kDtype, Path::affine_planes>;
        case Path::any: return fill_any<kForm, kDtype, false>;
        case Path::any_erfinv: return fill_any<kForm, kDtype, true>;
        case Path::general_erfinv: return fill_general<kForm, kDtype, false, true>;
        default: return fill_general<kForm, kDtype, false, false>;
    }
}

// Which of a form's kernels exist follows from Planner::add_piece of plan.cpp.
template <Dtype kDtype>
Kernel kernel_for(Form form, Path path) {
    switch (form) {
        case Form::constant:
            if (path == Path::run) return fill_run<Form::constant, kDtype>;
            return fill_general<Form::constant, kDtype, false, false>;
        case Form::uniform:
            if (path == Path::run) return fill_run<Form::uniform, kDtype>;
            if (path == Path::plain) return fill_general<Form::uniform, kDtype, true, false>;
            return kernel_for<Form::uniform, kDtype>(path);
        case Form::normal:
            if (path == Path::run) return fill_run<Form::normal, kDtype>;
            if (path == Path::plain) return fill_general<Form::normal, kDtype, true, false>;
            return kernel_for<Form::normal, kDtype>(path);
        case Form::symmetric: return fill_run<Form::symmetric, kDtype>;
        case Form::lopsided: return fill_run<Form::lopsided, kDtype>;
        default: return kernel_for<Form::truncated, kDtype>(path);
    }
}

Kernel kernel_for(Form form, Dtype dtype, Path path) {
    switch (dtype) {
        case Dtype::float16: return kernel_for<Dtype::float16>(form, path);
        case Dtype::bfloat16: return kernel_for<Dtype::bfloat16>(form, path);
        default: return kernel_for<Dtype::float32>(form, path);
    }
}

}  // namespace
}  // namespace fastinit::cuda
