// How fills become kernel calls: they are cut into pieces that threads take one by one, and a piece into stretches
// that are consecutive in the stream. Nothing here decides a value; any cut gives the same bits.
#include "fill.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>

#include "float_environment.h"
#include "isa.h"

namespace fastinit {
namespace {

// Large enough to hide the counter and a thread's last wait, small enough to share a matrix among many cores.
constexpr uint64_t piece_elements = uint64_t{1} << 16;
// The first write to a huge page zeroes it, in the thread that writes. Threads that do so at the same time all zero
// one, of which the system keeps one; so where there are enough for all threads, a piece is what lies in one huge page.
constexpr uint64_t huge_page = uint64_t{2} << 20;
// Starting a thread costs about as much as this many elements.
constexpr uint64_t elements_per_thread = uint64_t{1} << 17;
// Elements staged on the stack when the stream's order is not the memory's.
constexpr uint64_t stage_elements = 2048;
// Runs from this length go straight to memory although the stream continues behind them.
constexpr uint64_t direct_run = 512;

// How a fill is cut: into pieces of so many elements, the first of which lacks some in front.
struct Cut {
    uint64_t size;
    uint64_t missing;

    uint64_t pieces(uint64_t elements) const { return elements == 0 ? 0 : (missing + elements + size - 1) / size; }
};

Cut cut(const Fill& fill, bool at_huge_pages) {
    if (!at_huge_pages) return {piece_elements, 0};
    const uint64_t item = item_size(fill.values->dtype);
    return {huge_page / item, reinterpret_cast<uintptr_t>(fill.data) % huge_page / item};
}

void scatter(const Fill& fill, const char* stage, uint64_t* position, uint64_t memory, uint64_t count) {
    // Copies `count` staged elements to the box, from multi-index `position` at element `memory` of the data on.
    const Box& box = *fill.box;
    const int last = box.dims - 1;
    const uint64_t item = item_size(fill.values->dtype), stride = box.memory_stride[last];
    char* const data = static_cast<char*>(fill.data);
    while (count > 0) {
        const uint64_t n = std::min(count, box.size[last] - position[last]);
        if (stride == 1) {
            std::memcpy(data + memory * item, stage, n * item);
        } else if (item == 4) {
            for (uint64_t k = 0; k < n; ++k) std::memcpy(data + (memory + k * stride) * 4, stage + k * 4, 4);
        } else {
            for (uint64_t k = 0; k < n; ++k) std::memcpy(data + (memory + k * stride) * 2, stage + k * 2, 2);
        }
        stage += n * item;
        count -= n;
        position[last] += n;
        memory += n * stride;
        for (int d = last; d > 0 && position[d] == box.size[d]; --d) {
            memory += box.memory_stride[d - 1] - box.size[d] * box.memory_stride[d];
            position[d] = 0;
            ++position[d - 1];
        }
    }
}

// Elements [begin, end) of the box, counted row-major over its dimensions.
void run_piece(const Fill& fill, const Kernel& kernel, uint64_t begin, uint64_t end) {
    const Box& box = *fill.box;
    const uint64_t item = item_size(fill.values->dtype);
    char* const data = static_cast<char*>(fill.data);
    if (box.contiguous()) {
        kernel.generate(fill, box.index_offset + begin, end - begin, data + begin * item);
        return;
    }
    // The box's trailing dimensions that follow each other in the stream: stretches of `dense` elements.
    uint64_t dense = 1;
    for (int d = box.dims - 1; d >= 0 && box.index_stride[d] == dense; --d) dense *= box.size[d];
    const bool direct = box.contiguous_runs() && (dense == box.run() || box.run() >= direct_run);
    const uint64_t stretch = direct ? box.run() : dense;

    alignas(64) char stage[stage_elements * 4];
    while (begin < end) {
        uint64_t position[Box::max_dims];
        uint64_t index = box.index_offset, memory = 0, rest = begin;
        for (int d = box.dims - 1; d >= 0; --d) {
            position[d] = rest % box.size[d];
            rest /= box.size[d];
            index += position[d] * box.index_stride[d];
            memory += position[d] * box.memory_stride[d];
        }
        uint64_t n = std::min(end - begin, stretch - begin % stretch);
        if (direct) {
            kernel.generate(fill, index, n, data + memory * item);
        } else {
            n = std::min(n, stage_elements);
            kernel.generate(fill, index, n, stage);
            scatter(fill, stage, position, memory, n);
        }
        begin += n;
    }
}

}  // namespace

void fill_cpu(const Fill* fills, size_t count, int threads, const Kernel& kernel) {
    uint64_t elements = 0, bytes = 0;
    for (size_t f = 0; f < count; ++f) {
        elements += fills[f].elements();
        bytes += fills[f].elements() * item_size(fills[f].values->dtype);
    }
    const uint64_t most_threads = std::max(threads, 1);
    const bool at_huge_pages = bytes / huge_page >= 2 * most_threads;
    std::vector<uint64_t> first_piece(count + 1, 0);  // of each fill, in the numbering of all pieces
    for (size_t f = 0; f < count; ++f)
        first_piece[f + 1] = first_piece[f] + cut(fills[f], at_huge_pages).pieces(fills[f].elements());
    const uint64_t pieces = first_piece[count];

    std::atomic<uint64_t> next{0};
    const auto work = [&] {
        const FloatEnvironment environment;
        for (uint64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
            const size_t f = std::upper_bound(first_piece.begin(), first_piece.end(), piece) - first_piece.begin() - 1;
            const auto [size, missing] = cut(fills[f], at_huge_pages);
            const uint64_t begin = (piece - first_piece[f]) * size, end = begin + size - missing;
            run_piece(fills[f], kernel, std::max(begin, missing) - missing, std::min(end, fills[f].elements()));
        }
    };

    const uint64_t wanted = std::min({most_threads, pieces, elements / elements_per_thread});
    std::vector<std::thread> workers;
    workers.reserve(wanted);
    try {
        while (workers.size() + 1 < wanted) workers.emplace_back(work);
    } catch (const std::system_error&) {
        // The system gives no more threads: those that run take all the work.
    }
    work();
    for (std::thread& worker : workers) worker.join();
}

}  // namespace fastinit
