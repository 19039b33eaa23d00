// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11), and how stream v1
// addresses it. This header is where key order, counter layout and word order are specified:
//
//     key     = (seed low, seed high)
//     counter = (block low, block high, stream low, stream high),   block = element index >> 2
//     element i takes word i & 3 of its block's output
//
// Seed, stream and element index are unsigned 64-bit. A tensor never has more than 2^63 elements, so a block number
// needs 62 bits and distinct elements of a stream never share a word.
#pragma once

#include <cstdint>

// static: the CPU kernels compile these functions once per instruction set, and a linker that merged the copies could
// put AVX-512 code on the portable path.
#if defined(__CUDACC__)
#define FASTINIT_HOST_DEVICE static __host__ __device__ __forceinline__
#define FASTINIT_UNROLL _Pragma("unroll")
#else
#define FASTINIT_HOST_DEVICE static inline
#define FASTINIT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fastinit {

struct Philox {
    static constexpr int rounds = 10;
    static constexpr uint32_t multiplier0 = 0xD2511F53u;
    static constexpr uint32_t multiplier1 = 0xCD9E8D57u;
    static constexpr uint32_t key_step0 = 0x9E3779B9u;  // golden ratio
    static constexpr uint32_t key_step1 = 0xBB67AE85u;  // sqrt(3) - 1
};

struct Words {
    uint32_t w[4];
};

FASTINIT_HOST_DEVICE Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
    // Not unrolled, this loop keeps one over blocks around it from being turned into vectors.
    FASTINIT_UNROLL
    for (int round = 0; round < Philox::rounds; ++round) {
        const uint64_t p0 = uint64_t{Philox::multiplier0} * counter.w[0];
        const uint64_t p1 = uint64_t{Philox::multiplier1} * counter.w[2];
        counter = Words{{static_cast<uint32_t>(p1 >> 32) ^ counter.w[1] ^ key0, static_cast<uint32_t>(p1),
                         static_cast<uint32_t>(p0 >> 32) ^ counter.w[3] ^ key1, static_cast<uint32_t>(p0)}};
        key0 += Philox::key_step0;
        key1 += Philox::key_step1;
    }
    return counter;
}

FASTINIT_HOST_DEVICE Words block_words(uint64_t seed, uint64_t stream, uint64_t block) {
    return philox4x32(Words{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                             static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)}},
                      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

FASTINIT_HOST_DEVICE uint32_t element_word(uint64_t seed, uint64_t stream, uint64_t index) {
    return block_words(seed, stream, index >> 2).w[index & 3];
}

}  // namespace fastinit
