// From one 32-bit word to one value: the distributions of stream v1, their trailing steps, and the rounding to the
// stored dtype, one element at a time. Every backend must give these bits; the vector kernels are tested against them.
//
// Each operation below is one IEEE operation in float32, rounded to nearest even, subnormals kept. Files that include
// this header are compiled without contraction of a * b + c (-ffp-contract=off, nvcc -fmad=false), and every fused
// multiply-add is written out.
//
// A value may be NaN only through a NaN constant or through steps (0 * inf, inf - inf, 0 / 0). Its bits are then
// those of quiet_nan in every dtype: hardware disagrees about the sign and payload of the NaN it makes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "normal_table.h"
#include "philox.h"

namespace fastinit {

enum class Dtype : uint8_t { float32 = 0, float16 = 1, bfloat16 = 2 };
enum class Kind : uint8_t { constant = 0, uniform = 1, normal = 2, truncated_normal = 3 };
enum class StepOp : uint8_t { multiply = 0, add = 1, divide = 2, clamp = 3, erfinv = 4 };

// x * a, x + a, x / a, x clamped to [a, b], or the inverse error function of x, whose operands are 0.
struct Step {
    StepOp op;
    float a;
    float b;
};

struct Steps {
    static constexpr int capacity = 6;
    int count;
    Step items[capacity];
};

// How one side of a truncated normal maps the distance g of a word from the threshold to a tail position
// f = fma(g, scale, offset), and the interval [low, high] of |z| that the result is held to.
struct TailMap {
    float scale;
    float offset;
    float low;
    float high;
};

//     constant           location
//     uniform            fma(u, scale, location),   location = low, scale = high - low
//     normal, truncated  fma(z, scale, location),   location = mean, scale = standard deviation
struct Distribution {
    Kind kind;
    // Truncated normal whose two sides are alike and meet at 0: f = fma(|float(word)|, scale, offset), the same bits.
    bool symmetric;
    float location;
    float scale;
    int32_t threshold;  // truncated normal: words below it, as signed numbers, give negative z
    TailMap negative;
    TailMap positive;
};

constexpr uint32_t sign_bit = 0x80000000u;
constexpr uint32_t quiet_nan = 0x7FC00000u;

FASTINIT_HOST_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

FASTINIT_HOST_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

FASTINIT_HOST_DEVICE float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}

FASTINIT_HOST_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

FASTINIT_HOST_DEVICE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

FASTINIT_HOST_DEVICE float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

FASTINIT_HOST_DEVICE float float_of_signed(uint32_t w) {
#if defined(__CUDA_ARCH__)
    return __int2float_rn(static_cast<int32_t>(w));
#else
    return static_cast<float>(static_cast<int32_t>(w));
#endif
}

FASTINIT_HOST_DEVICE float float_of_unsigned(uint32_t w) {
#if defined(__CUDA_ARCH__)
    return __uint2float_rn(w);
#else
    return static_cast<float>(w);
#endif
}

// max(x, low) and min(x, high) with x kept when it is NaN or when both are zero, which fmaxf and fminf do not promise.
FASTINIT_HOST_DEVICE float at_least(float x, float low) { return x < low ? low : x; }
FASTINIT_HOST_DEVICE float at_most(float x, float high) { return x > high ? high : x; }

// Inverse normal CDF: z >= 0 with P(X > z) = |f| 2^-32, for |f| = 0 or 1 <= |f| <= 2^31, given f's bits.
// The row is the low 5 exponent bits and the top 3 mantissa bits of f; t is f's place in the row's cell, in
// [-1/16, 1/16). |f| = 2^31 gives 0; f = 0 has the bits of row 0's left end and gives the z of |f| = 2, 6.12.
// The largest z is that of |f| = 1, 6.23. Largest error against the exact inverse CDF: 5.2e-7. Other f, those in (0, 1)
// for one, are outside the domain: they meet the row of another octave.
FASTINIT_HOST_DEVICE float normal_icdf(uint32_t f, const float (*rows)[4]) {
    const float* c = rows[(f >> 20) & 255];
    const float t = add(float_of((f & 0x000FFFFFu) | 0x3F800000u), -1.0625f);
    return fused_multiply_add(fused_multiply_add(fused_multiply_add(c[3], t, c[2]), t, c[1]), t, c[0]);
}

// u in [0, 1): a multiple of 2^-24. The value is in [low, low + scale], the end attained only through rounding.
FASTINIT_HOST_DEVICE float uniform_value(const Distribution& d, uint32_t w) {
    const float u = multiply(float_of_unsigned(w >> 8), 0x1p-24f);
    return fused_multiply_add(u, d.scale, d.location);
}

FASTINIT_HOST_DEVICE float normal_value(const Distribution& d, uint32_t w, const float (*rows)[4]) {
    const uint32_t f = bits_of(float_of_signed(w));
    const float z = float_of(bits_of(normal_icdf(f, rows)) ^ (f & sign_bit));
    return fused_multiply_add(z, d.scale, d.location);
}

FASTINIT_HOST_DEVICE float truncated_normal_value(const Distribution& d, uint32_t w, const float (*rows)[4]) {
    const bool negative = static_cast<int32_t>(w) < d.threshold;
    const TailMap& side = negative ? d.negative : d.positive;
    const uint32_t threshold = static_cast<uint32_t>(d.threshold);
    const float g = float_of_unsigned(negative ? threshold - w : w - threshold);
    const float f = fused_multiply_add(g, side.scale, side.offset);
    float z = normal_icdf(bits_of(f), rows);
    z = at_most(at_least(z, side.low), side.high);
    z = float_of(bits_of(z) ^ (negative ? sign_bit : 0u));
    return fused_multiply_add(z, d.scale, d.location);
}

