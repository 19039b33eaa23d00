// The kernel's vocabulary in plain C++, for machines without a vector version: the operations of philox.h and
// distributions.h over short arrays.
#pragma once

#include "../distributions.h"

namespace fastinit {
namespace {

struct Portable {
    static constexpr int lanes = 8;
    static constexpr int philox_groups = 1;

    struct Int {
        uint32_t v[lanes];
    };
    struct Float {
        float v[lanes];
    };
    struct Wide {
        uint64_t v[lanes / 2];
    };
    struct Mask {
        bool v[lanes];
    };
    struct Table {};

    template <class R, class F>
    static R each(F f) {
        R r;
        for (int i = 0; i < lanes; ++i) r.v[i] = f(i);
        return r;
    }
    template <class F>
    static Wide each_wide(F f) {
        Wide r;
        for (int i = 0; i < lanes / 2; ++i) r.v[i] = f(i);
        return r;
    }

    static Wide wide(uint64_t x) {
        return each_wide([=](int) { return x; });
    }
    static Wide counters(uint32_t block) {
        return each_wide([=](int i) { return block + static_cast<uint32_t>(i); });
    }
    static Wide multiply(const Wide& a, const Wide& b) {
        return each_wide(
            [&](int i) { return uint64_t{static_cast<uint32_t>(a.v[i])} * static_cast<uint32_t>(b.v[i]); });
    }
    static Wide high(const Wide& a) {
        return each_wide([&](int i) { return a.v[i] >> 32; });
    }
    static Wide exclusive_or(const Wide& a, const Wide& b) {
        return each_wide([&](int i) { return a.v[i] ^ b.v[i]; });
    }
    static Wide exclusive_or(const Wide& a, const Wide& b, const Wide& c) {
        return each_wide([&](int i) { return a.v[i] ^ b.v[i] ^ c.v[i]; });
    }
    static Wide join(const Wide& product, const Wide& word, const Wide& key) {
        return each_wide([&](int i) {
            return (product.v[i] << 32) | static_cast<uint32_t>((product.v[i] >> 32) ^ word.v[i] ^ key.v[i]);
        });
    }
    static void store_blocks(uint32_t* out, const Wide& word01, const Wide& word23) {
        for (int i = 0; i < lanes / 2; ++i) {
            out[4 * i] = static_cast<uint32_t>(word01.v[i]);
            out[4 * i + 1] = static_cast<uint32_t>(word01.v[i] >> 32);
            out[4 * i + 2] = static_cast<uint32_t>(word23.v[i]);
            out[4 * i + 3] = static_cast<uint32_t>(word23.v[i] >> 32);
        }
    }

    static Int load(const uint32_t* p) {
        return each<Int>([=](int i) { return p[i]; });
    }
    static Int set(uint32_t x) {
        return each<Int>([=](int) { return x; });
    }
    static Float set(float x) {
        return each<Float>([=](int) { return x; });
    }
    template <int count>
    static Int shift_right(const Int& a) {
        return each<Int>([&](int i) { return a.v[i] >> count; });
    }
    static Int and_(const Int& a, const Int& b) {
        return each<Int>([&](int i) { return a.v[i] & b.v[i]; });
    }
    static Int sub(const Int& a, const Int& b) {
        return each<Int>([&](int i) { return a.v[i] - b.v[i]; });
    }
    static Float as_float(const Int& a) {
        return each<Float>([&](int i) { return float_of(a.v[i]); });
    }
    static Int bits(const Float& x) {
        return each<Int>([&](int i) { return bits_of(x.v[i]); });
    }
    static Float to_float_signed(const Int& a) {
        return each<Float>([&](int i) { return float_of_signed(a.v[i]); });
    }
    static Float to_float_unsigned(const Int& a) {
        return each<Float>([&](int i) { return float_of_unsigned(a.v[i]); });
    }
    static Float fma(const Float& a, const Float& b, const Float& c) {
        return each<Float>([&](int i) { return fused_multiply_add(a.v[i], b.v[i], c.v[i]); });
    }
    static Float mul(const Float& a, const Float& b) {
        return each<Float>([&](int i) { return a.v[i] * b.v[i]; });
    }
    static Float add(const Float& a, const Float& b) {
        return each<Float>([&](int i) { return a.v[i] + b.v[i]; });
    }
    static Float div(const Float& a, const Float& b) {
        return each<Float>([&](int i) { return a.v[i] / b.v[i]; });
    }
    static Float at_least(const Float& x, const Float& low) {
        return each<Float>([&](int i) { return fastinit::at_least(x.v[i], low.v[i]); });
    }
    static Float at_most(const Float& x, const Float& high) {
        return each<Float>([&](int i) { return fastinit::at_most(x.v[i], high.v[i]); });
    }
    static Float canonical(const Float& x) {
        return each<Float>([&](int i) { return fastinit::canonical(x.v[i]); });
    }
    static Float magnitude(const Float& x) {
        return each<Float>([&](int i) { return float_of(bits_of(x.v[i]) & ~sign_bit); });
    }
    static Float negate(const Float& x) {
        return each<Float>([&](int i) { return -x.v[i]; });
    }
    static Float exclusive_or_sign(const Float& x, const Int& sign) {
        return each<Float>([&](int i) { return float_of(bits_of(x.v[i]) ^ (sign.v[i] & sign_bit)); });
    }
    static Mask less_signed(const Int& a, const Int& b) {
        return each<Mask>([&](int i) { return static_cast<int32_t>(a.v[i]) < static_cast<int32_t>(b.v[i]); });
    }
    static Int distance(const Int& a, const Int& b, const Mask& a_is_less) {
        return each<Int>([&](int i) { return a_is_less.v[i] ? b.v[i] - a.v[i] : a.v[i] - b.v[i]; });
    }
    static Float select(const Mask& m, const Float& yes, const Float& no) {
        return each<Float>([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
    }
    static Float negate_where(const Mask& m, const Float& x) {
        return each<Float>([&](int i) { return m.v[i] ? float_of(bits_of(x.v[i]) ^ sign_bit) : x.v[i]; });
    }

    static Table load_table() { return {}; }
    static Float icdf(const Int& f, const Table&) {
        return each<Float>([&](int i) { return normal_icdf(f.v[i], normal_table.rows); });
    }

    static void store(float* out, const Float& x, const Float& y) {
        for (int i = 0; i < lanes; ++i) out[i] = x.v[i], out[lanes + i] = y.v[i];
    }
    template <class Out>
    static void stream(Out* out, const Float& x, const Float& y) {
        store(out, x, y);
    }
    static void finish_streams() {}
    template <class Out>
    static void store(Out* out, const Float& x, const Float& y) {
        for (int i = 0; i < lanes; ++i) out[i] = round(x.v[i], Out{}), out[lanes + i] = round(y.v[i], Out{});
    }
    static Half round(float x, Half) { return {float16_bits(x)}; }
    static BFloat round(float x, BFloat) { return {bfloat16_bits(x)}; }
};

}  // namespace
}  // namespace fastinit
