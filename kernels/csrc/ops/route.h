// The router: softmax over the pool, the k best, threshold, weights. It is tested against
// reference.py; this file is compiled once per instruction-set level.
//
// A row's result depends on its logits and its sub-network alone: a row is worked on by one
// thread, and every reduction has the association that the size of its pool gives it. A pool is
// gathered to the front first, so its bits are those of a model whose other experts do not exist.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/simd.h"
#include "core/team.h"
#include "ops/args.h"

namespace {

using elastic_moe::kMaxExperts;
using elastic_moe::RouteArgs;

constexpr int kPadded = kMaxExperts + 64;

// Up to this many vectors looked at, the k best are found one after the other: every round costs
// the same and no branch depends on the values.
constexpr int kRoundsLimit = 256;

// Beyond that, one pass with the candidates in a sorted list up to this k; above, in a heap.
constexpr int kInsertionLimit = 64;

// A second thread is worth waking from about 20 microseconds of work on.
constexpr int64_t kParallelElements = 16384;

// A candidate as one number: greater is better. The upper half orders floats (NaN above all),
// the lower half puts the lower index first among equals, so no two keys are equal.
typedef uint64_t Key;

static inline Key make_key(float value, int index) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t ordered = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
    return (static_cast<Key>(ordered) << 32) | ~static_cast<uint32_t>(index);
}

