// Which build of the kernels a processor can run.
#include "cpu/linear_sets.h"

#if MGF_HAS_AVXVNNI
#include <cpuid.h>
#endif
#if MGF_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mgf {
namespace {

#if MGF_HAS_AVXVNNI
// Asked of cpuid itself: compilers came to know the name in __builtin_cpu_supports long after the instructions. AVX2,
// asked for as well, says that the operating system saves the registers.
bool ask_for_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_avxvnni() {
    static const bool has = ask_for_avxvnni();  // 10 us a question in a virtual machine
    return has;
}
#endif

#if MGF_HAS_AMX
// Linux lets a process use the tiles once it has asked; its threads and forks then may, too.
bool ask_for_amx() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tiles = (d >> 24 & 1) && (d >> 25 & 1);
    return tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx() {
    static const bool has = ask_for_amx();
    return has;
}
#endif

}  // namespace

bool linear_isa_supported(LinearIsa isa) {
    if (isa == LinearIsa::baseline) return true;
#if MGF_X86
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
    if (isa == LinearIsa::avx2) return true;
#if MGF_HAS_AVXVNNI
    if (isa == LinearIsa::avxvnni) return has_avxvnni();
#endif
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (isa == LinearIsa::avx512) return avx512;
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (isa == LinearIsa::avx512vnni) return vnni;
#if MGF_HAS_AMX
    if (isa == LinearIsa::amx) return vnni && has_amx();
#endif
#endif
    return false;
}

LinearIsa best_linear_isa() {
    static const LinearIsa best = [] {
        int isa = kLinearIsas - 1;
        while (!linear_isa_supported(LinearIsa(isa))) --isa;
        return LinearIsa(isa);
    }();
    return best;
}

const char* linear_isa_name(LinearIsa isa) {
    static const char* const names[kLinearIsas] = {"baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "amx"};
    return names[int(isa)];
}

const LinearKernels& linear_kernels(LinearIsa isa) {
#if MGF_HAS_AMX
    if (isa == LinearIsa::amx) return linear_amx;
#endif
#if MGF_X86
    if (isa == LinearIsa::avx512vnni) return linear_avx512vnni;
    if (isa == LinearIsa::avx512) return linear_avx512;
#if MGF_HAS_AVXVNNI
    if (isa == LinearIsa::avxvnni) return linear_avxvnni;
#endif
    if (isa == LinearIsa::avx2) return linear_avx2;
#endif
    (void)isa;
    return linear_baseline;
}

}  // namespace mgf
