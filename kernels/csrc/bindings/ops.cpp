// Single kernels.
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "ops/attention_shares.h"
#include "ops/expert_plan.h"
#include "ops/pack.h"

namespace nb = nanobind;

namespace elastic_moe {
namespace {

template <class T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::device::cpu>;        // of a table, any stride
typedef nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu> Indices;  // int32 or int64

enum Refusal { kFine = 0, kBadSubnet = 1, kBadTopK = 2, kBadBias = 3 };

// (a Refusal, the row or expert it is about, the value found there). Nothing is written unless
// the first is kFine.
std::tuple<int, int64_t, double> route(
    int level, const Array<const float, 2>& router_logits, const Indices& subnet_of_row,
    const Column<int32_t>& top_k, const Column<int32_t>& min_experts,
    const Column<float>& threshold,
    const nb::ndarray<const bool, nb::ndim<2>, nb::device::cpu>& pool,
    const Floats& correction_bias, bool renormalize, float epsilon,
    const Array<int32_t, 2>& topk_ids, const Array<float, 2>& topk_weights, int threads) {
    RouteArgs args;
    args.router_logits = router_logits.data();
    args.subnet_of_row = subnet_of_row.data();
    args.subnet_index_bytes = subnet_of_row.dtype().bits / 8;
    args.rows = static_cast<int64_t>(router_logits.shape(0));
    args.experts = static_cast<int>(router_logits.shape(1));
    args.slots = static_cast<int>(topk_ids.shape(1));
    args.top_k = top_k.data();
    args.top_k_stride = top_k.stride(0);
    args.min_experts = min_experts.data();
    args.min_experts_stride = min_experts.stride(0);
    args.threshold = threshold.data();
    args.threshold_stride = threshold.stride(0);
    args.pool = reinterpret_cast<const uint8_t*>(pool.data());
    args.pool_stride = pool.stride(0);
    args.subnets = static_cast<int64_t>(pool.shape(0));
    args.correction_bias = correction_bias.is_valid() ? correction_bias.data() : nullptr;
    args.renormalize = renormalize;
    args.epsilon = epsilon;
    args.topk_ids = topk_ids.data();
    args.topk_weights = topk_weights.data();
    args.threads = threads;
    const size_t rows = router_logits.shape(0), experts = router_logits.shape(1);
    const size_t subnets = pool.shape(0), slots = topk_ids.shape(1);
    require(subnet_of_row.shape(0) == rows && (subnet_of_row.dtype() == nb::dtype<int32_t>() ||
                                               subnet_of_row.dtype() == nb::dtype<int64_t>()),
            "subnet_of_row must be contiguous int32 or int64, one for each row.");
    require(top_k.shape(0) == subnets && min_experts.shape(0) == subnets &&
                threshold.shape(0) == subnets && pool.shape(1) == experts &&
                (pool.stride(1) == 1 || experts < 2) && experts <= kMaxExperts,
            "the columns of the table must have one entry for each sub-network and expert.");
    require(topk_ids.shape(0) == rows && topk_weights.shape(0) == rows &&
                topk_weights.shape(1) == slots,
            "topk_ids and topk_weights must have one row for each row of router_logits.");
    if (args.correction_bias) require_size("correction_bias", correction_bias, args.experts);

    nb::gil_scoped_release release;
    for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t subnet = subnet_of(args, row);
        if (subnet < 0 || subnet >= args.subnets)
            return {kBadSubnet, row, static_cast<double>(subnet)};
        const int32_t k = args.top_k[subnet * args.top_k_stride];
        if (k < 1 || k > args.slots) return {kBadTopK, row, static_cast<double>(k)};
    }
    if (args.correction_bias)
        for (int e = 0; e < args.experts; ++e)
            if (!std::isfinite(args.correction_bias[e]))
                return {kBadBias, e, static_cast<double>(args.correction_bias[e])};
    kernels_of(level)->route(args);
    return {kFine, 0, 0.0};
}

// `matrix` has contiguous rows, which may lie apart.
void pack_matrix(const StridedNumbers<2>& matrix, const Array<uint8_t, 1>& packed, int64_t start,
                 int64_t panel_stride, int threads) {
    const bool bf16 = is_bf16(matrix);
    const int64_t outputs = static_cast<int64_t>(matrix.shape(0));
    const int64_t inputs = static_cast<int64_t>(matrix.shape(1));
    require(matrix.stride(1) == 1 || inputs < 2, "the rows of a matrix must be contiguous.");
    const int64_t panel = packed_matrix_bytes(1, inputs, bf16);
    const int64_t panels = round_up(outputs, kPanel) / kPanel;
    require(start >= 0 && panel_stride >= 1 &&
                (!panels || start + ((panels - 1) * panel_stride + 1) * panel <=
                                static_cast<int64_t>(packed.shape(0))),
            "the packed matrix does not fit.");
    const int value_bytes = bf16 ? 2 : 4;
    nb::gil_scoped_release release;
    pack({static_cast<const char*>(matrix.data()), matrix.stride(0) * value_bytes, outputs, inputs,
          value_bytes, reinterpret_cast<char*>(packed.data()) + start, panel_stride, threads});
}

// Of memory that holds nothing yet.
void populate_memory(const Array<uint8_t, 1>& memory, int threads) {
    nb::gil_scoped_release release;
    populate(reinterpret_cast<char*>(memory.data()), static_cast<int64_t>(memory.shape(0)),
             threads);
}

// `values` are numbers of `value_bytes`; `exponent` has the bits of the exponent of NaN.
bool are_finite(const Bytes& values, int value_bytes, uint32_t exponent, int threads) {
    const auto bytes = static_cast<int64_t>(values.shape(0));
    require((value_bytes == 2 || value_bytes == 4) && bytes % value_bytes == 0,
            "values must be whole numbers of 2 or 4 bytes.");
    nb::gil_scoped_release release;
    return all_finite(reinterpret_cast<const char*>(values.data()), bytes, value_bytes, exponent,
                      threads);
}

// Raise unless the rows of `x` are whole vectors, of which `size` numbers count.
void require_inputs(const StridedNumbers<2>& x, int64_t size) {
    // A single row has no stride of its own: torch hands over 1.
    const bool apart = x.stride(0) % kVectorValues == 0 && x.stride(0) >= size;
    require(static_cast<int64_t>(x.shape(1)) >= size && (x.stride(1) == 1 || size < 2) &&
                (x.shape(0) < 2 || apart),
            "matrix inputs must come in rows of whole vectors.");
}

void linear(int level, const Bytes& matrix, const StridedNumbers<2>& x, const Array<float, 2>& out,
            int inputs, int threads) {
    LinearArgs args{};
    args.bf16 = is_bf16(x);
    args.rows = static_cast<int>(x.shape(0));
    const int outputs = static_cast<int>(out.shape(1));
    if (args.rows) require_inputs(x, inputs);
    require(out.shape(0) == x.shape(0), "out must have one row for each row of x.");
    require_bytes("matrix", matrix, packed_matrix_bytes(outputs, inputs, args.bf16));
    args.matrix = {matrix.data(), outputs, inputs};
    args.inputs = x.data();
    args.input_stride = x.stride(0);
    args.out = out.data();
    args.threads = threads;
    nb::gil_scoped_release release;
    kernels_of(level)->linear(args);
}

void rms_norm(int level, const Array<const float, 2>& x, const Floats& gain, float eps,
              const Array<float, 2>& out, int threads) {
    require(out.shape(0) == x.shape(0) && out.shape(1) == x.shape(1),
            "out must have the shape of x.");
    require_size("gain", gain, static_cast<int64_t>(x.shape(1)));
    nb::gil_scoped_release release;
    NormArgs args = {x.data(),
                     gain.data(),
                     static_cast<int64_t>(x.shape(0)),
                     static_cast<int>(x.shape(1)),
                     eps,
                     out.data(),
                     threads};
    kernels_of(level)->rms_norm(args);
}

void divergence(int level, const Array<const float, 2>& logits,
                const Array<const float, 2>& reference, const Array<const int64_t, 1>& targets,
                const Array<float, 1>& losses, const Array<double, 1>& divergences,
                const Array<bool, 1>& agreed, int threads) {
    const size_t rows = logits.shape(0), vocab = logits.shape(1);
    require(reference.shape(0) == rows && reference.shape(1) == vocab && vocab > 0,
            "reference must have the shape of logits, of at least one column.");
    require(targets.shape(0) == rows && losses.shape(0) == rows && divergences.shape(0) == rows &&
                agreed.shape(0) == rows,
            "targets, losses, divergences and agreed must have one entry for each row.");
    for (size_t row = 0; row < rows; ++row)
        require(targets.data()[row] >= 0 && targets.data()[row] < static_cast<int64_t>(vocab),
                "targets must be columns of logits.");
    nb::gil_scoped_release release;
    DivergenceArgs args = {logits.data(),
                           reference.data(),
                           targets.data(),
                           static_cast<int64_t>(rows),
                           static_cast<int>(vocab),
                           losses.data(),
                           divergences.data(),
                           agreed.data(),
                           threads};
    kernels_of(level)->divergence(args);
}

// (weight bytes, FLOPs). Python has checked that ids are in [-1, num_experts) and row_channels in
// [1, channels].
std::tuple<int64_t, int64_t> experts(int level, const Bytes& weights, int num_experts, int channels,
                                     const StridedNumbers<2>& x,
                                     const Array<const int32_t, 2>& topk_ids,
                                     const Array<const float, 2>& topk_weights,
                                     const Array<const int32_t, 1>& row_channels,
                                     const Array<float, 2>& out, int threads) {
    static thread_local Workspace workspace;
    ExpertsArgs args{};
    args.bf16 = is_bf16(x);
    args.rows = static_cast<int>(x.shape(0));
    args.slots = static_cast<int>(topk_ids.shape(1));
    const size_t rows = x.shape(0);
    const int hidden = static_cast<int>(out.shape(1));
    if (args.rows) require_inputs(x, hidden);
    require(out.shape(0) == rows && topk_ids.shape(0) == rows && topk_weights.shape(0) == rows &&
                topk_weights.shape(1) == topk_ids.shape(1) && row_channels.shape(0) == rows,
            "topk_ids, topk_weights, row_channels and out must have one row for each row of x.");
    require_bytes("weights", weights,
                  num_experts * packed_expert_bytes(hidden, channels, args.bf16));
    args.ffn = {weights.data(), num_experts, hidden, channels};
    args.inputs = x.data();
    args.input_stride = x.stride(0);
    args.topk_ids = topk_ids.data();
    args.topk_weights = topk_weights.data();
    args.channels = row_channels.data();
    args.out = out.data();
    args.threads = threads;
    nb::gil_scoped_release release;
    workspace.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) workspace.hand_out();
        take_plan(workspace, args.plan, args.rows, static_cast<int64_t>(args.rows) * args.slots,
                  num_experts, channels, args.bf16 ? 2 : 4);
        args.sums = workspace.take<float>(static_cast<int64_t>(args.rows) * kDownColumns * threads);
    }
    kernels_of(level)->experts(args);
    return {args.weight_bytes, args.flops};
}

