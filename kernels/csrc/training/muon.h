// Muon's update, matrix by matrix: momentum, a rough U V^T by Newton-Schulz, decay, step.
#pragma once

#include "core/team.h"
#include "training/args.h"
#include "training/norm.h"

namespace {

using elastic_moe::MuonArgs;
using elastic_moe::MuonMatrices;

// Floats of scratch for one matrix: its transpose (longer, shorter) twice, and two Gram matrices.
static int64_t muon_scratch(const MuonArgs& args) {
    int64_t most = 0;
    for (int i = 0; i < args.count; ++i) {
        const int64_t rows = args.list[i].rows, columns = args.list[i].columns;
        const int64_t shorter = rows < columns ? rows : columns;
        const int64_t size = 2 * rows * columns + 2 * shorter * shorter + 64;
        if (size > most) most = size;
    }
    return most;
}

// x (n, r), n >= r, with X = x^T: X <- a X + (b G + c G G) X, G = X X^T. `other` is as large.
static inline void newton_schulz(float*& x, float*& other, float* gram, float* poly, int64_t n,
                                 int64_t r, int steps) {
    const VFloat a = broadcast(3.4445f), b = broadcast(-4.7750f), c = broadcast(2.0315f);
    for (int step = 0; step < steps; ++step) {
        product(r, r, n, {x, 1, r}, row_major(x, r), gram, r);
        product(r, r, r, {gram, r, 1}, row_major(gram, r), poly, r);
        for (int64_t i = 0; i < r * r; i += kLanes)
            store(poly + i, fma(c, load(poly + i), b * load(gram + i)));
        product(n, r, r, {x, r, 1}, row_major(poly, r), other, r);
        for (int64_t i = 0; i < n * r; i += kLanes)
            store(other + i, fma(a, load(x + i), load(other + i)));
        float* const now = x;
        x = other;
        other = now;
    }
}

static inline void muon_matrix(const MuonArgs& args, const MuonMatrices& of, int64_t index,
                               float* scratch) {
    const int64_t rows = of.rows, columns = of.columns, size = rows * columns;
    const bool tall = rows > columns;
    const int64_t n = tall ? rows : columns, r = tall ? columns : rows;
    float* x = scratch;
    float* other = x + size;
    float* const gram = other + size;
    float* const poly = gram + r * r;
    float* const p = of.p + index * size;
    const float* const grad = of.grad + index * size;
    float* const momentum = of.momentum + index * size;
    // momentum <- lerp(momentum, grad, 1 - beta); update = lerp(grad, momentum, beta)
    VFloat squares = {};
    for (int64_t i = 0; i < size; i += kLanes) {
        const VFloat g = load(grad + i), m = load(momentum + i);
        const VFloat now = fma(g - m, broadcast(1.0f - args.beta), m);
        store(momentum + i, now);
        const VFloat update = fma(now - g, broadcast(args.beta), g);
        squares = fma(update, update, squares);
        store(other + i, update);
    }
    const float scale = 1.0f / (std::sqrt(reduce_sum(squares)) + 1e-7f);
    if (tall) {
        for (int64_t i = 0; i < size; i += kLanes) store(x + i, load(other + i) * scale);
    } else {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) x[j * rows + i] = other[i * columns + j] * scale;
    }
    newton_schulz(x, other, gram, poly, n, r, args.steps);
    const float keep = 1.0f - args.lr * args.weight_decay;
    const float lr = -args.lr * (tall ? std::sqrt(static_cast<float>(rows) / columns) : 1.0f);
    if (!tall) {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) other[i * columns + j] = x[j * rows + i];
        x = other;
    }
    for (int64_t i = 0; i < size; i += kLanes)
        store(p + i, fma(load(x + i), broadcast(lr), load(p + i) * keep));
}

static void muon(MuonArgs& args) {
    run_team_and_wait(args.threads, [&](Member& member) {
        float* const scratch = args.scratch + member.id * args.scratch_size;
        int64_t all = 0;
        for (int i = 0; i < args.count; ++i) all += args.list[i].matrices;
        member.share(all, 4, [&](int64_t begin, int64_t end) {
            int of = 0;
            int64_t before = 0;
            for (int64_t piece = begin; piece < end; ++piece) {
                while (piece - before >= args.list[of].matrices) before += args.list[of++].matrices;
                muon_matrix(args, args.list[of], piece - before, scratch);
            }
        });
    });
}

}  // namespace
