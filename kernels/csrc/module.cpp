// What Python sees: which levels exist and run here, and the kernels on raw addresses. Dtypes,
// shapes and strides are checked by ops.py before they come here; what takes a pass over the data
// is checked here, before anything is written.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "levels.h"

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

// (name, runs on this machine, floats per vector, built with OpenMP), weakest first.
std::vector<std::tuple<std::string, bool, int, bool>> levels() {
    std::vector<std::tuple<std::string, bool, int, bool>> out;
    for (const Kernels* k : compiled())
        out.emplace_back(k->level, machine_runs(k), k->vector_floats, k->openmp);
    return out;
}

enum Refusal { kFine = 0, kBadSubnet = 1, kBadTopK = 2, kBadBias = 3 };

// (a Refusal, the row or expert it is about, the value found there). Nothing is written unless
// the first is kFine.
std::tuple<int, int64_t, double> route(
    int level, uintptr_t router_logits, uintptr_t subnet_of_row, int subnet_index_bytes,
    int64_t rows, int experts, int slots, uintptr_t top_k, int64_t top_k_stride,
    uintptr_t min_experts, int64_t min_experts_stride, uintptr_t threshold,
    int64_t threshold_stride, uintptr_t pool, int64_t pool_stride, int64_t subnets,
    uintptr_t correction_bias, bool renormalize, float epsilon, uintptr_t topk_ids,
    uintptr_t topk_weights, int threads) {
    RouteArgs args;
    args.router_logits = reinterpret_cast<const float*>(router_logits);
    args.subnet_of_row = reinterpret_cast<const void*>(subnet_of_row);
    args.subnet_index_bytes = subnet_index_bytes;
    args.rows = rows;
    args.experts = experts;
    args.slots = slots;
    args.top_k = reinterpret_cast<const int32_t*>(top_k);
    args.top_k_stride = top_k_stride;
    args.min_experts = reinterpret_cast<const int32_t*>(min_experts);
    args.min_experts_stride = min_experts_stride;
    args.threshold = reinterpret_cast<const float*>(threshold);
    args.threshold_stride = threshold_stride;
    args.pool = reinterpret_cast<const uint8_t*>(pool);
    args.pool_stride = pool_stride;
    args.subnets = subnets;
    args.correction_bias = reinterpret_cast<const float*>(correction_bias);
    args.renormalize = renormalize;
    args.epsilon = epsilon;
    args.topk_ids = reinterpret_cast<int32_t*>(topk_ids);
    args.topk_weights = reinterpret_cast<float*>(topk_weights);
    args.threads = threads;

    nb::gil_scoped_release release;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t subnet = subnet_of(args, row);
        if (subnet < 0 || subnet >= subnets)
            return {kBadSubnet, row, static_cast<double>(subnet)};
        const int32_t k = args.top_k[subnet * top_k_stride];
        if (k < 1 || k > slots) return {kBadTopK, row, static_cast<double>(k)};
    }
    if (args.correction_bias)
        for (int e = 0; e < experts; ++e)
            if (!std::isfinite(args.correction_bias[e]))
                return {kBadBias, e, static_cast<double>(args.correction_bias[e])};
    compiled()[static_cast<size_t>(level)]->route(args);
    return {kFine, 0, 0.0};
}

}  // namespace

NB_MODULE(_native, m) {
    m.attr("MAX_EXPERTS") = kMaxExperts;
    m.def("levels", &levels);
    m.def("route", &route);
}
