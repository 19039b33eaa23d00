// Run-time choice of the CPU kernel.
#include "isa.h"

#include <cstdlib>

namespace fastinit {

extern const Kernel portable_kernel;
#if defined(FASTINIT_X86)
extern const Kernel avx2_kernel;
extern const Kernel avx512_kernel;
#endif

const std::vector<Kernel>& available_kernels() {
    static const std::vector<Kernel> kernels = [] {
        std::vector<Kernel> found;
#if defined(FASTINIT_X86)
        // __builtin_cpu_supports also asks whether the operating system saves the wide registers. Not every compiler
        // can be asked for F16C, which every processor with AVX2 has.
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found.push_back(avx512_kernel);
        if (avx2) found.push_back(avx2_kernel);
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
