// Fills by the CPU kernels in a program of its own, for processors that Python is not here for. Compiled and run by
// tests/native/test_aarch64.py.
//
// Each line of standard input is a fill: dtype, kind, the number of parameters and these, seed, stream, the number of
// steps and these (op, a, b), the first index, the number of elements. Its elements go to standard output as they are
// in memory.
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/fill.h"
#include "cpu/float_environment.h"
#include "cpu/isa.h"
#include "lines.h"

using namespace fastinit;

namespace {

void run(std::istream& in) {
    const FloatEnvironment environment;
    uint64_t stream;
    const Values values = read_values(in, stream);
    const auto index = read<uint64_t>(in);
    const auto count = read<int64_t>(in);
    const Box box = make_box(index, {count}, {1}, {1});
    std::vector<char> data(count * item_size(values.dtype));
    const Fill fill{data.data(), stream, &values, &box};
    fill_cpu(&fill, 1, 1, default_kernel());
    std::fwrite(data.data(), 1, data.size(), stdout);
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream in(line);
        run(in);
    }
}