static inline int key_index(Key key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

// Put `key` in its place among `count` keys that are sorted best first; `keys` holds one more.
static inline void insert_sorted(Key* keys, int count, Key key) {
    int i = count;
    for (; i > 0 && keys[i - 1] < key; --i) keys[i] = keys[i - 1];
    keys[i] = key;
}

// Restore the heap whose root is its worst key, after heap[i] has changed for the better.
static inline void sift_down(Key* heap, int count, int i) {
    const Key moving = heap[i];
    for (int child; (child = 2 * i + 1) < count; i = child) {
        if (child + 1 < count && heap[child + 1] < heap[child]) ++child;
        if (moving <= heap[child]) break;
        heap[i] = heap[child];
    }
    heap[i] = moving;
}

static inline void make_heap(Key* keys, int count) {
    for (int i = count / 2 - 1; i >= 0; --i) sift_down(keys, count, i);
}

// Best first.
static inline void sort_keys(Key* keys, int count) {
    if (count <= kInsertionLimit) {
        for (int i = 1; i < count; ++i) insert_sorted(keys, i, keys[i]);
        return;
    }
    make_heap(keys, count);
    for (int last = count - 1; last > 0; --last) {  // the worst goes to the end
        const Key worst = keys[0];
        keys[0] = keys[last];
        keys[last] = worst;
        sift_down(keys, last, 0);
    }
}

// The k best of n values, best first, by k rounds of "the first of the greatest", each of which is
// then struck out in `left`, a copy of the values padded with -inf to `words` times 64. False if a
// round finds nothing, so if a value is NaN.
static inline bool select_by_rounds(const float* values, float* left, int words, int k, Key* keys) {
    constexpr int kVectors = 64 / kLanes;  // per word
    for (int found = 0; found < k; ++found) {
        VFloat best[4];
        for (int j = 0; j < 4; ++j) best[j] = load(left + j * kLanes);
        for (int v = 4; v < words * kVectors; v += 4)
            for (int j = 0; j < 4; ++j) best[j] = max(best[j], load(left + (v + j) * kLanes));
        const VFloat greatest =
            broadcast(reduce_max(max(max(best[0], best[1]), max(best[2], best[3]))));
        int index = -1;
        for (int word = 0; word < words && index < 0; ++word) {
            uint64_t equal = 0;  // a bit per value
            for (int v = 0; v < kVectors; ++v)
                equal |=
                    static_cast<uint64_t>(equal_mask(load(left + word * 64 + v * kLanes), greatest))
                    << (v * kLanes);
            if (equal) index = word * 64 + __builtin_ctzll(equal);
        }
        if (index < 0) return false;
        keys[found] = make_key(values[index], index);
        left[index] = -INFINITY;
    }
    return true;
}

// The k best of n values, best first. `values` is padded to full vectors with something that is
// greater than none of them; 1 <= k <= n. `left` takes a copy.
static inline void select_best(const float* values, int n, int k, float* left, Key* keys) {
    const int words = (n + 63) / 64;
    if (k * words * (64 / kLanes) <= kRoundsLimit) {
        std::memcpy(left, values, sizeof(float) * static_cast<size_t>(n));
        for (int i = n; i < words * 64; ++i) left[i] = -INFINITY;
        if (select_by_rounds(values, left, words, k, keys)) return;
    }
    const bool heap = k > kInsertionLimit;
    if (heap) {
        for (int i = 0; i < k; ++i) keys[i] = make_key(values[i], i);
        make_heap(keys, k);
    } else {
        for (int i = 0; i < k; ++i) insert_sorted(keys, i, make_key(values[i], i));
    }
    Key* const worst = heap ? keys : keys + k - 1;
    float bar = values[key_index(*worst)];
    // A later index must be strictly greater to enter, so whole vectors can be passed over.
    for (int start = k / kLanes * kLanes; start < n; start += kLanes) {
        uint32_t mask = greater_mask(load(values + start), broadcast(bar));
        if (start < k) mask &= ~0u << (k - start);  // those are in already
        for (; mask; mask &= mask - 1) {
            const int i = start + __builtin_ctz(mask);
            if (!(values[i] > bar)) continue;  // the bar has risen since
            if (heap) {
                keys[0] = make_key(values[i], i);
                sift_down(keys, k, 0);
            } else {
                insert_sorted(keys, k - 1, make_key(values[i], i));
            }
            bar = values[key_index(*worst)];
        }
    }
    if (heap) sort_keys(keys, k);
}

// Which experts a sub-network may choose.
struct Pool {
    int size;
    bool prefix;  // experts 0..size-1, so `ids` is not needed
    int32_t ids[kMaxExperts];

    int expert(int position) const { return prefix ? position : ids[position]; }
};

static inline void read_pool(const uint8_t* members, int experts, Pool& pool) {
    int size = 0, leading = 0;
    for (int e = 0; e < experts; ++e) size += members[e] != 0;
    for (int e = 0; e < size; ++e) leading += members[e] != 0;
    pool.size = size;
    pool.prefix = leading == size;
    if (pool.prefix) return;
    for (int e = 0, n = 0; n < size; ++e)
        if (members[e]) pool.ids[n++] = e;
}

struct Scratch {
    float logits[kPadded];
    float exps[kPadded];
    float preference[kPadded];
    float left[kPadded];
    Key keys[kMaxExperts];
    Pool pool;
};

// exps[i] = exp(x[i] - max x) for i < n, 0 up to the next full vector; returns their sum. It is
// NaN if any x is NaN or +inf, or all are -inf, and else at least 1.
static inline float softmax_numerators(const float* x, int n, float* exps) {
    const int whole = n / kLanes * kLanes;
    VFloat tail = broadcast(-INFINITY);
    if (whole < n) tail = load_partial(x + whole, n - whole, -INFINITY);
    VFloat best = tail;
    for (int i = 0; i < whole; i += kLanes) best = max(load(x + i), best);
    const VFloat top = broadcast(reduce_max(best));
    VFloat sum = {};
    for (int i = 0; i < whole; i += kLanes) {
        const VFloat e = exp_nonpositive(load(x + i) - top);
        store(exps + i, e);
        sum += e;
    }
    if (whole < n) {
        const VFloat e = exp_nonpositive(tail - top);
        store(exps + whole, e);
        sum += e;
    }
    return reduce_sum(sum);
}

// One row: `ids` and `weights` have args.slots entries.
static inline void route_row(const RouteArgs& args, const float* logits, int64_t subnet,
                             Scratch& scratch, int32_t* ids, float* weights) {
    const Pool& pool = scratch.pool;
    // The table was checked when it was made. Clamping keeps every access in range even if its
    // tensors were overwritten since.
    int k = args.top_k[subnet * args.top_k_stride];
    if (k > pool.size) k = pool.size;
    if (k > args.slots) k = args.slots;
    int min_experts = args.min_experts[subnet * args.min_experts_stride];
    if (min_experts > k) min_experts = k;
    int kept = 0;

    if (k > 0) {
        if (!pool.prefix) {
            for (int i = 0; i < pool.size; ++i) scratch.logits[i] = logits[pool.ids[i]];
            logits = scratch.logits;
        }
        const float sum = softmax_numerators(logits, pool.size, scratch.exps);
        if (!(sum > 0.0f)) {
            // No order exists. Like the reference: NaN weights, so that the failure shows in the
            // output, on the lowest experts of the pool, and no expert passes the threshold.
            for (; kept < min_experts; ++kept) {
                ids[kept] = pool.expert(kept);
                weights[kept] = NAN;
            }
        } else {
            const float* preference = scratch.exps;
            if (args.correction_bias) {
                for (int i = 0; i < pool.size; ++i)
                    scratch.preference[i] =
                        scratch.exps[i] / sum + args.correction_bias[pool.expert(i)];
                for (int i = pool.size; i % kLanes; ++i) scratch.preference[i] = -INFINITY;
                preference = scratch.preference;
            }
            Key* const keys = scratch.keys;
            select_best(preference, pool.size, k, scratch.left, keys);
            if (args.correction_bias) {  // from here on, order by the unbiased score
                for (int i = 0; i < k; ++i)
                    keys[i] = make_key(scratch.exps[key_index(keys[i])], key_index(keys[i]));
                sort_keys(keys, k);
            }

            const float best = scratch.exps[key_index(keys[0])] / sum;
            const float bar = args.threshold[subnet * args.threshold_stride] * best;
            float total = 0.0f;
            for (; kept < k; ++kept) {  // scores fall, so the first one dropped ends the list
                const int position = key_index(keys[kept]);
                const float score = scratch.exps[position] / sum;
                if (kept >= min_experts && !(score >= bar)) break;
                ids[kept] = pool.expert(position);
                weights[kept] = score;
                total += score;
            }
            if (args.renormalize) {
                const float divisor = total > args.epsilon ? total : args.epsilon;
                for (int i = 0; i < kept; ++i) weights[i] /= divisor;
            }
        }
    }
    for (int i = kept; i < args.slots; ++i) {
        ids[i] = -1;
        weights[i] = 0.0f;
    }
}

// Rows begin..end-1, one after the other.
static void route_rows(const RouteArgs& args, int64_t begin, int64_t end) {
    Scratch scratch;  // about 100 kB of stack, of which E experts touch what they need
    int64_t pool_of = -1;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t subnet = subnet_of(args, row);
        if (subnet != pool_of) {
            read_pool(args.pool + subnet * args.pool_stride, args.experts, scratch.pool);
            pool_of = subnet;
        }
        route_row(args, args.router_logits + row * args.experts, subnet, scratch,
                  args.topk_ids + row * args.slots, args.topk_weights + row * args.slots);
    }
}

static void route(RouteArgs& args) {
    const int64_t useful = args.rows * args.experts / (kParallelElements / 2);
    const int64_t most = args.threads < args.rows ? args.threads : args.rows;
    run_team(static_cast<int>(useful < most ? useful : most), args,
             [](Member& member, RouteArgs& a) {
                 member.share(a.rows, 1 + a.rows / (4 * member.threads),
                              [&](int64_t begin, int64_t end) { route_rows(a, begin, end); });
             });
}

}  // namespace
