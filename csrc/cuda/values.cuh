// Stream v1 on the device: from Philox blocks to values, and to the 16 bytes of a slot.
//
// The bits are those of distributions.h. Compile with -fmad=false and without --use_fast_math or --ftz=true: every
// operation is an explicit round-to-nearest intrinsic or exact.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace fastinit::cuda {
namespace {

__device__ constexpr NormalTable device_table = normal_table;

// The table has to be read 16 bytes at once, one row per element. Eight copies, side by side: threads 0 to 7 of a
// quarter warp, which the hardware serves together, read copies 0 to 7, each in its own banks.
constexpr uint32_t kTableRows = 256;
constexpr uint32_t kCopies = 8;

// See kCentre.
template <Form kForm>
constexpr bool kCentred = kForm == Form::normal || kForm == Form::symmetric || kForm == Form::lopsided;

// A row for the variable 2^e t, where 2^e is f's octave: exactly the same polynomial. The row of |f| = 1 and that of
// 2 <= |f| < 2.25 become constants for a normal, whose f is an integer and which meets them nowhere but at their left
// ends, t = -1/16, and, the latter, at f = 0, which has the value of 2: with a constant, icdf may get t wrong there.
template <Form kForm>
__device__ __forceinline__ float4 centred(float4 c, uint32_t row) {
    if (kForm == Form::normal && (row == 0 || row == 248)) {
        constexpr float t = -0.0625f;
        return make_float4(__fmaf_rn(__fmaf_rn(__fmaf_rn(c.w, t, c.z), t, c.y), t, c.x), 0.0f, 0.0f, 0.0f);
    }
    const uint32_t octave = ((row >> 3) + 1) & 31;
    const float scale = __uint_as_float((127 - octave) << 23);
    c.y = __fmul_rn(c.y, scale);
    c.z = __fmul_rn(__fmul_rn(c.z, scale), scale);
    c.w = __fmul_rn(__fmul_rn(__fmul_rn(c.w, scale), scale), scale);
    return c;
}

// The calling thread's copy. Each row is read from memory once: a small launch waits for little else.
template <Form kForm>
__device__ __forceinline__ const float4* load_rows(float4* rows) {
    for (uint32_t row = threadIdx.x; row < kTableRows; row += blockDim.x) {
        float4 c = *reinterpret_cast<const float4*>(device_table.rows[row]);
        if constexpr (kCentred<kForm>) c = centred<kForm>(c, row);
#pragma unroll
        for (uint32_t i = 0; i < kCopies; ++i) rows[row * kCopies + (row + i) % kCopies] = c;  // each in other banks
    }
    __syncthreads();
    return rows + threadIdx.x % kCopies;
}

template <Form kForm>
constexpr bool kTabulated = kForm != Form::constant && kForm != Form::uniform;

// What rounds 1 and 2 of Philox make of everything but the low word of the block, which is all that changes between
// the blocks of an entry: two of the twenty multiplications, the scarce operation, are done once per run.
struct PhiloxRun {
    uint32_t x, z, w, z_first;
};

__device__ __forceinline__ PhiloxRun philox_run(const Shared& s, uint32_t stream) {
    const uint64_t p1 = uint64_t{Philox::multiplier1} * stream;
    const uint32_t x1 = static_cast<uint32_t>(p1 >> 32) ^ s.origin.block_high ^ s.key0[0];
    const uint64_t p0 = uint64_t{Philox::multiplier0} * x1;
    return PhiloxRun{static_cast<uint32_t>(p1) ^ s.key0[1], static_cast<uint32_t>(p0 >> 32) ^ s.key1[1],
                     static_cast<uint32_t>(p0), s.origin.stream_high ^ s.key1[0]};
}

__device__ __forceinline__ void philox_rounds(const Shared& s, int from, uint32_t (&c)[4]) {
#pragma unroll
    for (int round = from; round < Philox::rounds; ++round) {
        const uint64_t p0 = uint64_t{Philox::multiplier0} * c[0];
        const uint64_t p1 = uint64_t{Philox::multiplier1} * c[2];
        c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ s.key0[round];
        c[1] = static_cast<uint32_t>(p1);
        c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ s.key1[round];
        c[3] = static_cast<uint32_t>(p0);
    }
}

__device__ __forceinline__ void philox_block(const Shared& s, const PhiloxRun& run, uint32_t block, uint32_t (&c)[4]) {
    const uint64_t p0 = uint64_t{Philox::multiplier0} * block;
    const uint64_t p1 = uint64_t{Philox::multiplier1} * (static_cast<uint32_t>(p0 >> 32) ^ run.z_first);
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ run.x;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0) ^ run.z;
    c[3] = run.w;
    philox_rounds(s, 2, c);
}

