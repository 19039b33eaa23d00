// The kernel's vocabulary in AVX-512 (F, BW, DQ, VL): 16 lanes.
#pragma once

#include <immintrin.h>

#include "../distributions.h"

namespace fastinit {
namespace {

// The 64 rows of exponents 150 to 157, |f| from 2^23 to 2^31, which serve 255 of 256 elements of a normal, by
// coefficient. A row's low five bits are its place and its sixth bit says in which half it is: even holds rows 192 to
// 223, odd rows 224 to 239 and 176 to 191.
struct LikelyRows {
    alignas(64) float even[4][32], odd[4][32];
};

constexpr LikelyRows make_likely_rows() {
    LikelyRows likely{};
    for (int c = 0; c < 4; ++c) {
        for (int i = 0; i < 32; ++i) {
            likely.even[c][i] = normal_table.rows[192 + i][c];
            likely.odd[c][i] = normal_table.rows[i < 16 ? 224 + i : 160 + i][c];
        }
    }
    return likely;
}

constexpr LikelyRows likely_rows = make_likely_rows();

struct Avx512 {
    static constexpr int lanes = 16;
    static constexpr int philox_groups = 6;

    using Int = __m512i;
    using Float = __m512;
    using Wide = __m512i;
    using Mask = __mmask16;

    static Wide wide(uint64_t x) { return _mm512_set1_epi64(x); }
    // Lanes hold blocks 0, 4, 1, 5, 2, 6, 3, 7 of the group, which is where store_blocks' unpacking leaves them in
    // order.
    static Wide counters(uint32_t block) {
        return _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
    }
    static Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
    // A shuffle and not a shift: it leaves the multiplications' port alone. What it puts in the high half does not
    // matter.
    static Wide high(Wide a) { return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0xF5)); }
    static Wide exclusive_or(Wide a, Wide b) { return _mm512_xor_si512(a, b); }
    static Wide exclusive_or(Wide a, Wide b, Wide c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
    // Low half: high half of the product ^ word ^ key. High half: low half of the product.
    static Wide join(Wide product, Wide word, Wide key) {
        return _mm512_mask_ternarylogic_epi32(_mm512_rol_epi64(product, 32), 0x5555, word, key, 0x96);
    }
    static void store_blocks(uint32_t* out, Wide word01, Wide word23) {
        _mm512_storeu_si512(out, _mm512_unpacklo_epi64(word01, word23));
        _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(word01, word23));
    }

