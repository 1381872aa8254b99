// How attention is shared out, decided before a step.
#pragma once

#include "ops/args.h"

namespace elastic_moe {

// Few pieces of work that threads cannot share evenly are cut smaller: first rows, then the tiles
// of single tokens, whose parts are merged by who ends last.
static inline AttentionShares share_attention(const Span* spans, int span_count, int kv_heads,
                                              int group, int threads) {
    AttentionShares shares = {kMaxHeadsPerGroup, 1, 0, 0};
    int longest = 0;
    for (int i = 0; i < span_count; ++i)
        if (spans[i].rows == 1) {
            shares.partials += kv_heads;
            if (spans[i].position >= longest) longest = spans[i].position + 1;
        }
    const auto pieces = [&] {
        const int tokens = shares.rows < group ? 1 : shares.rows / group;
        int64_t all = 0;
        for (int i = 0; i < span_count; ++i)
            all += static_cast<int64_t>(spans[i].rows + tokens - 1) / tokens * kv_heads;
        return all;
    };
    int64_t now = pieces();
    const auto even = [&] { return now >= 4 * threads || now % threads == 0; };
    for (; now && !even() && shares.rows > kBlockPositions; now = pieces()) shares.rows /= 2;
    shares.partial_tiles = (longest + kTilePositions - 1) / kTilePositions;
    if (now && !even() && shares.partial_tiles > 1)
        shares.runs = static_cast<int>((4 * threads + now - 1) / now);
    if (shares.runs == 1) shares.partial_tiles = shares.partials = 0;
    return shares;
}

// Floats of the parts of tiles.
static inline int64_t partial_floats(const AttentionShares& shares, int group, int head_dim) {
    return static_cast<int64_t>(shares.partials) * shares.partial_tiles * group *
           (2 + round_up(head_dim, kPanel));
}

}  // namespace elastic_moe
