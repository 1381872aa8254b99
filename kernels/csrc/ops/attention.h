// Causal attention over block tables, for decode and prefill alike.
//
// Positions are taken in tiles of kTilePositions counted from 0, with a running maximum and sum. A
// query's result depends on its position and the cache alone: a tile has the same bounds whoever
// looks at it, and what lies beyond a query's own position contributes exact zeros.
#pragma once

#include <cmath>

#include "core/team.h"
#include "core/tile.h"
#include "ops/args.h"
#include "ops/norm.h"

namespace {

using elastic_moe::AttentionArgs;
using elastic_moe::kBlockPositions;
using elastic_moe::kMaxHeadDim;
using elastic_moe::kMaxHeadsPerGroup;
using elastic_moe::kTilePositions;
using elastic_moe::kv_head_values;
using elastic_moe::KVPool;
using elastic_moe::Span;

constexpr int kFetchPositions = 3 * kBlockPositions;  // how far ahead blocks are fetched
constexpr int kQueryRows = 16;  // rows (tokens x heads of a group) per piece of work, at least
constexpr int kMaxQueryRows = kMaxHeadsPerGroup;
static_assert(kQueryRows <= kMaxQueryRows, "a piece of work fits its scratch");

static inline int value_stride(int head_dim) {
    return static_cast<int>(elastic_moe::round_up(head_dim, kPanel));
}

template <class Kind>
static inline typename Kind::Value* keys_at(const KVPool& kv, int32_t block, int head) {
    return static_cast<typename Kind::Value*>(kv.data) +
           kv_head_values(kv.head_dim) * (static_cast<int64_t>(kv.kv_heads) * block + head);
}

template <class Kind>
static inline typename Kind::Value* values_at(const KVPool& kv, int32_t block, int head) {
    return keys_at<Kind>(kv, block, head) + static_cast<int64_t>(kPanel) * kv.head_dim;
}

// Put one position's key and value of one head (float32, d each) into its block.
template <class Kind>
static inline void store_kv(const KVPool& kv, const int32_t* blocks, int position, int head,
                            const float* key, const float* value) {
    typedef typename Kind::Value Value;
    const int lane = position % kBlockPositions, d = kv.head_dim;
    Value* const keys = keys_at<Kind>(kv, blocks[position / kBlockPositions], head);
    Value rounded[kMaxHeadDim + 2 * kPanel];
    to_inputs<Kind>(key, d, value_stride(d), rounded);
    for (int c = 0; c < d; c += Kind::kDepth)
        std::memcpy(keys + c * kPanel + lane * Kind::kDepth, rounded + c,
                    sizeof(Value) * Kind::kDepth);
    to_inputs<Kind>(value, d, value_stride(d),
                    keys + static_cast<int64_t>(kPanel) * d + lane * value_stride(d));
}

// Blocks lie anywhere, so that no hardware foresees the next one: fetch a head's part of it.
template <class Kind>
static inline void fetch_block(const KVPool& kv, int32_t block, int head) {
    const char* const at = reinterpret_cast<const char*>(keys_at<Kind>(kv, block, head));
    const int64_t bytes =
        kv_head_values(kv.head_dim) * static_cast<int64_t>(sizeof(typename Kind::Value));
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// What one piece of work keeps: `scores` and `sums` for its rows.
struct AttentionScratch {
    float scores[kMaxQueryRows][kTilePositions];
    float sums[kMaxQueryRows][kMaxHeadDim];
    float best[kMaxQueryRows];
    float total[kMaxQueryRows];
};

// sums[r] = sums[r] * scale[r] + probabilities[r] . values, for R rows and C panels of channels.
template <class Kind, int R, int C>
static inline void add_values(const KVPool& kv, const int32_t* blocks, int head, int positions,
                              int channel, AttentionScratch& s, int row, const float* scale) {
    Panel acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            for (int i = 0; i < kParts; ++i)
                acc[r][c].part[i] =
                    load(s.sums[row + r] + channel + c * kPanel + i * kLanes) * scale[r];
    const int stride = value_stride(kv.head_dim);
    for (int block = 0; block * kBlockPositions < positions; ++block) {
        const int left = positions - block * kBlockPositions;
        const int count = left < kBlockPositions ? left : kBlockPositions;
        const typename Kind::Value* v = values_at<Kind>(kv, blocks[block], head) + channel;
        for (int key = 0; key < count; ++key, v += stride) {
            Panel value[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
                for (int i = 0; i < kParts; ++i)
                    value[c].part[i] = Kind::read(v + c * kPanel + i * kLanes);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const VFloat p = broadcast(s.scores[row + r][block * kBlockPositions + key]);
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c)
                    for (int i = 0; i < kParts; ++i)
                        acc[r][c].part[i] = fma(p, value[c].part[i], acc[r][c].part[i]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            for (int i = 0; i < kParts; ++i)
                store(s.sums[row + r] + channel + c * kPanel + i * kLanes, acc[r][c].part[i]);
}

// Scores of one tile -> probabilities in place; returns what earlier sums are to be scaled by.
static inline float soften(float* scores, int positions, float& best, float& total) {
    VFloat top = broadcast(best);
    for (int i = 0; i < positions; i += kLanes) top = max(load(scores + i), top);
    const float now = reduce_max(top);
    const float scale = exp_nonpositive(broadcast(best - now))[0];
    VFloat sum = {};
    for (int i = 0; i < positions; i += kLanes) {
        const VFloat p = exp_nonpositive(load(scores + i) - now);
        store(scores + i, p);
        sum += p;
    }
    total = total * scale + reduce_sum(sum);
    best = now;
    return scale;
}

// Tokens first..first+count-1 of a span, all query heads that share key/value head `head`.
template <class Kind>
static void attend(const AttentionArgs& args, const Span& span, int head, int first, int count,
                   AttentionScratch& s) {
    typedef typename Kind::Value Value;
    const KVPool& kv = args.kv;
    const int d = kv.head_dim, group = args.heads / kv.kv_heads, rows = count * group;
    const int channels = value_stride(d), steps = steps_of<Kind>(d);
    const int last = span.position + first + count - 1;
    for (int r = 0; r < rows; ++r) {  // row r: token r / group, head r % group of the group
        s.best[r] = -INFINITY;
        s.total[r] = 0.0f;
        std::memset(s.sums[r], 0, sizeof(float) * static_cast<size_t>(channels));
    }
    const RowTiles tiles(rows);
    for (int from = 0; from < kFetchPositions && from <= last; from += kBlockPositions)
        fetch_block<Kind>(kv, span.blocks[from / kBlockPositions], head);
    for (int start = 0; start <= last; start += kTilePositions) {
        const int positions = last + 1 - start < kTilePositions ? last + 1 - start : kTilePositions;
        const int32_t* const blocks = span.blocks + start / kBlockPositions;
        for (int t = 0; t < tiles.tiles; ++t) {
            const int begin = tiles.begin(t), height = tiles.begin(t + 1) - begin;
            const Value* q[kTileRows];
            for (int r = 0; r < height; ++r) {
                const int token = first + (begin + r) / group;
                q[r] = static_cast<const Value*>(args.queries) +
                       args.query_stride * (span.row + token) +
                       static_cast<int64_t>(head * group + (begin + r) % group) * d;
            }
            for (int from = 0; from < positions; from += kBlockPositions) {
                const int ahead = from + kFetchPositions;
                if (t == 0 && ahead <= last - start)
                    fetch_block<Kind>(kv, blocks[ahead / kBlockPositions], head);
                float out[kTileRows * kPanel];
                const Value* const keys = keys_at<Kind>(kv, blocks[from / kBlockPositions], head);
                multiply<Kind>(height, q, keys, 0, steps, 1, out,
                               {reinterpret_cast<const char*>(keys), 0});
                for (int r = 0; r < height; ++r) {
                    const int own = span.position + first + (begin + r) / group;
                    const int seen = own + 1 - start - from;  // positions of the block it may see
                    float* to = s.scores[begin + r] + from;
                    for (int i = 0; i < kPanel; i += kLanes)
                        store(to + i, load(out + r * kPanel + i) * args.scale);
                    for (int i = seen < 0 ? 0 : seen; i < kPanel; ++i) to[i] = -INFINITY;
                }
            }
        }
        const int softened = (positions + kPanel - 1) / kPanel * kPanel;
        for (int row = 0; row < rows;) {
            const int height = rows - row < kValueRows ? 1 : kValueRows;
            float scale[kValueRows];
            for (int r = 0; r < height; ++r)
                scale[r] = soften(s.scores[row + r], softened, s.best[row + r], s.total[row + r]);
            for (int channel = 0; channel < channels;) {
                const bool wide = channels - channel >= kValuePanels * kPanel;
                if (height == 1 && wide)
                    add_values<Kind, 1, kValuePanels>(kv, blocks, head, positions, channel, s, row,
                                                      scale);
                else if (height == 1)
                    add_values<Kind, 1, 1>(kv, blocks, head, positions, channel, s, row, scale);
                else if (wide)
                    add_values<Kind, kValueRows, kValuePanels>(kv, blocks, head, positions, channel,
                                                               s, row, scale);
                else
                    add_values<Kind, kValueRows, 1>(kv, blocks, head, positions, channel, s, row,
                                                    scale);
                channel += (wide ? kValuePanels : 1) * kPanel;
            }
            row += height;
        }
    }
    for (int r = 0; r < rows; ++r) {
        float* const sums = s.sums[r];
        for (int i = 0; i < channels; i += kLanes)
            store(sums + i, load(sums + i) / broadcast(s.total[r]));
        Value rounded[kMaxHeadDim + 2 * kPanel];
        to_inputs<Kind>(sums, d, channels, rounded);
        std::memcpy(static_cast<Value*>(args.out) +
                        args.out_stride * (span.row + first + r / group) +
                        static_cast<int64_t>(head * group + r % group) * d,
                    rounded, sizeof(Value) * static_cast<size_t>(d));
    }
}

// Phase: attention of all spans; `before(span, head)` comes before a piece of work is done.
template <class Kind, class Before>
static void run_attention(Member& member, const AttentionArgs& args, Before before_piece) {
    const int group = args.heads / args.kv.kv_heads;
    const int tokens = group < kQueryRows ? kQueryRows / group : 1;  // per piece of work
    const auto tiles_of = [&](const Span& span) {
        return static_cast<int64_t>((span.rows + tokens - 1) / tokens);
    };
    member.phase(
        [&] {
            int64_t pieces = 0;
            for (int i = 0; i < args.span_count; ++i)
                pieces += tiles_of(args.spans[i]) * args.kv.kv_heads;
            return pieces;
        },
        [&] {
            return [&, index = 0, before = int64_t{0}](int64_t piece, int64_t) mutable {
                AttentionScratch scratch;
                // Pieces come in ascending order; `before` counts those of earlier spans.
                int64_t tiles = tiles_of(args.spans[index]);
                for (; piece >= before + tiles * args.kv.kv_heads;
                     tiles = tiles_of(args.spans[++index]))
                    before += tiles * args.kv.kv_heads;
                const Span& span = args.spans[index];
                const int64_t own = piece - before;
                // Late tiles see most positions; they go first, so that threads end together.
                const int first = static_cast<int>(tiles - 1 - own / args.kv.kv_heads) * tokens;
                const int left = span.rows - first;
                const int head = static_cast<int>(own % args.kv.kv_heads);
                before_piece(span, head);
                attend<Kind>(args, span, head, first, left < tokens ? left : tokens, scratch);
            };
        });
}

}  // namespace