// Spans are rows (row, rows, position, index of its first entry in `block_tables`), which Python
// has checked against the tables and the cache.
void attention(int level, const Array<uint8_t, 2>& kv, int kv_heads, float scale,
               const Numbers<3>& queries, const Array<const int32_t, 2>& spans,
               const Array<const int32_t, 2>& block_tables, const Numbers<3>& out, int threads) {
    AttentionArgs args{};
    args.bf16 = is_bf16(queries);
    args.heads = static_cast<int>(queries.shape(1));
    const int head_dim = static_cast<int>(queries.shape(2));
    require(is_bf16(out) == args.bf16 && out.shape(0) == queries.shape(0) &&
                out.shape(1) == queries.shape(1) && out.shape(2) == queries.shape(2),
            "out must have the dtype and shape of queries.");
    require(head_dim <= kMaxHeadDim && kv_heads >= 1 && args.heads % kv_heads == 0 &&
                args.heads / kv_heads <= kMaxHeadsPerGroup,
            "queries have heads that these kernels do not take.");
    require(static_cast<int64_t>(kv.shape(1)) ==
                    kv_heads * kv_head_values(head_dim) * (args.bf16 ? 2 : 4) &&
                spans.shape(1) == 4,
            "kv must hold blocks of these heads, and spans four numbers.");
    std::vector<Span> list;
    for (size_t i = 0; i < spans.shape(0); ++i) {
        const int32_t* const span = spans.data() + 4 * i;
        list.push_back({span[0], span[1], span[2], block_tables.data() + span[3]});
    }
    args.kv = {kv.data(), kv_heads, head_dim};
    args.scale = scale;
    args.queries = queries.data();
    args.query_stride = args.out_stride = static_cast<int64_t>(args.heads) * head_dim;
    args.spans = list.data();
    args.span_count = static_cast<int>(list.size());
    args.out = out.data();
    args.threads = threads;
    const int group = args.heads / kv_heads;
    args.shares = share_attention(args.spans, args.span_count, kv_heads, group, threads);
    std::vector<float> partials(static_cast<size_t>(partial_floats(args.shares, group, head_dim)));
    std::vector<int32_t> runs_done(static_cast<size_t>(args.shares.partials));
    args.partials = partials.data();
    args.runs_done = runs_done.data();
    nb::gil_scoped_release release;
    kernels_of(level)->attention(args);
}

