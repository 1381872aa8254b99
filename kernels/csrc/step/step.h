// A whole step: a flat batch of tokens from many sequences, each with its own sub-network, through
// all layers in one parallel region.
//
// A layer is a chain of phases. Those that stream weights are shared out piece by piece; so are
// those that work on single rows, unless there is so little to do that one thread is done sooner.
#pragma once

#include "ops/argmax.h"
#include "ops/attention.h"
#include "ops/experts.h"
#include "ops/linear.h"
#include "ops/norm.h"
#include "ops/route.h"
#include "step/args.h"

namespace {

using elastic_moe::Counters;
using elastic_moe::kFewNumbers;
using elastic_moe::LayerRows;
using elastic_moe::LayerWeights;
using elastic_moe::ModelWeights;
using elastic_moe::QKNorm;
using elastic_moe::StepArgs;

// A matrix of up to this many bytes is not worth sharing out, for few rows.
constexpr int64_t kAloneBytes = 32 << 10;

// Phase: body(row) for 0..rows-1, `cost` numbers each.
template <class Body>
static inline void each_row(Member& member, int rows, int64_t cost, Body body) {
    const int64_t grain = rows * cost <= kAlone ? rows : rows / (8 * member.threads);
    member.share(rows, grain < 1 ? 1 : grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
    });
}

template <class Kind>
static inline typename Kind::Value* row_of(void* data, int64_t stride, int64_t row) {
    return static_cast<typename Kind::Value*>(data) + stride * row;
}

template <class Kind>
static inline int64_t matrix_bytes(const Matrix& m) {
    return static_cast<int64_t>(groups_of(m.outputs)) * steps_of<Kind>(m.inputs) * kStepBytes;
}

// One key/value head of a row, and the query heads of its group: norm, rotate, put the queries
// aside and the rest into the cache. `q`, `k`, `v` are the row's, of all heads.
template <class Kind>
static void finish_head(const StepArgs& s, const LayerWeights& layer, int index, int n, int row,
                        int head) {
    const ModelWeights& m = *s.model;
    const int d = m.head_dim, group = m.heads / m.kv_heads;
    float* const q = s.qkv + static_cast<int64_t>(n) * (m.heads + 2 * m.kv_heads) * d;
    float* const k = q + (m.heads + head) * d;
    const float* const v = q + (m.heads + m.kv_heads + head) * d;
    const int position = s.positions[row];
    const float* const cos = s.cos + static_cast<int64_t>(position) * (d / 2);
    const float* const sin = s.sin + static_cast<int64_t>(position) * (d / 2);
    const int32_t* const blocks =
        s.blocks[static_cast<int64_t>(s.sequences[row]) * m.layers + index];
    for (int h = head * group; h < (head + 1) * group; ++h) {
        if (m.qk_norm == QKNorm::kHead) rms_norm(q + h * d, layer.q_norm, d, m.eps, q + h * d);
        rotate(q + h * d, cos, sin, d, m.interleaved);
    }
    if (m.qk_norm == QKNorm::kHead) rms_norm(k, layer.k_norm, d, m.eps, k);
    rotate(k, cos, sin, d, m.interleaved);
    store_kv<Kind>(s.kv, blocks, position, head, k, v);
}
// All heads of a row.
template <class Kind>
static void finish_row(const StepArgs& s, const LayerWeights& layer, int index, int n, int row) {
    const ModelWeights& m = *s.model;
    const int q_size = m.heads * m.head_dim, kv_size = m.kv_heads * m.head_dim;
    float* const q = s.qkv + static_cast<int64_t>(n) * (q_size + 2 * kv_size);
    if (m.qk_norm == QKNorm::kAll) {
        rms_norm(q, layer.q_norm, q_size, m.eps, q);
        rms_norm(q + q_size, layer.k_norm, kv_size, m.eps, q + q_size);
    }
    for (int h = 0; h < m.kv_heads; ++h) finish_head<Kind>(s, layer, index, n, row, h);
    to_inputs<Kind>(q, q_size, s.head_stride, row_of<Kind>(s.queries, s.head_stride, n));
}

