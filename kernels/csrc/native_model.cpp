#include "native_model.h"

#include <cstring>
#include <utility>

#include "plan_room.h"

namespace nb = nanobind;

namespace elastic_moe {

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

NativeModel::NativeModel(const Kernels* kernels, bool bf16, int hidden, int heads, int kv_heads,
                         int head_dim, int experts, int vocab, int layers, float eps, int qk_norm,
                         bool interleaved, bool renormalize, float routing_epsilon)
    : kernels_(kernels), layer_(static_cast<size_t>(layers)) {
    weights_.bf16 = bf16;
    weights_.hidden = hidden;
    weights_.heads = heads;
    weights_.kv_heads = kv_heads;
    weights_.head_dim = head_dim;
    weights_.experts = experts;
    weights_.vocab = vocab;
    weights_.layers = layers;
    weights_.eps = eps;
    weights_.qk_norm = static_cast<QKNorm>(qk_norm);
    weights_.interleaved = interleaved;
    weights_.renormalize = renormalize;
    weights_.routing_epsilon = routing_epsilon;
    weights_.layer = layer_.data();
}

void NativeModel::set_layer(int index, uintptr_t attention_norm, uintptr_t q_norm, uintptr_t k_norm,
                            uintptr_t qkv, uintptr_t out, uintptr_t mlp_norm, uintptr_t router,
                            uintptr_t correction_bias, uintptr_t experts, int channels,
                            uintptr_t everyone, int everyone_channels) {
    const int hidden = weights_.hidden, d = weights_.head_dim;
    LayerWeights& layer = layer_.at(static_cast<size_t>(index));
    layer.attention_norm = at<const float>(attention_norm);
    layer.q_norm = at<const float>(q_norm);
    layer.k_norm = at<const float>(k_norm);
    layer.qkv = {at<const void>(qkv), (weights_.heads + 2 * weights_.kv_heads) * d, hidden};
    layer.out = {at<const void>(out), hidden, weights_.heads * d};
    layer.mlp_norm = at<const float>(mlp_norm);
    layer.router = {at<const void>(router), router ? weights_.experts : 0, hidden};
    layer.correction_bias = at<const float>(correction_bias);
    layer.experts = {at<const void>(experts), experts ? weights_.experts : 0, hidden, channels};
    layer.everyone = {at<const void>(everyone), everyone ? 1 : 0, hidden, everyone_channels};
    for (const int64_t size : {channels, everyone_channels})
        if (size > most_channels_) most_channels_ = size;
}

void NativeModel::set_ends(uintptr_t embeddings, uintptr_t final_norm, uintptr_t head) {
    weights_.embeddings = at<const void>(embeddings);
    weights_.final_norm = at<const float>(final_norm);
    weights_.head = {at<const void>(head), weights_.vocab, weights_.hidden};
}

NativeModel::Found NativeModel::check(const StepInputs& in) const {
    const int32_t *tokens = at<const int32_t>(in.token_ids), *positions = at<const int32_t>(in.positions),
                  *sequences = at<const int32_t>(in.sequences), *subnets = at<const int32_t>(in.subnets);
    const uint8_t* const active = at<const uint8_t>(in.active);
    const int64_t L = weights_.layers;
    std::vector<bool> seen(static_cast<size_t>(in.sequence_count));
    for (int t = 0; t < in.rows; ++t) {
        if (tokens[t] < 0 || tokens[t] >= weights_.vocab) return {kBadToken, t, tokens[t]};
        if (positions[t] < 0 || positions[t] >= in.angle_positions ||
            positions[t] / kBlockPositions >= in.table_blocks)
            return {kBadPosition, t, positions[t]};
        if (sequences[t] < 0 || sequences[t] >= in.sequence_count)
            return {kBadSequence, t, sequences[t]};
        if (subnets[t] < 0 || subnets[t] >= in.subnet_count) return {kBadRowSubnet, t, subnets[t]};
        if (t && sequences[t] == sequences[t - 1]) {
            if (positions[t] != positions[t - 1] + 1) return {kSplitSequence, t, sequences[t]};
            if (subnets[t] != subnets[t - 1] &&
                std::memcmp(active + subnets[t] * L, active + subnets[t - 1] * L,
                            static_cast<size_t>(L)))
                return {kMixedDepth, t, subnets[t]};
        } else {
            if (seen[static_cast<size_t>(sequences[t])]) return {kSplitSequence, t, sequences[t]};
            seen[static_cast<size_t>(sequences[t])] = true;
        }
        if (t + 1 < in.rows && sequences[t + 1] == sequences[t]) continue;
        const int32_t* const tables =
            at<const int32_t>(in.block_tables) + sequences[t] * L * in.table_blocks;
        for (int64_t l = 0; l < L; ++l)
            for (int b = 0; active[subnets[t] * L + l] && b <= positions[t] / kBlockPositions; ++b) {
                const int32_t block = tables[l * in.table_blocks + b];
                if (block < 0 || block >= in.kv_blocks) return {kBadBlock, sequences[t], block, l};
            }
    }
    const int32_t* const wanted = at<const int32_t>(in.logits_rows);
    for (int i = 0; i < in.logits_count; ++i)
        if (wanted[i] < 0 || wanted[i] >= in.rows) return {kBadLogitsRow, i, wanted[i]};
    return {};
}

void NativeModel::sort_rows(const StepInputs& in) {
    const int32_t *positions = at<const int32_t>(in.positions), *sequences = at<const int32_t>(in.sequences),
                  *subnets = at<const int32_t>(in.subnets), *top_k = at<const int32_t>(in.top_k);
    const uint8_t* const active = at<const uint8_t>(in.active);
    const int L = weights_.layers;
    const size_t layers = static_cast<size_t>(L);
    layers_.assign(layers, LayerRows{});
    row_lists_.resize(layers);
    subnet_lists_.resize(layers);
    spans_.clear();
    spans_.reserve(layers * static_cast<size_t>(in.sequence_count));  // so that pointers into it stay
    blocks_.resize(static_cast<size_t>(in.sequence_count) * layers);
    for (size_t i = 0; i < blocks_.size(); ++i)
        blocks_[i] = at<const int32_t>(in.block_tables) + i * static_cast<size_t>(in.table_blocks);
    most_slots_ = 1;
    // A table has rows that no token of this step names.
    used_subnets_.clear();
    std::vector<bool> seen(static_cast<size_t>(in.subnet_count));
    for (int t = 0; t < in.rows; ++t) {
        if (t && subnets[t] == subnets[t - 1]) continue;
        if (seen[static_cast<size_t>(subnets[t])]) continue;
        seen[static_cast<size_t>(subnets[t])] = true;
        used_subnets_.push_back(subnets[t]);
    }

    for (int l = 0; l < L; ++l) {
        LayerRows& here = layers_[static_cast<size_t>(l)];
        // Most layers run for the same rows as the one before.
        bool same = l > 0;
        for (size_t i = 0; same && i < used_subnets_.size(); ++i) {
            const int64_t s = used_subnets_[i];
            same = (active[s * L + l] != 0) == (active[s * L + l - 1] != 0);
        }
        std::vector<int32_t>& rows = row_lists_[static_cast<size_t>(l)];
        std::vector<int32_t>& own = subnet_lists_[static_cast<size_t>(l)];
        if (same) {
            here.row = layers_[static_cast<size_t>(l) - 1].row;
            here.subnets = layers_[static_cast<size_t>(l) - 1].subnets;
            here.rows = layers_[static_cast<size_t>(l) - 1].rows;
        } else {
            rows.clear();
            own.clear();
            for (int t = 0; t < in.rows; ++t)
                if (active[static_cast<int64_t>(subnets[t]) * L + l]) {
                    rows.push_back(t);
                    own.push_back(subnets[t]);
                }
            here.row = rows.data();
            here.subnets = own.data();
            here.rows = static_cast<int>(rows.size());
        }
        here.spans = spans_.data() + spans_.size();
        for (int n = 0; n < here.rows; ++n) {
            const int t = here.row[n];
            if (n && sequences[here.row[n - 1]] == sequences[t]) {
                ++spans_.back().rows;
            } else {
                spans_.push_back({n, 1, positions[t],
                                  blocks_[static_cast<size_t>(sequences[t]) * layers + static_cast<size_t>(l)]});
                ++here.span_count;
            }
        }
        here.slots = 1;
        for (const int64_t s : used_subnets_)
            if (active[s * L + l] && top_k[s * L + l] > here.slots) here.slots = top_k[s * L + l];
        if (here.slots > most_slots_) most_slots_ = here.slots;
    }
}

void NativeModel::take_room(const StepInputs& in, StepArgs& a) {
    const int64_t T = in.rows > in.logits_count ? in.rows : in.logits_count;
    const int64_t value_bytes = weights_.bf16 ? 2 : 4;
    const int64_t heads = static_cast<int64_t>(weights_.heads) * weights_.head_dim;
    const int64_t kv_heads = static_cast<int64_t>(weights_.kv_heads) * weights_.head_dim;
    a.input_stride = whole_vectors(weights_.hidden);
    a.own_rows = static_cast<int>(kFewNumbers / weights_.hidden < T ? kFewNumbers / weights_.hidden : T);
    a.head_stride = whole_vectors(heads);
    room_.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) room_.hand_out();
        a.stream = room_.take<float>(T * weights_.hidden);
        a.normed = room_.take<float>(T * weights_.hidden);
        a.inputs = room_.take_bytes(T * a.input_stride * value_bytes);
        a.own_inputs = room_.take_bytes(in.threads * a.own_rows * a.input_stride * value_bytes);
        a.qkv = room_.take<float>(T * (heads + 2 * kv_heads));
        a.queries = room_.take_bytes(T * a.head_stride * value_bytes);
        a.attended = room_.take_bytes(T * a.head_stride * value_bytes);
        a.router_logits = room_.take<float>(T * weights_.experts);
        a.topk_ids = room_.take<int32_t>(T * most_slots_);
        a.topk_weights = room_.take<float>(T * most_slots_);
        a.row_channels = room_.take<int32_t>(T);
        a.sums = room_.take<float>(T * 64 * in.threads);
        a.logits = in.logits ? at<float>(in.logits)
                             : room_.take<float>(static_cast<int64_t>(in.logits_count) * weights_.vocab);
        take_plan(room_, a.plan, T, T * (most_slots_ + 1), weights_.experts, most_channels_,
                  value_bytes);
    }
}

