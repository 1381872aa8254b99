// Weights of tokens, their sums, and which tokens are the first in order.
//
//   weight   = 2^((logit - largest logit) * log2(e) / temperature), a float in [2^-40, 1], or 0 if
//              it is less than that or than min_p
//   in a sum = floor(weight * 2^40)
//   order    = by weight, among equals the lower id first
//
// The same at every level, on any number of threads: weights come from additions and
// multiplications alone (no fused ones), and what is summed are integers.
// `elastic_moe_kernels.ops.sample_reference` has the same in numpy.
#pragma once

#include <cmath>

#include "core/constants.h"
#include "core/simd.h"

namespace {

using elastic_moe::kSampleBlock;
constexpr float kHalfOne = 1048576.0f;            // 2^20
constexpr float kLeast = 9.094947017729282e-13f;  // 2^-40
constexpr double kLog2e = 1.4426950408889634;
static_assert(kSampleBlock % kLanes == 0, "blocks are whole vectors");

// The weights, as integers, of a number of vectors; at most kSampleBlock of them.
struct IntegerSums {
    VInt high = {}, low = {};  // in units of 2^20 and of 1

    inline __attribute__((always_inline)) void add(VFloat weights) {
        const VFloat scaled = weights * kHalfOne;
        const VInt whole = __builtin_convertvector(scaled, VInt);
        const VFloat rest = scaled - __builtin_convertvector(whole, VFloat);
        high += whole;
        low += __builtin_convertvector(rest * kHalfOne, VInt);
    }

    inline uint64_t total() const {
        uint32_t sums[2] = {};
        for (int i = 0; i < kLanes; ++i) {
            sums[0] += static_cast<uint32_t>(high[i]);
            sums[1] += static_cast<uint32_t>(low[i]);
        }
        return (static_cast<uint64_t>(sums[0]) << 20) + sums[1];
    }
};

static inline bool is_finite(float x) { return x - x == 0.0f; }

static inline uint64_t integer_weight(float weight) {
    return static_cast<uint64_t>(weight * (kHalfOne * kHalfOne));
}

static inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// 2^x for x <= 0 within 1e-7 of it, some number below 2^-60 for x < -64. NaN is as -64.
//
// x = n + f with |f| <= 1/2; 2^f by a polynomial of least relative error; times 2^n through the
// exponent's bits. The same in
// `elastic_moe_kernels.ops.sample_reference`.
static inline VFloat exp2_nonpositive(VFloat x) {
    const VFloat rounder = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    x = max(x, broadcast(-64.0f));
    const VFloat shifted = x + rounder;
    const VFloat f = x - (shifted - rounder);
    VFloat p = broadcast(0x1.41fbbcp-13f);
    p = p * f + 0x1.5f3e54p-10f;
    p = p * f + 0x1.3b2d4cp-7f;
    p = p * f + 0x1.c6aee8p-5f;
    p = p * f + 0x1.ebfbdcp-3f;
    p = p * f + 0x1.62e430p-1f;
    p = p * f + 1.0f;
    VInt exponent, bits;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    std::memcpy(&bits, &p, sizeof bits);
    return as_floats(bits + (exponent << 23));
}

// The largest of n numbers, NaN aside; -inf if there is none.
static inline float largest(const float* x, int n) {
    VFloat most = broadcast(-INFINITY);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) most = max(load(x + i), most);
    if (i < n) most = max(load_partial(x + i, n - i, -INFINITY), most);
    return reduce_max(most);
}

// Weights of the logits begin..end-1 of n, and their sum for each block; those of NaN are 0.
// `weights` goes on to a whole block, with zeros. `begin` is that of a block.
static inline void weigh(const float* x, int begin, int end, float most, float scale, float least,
                         float* weights, uint64_t* sums) {
    const VFloat top = broadcast(most), times = broadcast(scale), low = broadcast(least);
    for (int block = begin; block < end; block += kSampleBlock) {
        IntegerSums sum;
        for (int i = block; i < block + kSampleBlock; i += kLanes) {
            VFloat weight = {};
            if (i < end) {
                const VFloat v =
                    i + kLanes <= end ? load(x + i) : load_partial(x + i, end - i, -INFINITY);
                weight = exp2_nonpositive((v - top) * times);
                weight = weight >= low ? weight : VFloat{};
            }
            sum.add(weight);
            store(weights + i, weight);
        }
        sums[block / kSampleBlock] = sum.total();
    }
}

// Some of the first tokens in order: those whose weight is above `weight`, and of those whose
// weight it is the ones with an id below `until`.
struct Cut {
    float weight;
    int until;

    bool keeps(float other, int id) const {
        return other > weight || (other == weight && other > 0.0f && id < until);
    }
};

constexpr Cut kAll = {0.0f, 0};

