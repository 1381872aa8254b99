// One step of a model: what Python handed over is checked, rows are sorted by layer, memory is
// shared out, and the level's kernel runs.
#include <algorithm>
#include <cstring>
#include <utility>

#include "bindings/model.h"
#include "ops/attention_shares.h"
#include "ops/expert_plan.h"

namespace nb = nanobind;

namespace elastic_moe {

NativeModel::Found NativeModel::check(const StepInputs& in) const {
    const int32_t *tokens = in.token_ids, *positions = in.positions;
    const int32_t *sequences = in.sequences, *subnets = in.subnets;
    const uint8_t* const active = in.table->active_bytes();
    const int64_t L = weights_.layers;
    std::vector<bool> seen(static_cast<size_t>(in.sequence_count));
    for (int t = 0; t < in.rows; ++t) {
        if (tokens[t] < 0 || tokens[t] >= weights_.vocab) return {kBadToken, t, tokens[t]};
        if (positions[t] < 0 || positions[t] >= in.angle_positions() ||
            positions[t] / kBlockPositions >= in.table_blocks)
            return {kBadPosition, t, positions[t]};
        if (sequences[t] < 0 || sequences[t] >= in.sequence_count)
            return {kBadSequence, t, sequences[t]};
        if (subnets[t] < 0 || subnets[t] >= in.subnet_count())
            return {kBadRowSubnet, t, subnets[t]};
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
        const int32_t* const tables = in.block_tables + sequences[t] * L * in.table_blocks;
        for (int64_t l = 0; l < L; ++l)
            for (int b = 0; active[subnets[t] * L + l] && b <= positions[t] / kBlockPositions;
                 ++b) {
                const int32_t block = tables[l * in.table_blocks + b];
                if (block < 0 || block >= in.kv_blocks())
                    return {kBadBlock, sequences[t], block, l};
            }
    }
    const int32_t* const wanted = in.logits_rows;
    for (int i = 0; i < in.logits_count; ++i)
        if (wanted[i] < 0 || wanted[i] >= in.rows) return {kBadLogitsRow, i, wanted[i]};
    return {};
}

// Whether what Python allocated for the results has room for them.
bool NativeModel::outputs_fit(const StepInputs& in) const {
    const size_t rows = static_cast<size_t>(in.rows), layers = layer_.size();
    bool fit = true;
    if (in.logits.is_valid())
        fit &= in.logits.shape(0) == static_cast<size_t>(in.logits_count) &&
               in.logits.shape(1) == static_cast<size_t>(weights_.vocab);
    if (in.state_layers.is_valid()) {
        size_t copies = 0;
        fit &= in.state_layers.shape(0) == layers + 1;
        for (size_t l = 0; fit && l <= layers; ++l) copies += in.state_layers.data()[l];
        fit &= in.states.is_valid() && in.states.shape(0) == copies && in.states.shape(1) == rows &&
               in.states.shape(2) == static_cast<size_t>(weights_.hidden);
    }
    if (in.trace_ids.is_valid())
        fit &= in.trace_ids.shape(0) == layers && in.trace_ids.shape(1) == rows;
    return fit;
}

void NativeModel::sort_rows(const StepInputs& in) {
    const int32_t *positions = in.positions, *sequences = in.sequences, *subnets = in.subnets;
    const int32_t* const top_k = in.table->top_k.data();
    const uint8_t* const active = in.table->active_bytes();
    const int L = weights_.layers;
    const size_t layers = static_cast<size_t>(L);
    layers_.assign(layers, LayerRows{});
    row_lists_.resize(layers);
    subnet_lists_.resize(layers);
    spans_.clear();
    spans_.reserve(layers *
                   static_cast<size_t>(in.sequence_count));  // so that pointers into it stay
    blocks_.resize(static_cast<size_t>(in.sequence_count) * layers);
    for (size_t i = 0; i < blocks_.size(); ++i)
        blocks_[i] = in.block_tables + i * static_cast<size_t>(in.table_blocks);
    most_slots_ = 1;
    // A table has rows that no token of this step names.
    used_subnets_.clear();
    std::vector<bool> seen(static_cast<size_t>(in.subnet_count()));
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
                spans_.push_back(
                    {n, 1, positions[t],
                     blocks_[static_cast<size_t>(sequences[t]) * layers + static_cast<size_t>(l)]});
                ++here.span_count;
            }
        }
        here.attention = share_attention(here.spans, here.span_count, weights_.kv_heads,
                                         weights_.heads / weights_.kv_heads, in.threads);
        here.slots = 1;
        for (const int64_t s : used_subnets_)
            if (active[s * L + l] && top_k[s * L + l] > here.slots) here.slots = top_k[s * L + l];
        if (here.slots > most_slots_) most_slots_ = here.slots;
    }
}