template <class Kind>
static void run_attention_block(Member& member, StepArgs& s, int index) {
    const ModelWeights& m = *s.model;
    const LayerWeights& layer = m.layer[index];
    const LayerRows& here = s.layers[index];
    const int group_size = m.heads / m.kv_heads * m.head_dim;
    const int qkv_size = (m.heads + 2 * m.kv_heads) * m.head_dim;
    const bool few = here.rows <= s.own_rows;
    void* const inputs = few ? row_of<Kind>(s.own_inputs, s.input_stride,
                                            static_cast<int64_t>(member.id) * s.own_rows)
                             : s.inputs;
    const auto norm_row = [&](int n, float* normed) {
        rms_norm(s.stream + static_cast<int64_t>(here.row[n]) * m.hidden, layer.attention_norm,
                 m.hidden, m.eps, normed);
        to_inputs<Kind>(normed, m.hidden, s.input_stride, row_of<Kind>(inputs, s.input_stride, n));
    };
    if (!few)
        each_row(member, here.rows, m.hidden,
                 [&](int n) { norm_row(n, s.normed + static_cast<int64_t>(n) * m.hidden); });
    multiply_rows<Kind>(
        member, layer.qkv, here.rows,
        [&](int n) { return row_of<Kind>(inputs, s.input_stride, n); },
        [&](int n, int column, int count, const float* sums) {
            store_panel(s.qkv + static_cast<int64_t>(n) * qkv_size + column, sums, count);
        },
        [&] {
            float normed[kFewNumbers];
            for (int n = 0; few && n < here.rows; ++n) norm_row(n, normed);
        });
    // Single tokens of many sequences: no other piece waits for a head's keys. Whole vectors only,
    // as heads of one row are then finished side by side.
    const bool singly = here.span_count == here.rows && here.attention.runs == 1 &&
                        m.qk_norm != QKNorm::kAll && group_size % kPanel == 0;
    if (!singly)
        each_row(member, here.rows, qkv_size,
                 [&](int n) { finish_row<Kind>(s, layer, index, n, here.row[n]); });

    AttentionArgs args = {};
    args.kv = s.kv;
    args.shares = here.attention;
    args.partials = s.partials;
    args.runs_done = s.runs_done;
    args.heads = m.heads;
    args.scale = 1.0f / std::sqrt(static_cast<float>(m.head_dim));
    args.queries = s.queries;
    args.query_stride = s.head_stride;
    args.spans = here.spans;
    args.span_count = here.span_count;
    args.out = s.attended;
    args.out_stride = s.head_stride;
    run_attention<Kind>(member, args, [&](const Span& span, int head) {
        if (!singly) return;
        finish_head<Kind>(s, layer, index, span.row, here.row[span.row], head);
        const int64_t begin = static_cast<int64_t>(head) * group_size;
        to_inputs<Kind>(s.qkv + static_cast<int64_t>(span.row) * qkv_size + begin, group_size,
                        group_size, row_of<Kind>(s.queries, s.head_stride, span.row) + begin);
    });
    multiply_rows<Kind>(
        member, layer.out, here.rows,
        [&](int n) { return row_of<Kind>(s.attended, s.head_stride, n); },
        [&](int n, int column, int count, const float* sums) {
            add_panel(s.stream + static_cast<int64_t>(here.row[n]) * m.hidden + column, sums,
                      count);
        });
}

static inline elastic_moe::RouteArgs route_args(const StepArgs& s, int index) {
    const ModelWeights& m = *s.model;
    const LayerRows& here = s.layers[index];
    elastic_moe::RouteArgs args = {};
    args.router_logits = s.router_logits;
    args.subnet_of_row = here.subnets;
    args.subnet_index_bytes = 4;
    args.rows = here.rows;
    args.experts = m.experts;
    args.slots = here.slots;
    args.top_k = s.top_k + index;
    args.top_k_stride = m.layers;
    args.min_experts = s.min_experts + index;
    args.min_experts_stride = m.layers;
    args.threshold = s.threshold + index;
    args.threshold_stride = m.layers;
    args.pool = s.pool + static_cast<int64_t>(index) * m.experts;
    args.pool_stride = static_cast<int64_t>(m.layers) * m.experts;
    args.subnets = s.subnets;
    args.correction_bias = m.layer[index].correction_bias;
    args.renormalize = m.renormalize;
    args.epsilon = m.routing_epsilon;
    args.topk_ids = s.topk_ids;
    args.topk_weights = s.topk_weights;
    return args;
}

