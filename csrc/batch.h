// The fills that run together, as Python collects them; what they write to is the caller's to keep alive.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "validation.h"

namespace fastinit {

class Batch {
public:
    // Fills, and what they point to.
    struct Work {
        std::vector<Fill> fills;
        std::deque<Values> values;
        std::deque<Box> boxes;
    };

    void append(void* data, const Values& values, uint64_t stream, const Box& box) {
        check_data(data, values.dtype, box.elements());
        work_.fills.push_back(Fill{data, stream, shared(work_.values, values), shared(work_.boxes, box)});
    }

    size_t size() const { return work_.fills.size(); }

    uint64_t elements() const {
        uint64_t n = 0;
        for (const Fill& fill : work_.fills) n += fill.elements();
        return n;
    }

    // A batch runs once, whether or not it succeeds: what was written must not be written again by accident.
    Work take() { return std::exchange(work_, {}); }

private:
    // The item's copy in `items`: one of the last few if it is the same, as where weights and biases alternate. Padding
    // that differs costs another copy, no more.
    template <class T>
    static const T* shared(std::deque<T>& items, const T& item) {
        size_t looked = 0;
        for (auto it = items.rbegin(); it != items.rend() && looked < 4; ++it, ++looked)
            if (std::memcmp(&*it, &item, sizeof item) == 0) return &*it;
        items.push_back(item);
        return &items.back();
    }

    Work work_;
};

}  // namespace fastinit