// `prepare` completes the inputs, and says what is wrong with them.
template <class Prepare>
NativeModel::Answer NativeModel::run(StepInputs& in, Prepare prepare) {
    if (busy_.test_and_set(std::memory_order_acquire)) return {kBusy, 0, 0, 0, {}, {}, {}};
    struct Free {
        std::atomic_flag& flag;
        ~Free() { flag.clear(std::memory_order_release); }
    } free{busy_};
    const Found found = prepare();
    if (found.refusal) return {found.refusal, found.where, found.value, found.detail, {}, {}, {}};
    sort_rows(in);

    StepArgs a{};
    a.model = &weights_;
    a.rows = in.rows;
    a.token_ids = at<const int32_t>(in.token_ids);
    a.positions = at<const int32_t>(in.positions);
    a.sequences = at<const int32_t>(in.sequences);
    a.layers = layers_.data();
    a.blocks = blocks_.data();
    const int64_t padded_head = (weights_.head_dim + 15) / 16 * 16;
    a.kv = {at<void>(in.kv), 16 * weights_.kv_heads * (weights_.head_dim + padded_head),
            weights_.kv_heads, weights_.head_dim};
    a.cos = at<const float>(in.cos);
    a.sin = at<const float>(in.sin);
    a.top_k = at<const int32_t>(in.top_k);
    a.min_experts = at<const int32_t>(in.min_experts);
    a.threshold = at<const float>(in.threshold);
    a.channels = at<const int32_t>(in.channels);
    a.pool = at<const uint8_t>(in.pool);
    a.subnets = in.subnet_count;
    a.logits_rows = at<const int32_t>(in.logits_rows);
    a.logits_count = in.logits_count;
    a.state_layers = at<const uint8_t>(in.state_layers);
    a.states = at<float>(in.states);
    a.trace_ids = at<int32_t>(in.trace_ids);
    a.trace_slots = in.trace_slots;
    a.threads = in.threads;
    take_room(in, a);
    std::vector<int32_t> best_ids(static_cast<size_t>(in.logits_count));
    a.best_ids = best_ids.data();
    std::vector<int64_t> sequence_experts(static_cast<size_t>(in.sequence_count));
    a.sequence_experts = sequence_experts.data();
    kernels_->step(a);
    const Counters& c = a.counters;
    return {kStepFine, 0, 0, 0, std::move(best_ids), std::move(sequence_experts),
            {c.weight_bytes, c.kv_bytes, c.flops, c.experts_run, c.rows_routed, c.finite}};
}

