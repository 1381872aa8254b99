// Attention for training: a norm, projections, norms of heads, rotation, causal attention, the way
// out, and the gradients of all of it.
//
// Every sum is taken in an order that the shapes fix, never by which thread does it, so a step has
// the same bits on any number of threads. Probabilities are computed again on the way back, from
// the logarithm of their sum: a sequence of n tokens keeps n numbers per head, not n^2.
#pragma once

#include "core/team.h"
#include "training/args.h"
#include "training/norm.h"

namespace {

using elastic_moe::AttentionTraining;

struct AttentionSizes {
    int64_t q, kv, all, turned;  // numbers per row: of queries, of keys, of q k v, of q k
    int64_t keys;                // of a sequence, in whole panels
    int64_t scores;              // from one row of scores to the next: no power of two, whose
                                 // columns would meet in few sets of the cache

    explicit AttentionSizes(const AttentionTraining& a)
        : q(static_cast<int64_t>(a.heads) * a.head_dim),
          kv(static_cast<int64_t>(a.kv_heads) * a.head_dim),
          all(q + 2 * kv),
          turned(q + kv),
          keys(round_up(a.length, kColumns)),
          scores(keys + kPanel) {}
};

// Floats of scratch that one thread needs, and that packed weights take.
static int64_t attention_scratch(const AttentionTraining& a) {
    const AttentionSizes n(a);
    const int64_t d = round_up(a.head_dim, kColumns);
    // Forward: k^T, v, scores. Backward: k^T, k, v^T, probabilities, gradients of scores, a block
    // of queries and one of gradients.
    return 4 * n.keys * d + 2 * kBlockRows * n.scores + 2 * kBlockRows * (d + a.hidden + n.all) +
           64;
}

static int64_t attention_weights(const AttentionTraining& a) {
    const AttentionSizes n(a);
    return packed_size(a.hidden, n.all) + packed_size(n.all, a.hidden) +
           packed_size(n.q, a.hidden) + packed_size(a.hidden, n.q);
}

// The heads of one row: normed where there are norms, then rotated. `raw` stays.
static inline void turn_heads(const AttentionTraining& a, int64_t row, const float* raw,
                              float* to) {
    const int d = a.head_dim, half = d / 2;
    const int64_t position = row % a.length;
    for (int h = 0; h < a.heads + a.kv_heads; ++h) {
        const float* const gain = h < a.heads ? a.q_norm : a.k_norm;
        float* const head = to + static_cast<int64_t>(h) * d;
        copy(head, raw + static_cast<int64_t>(h) * d, d);
        if (gain) {
            const float s = norm_scale(head, d, a.eps);
            a.head_scale[row * (a.heads + a.kv_heads) + h] = s;
            scale_row(head, s, gain, d, head);
        }
        rotate(head, a.cos + position * half, a.sin + position * half, d, a.interleaved);
    }
}

// scores[r] = softmax over keys 0..first + r of scores[r] * scale, zeros behind; returns nothing,
// log_sums[r * stride] gets log(sum(exp)).
static inline void softmax_rows(float* scores, int64_t row, int64_t first, int64_t rows,
                                int64_t keys, float scale, float* log_sums, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
        float* const x = scores + r * row;
        const int64_t n = first + r + 1;
        for (int64_t i = n; i < keys; ++i) x[i] = -INFINITY;
        VFloat best = broadcast(-INFINITY);
        for (int64_t i = 0; i < n; i += kLanes) best = max(load(x + i), best);
        const float top = reduce_max(best);
        VFloat sums = {};
        for (int64_t i = 0; i < n; i += kLanes) {
            const VFloat e = exp_nonpositive((load(x + i) - top) * scale);
            store(x + i, e);
            sums += e;
        }
        const float sum = reduce_sum(sums);
        const VFloat share = broadcast(1.0f / sum);
        int64_t i = 0;
        for (; i < n; i += kLanes) store(x + i, load(x + i) * share);
        for (; i < keys; ++i) x[i] = 0.0f;
        log_sums[r * stride] = top * scale + std::log(sum);
    }
}

