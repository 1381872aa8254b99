// Drawing the next token of each row of logits, and log-probabilities of tokens; the same tokens at
// every level, on any number of threads and beside any other rows (ops/token_weights.h).
#pragma once

#include <cfloat>
#include <cmath>

#include "core/team.h"
#include "ops/args.h"
#include "ops/token_weights.h"

namespace {

using elastic_moe::LogitChange;
using elastic_moe::SampleWork;
using elastic_moe::SamplingRow;

// Numbers of a row that threads take at a time if there is but one row.
constexpr int kSamplePiece = 32 * kSampleBlock;

// The high half of a product.
static inline uint64_t share_of(uint64_t total, uint64_t random) {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(total) * random) >> 64);
}

// The weight that reaches top_p of the total. A millionth less counts as reached: what logits'
// last bits decide is no reason to keep another token.
static inline uint64_t weight_of_top_p(uint64_t total, double top_p) {
    const uint64_t share = static_cast<uint64_t>(top_p * (1 - 0x1p-20) * 0x1p62);
    const unsigned __int128 product = static_cast<unsigned __int128>(total) * share;
    const uint64_t wanted =
        static_cast<uint64_t>((product + ((static_cast<uint64_t>(1) << 62) - 1)) >> 62);
    return wanted ? wanted : 1;
}

// Two random numbers that are a function of seed, choice and position: the first two of numpy's
// Philox(key=[seed, choice], counter=[0, 0, 0, position]). Philox 4x64-10: Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", 2011.
static inline void random_words(const SamplingRow& row, uint64_t* words) {
    uint64_t c[4] = {1, 0, 0, row.position}, key[2] = {row.seed, row.choice};
    for (int round = 0; round < 10; ++round) {
        const auto a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c[0];
        const auto b = static_cast<unsigned __int128>(0xCA5A826395121157u) * c[2];
        c[0] = static_cast<uint64_t>(b >> 64) ^ c[1] ^ key[0];
        c[1] = static_cast<uint64_t>(b);
        c[2] = static_cast<uint64_t>(a >> 64) ^ c[3] ^ key[1];
        c[3] = static_cast<uint64_t>(a);
        key[0] += 0x9E3779B97F4A7C15u;
        key[1] += 0xBB67AE8584CAA73Bu;
    }
    words[0] = c[0];
    words[1] = c[1];
}

static inline float changed(float logit, const SamplingRow& row, const LogitChange& change) {
    double x = logit;
    if (change.seen) x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
    if (change.count) {
        const double count = static_cast<double>(change.count);
        x -= row.frequency_penalty * count + row.presence_penalty;
    }
    x += change.bias;
    return static_cast<float>(x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x);
}

// One row on its way to a token. Its steps follow one another; those with `begin` and `end` may be
// shared among threads, in pieces of whole blocks.
class RowSampler {
  public:
    RowSampler(const elastic_moe::SampleArgs& args, int64_t row, const SampleWork& work)
        : args_(args),
          row_(args.rows[row]),
          work_(work),
          vocab_(args.vocab),
          padded_(static_cast<int>(elastic_moe::round_up(args.vocab, kSampleBlock))),
          token_(args.token_ids[row]) {
        const int mask = args.mask_rows ? args.mask_rows[row] : -1;
        mask_ = mask < 0 ? nullptr : args.masks + mask * args.mask_words;
        changes_ = args.changes ? args.changes + (row ? args.change_ends[row - 1] : 0) : nullptr;
        changes_end_ = args.changes ? args.changes + args.change_ends[row] : nullptr;
        source_ = args.logits + static_cast<int64_t>(args.logits_rows[row]) * vocab_;
        logits_ = mask_ || changes_ != changes_end_ ? work.logits : source_;
    }