NativeModel::Answer NativeModel::step(StepInputs& in, const IntArray& token_ids,
                                      const IntArray& positions, const IntArray& sequences,
                                      const IntArray& subnets, const IntTables& block_tables,
                                      const IntArray& logits_rows) {
    nb::gil_scoped_release release;
    return run(in, [&]() -> Found {
        const size_t rows = token_ids.shape(0);
        if (positions.shape(0) != rows || sequences.shape(0) != rows || subnets.shape(0) != rows ||
            block_tables.shape(1) != layer_.size())
            return {kBadShapes};
        const auto address = [](const auto& array) {
            return reinterpret_cast<uintptr_t>(array.data());
        };
        in.rows = static_cast<int>(rows);
        in.token_ids = address(token_ids);
        in.positions = address(positions);
        in.sequences = address(sequences);
        in.subnets = address(subnets);
        in.sequence_count = static_cast<int>(block_tables.shape(0));
        in.table_blocks = static_cast<int>(block_tables.shape(2));
        in.block_tables = address(block_tables);
        in.logits_count = static_cast<int>(logits_rows.shape(0));
        in.logits_rows = address(logits_rows);
        in.own_tokens.clear();
        in.own_positions.clear();
        return check(in);
    });
}

NativeModel::Answer NativeModel::advance(StepInputs& in, const std::vector<int32_t>& token_ids) {
    nb::gil_scoped_release release;
    return run(in, [&]() -> Found {
        const size_t rows = static_cast<size_t>(in.rows);
        if (token_ids.size() != rows)
            return {kBadCount, static_cast<int64_t>(token_ids.size()), in.rows};
        const int32_t *sequences = at<const int32_t>(in.sequences), *positions = at<const int32_t>(in.positions);
        for (int t = 1; t < in.rows; ++t)
            if (sequences[t] == sequences[t - 1]) return {kNotSingle, t, sequences[t]};
        if (in.own_positions.empty()) in.own_positions.assign(positions, positions + rows);
        in.own_tokens = token_ids;
        in.token_ids = reinterpret_cast<uintptr_t>(in.own_tokens.data());
        in.positions = reinterpret_cast<uintptr_t>(in.own_positions.data());
        for (int32_t& position : in.own_positions) ++position;
        const Found found = check(in);
        if (found.refusal)
            for (int32_t& position : in.own_positions) --position;
        return found;
    });
}