FASTINIT_HOST_DEVICE float distribution_value(const Distribution& d, uint32_t w, const float (*rows)[4]) {
    switch (d.kind) {
        case Kind::uniform: return uniform_value(d, w);
        case Kind::normal: return normal_value(d, w, rows);
        case Kind::truncated_normal: return truncated_normal_value(d, w, rows);
        default: return d.location;
    }
}

// The polynomials of erfinv, lowest coefficient first. Part of the frozen stream: docs/stream-v1.md says what they are.
struct ErfinvPolynomials {
    float log2[8];   // -log2(1 + f) / f
    float near[10];  // erfinv(x) / x in v = -log2(1 - x^2), below 7
    float far[11];   // the same in v - 12, from 7 on
};

FASTINIT_HOST_DEVICE constexpr ErfinvPolynomials erfinv_polynomials() {
    return {{-0x1.715472p+0f, 0x1.7155b8p-1f, -0x1.ec7b3ep-2f, 0x1.70baf4p-2f, -0x1.25992ap-2f, 0x1.0011f8p-2f,
             -0x1.e50a8p-3f, 0x1.2a5e4p-3f},
            {0x1.c5bf8ap-1f, 0x1.495baap-3f, 0x1.6bb404p-8f, -0x1.9851fep-11f, -0x1.dd04acp-16f, 0x1.c3c5dep-18f,
             0x1.204b44p-21f, -0x1.6303d6p-23f, 0x1.b7b3ccp-27f, -0x1.88b8d8p-32f},
            {0x1.5bc5e2p+1f, 0x1.ebc998p-4f, -0x1.2ff98ap-9f, 0x1.46a4eap-14f, -0x1.23dc8ap-19f, -0x1.30d19ep-25f,
             0x1.b77ep-27f, -0x1.6166b4p-30f, 0x1.8454aap-34f, -0x1.18b7bcp-38f, 0x1.7dd168p-44f}};
}

template <int count>
FASTINIT_HOST_DEVICE float horner(const float (&c)[count], float x) {
    float y = c[count - 1];
    FASTINIT_UNROLL
    for (int i = count - 2; i >= 0; --i) y = fused_multiply_add(y, x, c[i]);
    return y;
}

// Inverse error function, odd; +-1 give +-infinity, and what is beyond them NaN. Largest error: 1.99 ulp.
// 1 - x^2 = 2^e m with m in [sqrt(1/2), sqrt(2)); v is minus its binary logarithm, and erfinv(x) / x a function of v.
FASTINIT_HOST_DEVICE float erfinv(float x) {
    constexpr ErfinvPolynomials p = erfinv_polynomials();
    const float magnitude = float_of(bits_of(x) & ~sign_bit);
    const uint32_t square = bits_of(fused_multiply_add(-magnitude, magnitude, 1.0f));
    const uint32_t exponent = (square - 0x3F3504F3u) & 0xFF800000u;  // e 2^23
    const float f = add(float_of(square - exponent), -1.0f);
    const float v = fused_multiply_add(f, horner(p.log2, f), multiply(float_of_signed(exponent), -0x1p-23f));
    const float ratio = v < 7.0f ? horner(p.near, v) : horner(p.far, add(v, -12.0f));
    const float edge = float_of(magnitude == 1.0f ? 0x7F800000u : quiet_nan);
    return multiply(magnitude < 1.0f ? ratio : edge, x);
}

FASTINIT_HOST_DEVICE float apply_step(const Step& step, float x) {
    switch (step.op) {
        case StepOp::multiply: return multiply(x, step.a);
        case StepOp::add: return add(x, step.a);
        case StepOp::divide: return divide(x, step.a);
        case StepOp::erfinv: return erfinv(x);
        default: return at_most(at_least(x, step.a), step.b);
    }
}

FASTINIT_HOST_DEVICE float canonical(float x) { return x == x ? x : float_of(quiet_nan); }

FASTINIT_HOST_DEVICE float apply_steps(const Steps& steps, float x) {
    for (int i = 0; i < steps.count; ++i) x = apply_step(steps.items[i], x);
    return canonical(x);
}

// Round to nearest even by integer arithmetic: float16 overflows to infinity from 65520 and keeps subnormals.
FASTINIT_HOST_DEVICE uint16_t float16_bits(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t sign = (bits & sign_bit) >> 16;
    const uint32_t magnitude = bits & ~sign_bit;
    uint32_t half;
    if (magnitude > 0x7F800000u) return 0x7E00u;
    if (magnitude >= 0x477FF000u) {
        half = 0x7C00u;
    } else if (magnitude >= 0x38800000u) {  // 2^-14: normal in float16
        half = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    } else if (magnitude > 0x33000000u) {  // above 2^-25, which ties to zero
        const uint32_t shift = 126u - (magnitude >> 23);
        const uint32_t mantissa = (magnitude & 0x007FFFFFu) | 0x00800000u;
        const uint32_t rest = mantissa & ((1u << shift) - 1u);
        const uint32_t tie = 1u << (shift - 1u);
        half = mantissa >> shift;
        half += rest > tie || (rest == tie && (half & 1u)) ? 1u : 0u;
    } else {
        half = 0u;
    }
    return static_cast<uint16_t>(sign | half);
}

FASTINIT_HOST_DEVICE uint16_t bfloat16_bits(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & ~sign_bit) > 0x7F800000u ? quiet_nan >> 16 : rounded);
}

}  // namespace fastinit