// After the routing: the plan, the trace, the counters. One thread.
template <class Kind>
static void plan_layer(StepArgs& s, int index) {
    const ModelWeights& m = *s.model;
    const LayerWeights& layer = m.layer[index];
    const LayerRows& here = s.layers[index];
    s.plan.jobs_used = 0;
    s.plan.slots_used = 0;
    if (layer.experts.experts) {
        for (int n = 0; n < here.rows; ++n)
            s.row_channels[n] =
                s.channels[static_cast<int64_t>(here.subnets[n]) * m.layers + index];
        plan_experts<Kind>(s.plan, layer.experts, s.topk_ids, s.topk_weights, s.row_channels,
                           here.rows, here.slots);
        s.counters.experts_run += s.plan.slots_used;
        for (int n = 0; n < here.rows; ++n)
            for (int slot = 0; slot < here.slots; ++slot)
                s.sequence_experts[s.sequences[here.row[n]]] +=
                    s.topk_ids[static_cast<int64_t>(n) * here.slots + slot] >= 0;
        s.counters.rows_routed += here.rows;
        if (s.trace_ids) {
            int32_t* const trace =
                s.trace_ids + static_cast<int64_t>(index) * s.rows * s.trace_slots;
            for (int n = 0; n < here.rows; ++n)
                std::memcpy(trace + static_cast<int64_t>(here.row[n]) * s.trace_slots,
                            s.topk_ids + static_cast<int64_t>(n) * here.slots,
                            sizeof(int32_t) * static_cast<size_t>(here.slots));
        }
    }
    if (layer.everyone.channels) plan_everyone<Kind>(s.plan, layer.everyone, here.rows);

    Counters& c = s.counters;
    const int gains =
        2 * m.hidden + (m.qk_norm == QKNorm::kNone   ? 0
                        : m.qk_norm == QKNorm::kHead ? 2 * m.head_dim
                                                     : (m.heads + m.kv_heads) * m.head_dim);
    const int normed =
        2 * m.hidden + (m.qk_norm == QKNorm::kNone ? 0 : (m.heads + m.kv_heads) * m.head_dim);
    c.weight_bytes += matrix_bytes<Kind>(layer.qkv) + matrix_bytes<Kind>(layer.out) +
                      matrix_bytes<Float32>(layer.router) + 4 * gains;
    const int64_t products = static_cast<int64_t>(layer.qkv.outputs) * m.hidden +
                             static_cast<int64_t>(layer.out.inputs) * m.hidden +
                             static_cast<int64_t>(layer.router.outputs) * m.hidden;
    c.flops += here.rows * (2 * products + 4 * static_cast<int64_t>(normed));
    for (int i = 0; i < here.span_count; ++i) {
        const Span& span = here.spans[i];
        const int64_t last = span.position + span.rows;
        // Sum of position + 1 over the span's rows.
        const int64_t seen = span.rows * static_cast<int64_t>(span.position) +
                             static_cast<int64_t>(span.rows) * (span.rows + 1) / 2;
        c.flops += 4 * seen * m.heads * m.head_dim;
        c.kv_bytes +=
            2 * last * m.kv_heads * m.head_dim * static_cast<int64_t>(sizeof(typename Kind::Value));
    }
    count_plan<Kind>(s.plan, c.weight_bytes, c.flops);
}

template <class Kind>
static void run_mlp_block(Member& member, StepArgs& s, int index) {
    const ModelWeights& m = *s.model;
    const LayerWeights& layer = m.layer[index];
    const LayerRows& here = s.layers[index];
    const bool routed = layer.experts.experts > 0;
    const auto norm_row = [&](int n) {
        float* const normed = s.normed + static_cast<int64_t>(n) * m.hidden;
        rms_norm(s.stream + static_cast<int64_t>(here.row[n]) * m.hidden, layer.mlp_norm, m.hidden,
                 m.eps, normed);
        to_inputs<Kind>(normed, m.hidden, s.input_stride,
                        row_of<Kind>(s.inputs, s.input_stride, n));
    };
    // The router sees the norm's output itself, never rounded.
    const auto router_input = [&](int n) { return s.normed + static_cast<int64_t>(n) * m.hidden; };
    const auto router_output = [&](int n, int column, int count, const float* sums) {
        store_panel(s.router_logits + static_cast<int64_t>(n) * m.experts + column, sums, count);
    };
    const elastic_moe::RouteArgs route = route_args(s, index);
    const bool together =
        here.rows <= s.own_rows && matrix_bytes<Float32>(layer.router) <= kAloneBytes;
    const bool route_alone = together || route.rows * route.experts <= kAlone / 16;
    if (!together) {
        each_row(member, here.rows, m.hidden, norm_row);
        if (routed)
            multiply_rows<Float32>(member, layer.router, here.rows, router_input, router_output);
        if (routed && !route_alone)
            member.share(route.rows, 1 + route.rows / (4 * member.threads),
                         [&](int64_t begin, int64_t end) { route_rows(route, begin, end); });
    }
    member.alone([&] {
        if (together) {
            for (int n = 0; n < here.rows; ++n) norm_row(n);
            if (routed)
                multiply_panels<Float32>(layer.router, RowTiles(here.rows), 0,
                                         panels_of(layer.router), -1, router_input, router_output);
        }
        if (routed && route_alone) route_rows(route, 0, route.rows);
        plan_layer<Kind>(s, index);
    });
    run_gate_up<Kind>(member, s.plan,
                      [&](int n) { return row_of<Kind>(s.inputs, s.input_stride, n); });
    float* const sums = s.sums + static_cast<int64_t>(member.id) * s.rows * kDownColumns;
    run_down<Kind>(member, s.plan, here.rows, m.hidden, sums,
                   [&](int n) { return s.stream + static_cast<int64_t>(here.row[n]) * m.hidden; });
}