// One sequence and key/value head: the outputs of its query heads.
static inline void attend(const AttentionTraining& a, int64_t sequence, int kv_head,
                          float* scratch) {
    const AttentionSizes n(a);
    const int d = a.head_dim, group = a.heads / a.kv_heads;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    const int64_t begin = sequence * a.length;
    float* const keys = scratch;  // k^T: (d, keys)
    float* const values = keys + packed_size(d, n.keys);
    float* const scores = values + packed_size(n.keys, d);
    const float* const k = a.rotated + begin * n.turned + n.q + static_cast<int64_t>(kv_head) * d;
    const float* const v = a.qkv + begin * n.all + n.turned + static_cast<int64_t>(kv_head) * d;
    pack_rows_as_columns(k, n.turned, a.length, d, 0, keys);
    pack_nothing(a.length, d, keys);
    pack_rows(v, n.all, a.length, d, 0, n.keys, values);
    for (int h = kv_head * group; h < (kv_head + 1) * group; ++h)
        for (int64_t first = 0; first < a.length; first += kBlockRows) {
            const int64_t rows = a.length - first < kBlockRows ? a.length - first : kBlockRows;
            const int64_t seen = round_up(first + rows, kPanel);
            const float* const q =
                a.rotated + (begin + first) * n.turned + static_cast<int64_t>(h) * d;
            product(rows, seen, d, {q, n.turned, 1}, packed(keys, d), scores, n.scores);
            softmax_rows(scores, n.scores, first, rows, seen, scale,
                         a.log_sums + (begin + first) * a.heads + h, a.heads);
            product(rows, d, first + rows, {scores, n.scores, 1}, packed(values, n.keys),
                    a.attended + (begin + first) * n.q + static_cast<int64_t>(h) * d, n.q);
        }
}

static void attention_forward(AttentionTraining& a) {
    const AttentionSizes n(a);
    float* const qkv_weights = a.weights;
    float* const out_weights = qkv_weights + packed_size(a.hidden, n.all);
    run_team_and_wait(a.threads, [&](Member& member) {
        float* const scratch = a.scratch + member.id * a.scratch_size;
        member.share(4, 1, [&](int64_t i, int64_t) {
            const float* const of[] = {a.q, a.k, a.v};
            if (i == 3) {
                pack_rows_as_columns(a.o, n.q, a.hidden, n.q, 0, out_weights);
                pack_nothing(a.hidden, n.q, out_weights);
            } else {
                const int64_t first = i == 0 ? 0 : n.q + (i - 1) * n.kv;
                pack_rows_as_columns(of[i], a.hidden, i == 0 ? n.q : n.kv, a.hidden, first,
                                     qkv_weights);
            }
            if (i == 2) pack_nothing(n.all, a.hidden, qkv_weights);
        });
        share_blocks(member, a.rows, [&](int64_t, int64_t first, int64_t rows) {
            for (int64_t r = first; r < first + rows; ++r) {
                a.norm_scale[r] = norm_scale(a.x + r * a.hidden, a.hidden, a.eps);
                scale_row(a.x + r * a.hidden, a.norm_scale[r], a.norm, a.hidden,
                          scratch + (r - first) * a.hidden);
            }
            product(rows, n.all, a.hidden, {scratch, a.hidden, 1}, packed(qkv_weights, a.hidden),
                    a.qkv + first * n.all, n.all);
            for (int64_t r = first; r < first + rows; ++r)
                turn_heads(a, r, a.qkv + r * n.all, a.rotated + r * n.turned);
        });
        member.share(a.rows / a.length * a.kv_heads, 1, [&](int64_t piece, int64_t) {
            attend(a, piece / a.kv_heads, static_cast<int>(piece % a.kv_heads), scratch);
        });
        share_blocks(member, a.rows, [&](int64_t, int64_t first, int64_t rows) {
            copy(a.out + first * a.hidden, a.x + first * a.hidden, rows * a.hidden);
            product(rows, a.hidden, n.q, {a.attended + first * n.q, n.q, 1},
                    packed(out_weights, n.q), a.out + first * a.hidden, a.hidden, true);
        });
    });
}