    // Change logits and forbid tokens; find the largest of each piece.
    void change(int begin, int end) {
        if (logits_ != source_) {
            std::memcpy(work_.logits + begin, source_ + begin,
                        static_cast<size_t>(end - begin) * sizeof(float));
            for (const LogitChange* c = changes_; c != changes_end_; ++c)
                if (c->token >= begin && c->token < end)
                    work_.logits[c->token] = changed(source_[c->token], row_, *c);
            if (mask_)
                for (int i = begin; i < end; ++i)
                    if (!(mask_[i / 32] >> (i % 32) & 1)) work_.logits[i] = -INFINITY;
        }
        for (int at = begin; at < end; at += kSamplePiece)
            work_.largest[at / kSamplePiece] =
                largest(logits_ + at, at + kSamplePiece < end ? kSamplePiece : end - at);
    }

    // Weights of this piece, unless the most likely token is wanted.
    void weigh_piece(int begin, int end) {
        const float most = largest_of_row();
        if (row_.temperature == 0 || !is_finite(most)) return;
        double scale = kLog2e / row_.temperature;  // beyond these no float32 logits differ
        scale = scale > 0x1p126 ? 0x1p126 : scale < 0x1p-126 ? 0x1p-126 : scale;
        const float min_p = static_cast<float>(row_.min_p);
        weigh(logits_, begin, end, most, static_cast<float>(scale), min_p > kLeast ? min_p : kLeast,
              work_.weights, work_.sums);
    }

    // A token of all, or of the first top_k. If top_p is below 1 it may be one to refuse.
    void draw() {
        const float most = largest_of_row();
        *work_.above = 0;
        if (!is_finite(most)) {
            token_ = -1;
            return;
        }
        if (row_.temperature == 0) {
            token_ = 0;
            while (logits_[token_] != most) ++token_;  // the first among equals; there is one
            return;
        }
        uint64_t words[2];
        random_words(row_, words);
        if (row_.top_k > 0 && row_.top_k < vocab_) {
            const uint64_t wanted = static_cast<uint64_t>(row_.top_k);
            const float least = least_of_first(work_.weights, padded_, row_.top_k);
            Cut cut = find_cut(work_.weights, padded_, false, wanted, least);
            uint64_t total = kept_weight(work_.weights, 0, padded_, cut);
            if (row_.top_p < 1) {
                const uint64_t enough = weight_of_top_p(total, row_.top_p);
                cut = find_cut(work_.weights, padded_, true, enough, cut.weight);
                total = kept_weight(work_.weights, 0, padded_, cut);
            }
            token_ = token_at(work_.weights, vocab_, cut, nullptr, share_of(total, words[0]));
            return;
        }
        token_ = token_at(work_.weights, vocab_, kAll, work_.sums, share_of(total(), words[0]));
    }

    // Whether the token may be one that top_p cuts off.
    bool unsure() const {
        return token_ >= 0 && row_.temperature > 0 && row_.top_p < 1 &&
               (row_.top_k <= 0 || row_.top_k >= vocab_);
    }

    // Add up the weights of this piece before the token, in order.
    void weigh_before(int begin, int end) {
        if (!unsure()) return;
        const Cut before = {work_.weights[token_], token_};
        const uint64_t sum = kept_weight(work_.weights, begin, end, before);
        __atomic_fetch_add(work_.above, sum, __ATOMIC_RELAXED);
    }

    // Instead of a token that top_p cuts off, draw one of those that it keeps.
    //
    // Tokens to keep are drawn as if there were no others: with their share of all at first, or
    // with their share of the kept ones after a refusal. To sum up what comes before one token
    // takes a fraction of the time that it takes to find where top_p cuts.
    void redraw() {
        if (!unsure()) return;
        const uint64_t enough = weight_of_top_p(total(), row_.top_p);
        if (*work_.above < enough) return;
        uint64_t words[2];
        random_words(row_, words);
        // If all tokens below this were cut off, the others would be enough.
        const double cut_off = static_cast<double>(total() - enough) * (0x1p-40 * 0.999);
        const float least = static_cast<float>(cut_off / vocab_);
        const Cut cut = find_cut(work_.weights, padded_, true, enough, least);
        const uint64_t kept = kept_weight(work_.weights, 0, padded_, cut);
        token_ = token_at(work_.weights, vocab_, cut, nullptr, share_of(kept, words[1]));
    }

  private:
    float largest_of_row() const {
        float most = work_.largest[0];
        for (int i = 1; i * kSamplePiece < vocab_; ++i)
            most = work_.largest[i] > most ? work_.largest[i] : most;
        return most;
    }