int read_patterns(int level) { return kernels_of(level)->read_patterns; }

// Reads every byte once, in one of the patterns.
void probe_read(int level, const Bytes& data, int pattern, int threads) {
    const Kernels* kernels = kernels_of(level);
    if (pattern < 0 || pattern >= kernels->read_patterns)
        throw nb::index_error("pattern is outside the read patterns");
    nb::gil_scoped_release release;
    kernels->probe_read(reinterpret_cast<const char*>(data.data()),
                        static_cast<int64_t>(data.shape(0)), pattern, threads);
}

int64_t probe_multiply(int level, bool bf16, int64_t turns, int threads) {
    const Kernels* kernels = kernels_of(level);
    nb::gil_scoped_release release;
    return kernels->probe_multiply(bf16, turns, threads);
}

}  // namespace

void define_ops(nb::module_& m) {
    using nb::arg;
    m.def("route", &route, arg("level"), nb::kw_only(), arg("router_logits").noconvert(),
          arg("subnet_of_row").noconvert(), arg("top_k").noconvert(),
          arg("min_experts").noconvert(), arg("threshold").noconvert(), arg("pool").noconvert(),
          arg("correction_bias").noconvert().none(), arg("renormalize"), arg("epsilon"),
          arg("topk_ids").noconvert(), arg("topk_weights").noconvert(), arg("threads"));
    m.def("pack", &pack_matrix, arg("matrix").noconvert(), arg("packed").noconvert(), nb::kw_only(),
          arg("start"), arg("panel_stride"), arg("threads"));
    m.def("populate", &populate_memory, arg("memory").noconvert(), arg("threads"));
    m.def("are_finite", &are_finite, arg("values").noconvert(), nb::kw_only(), arg("value_bytes"),
          arg("exponent"), arg("threads"));
    m.def("linear", &linear, arg("level"), nb::kw_only(), arg("matrix").noconvert(),
          arg("x").noconvert(), arg("out").noconvert(), arg("inputs"), arg("threads"));
    m.def("rms_norm", &rms_norm, arg("level"), nb::kw_only(), arg("x").noconvert(),
          arg("gain").noconvert(), arg("eps"), arg("out").noconvert(), arg("threads"));
    m.def("divergence", &divergence, arg("level"), nb::kw_only(), arg("logits").noconvert(),
          arg("reference").noconvert(), arg("targets").noconvert(), arg("losses").noconvert(),
          arg("divergences").noconvert(), arg("agreed").noconvert(), arg("threads"));
    m.def("experts", &experts, arg("level"), nb::kw_only(), arg("weights").noconvert(),
          arg("num_experts"), arg("channels"), arg("x").noconvert(), arg("topk_ids").noconvert(),
          arg("topk_weights").noconvert(), arg("row_channels").noconvert(), arg("out").noconvert(),
          arg("threads"));
    m.def("attention", &attention, arg("level"), nb::kw_only(), arg("kv").noconvert(),
          arg("kv_heads"), arg("scale"), arg("queries").noconvert(), arg("spans").noconvert(),
          arg("block_tables").noconvert(), arg("out").noconvert(), arg("threads"));
    m.def("read_patterns", &read_patterns, arg("level"));
    m.def("probe_read", &probe_read, arg("level"), arg("data").noconvert(), arg("pattern"),
          arg("threads"));
    m.def("probe_multiply", &probe_multiply, arg("level"), arg("bf16"), arg("turns"),
          arg("threads"));
}

}  // namespace elastic_moe