// One sequence and key/value head: the gradients of its queries, keys and values.
static inline void attend_backward(const AttentionTraining& a, int64_t sequence, int kv_head,
                                   float* scratch) {
    const AttentionSizes n(a);
    const int d = a.head_dim, group = a.heads / a.kv_heads;
    const int64_t wide = round_up(d, kColumns);
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    const int64_t begin = sequence * a.length;
    float* const keys = scratch;  // k^T: (d, keys)
    float* const key_rows = keys + packed_size(d, n.keys);
    float* const values = key_rows + packed_size(n.keys, d);  // v^T: (d, keys)
    float* const chances = values + packed_size(d, n.keys);
    float* const grads = chances + kBlockRows * n.scores;
    float* const queries = grads + kBlockRows * n.scores;  // a block, packed
    float* const outs = queries + kBlockRows * wide;       // the gradients of its outputs, packed
    const float* const k = a.rotated + begin * n.turned + n.q + static_cast<int64_t>(kv_head) * d;
    const float* const v = a.qkv + begin * n.all + n.turned + static_cast<int64_t>(kv_head) * d;
    float* const grad_k = a.grad_qkv + begin * n.all + n.q + static_cast<int64_t>(kv_head) * d;
    float* const grad_v = grad_k + n.kv;
    pack_rows_as_columns(k, n.turned, a.length, d, 0, keys);
    pack_nothing(a.length, d, keys);
    pack_rows(k, n.turned, a.length, d, 0, n.keys, key_rows);
    pack_rows_as_columns(v, n.all, a.length, d, 0, values);
    pack_nothing(a.length, d, values);
    for (int64_t r = 0; r < a.length; ++r) {
        zero(grad_k + r * n.all, d);
        zero(grad_v + r * n.all, d);
    }
    for (int h = kv_head * group; h < (kv_head + 1) * group; ++h)
        for (int64_t first = 0; first < a.length; first += kBlockRows) {
            const int64_t rows = a.length - first < kBlockRows ? a.length - first : kBlockRows;
            const int64_t seen = round_up(first + rows, kPanel), head = static_cast<int64_t>(h) * d;
            const float* const q = a.rotated + (begin + first) * n.turned + head;
            const float* const out = a.attended + (begin + first) * n.q + head;
            const float* const grad = a.grad_heads + (begin + first) * n.q + head;
            const float* const log_sums = a.log_sums + (begin + first) * a.heads + h;
            product(rows, seen, d, {q, n.turned, 1}, packed(keys, d), chances, n.scores);
            product(rows, seen, d, {grad, n.q, 1}, packed(values, d), grads, n.scores);
            for (int64_t r = 0; r < rows; ++r) {
                float* const p = chances + r * n.scores;
                float* const g = grads + r * n.scores;
                const int64_t now = first + r + 1;
                VFloat both = {};
                for (int i = 0; i < d; i += kLanes)
                    both = fma(load(grad + r * n.q + i), load(out + r * n.q + i), both);
                const float delta = reduce_sum(both), log_sum = log_sums[r * a.heads];
                for (int64_t i = now; i < seen; ++i) p[i] = -INFINITY;
                for (int64_t i = 0; i < seen; i += kLanes) {
                    const VFloat away = load(p + i) * scale - log_sum;
                    const VFloat e = exp_nonpositive(away > 0.0f ? VFloat{} : away);
                    store(p + i, e);
                    store(g + i, (load(g + i) - delta) * e * scale);
                }
            }
            product(rows, d, first + rows, {grads, n.scores, 1}, packed(key_rows, n.keys),
                    a.grad_qkv + (begin + first) * n.all + head, n.all);
            pack_rows(q, n.turned, rows, d, 0, kBlockRows, queries);
            pack_rows(grad, n.q, rows, d, 0, kBlockRows, outs);
            product(first + rows, d, rows, {grads, 1, n.scores}, packed(queries, kBlockRows),
                    grad_k, n.all, true);
            product(first + rows, d, rows, {chances, 1, n.scores}, packed(outs, kBlockRows), grad_v,
                    n.all, true);
        }
}

// From the gradients of rotated heads to those of the raw ones, in place.
static inline void turn_heads_back(const AttentionTraining& a, int64_t row, float* grad,
                                   float* grad_q_norm, float* grad_k_norm) {
    const AttentionSizes n(a);
    const int d = a.head_dim, half = d / 2;
    const int64_t position = row % a.length;
    for (int h = 0; h < a.heads + a.kv_heads; ++h) {
        const bool query = h < a.heads;
        const float* const gain = query ? a.q_norm : a.k_norm;
        float* const head = grad + static_cast<int64_t>(h) * d;
        rotate_back(head, a.cos + position * half, a.sin + position * half, d, a.interleaved);
        if (gain)
            norm_backward(a.qkv + row * n.all + static_cast<int64_t>(h) * d,
                          a.head_scale[row * (a.heads + a.kv_heads) + h], gain, head, nullptr, d,
                          head, query ? grad_q_norm : grad_k_norm);
    }
}

