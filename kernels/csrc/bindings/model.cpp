// A model's weights and batches as Python sets them up; bindings/step.cpp runs a batch.
#include "bindings/model.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "bindings/bindings.h"

namespace nb = nanobind;

namespace elastic_moe {

namespace {

QKNorm qk_norm_of(const std::string& name) {
    require(name == "none" || name == "head" || name == "all",
            "qk_norm must be none, head or all, got " + name + ".");
    return name == "none" ? QKNorm::kNone : name == "head" ? QKNorm::kHead : QKNorm::kAll;
}

// Models that exist. Helpers end with the last of them.
std::atomic<int> models{0};

}  // namespace

NativeModel::~NativeModel() {
    settle_threads();
    if (--models == 0) stop_threads();
}

NativeModel::NativeModel(const Kernels* kernels, const ModelSpec& spec)
    : kernels_(kernels),
      expert_hidden_(spec.expert_hidden),
      layer_(static_cast<size_t>(spec.num_layers)),
      layer_arrays_(static_cast<size_t>(spec.num_layers)) {
    require(spec.head_dim >= 2 && spec.head_dim % 2 == 0 && spec.head_dim <= kMaxHeadDim &&
                spec.num_kv_heads >= 1 && spec.num_heads % spec.num_kv_heads == 0 &&
                spec.num_heads / spec.num_kv_heads <= kMaxHeadsPerGroup &&
                spec.num_experts <= kMaxExperts,
            "a size is outside what these kernels take.");
    require(spec.rope == "half" || spec.rope == "interleaved",
            "rope must be half or interleaved, got " + spec.rope + ".");
    weights_.bf16 = spec.bf16;
    weights_.hidden = spec.hidden_size;
    weights_.heads = spec.num_heads;
    weights_.kv_heads = spec.num_kv_heads;
    weights_.head_dim = spec.head_dim;
    weights_.experts = spec.num_experts;
    weights_.vocab = spec.vocab_size;
    weights_.layers = spec.num_layers;
    weights_.eps = spec.rms_norm_eps;
    weights_.qk_norm = qk_norm_of(spec.qk_norm);
    weights_.interleaved = spec.rope == "interleaved";
    weights_.renormalize = spec.renormalize;
    weights_.routing_epsilon = spec.routing_epsilon;
    weights_.layer = layer_.data();
    ++models;
}

void NativeModel::set_layer(int index, LayerArrays arrays) {
    const ModelWeights& m = weights_;
    const int hidden = m.hidden, d = m.head_dim;
    const bool bf16 = m.bf16, routes = arrays.experts.is_valid();
    const int qkv = (m.heads + 2 * m.kv_heads) * d;
    require_size("attention_norm", arrays.attention_norm, hidden);
    require_size("mlp_norm", arrays.mlp_norm, hidden);
    if (m.qk_norm != QKNorm::kNone) {
        const bool all = m.qk_norm == QKNorm::kAll;
        require(arrays.q_norm.is_valid() && arrays.k_norm.is_valid(),
                "q_norm and k_norm must be given.");
        require_size("q_norm", arrays.q_norm, all ? m.heads * d : d);
        require_size("k_norm", arrays.k_norm, all ? m.kv_heads * d : d);
    }
    require_bytes("qkv", arrays.qkv, packed_matrix_bytes(qkv, hidden, bf16));
    require_bytes("out", arrays.out, packed_matrix_bytes(hidden, m.heads * d, bf16));
    require(arrays.router.is_valid() == routes, "router and experts must be given, or neither.");
    if (routes) {
        require_bytes("router", arrays.router, packed_matrix_bytes(m.experts, hidden, false));
        require_bytes("experts", arrays.experts,
                      m.experts * packed_expert_bytes(hidden, expert_hidden_, bf16));
    }
    if (arrays.correction_bias.is_valid())
        require_size("correction_bias", arrays.correction_bias, m.experts);
    const bool everyone = arrays.everyone.is_valid();
    if (everyone)
        require_bytes("everyone", arrays.everyone,
                      packed_expert_bytes(hidden, arrays.everyone_channels, bf16));

    LayerWeights& layer = layer_.at(static_cast<size_t>(index));
    layer.attention_norm = arrays.attention_norm.data();
    layer.q_norm = data_or_null(arrays.q_norm);
    layer.k_norm = data_or_null(arrays.k_norm);
    layer.qkv = {arrays.qkv.data(), qkv, hidden};
    layer.out = {arrays.out.data(), hidden, m.heads * d};
    layer.mlp_norm = arrays.mlp_norm.data();
    layer.router = {data_or_null(arrays.router), routes ? m.experts : 0, hidden};
    layer.correction_bias = data_or_null(arrays.correction_bias);
    layer.experts = {data_or_null(arrays.experts), routes ? m.experts : 0, hidden, expert_hidden_};
    layer.everyone = {data_or_null(arrays.everyone), everyone ? 1 : 0, hidden,
                      arrays.everyone_channels};
    if (routes && expert_hidden_ > most_channels_) most_channels_ = expert_hidden_;
    if (everyone && arrays.everyone_channels > most_channels_)
        most_channels_ = arrays.everyone_channels;
    layer_arrays_.at(static_cast<size_t>(index)) = std::move(arrays);
}

void NativeModel::set_ends(const Numbers<2>& embeddings, const Floats& final_norm,
                           const Bytes& head) {
    require(is_bf16(embeddings) == weights_.bf16 &&
                static_cast<int64_t>(embeddings.shape(0)) == weights_.vocab &&
                static_cast<int64_t>(embeddings.shape(1)) == weights_.hidden,
            "embeddings must be (vocab_size, hidden_size) in the model's dtype.");
    require_size("final_norm", final_norm, weights_.hidden);
    require_bytes("head", head,
                  packed_matrix_bytes(weights_.vocab, weights_.hidden, weights_.bf16));
    embeddings_ = embeddings;
    final_norm_ = final_norm;
    head_ = head;
    weights_.embeddings = embeddings.data();
    weights_.final_norm = final_norm.data();
    weights_.head = {head.data(), weights_.vocab, weights_.hidden};
}

StepInputs NativeModel::prepare(std::shared_ptr<const SubnetColumns> table,
                                std::shared_ptr<const Angles> angles,
                                const Array<uint8_t, 2>& blocks, int threads) const {
    const size_t S = table->pool.shape(0), L = layer_.size();
    const auto fits = [&](const auto& column) {
        return column.shape(0) == S && column.shape(1) == L;
    };
    require(fits(table->active) && fits(table->top_k) && fits(table->min_experts) &&
                fits(table->threshold) && fits(table->channels) && fits(table->pool) &&
                static_cast<int64_t>(table->pool.shape(2)) == weights_.experts,
            "the table's columns must have shape (sub-networks, layers) of this model.");
    const size_t half = static_cast<size_t>(weights_.head_dim / 2);
    require(angles->cos.shape(1) == half && angles->sin.shape(1) == half &&
                angles->cos.shape(0) == angles->sin.shape(0),
            "cos and sin must have shape (positions, head_dim / 2).");
    require(static_cast<int64_t>(blocks.shape(1)) ==
                weights_.kv_heads * kv_head_values(weights_.head_dim) * (weights_.bf16 ? 2 : 4),
            "blocks must have the size of this model's blocks.");
    require(threads >= 1, "threads must be at least 1.");
    for (const LayerWeights& layer : layer_)
        require(layer.attention_norm && weights_.embeddings, "weights are missing.");
    StepInputs in;
    in.table = std::move(table);
    in.angles = std::move(angles);
    in.blocks = blocks;
    in.threads = threads;
    return in;
}

void define_model(nb::module_& m) {
    using nb::arg;
    typedef std::shared_ptr<const SubnetColumns> Table;
    typedef std::shared_ptr<const Angles> SharedAngles;

    nb::class_<SubnetColumns>(m, "SubnetColumns")
        .def(nb::init<Array<const bool, 2>, Array<const int32_t, 2>, Array<const int32_t, 2>,
                      Array<const float, 2>, Array<const int32_t, 2>, Array<const bool, 3>>(),
             nb::kw_only(), arg("active").noconvert(), arg("top_k").noconvert(),
             arg("min_experts").noconvert(), arg("threshold").noconvert(),
             arg("channels").noconvert(), arg("pool").noconvert());

    nb::class_<Angles>(m, "Angles")
        .def(nb::init<Array<const float, 2>, Array<const float, 2>>(), nb::kw_only(),
             arg("cos").noconvert(), arg("sin").noconvert());

    nb::class_<StepInputs>(m, "StepInputs")
        .def_prop_ro("subnet_count", &StepInputs::subnet_count)
        .def_prop_ro("kv_blocks", &StepInputs::kv_blocks)
        .def_prop_ro("angle_positions", &StepInputs::angle_positions)
        .def(
            "set_logits", [](StepInputs& in, Array<float, 2> logits) { in.logits = logits; },
            arg("logits").noconvert())
        .def(
            "set_states",
            [](StepInputs& in, Array<const bool, 1> layers, Array<float, 3> states) {
                in.state_layers = layers;
                in.states = states;
            },
            arg("layers").noconvert(), arg("states").noconvert())
        .def(
            "set_trace", [](StepInputs& in, Array<int32_t, 3> ids) { in.trace_ids = ids; },
            arg("ids").noconvert());

    nb::class_<NativeModel>(m, "Model")
        .def(
            "__init__",
            [](NativeModel* self, int level, bool bf16, int vocab_size, int hidden_size,
               int num_layers, int num_heads, int num_kv_heads, int head_dim, int num_experts,
               int expert_hidden, float rms_norm_eps, const std::string& qk_norm,
               const std::string& rope, bool renormalize, float routing_epsilon) {
                new (self) NativeModel(kernels_of(level),
                                       {bf16, vocab_size, hidden_size, num_layers, num_heads,
                                        num_kv_heads, head_dim, num_experts, expert_hidden,
                                        rms_norm_eps, qk_norm, rope, renormalize, routing_epsilon});
            },
            arg("level"), nb::kw_only(), arg("bf16"), arg("vocab_size"), arg("hidden_size"),
            arg("num_layers"), arg("num_heads"), arg("num_kv_heads"), arg("head_dim"),
            arg("num_experts"), arg("expert_hidden"), arg("rms_norm_eps"), arg("qk_norm"),
            arg("rope"), arg("renormalize"), arg("routing_epsilon"))
        .def(
            "set_layer",
            [](NativeModel& self, int index, Floats attention_norm, Floats q_norm, Floats k_norm,
               Bytes qkv, Bytes out, Floats mlp_norm, Bytes router, Floats correction_bias,
               Bytes experts, Bytes everyone, int everyone_channels) {
                self.set_layer(index, {attention_norm, q_norm, k_norm, qkv, out, mlp_norm, router,
                                       correction_bias, experts, everyone, everyone_channels});
            },
            arg("index"), nb::kw_only(), arg("attention_norm").noconvert(),
            arg("q_norm").noconvert().none(), arg("k_norm").noconvert().none(),
            arg("qkv").noconvert(), arg("out").noconvert(), arg("mlp_norm").noconvert(),
            arg("router").noconvert().none(), arg("correction_bias").noconvert().none(),
            arg("experts").noconvert().none(), arg("everyone").noconvert().none(),
            arg("everyone_channels"))
        .def("set_ends", &NativeModel::set_ends, nb::kw_only(), arg("embeddings").noconvert(),
             arg("final_norm").noconvert(), arg("head").noconvert())
        .def(
            "prepare",
            [](const NativeModel& self, Table table, SharedAngles angles, Array<uint8_t, 2> blocks,
               int threads) { return self.prepare(table, angles, blocks, threads); },
            nb::kw_only(), arg("table"), arg("angles"), arg("blocks").noconvert(), arg("threads"))
        .def("step", &NativeModel::step, arg("inputs"), arg("token_ids").noconvert(),
             arg("positions").noconvert(), arg("sequences").noconvert(), arg("subnets").noconvert(),
             arg("block_tables").noconvert(), arg("logits_rows").noconvert())
        .def("advance", &NativeModel::advance, arg("inputs"), arg("token_ids"));
}

}  // namespace elastic_moe