void NativeModel::reserve(const StepInputs& in, StepArgs& a) {
    const int64_t T = in.rows > in.logits_count ? in.rows : in.logits_count;
    const int64_t value_bytes = weights_.bf16 ? 2 : 4;
    const int64_t heads = static_cast<int64_t>(weights_.heads) * weights_.head_dim;
    const int64_t kv_heads = static_cast<int64_t>(weights_.kv_heads) * weights_.head_dim;
    a.input_stride = whole_vectors(weights_.hidden);
    a.own_rows =
        static_cast<int>(kFewNumbers / weights_.hidden < T ? kFewNumbers / weights_.hidden : T);
    a.head_stride = whole_vectors(heads);
    int64_t partials = 0, runs = 0;
    for (const LayerRows& here : layers_) {
        const int64_t floats =
            partial_floats(here.attention, weights_.heads / weights_.kv_heads, weights_.head_dim);
        if (floats > partials) partials = floats;
        if (here.attention.partials > runs) runs = here.attention.partials;
    }
    workspace_.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) workspace_.hand_out();
        a.stream = workspace_.take<float>(T * weights_.hidden);
        a.normed = workspace_.take<float>(T * weights_.hidden);
        a.inputs = workspace_.take_bytes(T * a.input_stride * value_bytes);
        a.own_inputs =
            workspace_.take_bytes(in.threads * a.own_rows * a.input_stride * value_bytes);
        a.qkv = workspace_.take<float>(T * (heads + 2 * kv_heads));
        a.queries = workspace_.take_bytes(T * a.head_stride * value_bytes);
        a.attended = workspace_.take_bytes(T * a.head_stride * value_bytes);
        a.partials = workspace_.take<float>(partials);
        a.runs_done = workspace_.take<int32_t>(runs);
        a.router_logits = workspace_.take<float>(T * weights_.experts);
        a.topk_ids = workspace_.take<int32_t>(T * most_slots_);
        a.topk_weights = workspace_.take<float>(T * most_slots_);
        a.row_channels = workspace_.take<int32_t>(T);
        a.sums = workspace_.take<float>(T * kDownColumns * in.threads);
        a.logits =
            in.logits.is_valid()
                ? in.logits.data()
                : workspace_.take<float>(static_cast<int64_t>(in.logits_count) * weights_.vocab);
        take_plan(workspace_, a.plan, T, T * (most_slots_ + 1), weights_.experts, most_channels_,
                  value_bytes);
    }
    std::fill(a.runs_done, a.runs_done + runs, 0);
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
    a.token_ids = in.token_ids;
    a.positions = in.positions;
    a.sequences = in.sequences;
    a.layers = layers_.data();
    a.blocks = blocks_.data();
    a.kv = {in.blocks.data(), weights_.kv_heads, weights_.head_dim};
    a.cos = in.angles->cos.data();
    a.sin = in.angles->sin.data();
    a.top_k = in.table->top_k.data();
    a.min_experts = in.table->min_experts.data();
    a.threshold = in.table->threshold.data();
    a.channels = in.table->channels.data();
    a.pool = reinterpret_cast<const uint8_t*>(in.table->pool.data());
    a.subnets = in.subnet_count();
    a.logits_rows = in.logits_rows;
    a.logits_count = in.logits_count;
    a.state_layers = reinterpret_cast<const uint8_t*>(data_or_null(in.state_layers));
    a.states = data_or_null(in.states);
    a.trace_ids = data_or_null(in.trace_ids);
    a.trace_slots = in.trace_ids.is_valid() ? static_cast<int>(in.trace_ids.shape(2)) : 0;
    a.threads = in.threads;
    reserve(in, a);
    std::vector<int32_t> best_ids(static_cast<size_t>(in.logits_count));
    a.best_ids = best_ids.data();
    std::vector<int64_t> sequence_experts(static_cast<size_t>(in.sequence_count));
    a.sequence_experts = sequence_experts.data();
    kernels_->step(a);
    const Counters& c = a.counters;
    return {kStepFine,
            0,
            0,
            0,
            std::move(best_ids),
            std::move(sequence_experts),
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
        in.rows = static_cast<int>(rows);
        in.token_ids = token_ids.data();
        in.positions = positions.data();
        in.sequences = sequences.data();
        in.subnets = subnets.data();
        in.sequence_count = static_cast<int>(block_tables.shape(0));
        in.table_blocks = static_cast<int>(block_tables.shape(2));
        in.block_tables = block_tables.data();
        in.logits_count = static_cast<int>(logits_rows.shape(0));
        in.logits_rows = logits_rows.data();
        in.own_tokens.clear();
        in.own_positions.clear();
        return outputs_fit(in) ? check(in) : Found{kBadShapes};
    });
}

NativeModel::Answer NativeModel::advance(StepInputs& in, const std::vector<int32_t>& token_ids) {
    nb::gil_scoped_release release;
    return run(in, [&]() -> Found {
        const size_t rows = static_cast<size_t>(in.rows);
        if (token_ids.size() != rows)
            return {kBadCount, static_cast<int64_t>(token_ids.size()), in.rows};
        const int32_t *sequences = in.sequences, *positions = in.positions;
        for (int t = 1; t < in.rows; ++t)
            if (sequences[t] == sequences[t - 1]) return {kNotSingle, t, sequences[t]};
        if (in.own_positions.empty()) in.own_positions.assign(positions, positions + rows);
        in.own_tokens = token_ids;
        in.token_ids = in.own_tokens.data();
        in.positions = in.own_positions.data();
        for (int32_t& position : in.own_positions) ++position;
        const Found found = check(in);
        if (found.refusal)
            for (int32_t& position : in.own_positions) --position;
        return found;
    });
}

}  // namespace elastic_moe