__device__ __forceinline__ float polynomial(float4 c, float t) {
    return __fmaf_rn(__fmaf_rn(__fmaf_rn(c.w, t, c.z), t, c.y), t, c.x);
}

// normal_icdf. In the centred form, f's distance from the centre of its cell, 2^e t, is one subtraction from |f|, and
// the centre's bits are the row's offset as well. For f = 0 and |f| = 1 it would be the centre of another octave: their
// row is right and its polynomial a constant. `centre` is kCentre in a register: as an immediate it would cost a second
// instruction beside the mask.
template <Form kForm>
__device__ __forceinline__ float icdf(float f, const float4* rows, uint32_t centre) {
    const uint32_t bits = __float_as_uint(f);
    if constexpr (kCentred<kForm>) {
        const uint32_t middle = (bits & 0x0FF00000u) | centre;
        const char* const row = reinterpret_cast<const char*>(rows) - (kCentre >> 13) + (middle >> 13);
        return polynomial(*reinterpret_cast<const float4*>(row), __fadd_rn(fabsf(f), -__uint_as_float(middle)));
    } else {
        const uint32_t offset = (bits & 0x0FF00000u) >> 13;  // a row's copies are 128 bytes
        const char* const row = reinterpret_cast<const char*>(rows) + offset;
        const float t = __fadd_rn(__uint_as_float((bits & 0x000FFFFFu) | 0x3F800000u), -1.0625f);
        return polynomial(*reinterpret_cast<const float4*>(row), t);
    }
}

__device__ __forceinline__ float with_sign_of(float x, uint32_t sign) {
    return __uint_as_float(__float_as_uint(x) ^ (sign & sign_bit));
}

// kPlain: fills that the launcher has chosen. A uniform's scale has u's factor 2^-24,
// exactly. A truncated normal meets no NaN, and zeros of unlike sign nowhere: no z is -0 and no bound `high` is a
// zero. So fmaxf is at_least and fminf is at_most.
template <Form kForm, bool kPlain>
__device__ __forceinline__ float value(const Distribution& d, uint32_t centre, uint32_t w, const float4* rows) {
    if constexpr (kForm == Form::constant) {
        return d.location;
    } else if constexpr (kForm == Form::uniform) {
        if constexpr (kPlain) return __fmaf_rn(__uint2float_rn(w >> 8), d.scale, d.location);
        return uniform_value(d, w);
    } else if constexpr (kForm == Form::normal) {
        const float f = __int2float_rn(static_cast<int32_t>(w));
        return __fmaf_rn(with_sign_of(icdf<kForm>(f, rows, centre), __float_as_uint(f)), d.scale, d.location);
    } else if constexpr (kForm == Form::symmetric) {
        const float g = __int2float_rn(static_cast<int32_t>(w));
        const float f = __fmaf_rn(fabsf(g), d.positive.scale, d.positive.offset);
        const float z = fminf(icdf<kForm>(f, rows, centre), d.positive.high);
        return __fmaf_rn(with_sign_of(z, __float_as_uint(g)), d.scale, d.location);
    } else if constexpr (kForm == Form::lopsided) {
        // Either side's operation under a predicate: a choice of operands takes an instruction for each operand.
        const bool negative = static_cast<int32_t>(w) < d.threshold;
        const float g = __uint2float_rn(__sad(static_cast<int32_t>(w), d.threshold, 0u));
        const float f = negative ? __fmaf_rn(g, d.negative.scale, d.negative.offset)
                                 : __fmaf_rn(g, d.positive.scale, d.positive.offset);
        const float z = icdf<kForm>(f, rows, centre);
        return __fmaf_rn(negative ? fmaxf(-z, -d.negative.high) : fminf(z, d.positive.high), d.scale, d.location);
    } else {
        const bool negative = static_cast<int32_t>(w) < d.threshold;
        const uint32_t k = w - static_cast<uint32_t>(d.threshold);
        const float g = __uint2float_rn(negative ? 0u - k : k);
        const float f = __fmaf_rn(g, negative ? d.negative.scale : d.positive.scale,
                                  negative ? d.negative.offset : d.positive.offset);
        float z = icdf<kForm>(f, rows, centre);
        const float low = negative ? d.negative.low : d.positive.low;
        const float high = negative ? d.negative.high : d.positive.high;
        z = kPlain ? fminf(fmaxf(z, low), high) : at_most(at_least(z, low), high);
        return __fmaf_rn(negative ? -z : z, d.scale, d.location);
    }
}

