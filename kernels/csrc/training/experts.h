// Experts for training: a norm, the router, the experts of one sub-network, and the gradients of
// all of it. An expert's rows are one piece of work, so its gradients need no other thread's.
#pragma once

#include "core/team.h"
#include "ops/route.h"
#include "training/args.h"
#include "training/attention.h"

namespace {

using elastic_moe::ExpertsTraining;

struct ExpertSizes {
    int64_t wide;    // channels that run, in whole panels
    int64_t hidden;  // numbers per choice: gates, then ups

    explicit ExpertSizes(const ExpertsTraining& a)
        : wide(round_up(a.width, kPanel)), hidden(2 * wide) {}
};

// Floats of scratch: packed weights of one expert, and what a thread needs beside them.
static int64_t expert_weights(const ExpertsTraining& a) {
    const ExpertSizes n(a);
    return packed_size(a.hidden, 2 * n.wide) + packed_size(a.width, a.hidden) +
           packed_size(a.hidden, n.wide) + 2 * packed_size(a.width, a.hidden);
}

static int64_t expert_scratch(const ExpertsTraining& a) {
    const ExpertSizes n(a);
    const int64_t experts = round_up(a.experts, kColumns);
    return kBlockRows * (2 * a.hidden + n.hidden + 2 * n.wide) +
           2 * packed_size(a.hidden, experts) + kBlockRows * experts + experts + 64;
}

// scores = softmax of a row's logits over the pool, zeros outside it.
static inline void pool_scores(const ExpertsTraining& a, const float* logits, float* scores) {
    float top = -INFINITY, sum = 0.0f;
    for (int e = 0; e < a.experts; ++e)
        if (a.pool[e] && logits[e] > top) top = logits[e];
    for (int e = 0; e < a.experts; ++e) {
        scores[e] = a.pool[e] ? std::exp(logits[e] - top) : 0.0f;
        sum += scores[e];
    }
    for (int e = 0; e < a.experts; ++e) scores[e] /= sum;
}

// Choose for rows first..first + rows - 1, at most kBlockRows; all have one sub-network.
static inline void route_block(const ExpertsTraining& a, int64_t first, int64_t rows) {
    const int32_t subnets[kBlockRows] = {};
    RouteArgs args{};
    args.router_logits = a.router_logits + first * a.experts;
    args.subnet_of_row = subnets;
    args.subnet_index_bytes = 4;
    args.rows = rows;
    args.experts = a.experts;
    args.slots = a.slots;
    args.top_k = &a.top_k;
    args.min_experts = &a.min_experts;
    args.threshold = &a.threshold;
    args.pool = a.pool;
    args.subnets = 1;
    args.correction_bias = a.correction_bias;
    args.renormalize = a.renormalize;
    args.epsilon = a.epsilon;
    args.topk_ids = a.topk_ids + first * a.slots;
    args.topk_weights = a.topk_weights + first * a.slots;
    route_rows(args, 0, rows);
}

// Sort the choices by expert, each expert's by token.
static void sort_choices(ExpertsTraining& a) {
    for (int e = 0; e < a.experts; ++e) a.ends[e] = 0;
    const int64_t choices = a.rows * a.slots;
    for (int64_t i = 0; i < choices; ++i)
        if (a.topk_ids[i] >= 0) ++a.ends[a.topk_ids[i]];
    int32_t begin = 0;
    for (int e = 0; e < a.experts; ++e) {
        const int32_t count = a.ends[e];
        a.ends[e] = begin;
        begin += count;
    }
    for (int64_t i = 0; i < choices; ++i) {
        const int32_t e = a.topk_ids[i];
        a.place[i] = -1;
        if (e < 0) continue;
        a.place[i] = a.ends[e]++;
        a.token[a.place[i]] = static_cast<int32_t>(i / a.slots);
        a.weight[a.place[i]] = a.topk_weights[i];
    }
}

static inline int32_t first_choice(const ExpertsTraining& a, int64_t e) {
    return e ? a.ends[e - 1] : 0;
}

// Rows of `from` that the choices begin..begin + rows - 1 are about.
static inline void gather(const ExpertsTraining& a, const float* from, int64_t begin, int64_t rows,
                          float* to) {
    for (int64_t r = 0; r < rows; ++r)
        copy(to + r * a.hidden, from + static_cast<int64_t>(a.token[begin + r]) * a.hidden,
             a.hidden);
}

static inline void run_expert(ExpertsTraining& a, int64_t e, float* weights, float* scratch) {
    const ExpertSizes n(a);
    const int32_t begin = first_choice(a, e), end = a.ends[e];
    if (begin == end) return;
    const int64_t of = e * a.channels * a.hidden;
    float* const in = weights;
    float* const out = in + packed_size(a.hidden, n.hidden);
    std::memset(in, 0, sizeof(float) * static_cast<size_t>(packed_size(a.hidden, n.hidden)));
    pack_rows_as_columns(a.gate + of, a.hidden, a.width, a.hidden, 0, in);
    pack_rows_as_columns(a.up + of, a.hidden, a.width, a.hidden, n.wide, in);
    pack_rows_as_columns(a.down + of, a.channels, a.hidden, a.width, 0, out);
    pack_nothing(a.hidden, a.width, out);
    float* const inputs = scratch;
    float* const product_of = inputs + kBlockRows * a.hidden;
    for (int64_t first = begin; first < end; first += kBlockRows) {
        const int64_t rows = end - first < kBlockRows ? end - first : kBlockRows;
        float* const hidden = a.gate_up + first * n.hidden;
        gather(a, a.normed, first, rows, inputs);
        product(rows, n.hidden, a.hidden, {inputs, a.hidden, 1}, packed(in, a.hidden), hidden,
                n.hidden);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < n.wide; i += kLanes)
                store(product_of + r * n.wide + i, silu(load(hidden + r * n.hidden + i)) *
                                                       load(hidden + r * n.hidden + n.wide + i) *
                                                       a.weight[first + r]);
        product(rows, a.hidden, a.width, {product_of, n.wide, 1}, packed(out, a.width),
                a.outputs + first * a.hidden, a.hidden);
    }
}

