// The head's cross-entropy and its gradients, without logits of more than a block of rows.
#pragma once

#include "core/team.h"
#include "training/args.h"
#include "training/norm.h"

namespace {

using elastic_moe::HeadLossArgs;

// The rows are dealt to so many parts, each with gradients of its own, which are then added in
// order: the same bits whatever the number of threads.
constexpr int kHeadParts = 4;

static int64_t head_scratch(const HeadLossArgs& a) {
    return kBlockRows * round_up(a.vocab, kColumns) + 64;
}

static int64_t head_weights(const HeadLossArgs& a) {
    return packed_size(a.hidden, a.vocab) + packed_size(a.vocab, a.hidden);
}

// From a row of logits to its gradient, softmax minus one-hot, in place; returns the loss.
static inline float cross_entropy(float* logits, int64_t vocab, int64_t target) {
    const int64_t whole = vocab / kLanes * kLanes;
    VFloat tail = broadcast(-INFINITY);
    if (whole < vocab)
        tail = load_partial(logits + whole, static_cast<int>(vocab - whole), -INFINITY);
    VFloat best = tail;
    for (int64_t i = 0; i < whole; i += kLanes) best = max(load(logits + i), best);
    const float top = reduce_max(best), wanted = logits[target];
    VFloat sums = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
        const VFloat e = exp_nonpositive(load(logits + i) - top);
        store(logits + i, e);
        sums += e;
    }
    if (whole < vocab) {
        const VFloat e = exp_nonpositive(tail - top);
        std::memcpy(logits + whole, &e, sizeof(float) * static_cast<size_t>(vocab - whole));
        sums += e;
    }
    const float sum = reduce_sum(sums);
    const VFloat share = broadcast(1.0f / sum);
    for (int64_t i = 0; i < whole; i += kLanes) store(logits + i, load(logits + i) * share);
    for (int64_t i = whole; i < vocab; ++i) logits[i] /= sum;
    logits[target] -= 1.0f;
    return std::log(sum) + top - wanted;
}

static void head_loss(HeadLossArgs& a) {
    const int64_t wide = round_up(a.vocab, kColumns),
                  blocks = (a.rows + kBlockRows - 1) / kBlockRows;
    const float share = 1.0f / static_cast<float>(a.rows);
    float* const columns = a.weights;
    float* const rows_packed = columns + packed_size(a.hidden, a.vocab);
    double losses[kHeadParts] = {};
    run_team_and_wait(a.threads, [&](Member& member) {
        float* const logits = a.scratch + member.id * a.scratch_size;
        member.share(a.vocab, 512, [&](int64_t begin, int64_t end) {
            pack_rows_as_columns(a.weight + begin * a.hidden, a.hidden, end - begin, a.hidden,
                                 begin, columns);
            pack_rows(a.weight + begin * a.hidden, a.hidden, end - begin, a.hidden, begin, a.vocab,
                      rows_packed);
            if (end == a.vocab) pack_nothing(a.vocab, a.hidden, columns);
        });
        member.share(kHeadParts, 1, [&](int64_t part, int64_t) {
            float* const grad_weight = a.partial + part * a.vocab * a.hidden;
            zero(grad_weight, static_cast<int64_t>(a.vocab) * a.hidden);
            for (int64_t block = blocks * part / kHeadParts;
                 block < blocks * (part + 1) / kHeadParts; ++block) {
                const int64_t first = block * kBlockRows;
                const int64_t rows = a.rows - first < kBlockRows ? a.rows - first : kBlockRows;
                const float* const x = a.x + first * a.hidden;
                product(rows, round_up(a.vocab, kPanel), a.hidden, {x, a.hidden, 1},
                        packed(columns, a.hidden), logits, wide);
                for (int64_t r = 0; r < rows; ++r)
                    losses[part] += cross_entropy(logits + r * wide, a.vocab, a.targets[first + r]);
                product(rows, a.hidden, a.vocab, {logits, wide, 1}, packed(rows_packed, a.vocab),
                        a.grad_x + first * a.hidden, a.hidden);
                product(a.vocab, a.hidden, rows, {logits, 1, wide}, row_major(x, a.hidden),
                        grad_weight, a.hidden, true);
            }
        });
        member.share(
            static_cast<int64_t>(a.vocab) * a.hidden, 4096, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                    float sum = 0.0f;
                    for (int part = 0; part < kHeadParts; ++part)
                        sum += a.partial[part * static_cast<int64_t>(a.vocab) * a.hidden + i];
                    a.grad_weight[i] = sum * share;
                }
            });
        member.share(a.rows * a.hidden, 16384, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) a.grad_x[i] *= share;
        });
    });
    double loss = 0.0;
    for (const double part : losses) loss += part;
    *a.loss = static_cast<float>(loss / static_cast<double>(a.rows));
}

}  // namespace
