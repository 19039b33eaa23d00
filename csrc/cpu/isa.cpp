// Run-time choice of the CPU kernel.
#include "isa.h"

#include <cstdlib>

#include "../validation.h"

#if defined(FASTINIT_X86)
#include <cpuid.h>
#endif

namespace fastinit {

extern const Kernel portable_kernel;
#if defined(FASTINIT_X86)
extern const Kernel avx2_kernel;
extern const Kernel avx512_kernel;

namespace {

struct X86Features {
    bool avx2, avx512;  // as the kernels of that name need them
};

// Not by __builtin_cpu_supports: it reads what a compiler's run-time library has found out, and not every compiler
// links one that does (zig's says no to everything). Bits: Intel's Software Developer's Manual, CPUID leaves 1 and 7,
// XCR0.
X86Features read_x86_features() {
    unsigned a, b, c, d, b7, c7;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
    constexpr unsigned fma = 1u << 12, osxsave = 1u << 27, f16c = 1u << 29, leaf1 = fma | osxsave | f16c;
    if ((c & leaf1) != leaf1 || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d)) return {};
    unsigned saved, upper;  // the registers that the operating system saves
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    constexpr unsigned ymm = 0x06, zmm = 0xE6;
    constexpr unsigned avx2 = 1u << 5, f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
    constexpr unsigned avx512 = avx2 | f | dq | bw | vl;
    return {(saved & ymm) == ymm && (b7 & avx2), (saved & zmm) == zmm && (b7 & avx512) == avx512};
}

}  // namespace
#endif

const std::vector<Kernel>& available_kernels() {
    static const std::vector<Kernel> kernels = [] {
        std::vector<Kernel> found;
#if defined(FASTINIT_X86)
        const X86Features features = read_x86_features();
        if (features.avx512) found.push_back(avx512_kernel);
        if (features.avx2) found.push_back(avx2_kernel);
#endif
        found.push_back(portable_kernel);
        return found;
    }();
    return kernels;
}

namespace {

const Kernel& find(const std::string& argument, const std::string& isa) {
    std::string choices;
    for (const Kernel& kernel : available_kernels()) {
        if (isa == kernel.isa) return kernel;
        choices += (choices.empty() ? "" : ", ") + std::string(kernel.isa);
    }
    detail::refuse(argument, "'" + isa + "'", "this machine runs " + choices);
}

}  // namespace

const Kernel& kernel_named(const std::string& isa) { return find("isa", isa); }

const Kernel& default_kernel() {
    static const Kernel& chosen = [&]() -> const Kernel& {
        const char* isa = std::getenv("FASTINIT_CPU_ISA");
        return isa == nullptr || *isa == '\0' ? available_kernels().front() : find("FASTINIT_CPU_ISA", isa);
    }();
    return chosen;
}

}  // namespace fastinit
