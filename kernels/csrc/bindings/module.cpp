// The Python module: which levels exist and run here, the constants that Python compares with its
// own, and the kernels. Python checks arguments first, with messages for users; bindings check
// again whatever an address depends on.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace elastic_moe;

namespace {

// Weakest first.
const std::vector<const Kernels*>& compiled() {
    static const std::vector<const Kernels*> levels = {
        &kernels_portable,
#if defined(ELASTIC_MOE_HAS_AVX2)
        &kernels_avx2,
#endif
#if defined(ELASTIC_MOE_HAS_AVX512)
        &kernels_avx512,
#endif
    };
    return levels;
}

// The compiler's run-time check reads cpuid and whether the system saves the wide registers.
bool machine_runs(const Kernels* kernels) {
#if defined(ELASTIC_MOE_HAS_AVX2)
    if (kernels == &kernels_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(ELASTIC_MOE_HAS_AVX512)
    if (kernels == &kernels_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
    return kernels == &kernels_portable;
}

// (name, runs on this machine), weakest first.
std::vector<std::tuple<std::string, bool>> levels() {
    std::vector<std::tuple<std::string, bool>> out;
    for (const Kernels* k : compiled()) out.emplace_back(k->level, machine_runs(k));
    return out;
}

}  // namespace

const Kernels* elastic_moe::kernels_of(int level) {
    return compiled().at(static_cast<size_t>(level));
}

NB_MODULE(_native, m) {
    // A model that lives as long as the process is no leak.
    nb::set_leak_warnings(false);
    nb::dict constants;
    for (const SharedConstant& shared : kShared) constants[shared.name] = shared.value;
    m.attr("CONSTANTS") = constants;
    m.def("levels", &levels);
    define_ops(m);
    define_model(m);
    define_training(m);
}
