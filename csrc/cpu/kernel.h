// The CPU kernel of stream v1, written over a small vocabulary of vector operations. kernel_<isa>.cpp compiles it once
// per instruction set, with that set's Simd and compiler flags.
//
// A Simd provides, for vectors of `lanes` 32-bit lanes (Int, Float) and lanes / 2 64-bit lanes (Wide):
//     Philox      wide, counters, multiply, high, exclusive_or, join, store_blocks, or philox_words as a whole
//     arithmetic  load, set, and_, sub, shift_right, to_float_signed, to_float_unsigned, fma, mul, add, div, ...
//     the table   Table, icdf
//     output      store, rounding two Float vectors to the stored dtype; stream, past the caches, and finish_streams
// each with the meaning of its scalar twin in philox.h and distributions.h.
//
// Words go through a buffer in the first-level cache between the two halves: Philox wants all registers for
// independent chains, the inverse CDF wants them for its table.
//
// Only included by kernel_<isa>.cpp. Everything here has internal linkage and nothing calls a template of the standard
// library, so that the linker cannot merge code of different instruction sets.
#pragma once

#include <cstring>

#include "isa.h"

namespace fastinit {
namespace {

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

// Philox's keys, and what of its first three rounds is the same for all blocks of a fill that share the counter's
// upper three words: round 0 multiplies two and round 1 one of them. Words are kept in 64 bits, ready to be broadcast.
struct Schedule {
    uint64_t seed, stream;
    uint32_t block_high;
    uint64_t key0[Philox::rounds];
    uint64_t key1[Philox::rounds];
    uint64_t round0_word2;  // xored to the high half of block low * multiplier0
    uint64_t round1_word0;
    uint64_t round1_word2;
    uint64_t round2_word2;
};

inline Schedule make_schedule(uint64_t seed, uint64_t stream, uint32_t block_high) {
    Schedule s;
    s.seed = seed;
    s.stream = stream;
    s.block_high = block_high;
    for (int r = 0; r < Philox::rounds; ++r) {
        s.key0[r] = static_cast<uint32_t>(seed + uint64_t{Philox::key_step0} * r);
        s.key1[r] = static_cast<uint32_t>((seed >> 32) + uint64_t{Philox::key_step1} * r);
    }
    const uint64_t p1 = uint64_t{Philox::multiplier1} * static_cast<uint32_t>(stream);
    const uint64_t word0 = (p1 >> 32) ^ block_high ^ s.key0[0];
    const uint64_t p0 = Philox::multiplier0 * word0;
    s.round0_word2 = (stream >> 32) ^ s.key1[0];
    s.round1_word0 = static_cast<uint32_t>(p1) ^ s.key0[1];
    s.round1_word2 = (p0 >> 32) ^ s.key1[1];
    s.round2_word2 = static_cast<uint32_t>(p0) ^ s.key1[2];
    return s;
}

// Writes the words of `Groups` times lanes / 2 blocks. A Philox word lives in the low half of a 64-bit lane and what is
// in the high half is never cleared: the multiplication does not read it. The groups are independent chains that hide
// the multiplication's latency.
template <class S, int Groups>
inline void philox_groups(const Schedule& s, uint32_t block, uint32_t* out) {
    using Wide = typename S::Wide;
    constexpr uint32_t blocks = S::lanes / 2;
    const Wide m0 = S::wide(Philox::multiplier0), m1 = S::wide(Philox::multiplier1);
    Wide w0[Groups], w1[Groups], w2[Groups], w3[Groups];
    for (int g = 0; g < Groups; ++g) {  // round 0
        const Wide p0 = S::multiply(S::counters(block + g * blocks), m0);
        w2[g] = S::exclusive_or(S::high(p0), S::wide(s.round0_word2));
        w3[g] = p0;
    }
    for (int g = 0; g < Groups; ++g) {  // round 1
        const Wide p1 = S::multiply(w2[g], m1);
        w0[g] = S::exclusive_or(S::high(p1), S::wide(s.round1_word0));
        w2[g] = S::exclusive_or(w3[g], S::wide(s.round1_word2));
        w1[g] = p1;
    }
    for (int g = 0; g < Groups; ++g) {  // round 2
        const Wide p0 = S::multiply(w0[g], m0), p1 = S::multiply(w2[g], m1);
        w0[g] = S::exclusive_or(S::high(p1), w1[g], S::wide(s.key0[2]));
        w2[g] = S::exclusive_or(S::high(p0), S::wide(s.round2_word2));
        w1[g] = p1;
        w3[g] = p0;
    }
    for (int r = 3; r < Philox::rounds - 1; ++r) {
        const Wide k0 = S::wide(s.key0[r]), k1 = S::wide(s.key1[r]);
        for (int g = 0; g < Groups; ++g) {
            const Wide p0 = S::multiply(w0[g], m0), p1 = S::multiply(w2[g], m1);
            w0[g] = S::exclusive_or(S::high(p1), w1[g], k0);
            w2[g] = S::exclusive_or(S::high(p0), w3[g], k1);
            w1[g] = p1;
            w3[g] = p0;
        }
    }
    const Wide k0 = S::wide(s.key0[Philox::rounds - 1]), k1 = S::wide(s.key1[Philox::rounds - 1]);
    for (int g = 0; g < Groups; ++g) {
        const Wide p0 = S::multiply(w0[g], m0), p1 = S::multiply(w2[g], m1);
        S::store_blocks(out + g * 4 * blocks, S::join(p1, w1[g], k0), S::join(p0, w3[g], k1));
    }
}

// Words of blocks [block, block + count) and up to lanes / 2 - 1 blocks more.
template <class S>
inline void philox_words(const Schedule& s, uint32_t block, uint32_t count, uint32_t* out) {
    constexpr uint32_t one = S::lanes / 2, many = one * S::philox_groups;
    uint32_t done = 0;
    for (; done + many <= count; done += many) philox_groups<S, S::philox_groups>(s, block + done, out + 4 * done);
    for (; done < count; done += one) philox_groups<S, 1>(s, block + done, out + 4 * done);
}

// `uniform` gives u's factor 2^-24 to the scale, which is exact but for a tiny one.
enum class Transform { uniform, tiny_uniform, normal, symmetric, truncated };

inline bool is_tiny(float scale) { return (bits_of(scale) >> 23 & 255) <= 24; }

template <class S>
struct Constants {
    typename S::Float location, scale;
    typename S::Table table;
    typename S::Int threshold;
    typename S::Float tail_scale[2], tail_offset[2], tail_low[2], tail_high[2];  // positive, negative
};

template <class S, Transform T>
inline Constants<S> make_constants(const Distribution& d) {
    Constants<S> c;
    c.location = S::set(d.location);
    c.scale = S::set(T == Transform::uniform ? d.scale * 0x1p-24f : d.scale);
    c.table = S::load_table();
    c.threshold = S::set(static_cast<uint32_t>(d.threshold));
    const TailMap* const sides[2] = {&d.positive, &d.negative};
    for (int i = 0; i < 2; ++i) {
        c.tail_scale[i] = S::set(sides[i]->scale);
        c.tail_offset[i] = S::set(sides[i]->offset);
        c.tail_low[i] = S::set(sides[i]->low);
        c.tail_high[i] = S::set(sides[i]->high);
    }
    return c;
}

// Always inlined: GCC takes the portable kernel's for too large, and a call passes its vectors through memory.
template <class S, Transform T>
[[gnu::always_inline]] inline typename S::Float transform(const Constants<S>& c, typename S::Int w) {
    using Float = typename S::Float;
    using Int = typename S::Int;
    if constexpr (T == Transform::uniform) {
        return S::fma(S::to_float_signed(S::template shift_right<8>(w)), c.scale, c.location);
    } else if constexpr (T == Transform::tiny_uniform) {
        const Float u = S::mul(S::to_float_signed(S::template shift_right<8>(w)), S::set(0x1p-24f));
        return S::fma(u, c.scale, c.location);
    } else if constexpr (T == Transform::normal) {
        const Int f = S::bits(S::to_float_signed(w));
        return S::fma(S::exclusive_or_sign(S::icdf(f, c.table), f), c.scale, c.location);
    } else if constexpr (T == Transform::symmetric) {
        const Float g = S::magnitude(S::to_float_signed(w));
        Float z = S::icdf(S::bits(S::fma(g, c.tail_scale[0], c.tail_offset[0])), c.table);
        z = S::at_most(S::at_least(z, c.tail_low[0]), c.tail_high[0]);
        return S::fma(S::exclusive_or_sign(z, w), c.scale, c.location);
    } else {
        const auto negative = S::less_signed(w, c.threshold);
        const Float g = S::to_float_unsigned(S::distance(w, c.threshold, negative));
        const Float f = S::fma(g, S::select(negative, c.tail_scale[1], c.tail_scale[0]),
                               S::select(negative, c.tail_offset[1], c.tail_offset[0]));
        Float z = S::icdf(S::bits(f), c.table);
        z = S::at_least(z, S::select(negative, c.tail_low[1], c.tail_low[0]));
        z = S::at_most(z, S::select(negative, c.tail_high[1], c.tail_high[0]));
        return S::fma(S::negate_where(negative, z), c.scale, c.location);
    }
}

template <class S, int count>
inline typename S::Float horner(const float (&c)[count], typename S::Float x) {
    auto y = S::set(c[count - 1]);
    FASTINIT_UNROLL
    for (int i = count - 2; i >= 0; --i) y = S::fma(y, x, S::set(c[i]));
    return y;
}

// Floats that are not negative compare as their bits do, NaN above them. Not inlined, so that the fills without this
// step are compiled as if there were none.
template <class S>
[[gnu::noinline]] typename S::Float erfinv(typename S::Float x) {
    using Float = typename S::Float;
    using Int = typename S::Int;
    static constexpr ErfinvPolynomials p = erfinv_polynomials();
    const Float magnitude = S::magnitude(x);
    const Int square = S::bits(S::fma(S::negate(magnitude), magnitude, S::set(1.0f)));
    const Int exponent = S::and_(S::sub(square, S::set(0x3F3504F3u)), S::set(0xFF800000u));
    const Float f = S::add(S::as_float(S::sub(square, exponent)), S::set(-1.0f));
    const Float v = S::fma(f, horner<S>(p.log2, f), S::mul(S::to_float_signed(exponent), S::set(-0x1p-23f)));
    const Float ratio = S::select(S::less_signed(S::bits(v), S::set(0x40E00000u)), horner<S>(p.near, v),
                                  horner<S>(p.far, S::add(v, S::set(-12.0f))));
    const Float edge = S::select(S::less_signed(S::bits(magnitude), S::set(0x3F800001u)),
                                 S::as_float(S::set(0x7F800000u)), S::as_float(S::set(quiet_nan)));
    return S::mul(S::select(S::less_signed(S::bits(magnitude), S::set(0x3F800000u)), ratio, edge), x);
}

template <class S>
inline void step_pair(const Steps& steps, typename S::Float& x, typename S::Float& y) {
    for (int i = 0; i < steps.count; ++i) {
        const auto a = S::set(steps.items[i].a), b = S::set(steps.items[i].b);
        switch (steps.items[i].op) {
            case StepOp::multiply: x = S::mul(x, a), y = S::mul(y, a); break;
            case StepOp::add: x = S::add(x, a), y = S::add(y, a); break;
            case StepOp::divide: x = S::div(x, a), y = S::div(y, a); break;
            case StepOp::erfinv: x = erfinv<S>(x), y = erfinv<S>(y); break;
            default: x = S::at_most(S::at_least(x, a), b), y = S::at_most(S::at_least(y, a), b);
        }
    }
    x = S::canonical(x);
    y = S::canonical(y);
}

template <class S, Transform T, bool with_steps, bool streaming, class Out>
inline void transform_pair(const Constants<S>& c, const Steps& steps, const uint32_t* words, Out* out) {
    typename S::Float x = transform<S, T>(c, S::load(words)), y = transform<S, T>(c, S::load(words + S::lanes));
    if constexpr (with_steps) step_pair<S>(steps, x, y);
    if constexpr (streaming)
        S::stream(out, x, y);
    else
        S::store(out, x, y);
}

inline uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

constexpr uint64_t chunk_elements = 2048;  // 8 KiB of words

// From here on a tensor is larger than the caches that one core has to itself: written past them, its lines need not be
// read first.
constexpr uint64_t streaming_bytes = uint64_t{16} << 20;

template <class S, Transform T, bool with_steps, class Out>
void generate_values(const Fill& fill, uint64_t index, uint64_t count, Out* out) {
    constexpr uint64_t pair = 2 * S::lanes;
    const Constants<S> constants = make_constants<S, T>(fill.values->distribution);
    const Steps& steps = fill.values->steps;
    // A chunk may start inside a block, and its last vectors are computed whole.
    alignas(64) uint32_t words[chunk_elements + 2 * pair];
    Schedule schedule{};
    uint64_t scheduled = ~uint64_t{0};
    const bool large = fill.elements() >= streaming_bytes / sizeof(Out);
    while (count > 0) {
        // A chunk ends where a block does, and before the block number's low word wraps.
        const uint64_t skip = index & 3, block = index >> 2;
        const uint64_t until_wrap = ((uint64_t{1} << 32) - (block & 0xFFFFFFFFu)) * 4 - skip;
        const uint64_t n = least(count, least(chunk_elements - skip, until_wrap));
        if (block >> 32 != scheduled) {
            scheduled = block >> 32;
            schedule = make_schedule(fill.values->seed, fill.stream, static_cast<uint32_t>(scheduled));
        }
        philox_words<S>(schedule, static_cast<uint32_t>(block), static_cast<uint32_t>((skip + n + 3) / 4), words);
        const uint32_t* const first = words + skip;
        uint64_t done = 0;
        if (large && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
            for (; done + pair <= n; done += pair)
                transform_pair<S, T, with_steps, true>(constants, steps, first + done, out + done);
        }  // the rest is less than a pair
        for (; done + pair <= n; done += pair)
            transform_pair<S, T, with_steps, false>(constants, steps, first + done, out + done);
        if (done < n) {
            Out last[pair];
            transform_pair<S, T, with_steps, false>(constants, steps, first + done, last);
            std::memcpy(out + done, last, (n - done) * sizeof(Out));
        }
        index += n;
        out += n;
        count -= n;
    }
    if (large) S::finish_streams();
}

template <class S, class Out>
void generate_constant(const Fill& fill, uint64_t count, Out* out) {
    const float value = apply_steps(fill.values->steps, fill.values->distribution.location);
    Out pattern[2 * S::lanes];
    S::store(pattern, S::set(value), S::set(value));
    uint64_t done = 0;
    for (; done + 2 * S::lanes <= count; done += 2 * S::lanes) std::memcpy(out + done, pattern, sizeof pattern);
    std::memcpy(out + done, pattern, (count - done) * sizeof(Out));
}

template <class S, Transform T, class Out>
void generate_steps(const Fill& fill, uint64_t index, uint64_t count, Out* out) {
    if (fill.values->steps.count == 0)
        generate_values<S, T, false>(fill, index, count, out);
    else
        generate_values<S, T, true>(fill, index, count, out);
}

template <class S, class Out>
void generate_kind(const Fill& fill, uint64_t index, uint64_t count, Out* out) {
    const Distribution& distribution = fill.values->distribution;
    switch (distribution.kind) {
        case Kind::uniform:
            if (is_tiny(distribution.scale)) return generate_steps<S, Transform::tiny_uniform>(fill, index, count, out);
            return generate_steps<S, Transform::uniform>(fill, index, count, out);
        case Kind::normal: return generate_steps<S, Transform::normal>(fill, index, count, out);
        case Kind::truncated_normal:
            if (distribution.symmetric) return generate_steps<S, Transform::symmetric>(fill, index, count, out);
            return generate_steps<S, Transform::truncated>(fill, index, count, out);
        default: return generate_constant<S>(fill, count, out);
    }
}

template <class S>
void generate(const Fill& fill, uint64_t index, uint64_t count, void* out) noexcept {
    switch (fill.values->dtype) {
        case Dtype::float32: return generate_kind<S>(fill, index, count, static_cast<float*>(out));
        case Dtype::float16: return generate_kind<S>(fill, index, count, static_cast<Half*>(out));
        default: return generate_kind<S>(fill, index, count, static_cast<BFloat*>(out));
    }
}

// Takes the floats at `data` through a step of erfinv.
template <class S>
void erfinv_all(void* data, uint64_t count) noexcept {
    constexpr uint64_t pair = 2 * S::lanes;
    const Steps steps{1, {{StepOp::erfinv, 0.0f, 0.0f}}};
    for (char* at = static_cast<char*>(data); count > 0;) {
        const uint64_t n = least(count, pair);
        uint32_t bits[pair] = {};
        float out[pair];
        std::memcpy(bits, at, n * sizeof(float));
        auto x = S::as_float(S::load(bits)), y = S::as_float(S::load(bits + S::lanes));
        step_pair<S>(steps, x, y);
        S::store(out, x, y);
        std::memcpy(at, out, n * sizeof(float));
        at += n * sizeof(float);
        count -= n;
    }
}

}  // namespace
}  // namespace fastinit