// Sum of the weights in the blocks from `begin` to before `end` that the cut keeps.
static inline uint64_t kept_weight(const float* weights, int begin, int end, Cut cut) {
    const VFloat above = broadcast(cut.weight);
    // The float before it: above that are the equals, too.
    const VFloat from = broadcast(cut.until ? float_of(float_bits(cut.weight) - 1) : cut.weight);
    uint64_t total = 0;
    for (int block = begin; block < end; block += kSampleBlock) {
        IntegerSums sum;
        for (int i = block; i < block + kSampleBlock; i += kLanes) {
            const VFloat v = load(weights + i);
            sum.add(v > (i + kLanes <= cut.until ? from : above) ? v : VFloat{});
        }
        total += sum.total();
    }
    for (int i = cut.until / kLanes * kLanes; i < cut.until; ++i)  // of the vector with `until`
        if (i >= begin && i < end && weights[i] == cut.weight) total += integer_weight(weights[i]);
    return total;
}

// The token at `place` of the kept weights laid side by side, by ascending id. `sums` of blocks,
// if nothing is cut, or null.
static inline int token_at(const float* weights, int n, Cut cut, const uint64_t* sums,
                           uint64_t place) {
    for (int block = 0; block < n; block += kSampleBlock) {
        const uint64_t sum = sums ? sums[block / kSampleBlock]
                                  : kept_weight(weights, block, block + kSampleBlock, cut);
        if (place >= sum) {
            place -= sum;
            continue;
        }
        for (int i = block; i < block + kSampleBlock; ++i) {
            if (!cut.keeps(weights[i], i)) continue;
            const uint64_t weight = integer_weight(weights[i]);
            if (place < weight) return i;
            place -= weight;
        }
    }
    return -1;  // place is below the sum of all
}

// The cut that keeps the `wanted` first tokens; or, by weight, the fewest first tokens whose
// weights reach `wanted`. All of them if they are fewer. No token below `least` is kept.
//
// A radix selection on the weights' bits, which are in the order of the numbers. Four histograms
// side by side: an addition to the bin of the one before would wait for it.
static inline Cut find_cut(const float* weights, int n, bool by_weight, uint64_t wanted,
                           float least) {
    const int shifts[] = {19, 10, 0}, sizes[] = {641, 512, 1024};  // 2^-40 to 1 in steps of 2^-4
    uint64_t bins[1024][4];
    uint64_t above = 0;  // tokens, or their weights, over what is still searched
    uint32_t from = float_bits(kLeast);
    for (int level = 0; level < 3; ++level) {
        const int shift = shifts[level], size = sizes[level];
        for (int b = 0; b < size; ++b)
            for (int j = 0; j < 4; ++j) bins[b][j] = 0;
        const auto add = [&](int i) {
            bins[(float_bits(weights[i]) - from) >> shift][i % 4] +=
                by_weight ? integer_weight(weights[i]) : 1;
        };
        const uint32_t lowest = float_bits(least) > from ? float_bits(least) : from;
        const VFloat low = broadcast(float_of(lowest - 1));
        const VFloat high = broadcast(float_of(from + (static_cast<uint32_t>(size) << shift)));
        for (int i = 0; i < n; i += kLanes) {
            const VFloat v = load(weights + i);
            uint32_t found = greater_mask(v, low) & greater_mask(high, v);
            if (found == (1u << kLanes) - 1)
                for (int j = 0; j < kLanes; ++j) add(i + j);
            else
                for (; found; found &= found - 1) add(i + __builtin_ctz(found));
        }
        for (int b = size - 1;; --b) {
            const uint64_t sum = (bins[b][0] + bins[b][1]) + (bins[b][2] + bins[b][3]);
            if (above + sum >= wanted) {
                from += static_cast<uint32_t>(b) << shift;
                break;
            }
            if (!b) return kAll;
            above += sum;
        }
    }
    const float weight = float_of(from);
    const uint64_t each = by_weight ? integer_weight(weight) : 1;
    uint64_t ties = (wanted - above + each - 1) / each;
    const VFloat equal = broadcast(weight);
    for (int i = 0; i < n; i += kLanes) {
        const uint32_t found = equal_mask(load(weights + i), equal);
        const uint64_t count = static_cast<uint64_t>(__builtin_popcount(found));
        if (count < ties) {
            ties -= count;
            continue;
        }
        for (int j = i;; ++j)
            if (weights[j] == weight && !--ties) return {weight, j + 1};
    }
    return kAll;  // not reached: the bins have counted them
}

// A weight that the first `count` tokens reach, or 0: the largest of each of 512 groups of tokens
// are 512 tokens, and the last of the first `count` of them is not before that of all.
static inline float least_of_first(const float* weights, int n, int64_t count) {
    if (count > kSampleBlock) return 0.0f;
    float most[kSampleBlock];
    std::memcpy(most, weights, sizeof most);
    for (int block = kSampleBlock; block < n; block += kSampleBlock)
        for (int i = 0; i < kSampleBlock; i += kLanes)
            store(most + i, max(load(most + i), load(weights + block + i)));
    return find_cut(most, kSampleBlock, false, static_cast<uint64_t>(count), 0.0f).weight;
}

}  // namespace
