// Every input that exists, once: the vector transforms and roundings against the scalar ones, over all 2^32 words and
// all 2^32 float32 bit patterns. Compiled and run by tests/native/test_native_exhaustive.py, with -DSIMD_HEADER and
// -DSIMD.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/kernel.h"
#include SIMD_HEADER

using namespace fastinit;
using S = SIMD;

namespace {

constexpr uint64_t all = uint64_t{1} << 32;
constexpr uint32_t block = 1 << 16;
std::atomic<uint64_t> next_block{0}, differences{0};
uint64_t block_step = 1;

template <class Out>
void compare(const char* what, uint32_t input, Out got, Out expected) {
    if (std::memcmp(&got, &expected, sizeof got) == 0) return;
    uint32_t a = 0, b = 0;
    std::memcpy(&a, &got, sizeof got);
    std::memcpy(&b, &expected, sizeof got);
    if (differences++ < 20) std::printf("%s of %08x: got %08x, expected %08x\n", what, input, a, b);
}

template <Transform T>
void check_transform(const char* what, const Distribution& d, const uint32_t* words) {
    const Constants<S> constants = make_constants<S, T>(d);
    float out[2 * S::lanes];
    for (uint32_t i = 0; i < block; i += 2 * S::lanes) {
        S::store(out, transform<S, T>(constants, S::load(words + i)),
                 transform<S, T>(constants, S::load(words + i + S::lanes)));
        for (int lane = 0; lane < 2 * S::lanes; ++lane)
            compare(what, words[i + lane], out[lane], distribution_value(d, words[i + lane], normal_table.rows));
    }
}

// NaN excepted: no other NaN than quiet_nan is ever rounded.
template <class Out>
void check_rounding(const char* what, const uint32_t* words) {
    Out out[2 * S::lanes];
    for (uint32_t i = 0; i < block; i += 2 * S::lanes) {
        float x[2 * S::lanes];
        for (int lane = 0; lane < 2 * S::lanes; ++lane) {
            const bool nan = (words[i + lane] & ~sign_bit) > 0x7F800000u;
            x[lane] = float_of(nan ? quiet_nan : words[i + lane]);
        }
        uint32_t bits[2 * S::lanes];
        std::memcpy(bits, x, sizeof x);
        const auto vector = [&](const uint32_t* p) {
            typename S::Float v;
            std::memcpy(&v, p, sizeof v);
            return v;
        };
        S::store(out, vector(bits), vector(bits + S::lanes));
        for (int lane = 0; lane < 2 * S::lanes; ++lane) {
            const Out expected = {sizeof(Out) == 2 && what[0] == 'f' ? float16_bits(x[lane]) : bfloat16_bits(x[lane])};
            compare(what, bits[lane], out[lane], expected);
        }
    }
}

void check() {
    Distribution uniform{}, normal{}, symmetric{}, lopsided{}, one_sided{};
    uniform.kind = Kind::uniform, uniform.location = -0.1f, uniform.scale = 0.3f;
    normal.kind = Kind::normal, normal.location = 0.01f, normal.scale = 0.02f;
    const float inf = INFINITY;
    symmetric.kind = lopsided.kind = one_sided.kind = Kind::truncated_normal;
    symmetric.symmetric = true, symmetric.scale = 1.0f;
    symmetric.negative = symmetric.positive = TailMap{0.9544997215270996f, 97711072.0f, -inf, 2.0f};
    lopsided.location = 0.25f, lopsided.scale = 0.5f, lopsided.threshold = -356530598;
    lopsided.negative = TailMap{0.8185946345329285f, 681419136.0f, -inf, 1.0f};
    lopsided.positive = TailMap{0.8185946345329285f, 97711072.0f, -inf, 2.0f};
    one_sided.scale = -1.0f, one_sided.threshold = INT32_MIN;
    one_sided.negative = one_sided.positive = TailMap{0.001349897007457912f, 4.237361907958984f, 3.0f, 6.0f};
    std::vector<uint32_t> words(block);
    for (uint64_t b; (b = next_block.fetch_add(block_step)) < all / block;) {
        for (uint32_t i = 0; i < block; ++i) words[i] = static_cast<uint32_t>(b * block + i);
        check_transform<Transform::uniform>("uniform", uniform, words.data());
        check_transform<Transform::tiny_uniform>("uniform, factor by factor", uniform, words.data());
        check_transform<Transform::normal>("normal", normal, words.data());
        check_transform<Transform::symmetric>("symmetric truncated normal", symmetric, words.data());
        check_transform<Transform::truncated>("truncated normal", lopsided, words.data());
        check_transform<Transform::truncated>("one-sided truncated normal", one_sided, words.data());
        check_rounding<Half>("float16", words.data());
        check_rounding<BFloat>("bfloat16", words.data());
    }
}

}  // namespace

// An argument n takes every n-th block of 2^16 inputs only.
int main(int argc, char** argv) {
    if (argc > 1) block_step = std::strtoull(argv[1], nullptr, 10);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) threads.emplace_back(check);
    for (std::thread& thread : threads) thread.join();
    std::printf("%llu differences\n", static_cast<unsigned long long>(differences));
    return differences == 0 ? 0 : 1;
}