// Copy the stream if it is wanted after `layers` layers.
static inline void copy_state(Member& member, StepArgs& s, int layers, int64_t& copies) {
    if (!s.state_layers || !s.state_layers[layers]) return;
    const int64_t size = s.model->hidden;
    float* const to = s.states + copies++ * s.rows * size;
    member.share(s.rows, 16, [&](int64_t begin, int64_t end) {
        std::memcpy(to + begin * size, s.stream + begin * size,
                    sizeof(float) * static_cast<size_t>((end - begin) * size));
    });
}

template <class Kind>
static void step_as(Member& member, StepArgs& s) {
    const ModelWeights& m = *s.model;
    each_row(member, s.rows, m.hidden, [&](int row) {
        const typename Kind::Value* from = static_cast<const typename Kind::Value*>(m.embeddings) +
                                           static_cast<int64_t>(s.token_ids[row]) * m.hidden;
        float* const to = s.stream + static_cast<int64_t>(row) * m.hidden;
        for (int i = 0; i < m.hidden; ++i) to[i] = Kind::widen(from[i]);
    });
    int64_t copies = 0;
    copy_state(member, s, 0, copies);
    for (int index = 0; index < m.layers; ++index) {
        if (s.layers[index].rows) {
            run_attention_block<Kind>(member, s, index);
            run_mlp_block<Kind>(member, s, index);
        }
        copy_state(member, s, index + 1, copies);
    }
    if (!s.logits_count) return;
    each_row(member, s.logits_count, m.hidden, [&](int i) {
        float* const normed = s.normed + static_cast<int64_t>(i) * m.hidden;
        rms_norm(s.stream + static_cast<int64_t>(s.logits_rows[i]) * m.hidden, m.final_norm,
                 m.hidden, m.eps, normed);
        to_inputs<Kind>(normed, m.hidden, s.input_stride,
                        row_of<Kind>(s.inputs, s.input_stride, i));
    });
    multiply_rows<Kind>(
        member, m.head, s.logits_count,
        [&](int i) { return row_of<Kind>(s.inputs, s.input_stride, i); },
        [&](int i, int column, int count, const float* sums) {
            bool finite = true;
            for (int j = 0; j < count; ++j) finite &= sums[j] - sums[j] == 0.0f;
            if (!finite) __atomic_store_n(s.best_ids + i, -1, __ATOMIC_RELAXED);
            store_panel(s.logits + static_cast<int64_t>(i) * m.vocab + column, sums, count);
        });
    each_row(member, s.logits_count, m.vocab, [&](int i) {
        if (s.best_ids[i] < 0) __atomic_store_n(&s.counters.finite, 0, __ATOMIC_RELAXED);
        else s.best_ids[i] = argmax(s.logits + static_cast<int64_t>(i) * m.vocab, m.vocab);
    });
}

static void step(StepArgs& s) {
    const ModelWeights& m = *s.model;
    s.counters = {};
    s.counters.finite = 1;
    if (!s.rows) return;
    if (s.logits_count) {
        s.counters.weight_bytes =
            (m.bf16 ? matrix_bytes<Bf16>(m.head) : matrix_bytes<Float32>(m.head)) + 4 * m.hidden;
        s.counters.flops = s.logits_count * (2 * static_cast<int64_t>(m.vocab) * m.hidden +
                                             4 * static_cast<int64_t>(m.hidden));
    }
    // Threads read these between phases.
    const size_t layers = static_cast<size_t>(m.layers);
    const size_t rows_bytes = layers * sizeof(LayerRows);
    run_team(
        s.threads, s,
        [](Member& member, StepArgs& a) {
            if (a.model->bf16) step_as<Bf16>(member, a);
            else step_as<Float32>(member, a);
        },
        rows_bytes + layers + 1,
        [&](StepArgs& copy, char* memory) {
            copy.layers = reinterpret_cast<LayerRows*>(memory);
            std::memcpy(memory, s.layers, rows_bytes);
            if (!s.state_layers) return;
            copy.state_layers = reinterpret_cast<uint8_t*>(memory + rows_bytes);
            std::memcpy(memory + rows_bytes, s.state_layers, layers + 1);
        });
}

}  // namespace
