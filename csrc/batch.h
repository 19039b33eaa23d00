// The fills that run together, as Python collects them; what they write to is the caller's to keep alive.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fill.h"

namespace fastinit {

class Batch {
public:
    void append(const Fill& fill) {
        check_data(fill.data, fill.dtype, fill.elements());
        fills_.push_back(fill);
    }

    size_t size() const { return fills_.size(); }

    uint64_t elements() const {
        uint64_t n = 0;
        for (const Fill& fill : fills_) n += fill.elements();
        return n;
    }

    // A batch runs once, whether or not it succeeds: what was written must not be written again by accident.
    std::vector<Fill> take() { return std::exchange(fills_, {}); }

private:
    std::vector<Fill> fills_;
};

}  // namespace fastinit