static void experts_forward(ExpertsTraining& a) {
    const int64_t blocks = (a.rows + kBlockRows - 1) / kBlockRows;
    const int64_t wide = round_up(a.experts, kColumns);
    int pool = 0;
    for (int e = 0; e < a.experts; ++e) pool += a.pool[e] != 0;
    run_team_and_wait(a.threads, [&](Member& member) {
        float* const scratch = a.scratch + member.id * a.scratch_size;
        float* const weights = a.weights + member.id * a.weights_size;
        float* const router = scratch;  // every thread packs it for itself
        float* const logits = router + packed_size(a.hidden, wide);
        float* const scores = logits + kBlockRows * wide;
        pack_rows_as_columns(a.router, a.hidden, a.experts, a.hidden, 0, router);
        pack_nothing(a.experts, a.hidden, router);
        share_blocks(member, a.rows, [&](int64_t block, int64_t first, int64_t rows) {
            float* const sums = a.partial + block * (a.hidden + a.experts);
            for (int64_t r = first; r < first + rows; ++r) {
                a.norm_scale[r] = norm_scale(a.x + r * a.hidden, a.hidden, a.eps);
                scale_row(a.x + r * a.hidden, a.norm_scale[r], a.norm, a.hidden,
                          a.normed + r * a.hidden);
            }
            product(rows, round_up(a.experts, kPanel), a.hidden,
                    {a.normed + first * a.hidden, a.hidden, 1}, packed(router, a.hidden), logits,
                    wide);
            zero(sums, a.experts);
            for (int64_t r = 0; r < rows; ++r)
                copy(a.router_logits + (first + r) * a.experts, logits + r * wide, a.experts);
            route_block(a, first, rows);
            for (int64_t r = 0; r < rows; ++r) {
                pool_scores(a, logits + r * wide, scores);
                for (int e = 0; e < a.experts; ++e) sums[e] += scores[e];
            }
        });
        member.alone([&] {
            sort_choices(a);
            // P sum_e (share of the choices) (mean score)
            float total = 0.0f;
            const float chosen = static_cast<float>(a.ends[a.experts - 1]);
            for (int e = 0; e < a.experts; ++e) {
                float score = 0.0f;
                for (int64_t b = 0; b < blocks; ++b)
                    score += a.partial[b * (a.hidden + a.experts) + e];
                total += static_cast<float>(a.ends[e] - first_choice(a, e)) / chosen * score /
                         static_cast<float>(a.rows);
            }
            *a.balance = total * static_cast<float>(pool);
        });
        member.share(a.experts, 1, [&](int64_t e, int64_t) { run_expert(a, e, weights, scratch); });
        share_blocks(member, a.rows, [&](int64_t, int64_t first, int64_t rows) {
            for (int64_t r = first; r < first + rows; ++r)
                for (int i = 0; i < a.hidden; i += kLanes) {
                    VFloat sum = load(a.x + r * a.hidden + i);
                    for (int s = 0; s < a.slots; ++s) {
                        const int64_t place = a.place[r * a.slots + s];
                        if (place >= 0) sum += load(a.outputs + place * a.hidden + i);
                    }
                    store(a.out + r * a.hidden + i, sum);
                }
        });
    });
}

