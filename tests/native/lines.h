// What fills.cpp and plans.cpp read alike: words of a line of standard input, and the values of a fill.
#pragma once

#include <istream>
#include <stdexcept>
#include <string>
#include <vector>

#include "validation.h"

namespace fastinit {

template <class T>
T read(std::istream& in) {
    T value{};
    if (!(in >> value)) throw std::runtime_error("a line is not a fill");
    return value;
}

template <class T>
std::vector<T> read_many(std::istream& in, size_t count) {
    std::vector<T> values(count);
    for (T& value : values) value = read<T>(in);
    return values;
}

// dtype, kind, the number of parameters and these, seed, stream, the number of steps and these (op, a, b).
inline Values read_values(std::istream& in, uint64_t& stream) {
    Values values{};
    values.dtype = make_dtype(read<int64_t>(in));
    const auto kind = read<int64_t>(in);
    std::vector<double> parameters;
    // Not as numbers: a stream reads no infinity.
    for (const std::string& word : read_many<std::string>(in, read<size_t>(in))) parameters.push_back(std::stod(word));
    values.distribution = make_distribution(kind, parameters);
    values.seed = read<uint64_t>(in);
    stream = read<uint64_t>(in);
    for (auto steps = read<size_t>(in); steps > 0; --steps) {
        const auto op = read<int64_t>(in);
        const double a = std::stod(read<std::string>(in)), b = std::stod(read<std::string>(in));
        append_step(values.steps, make_step(op, a, b));
    }
    return values;
}

}  // namespace fastinit
