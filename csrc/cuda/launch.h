// What a launch is: the parameters that a kernel gets. Filled in by plan.cpp, read by the kernels.
//
// Fills that agree in kind, dtype, distribution, steps, seed and geometry share a launch, whose parameters carry the
// whole table of them: nothing is allocated or copied, so a launch is asynchronous and can be captured. A slot is one
// 16-byte store; each entry of the table is cut into tiles of so many slots, and the blocks of a grid walk the tiles.
// Entries of one extent, as the tensors of a model's layers are, stand together in a section, which says it once: it is
// half as much to copy at each launch, which is what many small fills wait for.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../fill.h"

namespace fastinit::cuda {

// Threads of a block of all kernels but fill_run and fill_rows, and of those for small entries.
constexpr int kThreads = 512;
constexpr uint32_t kWarp = 32;
// A tile, at most, in slots for each thread of a block: finding a tile's entry and preparing its Philox rounds is a
// small part of filling it.
constexpr uint32_t kMaxTile = 16;
// Tiles of an entry that take turns, at most: see Tile.
constexpr uint32_t kGroup = 64;
// Slots in a table entry, at most. Keeps slot and tile numbers of a launch and the elements of a run within 32 bits.
constexpr uint64_t kMaxSlots = uint64_t{1} << 27;
// Kernel parameters may take 32,764 bytes from CUDA 12.1, 4 KB before; CMakeLists.txt says which by defining
// FASTINIT_SMALL_LAUNCHES. The table takes what it may: what thousands of small fills wait for is the number of
// launches.
#if defined(FASTINIT_SMALL_LAUNCHES)
constexpr size_t kMaxParameters = 4096;
constexpr uint32_t kEntries = 144;
constexpr uint32_t kSections = 24;
#else
constexpr size_t kMaxParameters = 32764;
constexpr uint32_t kEntries = 2560;
constexpr uint32_t kSections = 32;
#endif

// The kernels (see kernels.cuh), and how their values are made. Truncated normals come in three forms: with equal sides
// that meet at 0 and no lower limit, as nearly all are; with other sides and no lower limit; and any.
enum class Path { run, rows, affine_rows, planes, affine_planes, any, any_erfinv, plain, general, general_erfinv };
enum class Form { constant, uniform, normal, symmetric, lopsided, truncated };

// The forms whose |f| is in [2, 2^32) or an integer below, so that one logic operation makes the centre of f's cell of
// it: see icdf. kCentre is what the bits of all centres have in common: biased exponents from 128 on, half a cell.
constexpr uint32_t kCentre = 0x40080000u;

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

// Where an aligned slot lies: the low word of its first Philox block, and its 16 bytes, counted from the entry's first.
struct Spot {
    uint32_t block;
    uint32_t slot;
};

// From one pass over rows to the next: `stride` slots, which are so many rows (in boxes of three dimensions, those
// beyond whole planes) and so far in a row, and the distance to there. Behind the end of a row or a plane what it is to
// the next one is added. The same for all entries of a launch, so that constants serve; distances are modulo 2^32.
struct RowStep {
    uint32_t stride;
    uint32_t rows;
    uint32_t at;
    Spot distance;
    Spot next_row;
    Spot next_plane;
};

// Where in its stream an entry begins, and how much there is of it.
struct Extent {
    uint32_t block;  // of its first element, the low word
    uint32_t slots;
    uint32_t size;  // in slots; the elements of fill_general's single run
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
    uint32_t group_log2;  // all aligned kernels but fill_run: the tiles that take turns
    RowStep step;
    Section sections[kSections + 1];  // the one behind the last says where the last one's tiles end
    char* data[kEntries];
    uint32_t stream[kEntries];  // the low word
};

static_assert(sizeof(Launch) <= kMaxParameters);

}  // namespace fastinit::cuda
