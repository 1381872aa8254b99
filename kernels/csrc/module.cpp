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
#include "native_model.h"
#include "pack.h"
#include "plan_room.h"
#include "train_module.h"

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

const Kernels* kernels_of(int level) { return compiled().at(static_cast<size_t>(level)); }

void pack_matrix(uintptr_t from, int64_t row_stride, int64_t outputs, int64_t inputs,
                 int value_bytes, uintptr_t to, int64_t panel_stride) {
    nb::gil_scoped_release release;
    pack(reinterpret_cast<const char*>(from), row_stride, outputs, inputs, value_bytes,
         reinterpret_cast<char*>(to), panel_stride);
}

void linear(int level, bool bf16, uintptr_t matrix, int outputs, int inputs, uintptr_t x,
            int64_t input_stride, int rows, uintptr_t out, int threads) {
    nb::gil_scoped_release release;
    LinearArgs args{};
    args.matrix = {reinterpret_cast<const void*>(matrix), outputs, inputs};
    args.inputs = reinterpret_cast<const void*>(x);
    args.input_stride = input_stride;
    args.rows = rows;
    args.out = reinterpret_cast<float*>(out);
    args.threads = threads;
    args.bf16 = bf16;
    kernels_of(level)->linear(args);
}

void rms_norm(int level, uintptr_t x, uintptr_t gain, int64_t rows, int size, float eps,
              uintptr_t out, int threads) {
    nb::gil_scoped_release release;
    kernels_of(level)->rms_norm(reinterpret_cast<const float*>(x),
                                reinterpret_cast<const float*>(gain), rows, size, eps,
                                reinterpret_cast<float*>(out), threads);
}

// (weight bytes, FLOPs). Ids are in [-1, experts) and channels in [1, channels]: checked by cpu.py.
std::tuple<int64_t, int64_t> experts(int level, bool bf16, uintptr_t weights, int num_experts,
                                     int hidden, int channels, uintptr_t x, int64_t input_stride,
                                     int rows, int slots, uintptr_t topk_ids,
                                     uintptr_t topk_weights, uintptr_t row_channels, uintptr_t out,
                                     int threads) {
    nb::gil_scoped_release release;
    static thread_local Room room;
    ExpertsArgs args{};
    args.ffn = {reinterpret_cast<const void*>(weights), num_experts, hidden, channels};
    args.inputs = reinterpret_cast<const void*>(x);
    args.input_stride = input_stride;
    args.rows = rows;
    args.slots = slots;
    args.topk_ids = reinterpret_cast<const int32_t*>(topk_ids);
    args.topk_weights = reinterpret_cast<const float*>(topk_weights);
    args.channels = reinterpret_cast<const int32_t*>(row_channels);
    args.out = reinterpret_cast<float*>(out);
    args.threads = threads;
    args.bf16 = bf16;
    room.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) room.hand_out();
        take_plan(room, args.plan, rows, static_cast<int64_t>(rows) * slots, num_experts, channels,
                  bf16 ? 2 : 4);
        args.sums = room.take<float>(static_cast<int64_t>(rows) * 64 * threads);
    }
    kernels_of(level)->experts(args);
    return {args.weight_bytes, args.flops};
}

// Spans are rows of int32: (row, rows, position, index of its first entry in `blocks`).
void attention(int level, bool bf16, uintptr_t kv, int kv_heads, int head_dim, int heads,
               float scale, uintptr_t queries, uintptr_t spans, int span_count, uintptr_t blocks,
               uintptr_t out, int threads) {
    nb::gil_scoped_release release;
    const int32_t* const numbers = reinterpret_cast<const int32_t*>(spans);
    std::vector<Span> list;
    for (int i = 0; i < span_count; ++i)
        list.push_back({numbers[4 * i], numbers[4 * i + 1], numbers[4 * i + 2],
                        reinterpret_cast<const int32_t*>(blocks) + numbers[4 * i + 3]});
    AttentionArgs args{};
    const int64_t padded_head = (head_dim + 15) / 16 * 16;
    args.kv = {reinterpret_cast<void*>(kv), 16 * kv_heads * (head_dim + padded_head), kv_heads,
               head_dim};
    args.heads = heads;
    args.scale = scale;
    args.queries = reinterpret_cast<const void*>(queries);
    args.query_stride = args.out_stride = static_cast<int64_t>(heads) * head_dim;
    args.spans = list.data();
    args.span_count = span_count;
    args.out = reinterpret_cast<void*>(out);
    args.threads = threads;
    args.bf16 = bf16;
    kernels_of(level)->attention(args);
}

// Reads `bytes` bytes once; what comes back only proves that they were read.
int32_t probe(int level, uintptr_t data, int64_t bytes, int threads) {
    nb::gil_scoped_release release;
    return kernels_of(level)->probe(reinterpret_cast<const char*>(data), bytes, threads);
}

}  // namespace

NB_MODULE(_native, m) {
    // A model that lives as long as the process is no leak.
    nb::set_leak_warnings(false);
    m.attr("MAX_EXPERTS") = kMaxExperts;
    m.attr("BLOCK_POSITIONS") = kBlockPositions;
    m.def("levels", &levels);
    m.def("route", &route);
    m.def("pack", &pack_matrix);
    m.def("linear", &linear);
    m.def("rms_norm", &rms_norm);
    m.def("experts", &experts);
    m.def("attention", &attention);
    m.def("probe", &probe);
    define_model(m, &kernels_of);
    define_training(m, &kernels_of);
}
