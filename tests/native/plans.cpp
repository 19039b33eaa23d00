// Which launches the planner of the CUDA half makes of fills, without a GPU. Compiled and run by
// tests/native/test_plan.py.
//
// Each line of standard input is a fill: its address, dtype, kind, the number of parameters and these, seed, stream,
// the number of steps and these (op, a, b), the first index, the number of dimensions, and their sizes, index strides
// and memory strides. Each line of standard output is a launch: form, dtype and path, blocks, threads, what its entries
// have in common (words of block and stream, phase, slots of a tile, outer dimensions), and the number of entries, with
// address, stream, block, slots and size of each.
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "batch.h"
#include "cuda/plan.h"
#include "lines.h"

using namespace fastinit;

namespace {

void append(Batch& batch, std::istream& in) {
    auto* data = reinterpret_cast<void*>(read<uintptr_t>(in));
    uint64_t stream;
    const Values values = read_values(in, stream);
    const auto index = read<uint64_t>(in);
    const auto dims = read<size_t>(in);
    const auto sizes = read_many<int64_t>(in, dims), index_strides = read_many<int64_t>(in, dims);
    batch.append(data, values, stream, make_box(index, sizes, index_strides, read_many<int64_t>(in, dims)));
}

// The GPU that the plan is for: an H200's numbers.
class Printer : public cuda::Device {
public:
    uint32_t multiprocessors() override { return 132; }
    uint32_t max_threads(const cuda::KernelId& kernel) override {
        return kernel.path == cuda::Path::run ? 1024 : kernel.path <= cuda::Path::affine_planes ? 768 : cuda::kThreads;
    }
    uint32_t blocks_per_multiprocessor(const cuda::KernelId&, uint32_t threads) override { return 2048 / threads; }

    void start(const cuda::KernelId& kernel, cuda::Launch& launch, uint32_t blocks, uint32_t threads) override {
        const cuda::Shared& shared = launch.shared;
        uint32_t entries = 0, tiles = 0;
        std::ostringstream out;
        for (const cuda::Section* section = launch.sections; tiles < launch.tiles; ++section) {
            const uint32_t of_section = section[1].first_tile - section->first_tile;
            tiles += of_section;
            for (uint32_t left = of_section / section->tiles.divisor; left > 0; --left, ++entries) {
                out << ' ' << reinterpret_cast<uintptr_t>(launch.data[entries]) << ' ' << launch.stream[entries] << ' '
                    << section->extent.block << ' ' << section->extent.slots << ' ' << section->extent.size;
            }
        }
        std::cout << static_cast<int>(kernel.form) << ' ' << static_cast<int>(kernel.dtype) << ' '
                  << static_cast<int>(kernel.path) << ' ' << blocks << ' ' << threads << ' ' << shared.origin.block_high
                  << ' ' << shared.origin.stream_high << ' ' << shared.origin.phase << ' ' << launch.tile_slots << ' '
                  << shared.geometry.outer_dims << ' ' << entries << out.str() << '\n';
    }
};

}  // namespace

int main() {
    Batch batch;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream in(line);
        append(batch, in);
    }
    const Batch::Work work = batch.take();
    Printer printer;
    cuda::plan(work.fills.data(), work.fills.size(), printer);
}