// The gradients of one expert's weights, and of its inputs and weights of choice.
static inline void run_expert_back(ExpertsTraining& a, int64_t e, float* weights, float* scratch) {
    const ExpertSizes n(a);
    const int32_t begin = first_choice(a, e), end = a.ends[e];
    const int64_t of = e * a.channels * a.hidden;
    if (begin == end) return;                                  // the gradients are zeros already
    float* const down = weights;                               // (D, c)
    float* const gate = down + packed_size(a.hidden, n.wide);  // (c, D)
    float* const up = gate + packed_size(a.width, a.hidden);   // (c, D)
    pack_rows(a.down + of, a.channels, a.hidden, a.width, 0, a.hidden, down);
    pack_rows(a.gate + of, a.hidden, a.width, a.hidden, 0, a.width, gate);
    pack_rows(a.up + of, a.hidden, a.width, a.hidden, 0, a.width, up);
    // The packed columns past `width` belong to the last panel and are zeros.
    float* const inputs = scratch;
    float* const grads = inputs + kBlockRows * a.hidden;
    float* const grad_hidden = grads + kBlockRows * a.hidden;  // of gates, then of ups
    float* const products = grad_hidden + kBlockRows * n.hidden;
    float* const grad_products = products + kBlockRows * n.wide;
    for (int64_t first = begin; first < end; first += kBlockRows) {
        const int64_t rows = end - first < kBlockRows ? end - first : kBlockRows;
        const bool more = first > begin;
        const float* const hidden = a.gate_up + first * n.hidden;
        gather(a, a.normed, first, rows, inputs);
        gather(a, a.grad_out, first, rows, grads);
        product(rows, n.wide, a.hidden, {grads, a.hidden, 1}, packed(down, a.hidden), grad_products,
                n.wide);
        for (int64_t r = 0; r < rows; ++r) {
            const float weight = a.weight[first + r];
            VFloat grad_weight = {};
            for (int64_t i = 0; i < n.wide; i += kLanes) {
                const VFloat g = load(hidden + r * n.hidden + i);
                const VFloat u = load(hidden + r * n.hidden + n.wide + i);
                const VFloat small = exp_nonpositive(g > 0.0f ? -g : g);
                const VFloat sigmoid = (g > 0.0f ? broadcast(1.0f) : small) / (small + 1.0f);
                const VFloat act = g * sigmoid;
                const VFloat grad = load(grad_products + r * n.wide + i);
                grad_weight = fma(grad, act * u, grad_weight);
                store(products + r * n.wide + i, act * u * weight);
                // silu' = sigmoid + silu (1 - sigmoid)
                store(grad_hidden + r * n.hidden + i,
                      grad * weight * u * (sigmoid + act * (1.0f - sigmoid)));
                store(grad_hidden + r * n.hidden + n.wide + i, grad * weight * act);
            }
            a.grad_weight[first + r] = reduce_sum(grad_weight);
        }
        product(rows, a.hidden, a.width, {grad_hidden, n.hidden, 1}, packed(gate, a.width),
                a.outputs + first * a.hidden, a.hidden);
        product(rows, a.hidden, a.width, {grad_hidden + n.wide, n.hidden, 1}, packed(up, a.width),
                a.outputs + first * a.hidden, a.hidden, true);
        product(a.width, a.hidden, rows, {grad_hidden, 1, n.hidden}, row_major(inputs, a.hidden),
                a.grad_gate + of, a.hidden, more);
        product(a.width, a.hidden, rows, {grad_hidden + n.wide, 1, n.hidden},
                row_major(inputs, a.hidden), a.grad_up + of, a.hidden, more);
        product(a.hidden, n.wide, rows, {grads, 1, a.hidden}, row_major(products, n.wide),
                a.grad_down + of, a.channels, more);
    }
}