// Step by step rather than element by element: the choice of operation is uniform. kErfinv: erfinv may be among them,
// which has kernels of its own, since its code in the loop costs all other steps 2 to 8 %.
template <bool kErfinv, int kCount>
__device__ __forceinline__ void apply_steps(const Steps& steps, float (&x)[kCount]) {
#pragma unroll 1
    for (int i = 0; i < steps.count; ++i) {
        const Step& step = steps.items[i];
        const float a = step.a;
        if constexpr (kErfinv) {
            if (step.op == StepOp::erfinv) {
#pragma unroll
                for (float& v : x) v = erfinv(v);
                continue;
            }
        }
        switch (step.op) {
            case StepOp::multiply:
#pragma unroll
                for (float& v : x) v = __fmul_rn(v, a);
                break;
            case StepOp::add:
#pragma unroll
                for (float& v : x) v = __fadd_rn(v, a);
                break;
            case StepOp::divide:
#pragma unroll
                for (float& v : x) v = __fdiv_rn(v, a);
                break;
            default:
#pragma unroll
                for (float& v : x) v = at_most(at_least(v, a), step.b);
        }
    }
}

template <int kCount>
__device__ __forceinline__ void apply_affine(const Affine& affine, float (&x)[kCount]) {
#pragma unroll
    for (float& v : x) v = __fadd_rn(__fmul_rn(v, affine.multiply), affine.add);
}

// One slot: kLanes elements in the 16 bytes of one store.
template <Dtype kDtype>
struct Slot {
    static constexpr int kItemSize = kDtype == Dtype::float32 ? 4 : 2;
    static constexpr int kLanes = 16 / kItemSize;
    static constexpr int kBlocks = kLanes / 4;
    uint32_t word[4];

    // No NaN among them.
    __device__ __forceinline__ void set(const float (&x)[kLanes]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (kDtype == Dtype::float32) {
                word[i] = __float_as_uint(x[i]);
            } else {
                word[i] = pair(x[2 * i], x[2 * i + 1]);
            }
        }
    }

    // The same with every NaN as quiet_nan: the hardware's conversions give another.
    __device__ __forceinline__ void set_canonical(const float (&x)[kLanes]) {
        set(x);
        constexpr uint32_t nan = kDtype == Dtype::float32 ? quiet_nan : kDtype == Dtype::float16 ? 0x7E00u : 0x7FC0u;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            if (x[i] == x[i]) continue;
            if constexpr (kDtype == Dtype::float32) {
                word[i] = nan;
            } else {
                uint32_t& w = word[i / 2];
                w = i & 1 ? (w & 0x0000FFFFu) | nan << 16 : (w & 0xFFFF0000u) | nan;
            }
        }
    }

    // Moves the elements down by `phase`, 0 to 3, and takes in the first ones of the next thread's slot.
    // Every thread of the warp must call this; the last one's slot is spoilt.
    __device__ __forceinline__ void shift(uint32_t phase) {
        uint32_t w[7];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = word[i];
        constexpr int kNext = kDtype == Dtype::float32 ? 3 : 2;
#pragma unroll
        for (int i = 0; i < kNext; ++i) w[4 + i] = __shfl_down_sync(0xFFFFFFFFu, word[i], 1);
        if constexpr (kDtype == Dtype::float32) {
            if (phase & 2u) {
#pragma unroll
                for (int i = 0; i < 5; ++i) w[i] = w[i + 2];
            }
            if (phase & 1u) {
#pragma unroll
                for (int i = 0; i < 4; ++i) w[i] = w[i + 1];
            }
        } else {
            if (phase & 2u) {
#pragma unroll
                for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
            }
            if (phase & 1u) {
#pragma unroll
                for (int i = 0; i < 4; ++i) w[i] = __funnelshift_r(w[i], w[i + 1], 16);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = w[i];
    }

    __device__ __forceinline__ void set_constant(const Shared& shared) {
        float value[1] = {shared.distribution.location};
        apply_steps<true>(shared.steps, value);
        float x[kLanes];
#pragma unroll
        for (float& v : x) v = value[0];
        set_canonical(x);
    }

    __device__ __forceinline__ void store(char* address) const {
        *reinterpret_cast<uint4*>(address) = make_uint4(word[0], word[1], word[2], word[3]);
    }

    // The elements whose bits are set in `which`, each by itself.
    __device__ __forceinline__ void store_elements(char* address, uint32_t which) const {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
            if (!(which >> i & 1u)) continue;
            if constexpr (kDtype == Dtype::float32) {
                reinterpret_cast<uint32_t*>(address)[i] = word[i];
            } else {
                reinterpret_cast<uint16_t*>(address)[i] = static_cast<uint16_t>(word[i / 2] >> (16 * (i & 1)));
            }
        }
    }

private:
    static __device__ __forceinline__ uint32_t pair(float low, float high) {
        uint32_t bits;
        if constexpr (kDtype == Dtype::float16) {
            const __half2 h = __floats2half2_rn(low, high);
            memcpy(&bits, &h, sizeof bits);
        } else {
            const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
            memcpy(&bits, &h, sizeof bits);
        }
        return bits;
    }
};

}  // namespace
}  // namespace fastinit::cuda
