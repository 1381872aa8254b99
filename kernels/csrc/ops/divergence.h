// What a row of logits predicts: its loss, and its distance from another row's distribution.
#pragma once

#include <cmath>
#include <limits>

#include "ops/argmax.h"
#include "ops/args.h"

namespace {

// Sums of vectors in double precision: one chain for each lane.
struct LaneSums {
    double chains[kLanes] = {};

    void add(VFloat v) {
        float lanes[kLanes];
        store(lanes, v);
        for (int i = 0; i < kLanes; ++i) chains[i] += static_cast<double>(lanes[i]);
    }

    double total() const {
        double sum = 0;
        for (const double chain : chains) sum += chain;
        return sum;
    }
};

// Row i: with x its logits, p the softmax of the reference's logits r and m a row's largest,
// KL(p || softmax(x)) = sum p ((r - m_r) - (x - m_x)) + log sum e^(x - m_x) - log sum e^(r - m_r).
static inline void diverge(const elastic_moe::DivergenceArgs& a, int64_t row) {
    const float* const x = a.logits + row * a.vocab;
    const float* const r = a.reference + row * a.vocab;
    const int best_x = argmax(x, a.vocab), best_r = argmax(r, a.vocab);
    const VFloat most_x = broadcast(x[best_x]), most_r = broadcast(r[best_r]);
    const float nothing = -std::numeric_limits<float>::infinity();
    LaneSums of_x, of_r, weighted;
    for (int i = 0; i < a.vocab; i += kLanes) {
        const int left = a.vocab - i;
        const VFloat own =
            (left < kLanes ? load_partial(x + i, left, nothing) : load(x + i)) - most_x;
        const VFloat other =
            (left < kLanes ? load_partial(r + i, left, nothing) : load(r + i)) - most_r;
        const VFloat weight = exp_nonpositive(other);
        of_x.add(exp_nonpositive(own));
        of_r.add(weight);
        weighted.add(left < kLanes ? weight * (load_partial(r + i, left, 0.0f) - most_r -
                                               (load_partial(x + i, left, 0.0f) - most_x))
                                   : weight * (other - own));
    }
    const double log_x = std::log(of_x.total()), sum_r = of_r.total();
    a.losses[row] =
        static_cast<float>(log_x - (static_cast<double>(x[a.targets[row]]) - x[best_x]));
    a.divergences[row] = weighted.total() / sum_r + log_x - std::log(sum_r);
    a.agreed[row] = best_x == best_r;
}

}  // namespace