// Rows `first`.. of the gradient of a matrix W (outputs, inputs) behind x: grads^T x over all rows.
static inline void matrix_gradient(const float* grads, int64_t grad_row, const float* x,
                                   int64_t x_row, int64_t rows, int64_t first, int64_t outputs,
                                   int64_t inputs, float* to) {
    for (int64_t r = 0; r < rows; r += kBlockRows) {
        const int64_t now = rows - r < kBlockRows ? rows - r : kBlockRows;
        product(outputs, inputs, now, {grads + r * grad_row + first, 1, grad_row},
                row_major(x + r * x_row, x_row), to + first * inputs, inputs, r > 0);
    }
}

// Sixteen outputs of a gradient a piece.
static inline void share_matrix_gradient(Member& member, const float* grads, int64_t grad_row,
                                         const float* x, int64_t x_row, int64_t rows,
                                         int64_t outputs, int64_t inputs, float* to) {
    member.share(outputs, 16, [&](int64_t first, int64_t end) {
        matrix_gradient(grads, grad_row, x, x_row, rows, first, end - first, inputs, to);
    });
}

static void attention_backward(AttentionTraining& a) {
    const AttentionSizes n(a);
    const int d = a.head_dim;
    const int64_t partial_row = a.hidden + 2 * d;
    const int64_t blocks = (a.rows + kBlockRows - 1) / kBlockRows;
    float* const qkv_weights = a.weights;
    float* const out_weights = qkv_weights + packed_size(n.all, a.hidden);
    run_team_and_wait(a.threads, [&](Member& member) {
        float* const scratch = a.scratch + member.id * a.scratch_size;
        member.share(4, 1, [&](int64_t i, int64_t) {
            const float* const of[] = {a.q, a.k, a.v};
            if (i == 3) {
                pack_rows(a.o, n.q, a.hidden, n.q, 0, a.hidden, out_weights);
            } else {
                const int64_t first = i == 0 ? 0 : n.q + (i - 1) * n.kv;
                pack_rows(of[i], a.hidden, i == 0 ? n.q : n.kv, a.hidden, first, n.all,
                          qkv_weights);
            }
        });
        share_blocks(member, a.rows, [&](int64_t, int64_t first, int64_t rows) {
            product(rows, n.q, a.hidden, {a.grad_out + first * a.hidden, a.hidden, 1},
                    packed(out_weights, a.hidden), a.grad_heads + first * n.q, n.q);
        });
        member.share(a.rows / a.length * a.kv_heads, 1, [&](int64_t piece, int64_t) {
            attend_backward(a, piece / a.kv_heads, static_cast<int>(piece % a.kv_heads), scratch);
        });
        share_blocks(member, a.rows, [&](int64_t block, int64_t first, int64_t rows) {
            float* const gains = a.partial + block * partial_row;
            zero(gains, partial_row);
            for (int64_t r = first; r < first + rows; ++r) {
                turn_heads_back(a, r, a.grad_qkv + r * n.all, gains + a.hidden,
                                gains + a.hidden + d);
                scale_row(a.x + r * a.hidden, a.norm_scale[r], a.norm, a.hidden,
                          a.normed + r * a.hidden);
            }
            product(rows, a.hidden, n.all, {a.grad_qkv + first * n.all, n.all, 1},
                    packed(qkv_weights, n.all), scratch, a.hidden);
            for (int64_t r = first; r < first + rows; ++r)
                norm_backward(a.x + r * a.hidden, a.norm_scale[r], a.norm,
                              scratch + (r - first) * a.hidden, a.grad_out + r * a.hidden, a.hidden,
                              a.grad_x + r * a.hidden, gains);
        });
        share_matrix_gradient(member, a.grad_qkv, n.all, a.normed, a.hidden, a.rows, n.q, a.hidden,
                              a.grad_q);
        share_matrix_gradient(member, a.grad_qkv + n.q, n.all, a.normed, a.hidden, a.rows, n.kv,
                              a.hidden, a.grad_k);
        share_matrix_gradient(member, a.grad_qkv + n.turned, n.all, a.normed, a.hidden, a.rows,
                              n.kv, a.hidden, a.grad_v);
        share_matrix_gradient(member, a.grad_out, a.hidden, a.attended, n.q, a.rows, a.hidden, n.q,
                              a.grad_o);
        member.alone([&] {
            sum_rows(a.partial, blocks, partial_row, a.hidden, a.grad_norm);
            if (a.q_norm) sum_rows(a.partial + a.hidden, blocks, partial_row, d, a.grad_q_norm);
            if (a.k_norm) sum_rows(a.partial + a.hidden + d, blocks, partial_row, d, a.grad_k_norm);
        });
    });
}

}  // namespace
