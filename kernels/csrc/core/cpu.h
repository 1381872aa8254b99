// What the processor has. __builtin_cpu_supports says no to everything where the compiler's run
// time is not its own (a wheel that zig builds).
#pragma once

#include <cpuid.h>

#include <cstdint>

namespace elastic_moe {
namespace cpu {

enum Register { kEax, kEbx, kEcx, kEdx };

// What the system must save when it switches threads, as bits of XCR0.
constexpr uint64_t kVectors256 = 0x06, kVectors512 = 0xE6;

// A bit of cpuid, and the registers that the instructions use.
struct Extension {
    uint32_t leaf, subleaf;
    Register where;
    int bit;
    uint64_t saved;
};

// Named as the compiler's -m options. Source: Intel's Software Developer's Manual, volume 2, CPUID.
constexpr Extension fma = {1, 0, kEcx, 12, kVectors256};
constexpr Extension avx2 = {7, 0, kEbx, 5, kVectors256};
constexpr Extension avx512f = {7, 0, kEbx, 16, kVectors512};
constexpr Extension avx512dq = {7, 0, kEbx, 17, kVectors512};
constexpr Extension avx512bw = {7, 0, kEbx, 30, kVectors512};
constexpr Extension avx512vl = {7, 0, kEbx, 31, kVectors512};
constexpr Extension avx512bf16 = {7, 1, kEax, 5, kVectors512};

inline bool has(const Extension& extension) {
    uint32_t values[4] = {};
    if (!__get_cpuid(1, &values[kEax], &values[kEbx], &values[kEcx], &values[kEdx])) return false;
    constexpr uint32_t kSystemSaves = 1u << 27;  // OSXSAVE: xgetbv exists
    if (!(values[kEcx] & kSystemSaves)) return false;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const uint64_t saved = static_cast<uint64_t>(high) << 32 | low;
    return (saved & extension.saved) == extension.saved &&
           __get_cpuid_count(extension.leaf, extension.subleaf, &values[kEax], &values[kEbx],
                             &values[kEcx], &values[kEdx]) &&
           (values[extension.where] >> extension.bit & 1u);
}

}  // namespace cpu
}  // namespace elastic_moe
