// The float environment of a fill: round to nearest even, subnormals kept, whatever the host program has set on this
// thread (torch.set_flush_denormal, a -ffast-math library's start-up code). Restored at the end of the scope.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastinit {

class FloatEnvironment {
public:
    FloatEnvironment() : saved_(read()) { write(standard); }
    ~FloatEnvironment() { write(saved_); }
    FloatEnvironment(const FloatEnvironment&) = delete;
    FloatEnvironment& operator=(const FloatEnvironment&) = delete;

private:
#if defined(__x86_64__)
    static constexpr uint64_t standard = 0x1F80;  // MXCSR at reset: every exception masked
    static uint64_t read() { return _mm_getcsr(); }
    static void write(uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
#elif defined(__aarch64__)
    static constexpr uint64_t standard = 0;  // FPCR at reset
    static uint64_t read() {
        uint64_t value;
        asm volatile("mrs %0, fpcr" : "=r"(value));
        return value;
    }
    static void write(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#else
    static constexpr uint64_t standard = 0;
    static uint64_t read() { return 0; }
    static void write(uint64_t) {}
#endif
    uint64_t saved_;
};

}  // namespace fastinit