    uint64_t total() const {
        uint64_t sum = 0;
        for (int i = 0; i * kSampleBlock < vocab_; ++i) sum += work_.sums[i];
        return sum;
    }

    const elastic_moe::SampleArgs& args_;
    const SamplingRow& row_;
    const SampleWork& work_;
    const int vocab_, padded_;
    int32_t& token_;
    const uint32_t* mask_;
    const LogitChange *changes_, *changes_end_;
    const float *source_, *logits_;  // as they came, and after changes
};

static void sample_rows(Member& member, elastic_moe::SampleArgs& a) {
    const int pieces = (a.vocab + kSamplePiece - 1) / kSamplePiece;
    if (a.count > 1 || pieces == 1) {
        member.share(a.count, 1, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                RowSampler sampler(a, row, a.work[member.id]);
                sampler.change(0, a.vocab);
                sampler.weigh_piece(0, a.vocab);
                sampler.draw();
                sampler.weigh_before(0, a.vocab);
                sampler.redraw();
            }
        });
        return;
    }
    // A single row: threads share it.
    member.share(a.vocab, kSamplePiece, [&](int64_t begin, int64_t end) {
        RowSampler(a, 0, a.work[0]).change(static_cast<int>(begin), static_cast<int>(end));
    });
    member.share(a.vocab, kSamplePiece, [&](int64_t begin, int64_t end) {
        RowSampler(a, 0, a.work[0]).weigh_piece(static_cast<int>(begin), static_cast<int>(end));
    });
    member.alone([&] { RowSampler(a, 0, a.work[0]).draw(); });
    member.share(a.vocab, kSamplePiece, [&](int64_t begin, int64_t end) {
        RowSampler(a, 0, a.work[0]).weigh_before(static_cast<int>(begin), static_cast<int>(end));
    });
    member.alone([&] { RowSampler(a, 0, a.work[0]).redraw(); });
}

// The `count` largest of n numbers, largest first, among equals the lower id first.
static inline void most_likely(const float* x, int n, int count, int32_t* ids) {
    int used = 0;
    const auto insert = [&](int i) {
        int at = used < count ? used++ : count - 1;
        for (; at > 0 && x[i] > x[ids[at - 1]]; --at) ids[at] = ids[at - 1];
        ids[at] = i;
    };
    int i = 0;
    for (; i < count || i % kLanes; ++i) {
        if (i == n) return;
        if (used < count || x[i] > x[ids[count - 1]]) insert(i);
    }
    if (!count) return;
    for (; i < n; i += kLanes) {
        const VFloat v = i + kLanes <= n ? load(x + i) : load_partial(x + i, n - i, -INFINITY);
        uint32_t found = greater_mask(v, broadcast(x[ids[count - 1]]));
        for (; found; found &= found - 1) {
            const int at = i + __builtin_ctz(found);
            if (x[at] > x[ids[count - 1]]) insert(at);
        }
    }
}

static void token_logprobs(Member& member, elastic_moe::LogprobArgs& a) {
    member.share(a.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const SampleWork& work = a.work[member.id];
            const float* x = a.logits + static_cast<int64_t>(a.logits_rows[row]) * a.vocab;
            const float most = largest(x, a.vocab);
            weigh(x, 0, a.vocab, most, static_cast<float>(kLog2e), kLeast, work.weights, work.sums);
            uint64_t total = 0;
            for (int i = 0; i * kSampleBlock < a.vocab; ++i) total += work.sums[i];
            const double log_total = std::log(static_cast<double>(total) * 0x1p-40);
            const auto logprob = [&](int token) {
                return static_cast<double>(x[token]) - static_cast<double>(most) - log_total;
            };
            a.logprobs[row] = logprob(a.token_ids[row]);
            int32_t* const ids = a.top_ids + row * a.top;
            most_likely(x, a.vocab, a.top, ids);
            for (int i = 0; i < a.top; ++i) a.top_logprobs[row * a.top + i] = logprob(ids[i]);
        }
    });
}

}  // namespace