void define_model(nb::module_& m, const Kernels* (*kernels)(int level)) {
    nb::class_<StepInputs> inputs(m, "StepInputs");
    inputs.def(nb::init<>());
#define ELASTIC_MOE_FIELD(name) inputs.def_rw(#name, &StepInputs::name)
    ELASTIC_MOE_FIELD(kv);
    ELASTIC_MOE_FIELD(kv_blocks);
    ELASTIC_MOE_FIELD(cos);
    ELASTIC_MOE_FIELD(sin);
    ELASTIC_MOE_FIELD(angle_positions);
    ELASTIC_MOE_FIELD(active);
    ELASTIC_MOE_FIELD(top_k);
    ELASTIC_MOE_FIELD(min_experts);
    ELASTIC_MOE_FIELD(threshold);
    ELASTIC_MOE_FIELD(channels);
    ELASTIC_MOE_FIELD(pool);
    ELASTIC_MOE_FIELD(subnet_count);
    ELASTIC_MOE_FIELD(logits);
    ELASTIC_MOE_FIELD(state_layers);
    ELASTIC_MOE_FIELD(states);
    ELASTIC_MOE_FIELD(trace_ids);
    ELASTIC_MOE_FIELD(trace_slots);
    ELASTIC_MOE_FIELD(threads);
#undef ELASTIC_MOE_FIELD

    nb::class_<NativeModel>(m, "Model")
        .def("__init__",
             [kernels](NativeModel* self, int level, bool bf16, int hidden, int heads, int kv_heads,
                       int head_dim, int experts, int vocab, int layers, float eps, int qk_norm,
                       bool interleaved, bool renormalize, float routing_epsilon) {
                 new (self) NativeModel(kernels(level), bf16, hidden, heads, kv_heads, head_dim,
                                        experts, vocab, layers, eps, qk_norm, interleaved,
                                        renormalize, routing_epsilon);
             })
        .def("set_layer", &NativeModel::set_layer)
        .def("set_ends", &NativeModel::set_ends)
        .def("step", &NativeModel::step, nb::arg("inputs"), nb::arg("token_ids").noconvert(),
             nb::arg("positions").noconvert(), nb::arg("sequences").noconvert(),
             nb::arg("subnets").noconvert(), nb::arg("block_tables").noconvert(),
             nb::arg("logits_rows").noconvert())
        .def("advance", &NativeModel::advance);
}

}  // namespace elastic_moe