    static Int load(const uint32_t* p) { return _mm512_loadu_si512(p); }
    static Int set(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static Float set(float x) { return _mm512_set1_ps(x); }
    template <int count>
    static Int shift_right(Int a) {
        return _mm512_srli_epi32(a, count);
    }
    static Int and_(Int a, Int b) { return _mm512_and_si512(a, b); }
    static Int sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    static Float as_float(Int a) { return _mm512_castsi512_ps(a); }
    static Int bits(Float x) { return _mm512_castps_si512(x); }
    static Float to_float_signed(Int a) { return _mm512_cvtepi32_ps(a); }
    static Float to_float_unsigned(Int a) { return _mm512_cvtepu32_ps(a); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
    // maxps and minps return the second operand if one is NaN or both are zero.
    static Float at_least(Float x, Float low) { return _mm512_max_ps(low, x); }
    static Float at_most(Float x, Float high) { return _mm512_min_ps(high, x); }
    static Float canonical(Float x) {
        return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_castsi512_ps(set(quiet_nan)));
    }
    static Float magnitude(Float x) { return _mm512_castsi512_ps(_mm512_and_si512(bits(x), set(~sign_bit))); }
    static Float negate(Float x) { return _mm512_castsi512_ps(_mm512_xor_si512(bits(x), set(sign_bit))); }
    static Float exclusive_or_sign(Float x, Int a) {
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits(x), a, set(sign_bit), 0x78));  // x ^ (a & sign)
    }
    static Mask less_signed(Int a, Int b) { return _mm512_cmplt_epi32_mask(a, b); }
    static Int distance(Int a, Int b, Mask a_is_less) {
        return _mm512_mask_sub_epi32(_mm512_sub_epi32(a, b), a_is_less, b, a);
    }
    static Float select(Mask m, Float yes, Float no) { return _mm512_mask_blend_ps(m, no, yes); }
    static Float negate_where(Mask m, Float x) {
        return _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits(x), m, bits(x), set(sign_bit)));
    }

    // One coefficient of the table's likely rows to four registers.
    struct Table {
        Float even[4][2], odd[4][2];
    };
    static Table load_table() {
        Table table;
        for (int c = 0; c < 4; ++c) {
            for (int half = 0; half < 2; ++half) {
                table.even[c][half] = _mm512_load_ps(likely_rows.even[c] + 16 * half);
                table.odd[c][half] = _mm512_load_ps(likely_rows.odd[c] + 16 * half);
            }
        }
        return table;
    }
    static Float icdf(Int f, const Table& table) {
        const Int row = _mm512_srli_epi32(f, 20);  // the permutations read its low five bits only
        const Mask odd = _mm512_test_epi32_mask(f, set(1u << 25));
        const auto coefficient = [&](int c) {
            return _mm512_mask_blend_ps(odd, _mm512_permutex2var_ps(table.even[c][0], row, table.even[c][1]),
                                        _mm512_permutex2var_ps(table.odd[c][0], row, table.odd[c][1]));
        };
        Float c0 = coefficient(0), c1 = coefficient(1), c2 = coefficient(2), c3 = coefficient(3);
        // Lanes of other exponents, one vector in sixteen: exponent - 150 has bits above the lowest three.
        unsigned rare = _mm512_test_epi32_mask(_mm512_sub_epi32(f, set(150u << 23)), set(0x7C000000u));
        if (__builtin_expect(rare != 0, 0)) {
            alignas(64) uint32_t lanes_of_f[lanes];
            _mm512_store_si512(lanes_of_f, f);
            do {
                const float* const c = normal_table.rows[(lanes_of_f[__builtin_ctz(rare)] >> 20) & 255];
                const Mask lane = static_cast<Mask>(rare & -rare);
                c0 = _mm512_mask_mov_ps(c0, lane, set(c[0]));
                c1 = _mm512_mask_mov_ps(c1, lane, set(c[1]));
                c2 = _mm512_mask_mov_ps(c2, lane, set(c[2]));
                c3 = _mm512_mask_mov_ps(c3, lane, set(c[3]));
                rare &= rare - 1;
            } while (rare != 0);
        }
        const Int mantissa = _mm512_ternarylogic_epi32(f, set(0x000FFFFFu), set(0x3F800000u), 0xEA);  // (f & a) | b
        const Float t = _mm512_add_ps(_mm512_castsi512_ps(mantissa), set(-1.0625f));
        return fma(fma(fma(c3, t, c2), t, c1), t, c0);
    }

    static void store(float* out, Float x, Float y) {
        _mm512_storeu_ps(out, x);
        _mm512_storeu_ps(out + lanes, y);
    }
    static void stream(float* out, Float x, Float y) {
        _mm512_stream_ps(out, x);
        _mm512_stream_ps(out + lanes, y);
    }
    static void finish_streams() { _mm_sfence(); }
    static __m256i half(Float x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static void store(Half* out, Float x, Float y) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half(x));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + lanes), half(y));
    }
    static void stream(Half* out, Float x, Float y) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out), half(x));
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + lanes), half(y));
    }
    static void store(BFloat* out, Float x, Float y) { _mm512_storeu_si512(out, bfloats(x, y)); }
    static void stream(BFloat* out, Float x, Float y) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out), bfloats(x, y));
    }
    // vcvtne2ps2bf16 would flush subnormals, so the rounding is done on integers; then the upper halves are collected.
    static Int bfloats(Float x, Float y) {
        const auto rounded = [](Float v) {
            const Int b = bits(v);
            const Mask odd = _mm512_test_epi32_mask(b, set(0x10000u));
            const Int sum = _mm512_add_epi32(b, set(0x7FFFu));
            return _mm512_mask_add_epi32(sum, odd, sum, set(1u));
        };
        alignas(64) static constexpr uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                           23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                           45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
        return _mm512_permutex2var_epi16(rounded(x), _mm512_load_si512(upper), rounded(y));
    }
};

}  // namespace
}  // namespace fastinit
