// The kernel's vocabulary in AVX2, FMA and F16C: 8 lanes.
#pragma once

#include <immintrin.h>

#include "../distributions.h"

namespace fastinit {
namespace {

struct Avx2 {
    static constexpr int lanes = 8;
    static constexpr int philox_groups = 3;  // measured: the spills of the third chain cost less than it hides

    using Int = __m256i;
    using Float = __m256;
    using Wide = __m256i;
    using Mask = __m256i;  // lanes of all ones or all zeros
    struct Table {};

    static Wide wide(uint64_t x) { return _mm256_set1_epi64x(x); }
    // Lanes hold blocks 0, 2, 1, 3 of the group, which is where store_blocks' unpacking leaves them in order.
    static Wide counters(uint32_t block) {
        return _mm256_add_epi64(_mm256_set1_epi64x(block), _mm256_set_epi64x(3, 1, 2, 0));
    }
    static Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
    static Wide high(Wide a) { return _mm256_srli_epi64(a, 32); }
    static Wide exclusive_or(Wide a, Wide b) { return _mm256_xor_si256(a, b); }
    static Wide exclusive_or(Wide a, Wide b, Wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, c), b); }
    // Low half: high half of the product ^ word ^ key. High half: low half of the product.
    static Wide join(Wide product, Wide word, Wide key) {
        const Wide swapped = _mm256_shuffle_epi32(product, 0xB1);
        return _mm256_blend_epi32(exclusive_or(swapped, word, key), swapped, 0xAA);
    }
    static void store_blocks(uint32_t* out, Wide word01, Wide word23) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(word01, word23));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(word01, word23));
    }

    static Int load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Int set(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
    static Float set(float x) { return _mm256_set1_ps(x); }
    template <int count>
    static Int shift_right(Int a) {
        return _mm256_srli_epi32(a, count);
    }
    static Int and_(Int a, Int b) { return _mm256_and_si256(a, b); }
    static Int sub(Int a, Int b) { return _mm256_sub_epi32(a, b); }
    static Float as_float(Int a) { return _mm256_castsi256_ps(a); }
    static Int bits(Float x) { return _mm256_castps_si256(x); }
    static Float to_float_signed(Int a) { return _mm256_cvtepi32_ps(a); }
    // high * 2^16 + low: the product is exact, so the fused operation rounds once.
    static Float to_float_unsigned(Int a) {
        const Float low = _mm256_cvtepi32_ps(_mm256_and_si256(a, set(0xFFFFu)));
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(a, 16)), set(65536.0f), low);
    }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
    // maxps and minps return the second operand if one is NaN or both are zero.
    static Float at_least(Float x, Float low) { return _mm256_max_ps(low, x); }
    static Float at_most(Float x, Float high) { return _mm256_min_ps(high, x); }
    static Float canonical(Float x) {
        return _mm256_blendv_ps(x, _mm256_castsi256_ps(set(quiet_nan)), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }
    static Float sign() { return _mm256_castsi256_ps(set(sign_bit)); }
    static Float magnitude(Float x) { return _mm256_andnot_ps(sign(), x); }
    static Float negate(Float x) { return _mm256_xor_ps(x, sign()); }
    static Float exclusive_or_sign(Float x, Int a) {
        return _mm256_xor_ps(x, _mm256_and_ps(_mm256_castsi256_ps(a), sign()));
    }
    static Mask less_signed(Int a, Int b) { return _mm256_cmpgt_epi32(b, a); }
    static Int distance(Int a, Int b, Mask a_is_less) {
        return _mm256_sub_epi32(_mm256_xor_si256(_mm256_sub_epi32(a, b), a_is_less), a_is_less);
    }
    static Float select(Mask m, Float yes, Float no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)); }
    static Float negate_where(Mask m, Float x) { return exclusive_or_sign(x, m); }

    static Table load_table() { return {}; }
    // Rows are loaded whole and transposed: 8 loads of 16 bytes instead of 4 gathers of 8 elements, which cost several
    // times as much on every processor so far.
    static Float icdf(Int f, Table) {
        alignas(32) uint32_t at[lanes];  // byte offsets of the rows
        _mm256_store_si256(reinterpret_cast<__m256i*>(at), _mm256_and_si256(_mm256_srli_epi32(f, 16), set(0xFF0u)));
        const auto row = [&](int lane) {
            return _mm_load_ps(
                // cppcheck-suppress invalidPointerCast; the offset is that of a float
                reinterpret_cast<const float*>(reinterpret_cast<const char*>(normal_table.rows) + at[lane]));
        };
        const auto rows = [&](int lane) {
            return _mm256_insertf128_ps(_mm256_castps128_ps256(row(lane)), row(lane + 4), 1);
        };
        const Float r0 = rows(0), r1 = rows(1), r2 = rows(2), r3 = rows(3);
        const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1)),
                      low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
        const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1)),
                      high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
        const Float c0 = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)),
                    c1 = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
        const Float c2 = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)),
                    c3 = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
        const Int mantissa = _mm256_or_si256(_mm256_and_si256(f, set(0x000FFFFFu)), set(0x3F800000u));
        const Float t = _mm256_add_ps(_mm256_castsi256_ps(mantissa), set(-1.0625f));
        return fma(fma(fma(c3, t, c2), t, c1), t, c0);
    }

    static void store(float* out, Float x, Float y) {
        _mm256_storeu_ps(out, x);
        _mm256_storeu_ps(out + lanes, y);
    }
    static void stream(float* out, Float x, Float y) {
        _mm256_stream_ps(out, x);
        _mm256_stream_ps(out + lanes, y);
    }
    static void finish_streams() { _mm_sfence(); }
    template <class Out>
    static void store(Out* out, Float x, Float y) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), round(x, y, Out{}));
    }
    template <class Out>
    static void stream(Out* out, Float x, Float y) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out), round(x, y, Out{}));
    }
    static Int round(Float x, Float y, Half) {
        return _mm256_set_m128i(_mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                                _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static Int round(Float x, Float y, BFloat) {
        const auto one = [](Float v) {
            const Int b = _mm256_castps_si256(v);
            const Int odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), set(1u));
            return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, set(0x7FFFu)), odd), 16);
        };
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(one(x), one(y)), 0xD8);
    }
};

}  // namespace
}  // namespace fastinit
