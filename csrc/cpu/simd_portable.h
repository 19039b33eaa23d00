// The kernel's vocabulary in plain C++, for machines without a vector version: the operations of philox.h and
// distributions.h over short arrays. A compiler makes vectors of it, for NEON for one.
#pragma once

#include "../distributions.h"

namespace fastinit {
namespace {

struct Portable {
    static constexpr int lanes = 8;

    struct Int {
        uint32_t v[lanes];
    };
    struct Float {
        float v[lanes];
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
    static Half round(float x, Half) {
#if defined(__aarch64__)  // has an instruction for it, which makes quiet_nan the NaN of the same sign and payload
        const __fp16 rounded = x;
        Half half;
        std::memcpy(&half, &rounded, sizeof half);
        return half;
#else
        return {float16_bits(x)};
#endif
    }
    static BFloat round(float x, BFloat) { return {bfloat16_bits(x)}; }
};

// A loop over whole blocks, which GCC and Clang turn into one over as many as a vector has lanes.
template <>
inline void philox_words<Portable>(const Schedule& s, uint32_t block, uint32_t count, uint32_t* out) {
    const uint64_t high = uint64_t{s.block_high} << 32;
    for (uint64_t i = 0; i < count; ++i) {
        const Words words = block_words(s.seed, s.stream, high | static_cast<uint32_t>(block + i));
        for (int k = 0; k < 4; ++k) out[4 * i + k] = words.w[k];
    }
}

}  // namespace
}  // namespace fastinit