// The gradient of a row's logits from those of its weights of choice and of the balance.
static inline void route_back(const ExpertsTraining& a, int64_t row, const float* pull,
                              float* scores, float* grad_scores, float* grad_logits) {
    pool_scores(a, a.router_logits + row * a.experts, scores);
    for (int e = 0; e < a.experts; ++e) grad_scores[e] = pull[e];
    const int32_t* const ids = a.topk_ids + row * a.slots;
    float total = 0.0f, drawn = 0.0f;
    for (int s = 0; s < a.slots; ++s) {
        if (ids[s] < 0) continue;
        total += scores[ids[s]];
        drawn += a.grad_weight[a.place[row * a.slots + s]] * a.topk_weights[row * a.slots + s];
    }
    for (int s = 0; s < a.slots; ++s) {
        if (ids[s] < 0) continue;
        const float grad = a.grad_weight[a.place[row * a.slots + s]];
        if (!a.renormalize) grad_scores[ids[s]] += grad;
        else if (total > a.epsilon) grad_scores[ids[s]] += (grad - drawn) / total;
        else grad_scores[ids[s]] += grad / a.epsilon;
    }
    float mean = 0.0f;
    for (int e = 0; e < a.experts; ++e) mean += scores[e] * grad_scores[e];
    for (int e = 0; e < a.experts; ++e) grad_logits[e] = scores[e] * (grad_scores[e] - mean);
}

static void experts_backward(ExpertsTraining& a) {
    const int64_t blocks = (a.rows + kBlockRows - 1) / kBlockRows;
    const int64_t wide = round_up(a.experts, kColumns);
    const int64_t partial_row = a.hidden + a.experts;
    int pool = 0;
    for (int e = 0; e < a.experts; ++e) pool += a.pool[e] != 0;
    run_team_and_wait(a.threads, [&](Member& member) {
        float* const scratch = a.scratch + member.id * a.scratch_size;
        float* const weights = a.weights + member.id * a.weights_size;
        member.share(a.experts, 1,
                     [&](int64_t e, int64_t) { run_expert_back(a, e, weights, scratch); });
        float* const router = scratch;
        float* const grads = router + packed_size(a.experts, a.hidden);
        float* const scores = grads + kBlockRows * a.hidden;
        float* const grad_scores = scores + wide;
        float* const pull = grad_scores + wide;
        pack_rows(a.router, a.hidden, a.experts, a.hidden, 0, a.experts, router);
        const float share =
            a.grad_balance * static_cast<float>(pool) /
            (static_cast<float>(a.ends[a.experts - 1]) * static_cast<float>(a.rows));
        for (int e = 0; e < a.experts; ++e)
            pull[e] = a.pool[e] ? share * static_cast<float>(a.ends[e] - first_choice(a, e)) : 0.0f;
        share_blocks(member, a.rows, [&](int64_t block, int64_t first, int64_t rows) {
            float* const gains = a.partial + block * partial_row;
            zero(gains, a.hidden);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t row = first + r;
                route_back(a, row, pull, scores, grad_scores, a.grad_logits + row * a.experts);
                for (int i = 0; i < a.hidden; i += kLanes) {
                    VFloat sum = {};
                    for (int s = 0; s < a.slots; ++s) {
                        const int64_t place = a.place[row * a.slots + s];
                        if (place >= 0) sum += load(a.outputs + place * a.hidden + i);
                    }
                    store(grads + r * a.hidden + i, sum);
                }
            }
            product(rows, a.hidden, a.experts, {a.grad_logits + first * a.experts, a.experts, 1},
                    packed(router, a.experts), grads, a.hidden, true);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = (first + r) * a.hidden;
                norm_backward(a.x + at, a.norm_scale[first + r], a.norm, grads + r * a.hidden,
                              a.grad_out + at, a.hidden, a.grad_x + at, gains);
            }
        });
        share_matrix_gradient(member, a.grad_logits, a.experts, a.normed, a.hidden, a.rows,
                              a.experts, a.hidden, a.grad_router);
        member.alone([&] { sum_rows(a.partial, blocks, partial_row, a.hidden, a.grad_norm); });
    });
}

}  // namespace
