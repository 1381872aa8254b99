// Causal attention over block tables, for decode and prefill alike.
//
// Positions are taken in tiles of kTilePositions counted from 0. Each tile has a maximum, a sum and
// a sum of values of its own, and a query merges those of its tiles in order, from position 0 on.
// So its result depends on its position and the cache alone: not on the rows beside it, nor on how
// many threads its tiles were shared out to.
//
// The file is long because scores, softmax, sums of values, merging and the sharing out of work are
// one algorithm.
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
using elastic_moe::kTileBlocks;
using elastic_moe::kTilePositions;
using elastic_moe::kv_head_values;
using elastic_moe::KVPool;
using elastic_moe::Span;

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
    const int32_t block = blocks[position / kBlockPositions];
    const int lane = position % kBlockPositions, d = kv.head_dim, channels = value_stride(d);
    Value* const keys = keys_at<Kind>(kv, block, head) + lane * Kind::kDepth;
    Value* const values = values_at<Kind>(kv, block, head) +
                          lane / Kind::kDepth * (kPanel * Kind::kDepth) + lane % Kind::kDepth;
    Value rounded[kMaxHeadDim + 2 * kPanel];
    to_inputs<Kind>(key, d, channels, rounded);
    for (int c = 0; c < d; c += Kind::kDepth)
        std::memcpy(keys + c * kPanel, rounded + c, sizeof(Value) * Kind::kDepth);
    to_inputs<Kind>(value, d, channels, rounded);
    for (int c = 0; c < channels; c += kPanel)
        for (int i = 0; i < kPanel; ++i)
            values[c * kBlockPositions + i * Kind::kDepth] = rounded[c + i];
}

// Queries that a piece of work is for: tokens first..first+count-1 of a span, all heads that share
// key/value head `head`. Row r is token r / group, head r % group of the group.
struct QueryRows {
    const Span* span;
    int head, first, count;

    int position() const { return span->position + first; }
    int tiles() const { return (position() + count - 1) / kTilePositions + 1; }
};

// A tile of positions as the rows of a piece see it, and what is fetched while it is worked on.
struct Tile {
    int start, positions;   // the last row sees that many
    const int32_t* blocks;  // of the tile
    const int32_t* next;    // blocks of the tile that comes then
    int next_head, next_positions;
};

static inline Tile tile_at(const QueryRows& rows, int tile, const QueryRows& next, int next_tile) {
    const auto positions = [](const QueryRows& q, int t) {
        const int left = q.position() + q.count - t * kTilePositions;
        return left < kTilePositions ? left : kTilePositions;
    };
    const int32_t* const blocks = rows.span->blocks + tile * kTileBlocks;
    Tile made = {tile * kTilePositions, positions(rows, tile), blocks, blocks, 0, 0};
    if (next.span) {
        made.next = next.span->blocks + next_tile * kTileBlocks;
        made.next_head = next.head;
        made.next_positions = positions(next, next_tile);
    }
    return made;
}

// Scores, then probabilities, of as many rows as a product takes.
struct RowScratch {
    alignas(64) float scores[kTileRows][kTilePositions];
};

// scores[r] = q[r] . keys. With `fetch`, the tile's values are fetched.
template <class Kind>
static inline void score_rows(const KVPool& kv, const Tile& tile, int head, int height,
                              const typename Kind::Value* const* q, bool fetch, RowScratch& s) {
    const int steps = steps_of<Kind>(kv.head_dim), most = tile_panels(height);
    const int blocks = (tile.positions + kBlockPositions - 1) / kBlockPositions;
    for (int block = 0; block < blocks; block += most) {
        const int count = blocks - block < most ? blocks - block : most;
        const typename Kind::Value* keys[kMostPanels];
        Ahead ahead = fetch_nothing();
        for (int c = 0; c < count; ++c) {
            keys[c] = keys_at<Kind>(kv, tile.blocks[block + c], head);
            if (!fetch) continue;
            ahead.line[c] =
                reinterpret_cast<const char*>(values_at<Kind>(kv, tile.blocks[block + c], head));
            ahead.step = kStepBytes;
        }
        multiply<Kind>(height, q, keys, steps, count, s.scores[0] + block * kPanel, kTilePositions,
                       ahead);
    }
}

// Maximum and sum of what a row has seen.
struct Softmax {
    float best, total;
};

// The first `seen` scores of a row become probabilities relative to their maximum, in place; zeros
// follow up to `positions`.
static inline Softmax soften(float* scores, int seen, int positions, float scale) {
    const int whole = seen / kLanes * kLanes;
    VFloat top = broadcast(-INFINITY);
    for (int i = 0; i < whole; i += kLanes) {
        const VFloat v = load(scores + i) * scale;
        store(scores + i, v);
        top = max(v, top);
    }
    if (whole < seen) {
        for (int i = whole; i < whole + kLanes; ++i)
            scores[i] = i < seen ? scores[i] * scale : -INFINITY;
        top = max(load(scores + whole), top);
    }
    const float best = reduce_max(top);
    VFloat sum = {};
    int i = 0;
    for (; i < seen; i += kLanes) {
        const VFloat p = exp_nonpositive(load(scores + i) - best);
        store(scores + i, p);
        sum += p;
    }
    for (; i < positions; i += kLanes) store(scores + i, VFloat{});
    return {best, reduce_sum(sum)};
}

// How sums are scaled when a tile's are added to those before.
struct Scales {
    float before, tile;
};

static inline Scales merge(Softmax& all, const Softmax& tile) {
    const float apart = all.best - tile.best;
    const bool later = !(apart > 0.0f);  // the tile has the maximum
    const float smaller = exp_nonpositive(broadcast(later ? apart : -apart))[0];
    const Scales scales = later ? Scales{smaller, 1.0f} : Scales{1.0f, smaller};
    if (later) all.best = tile.best;
    all.total = all.total * scales.before + tile.total * scales.tile;
    return scales;
}

static inline VFloat merge(VFloat all, VFloat tile, const Scales& scales) {
    return fma(tile, broadcast(scales.tile), all * broadcast(scales.before));
}

template <int N>
struct Inputs {
    static constexpr int value = N;
};

// Merge probabilities[r] . values into sums[r], for R rows and C panels of channels from `channel`
// on. With `fetch`, the keys of the next tile are fetched.
template <class Kind, int R, int C>
static __attribute__((noinline)) void add_values(const KVPool& kv, const Tile& tile, int head,
                                                 int channel, bool fetch,
                                                 const float* probabilities, const Scales* scales,
                                                 float* sums) {
    constexpr int kSteps = kBlockPositions / Kind::kDepth;
    Panel acc[R][C] = {};
    for (int block = 0; block * kBlockPositions < tile.positions; ++block) {
        const int count = tile.positions - block * kBlockPositions;
        const typename Kind::Value* const v =
            values_at<Kind>(kv, tile.blocks[block], head) + channel * kBlockPositions;
        const float* const p = probabilities + block * kBlockPositions;
        const char* line = kNothing;
        int64_t fetched = 0;
        if (fetch && block * kBlockPositions < tile.next_positions) {
            line = reinterpret_cast<const char*>(
                keys_at<Kind>(kv, tile.next[block], tile.next_head) + channel * kBlockPositions);
            fetched = kStepBytes;
        }
        const auto add = [&](int step, auto inputs) __attribute__((always_inline)) {
            typename Kind::Wide values[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                __builtin_prefetch(line, 0, 2);
                line += fetched;
                values[c] =
                    Kind::wide(v + c * (kPanel * kBlockPositions) + step * (kPanel * Kind::kDepth));
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c)
                    add_inputs<decltype(inputs)::value>(
                        acc[r][c], values[c], p + r * kTilePositions + step * Kind::kDepth);
        };
        const int whole = count / Kind::kDepth < kSteps ? count / Kind::kDepth : kSteps;
        for (int step = 0; step < whole; ++step) add(step, Inputs<Kind::kDepth>{});
        // What lies beyond the last position was never written.
        if (whole < kSteps && count % Kind::kDepth) add(whole, Inputs<1>{});
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            for (int i = 0; i < kParts; ++i) {
                float* const to =
                    sums + r * value_stride(kv.head_dim) + channel + c * kPanel + i * kLanes;
                store(to, merge(load(to), acc[r][c].part[i], scales[r]));
            }
}

// All channels of 1 <= rows <= kValueRows rows.
template <class Kind, int R = kValueRows>
static inline void add_values_of(int rows, const KVPool& kv, const Tile& tile, int head, bool fetch,
                                 const float* probabilities, const Scales* scales, float* sums) {
    if constexpr (R > 1)
        if (rows < R)
            return add_values_of<Kind, R - 1>(rows, kv, tile, head, fetch, probabilities, scales,
                                              sums);
    const int channels = value_stride(kv.head_dim);
    int channel = 0;
    for (; channel + kValuePanels * kPanel <= channels; channel += kValuePanels * kPanel)
        add_values<Kind, R, kValuePanels>(kv, tile, head, channel, fetch, probabilities, scales,
                                          sums);
    for (; channel < channels; channel += kPanel)
        add_values<Kind, R, 1>(kv, tile, head, channel, fetch, probabilities, scales, sums);
}

// What the rows of a piece of work have merged: softmax (rows,) and sums (rows, value_stride).
struct Merged {
    Softmax* softmax;
    float* sums;

    void clear(int rows, int channels) const {
        for (int r = 0; r < rows; ++r) softmax[r] = {-INFINITY, 0.0f};
        std::memset(sums, 0, sizeof(float) * static_cast<size_t>(rows * channels));
    }
};

// Merge a tile into those rows that see any of it; to the others it is nothing.
template <class Kind>
static inline void attend_tile(const AttentionArgs& args, const QueryRows& rows, const Tile& tile,
                               const Merged& to, RowScratch& s) {
    typedef typename Kind::Value Value;
    const KVPool& kv = args.kv;
    const int d = kv.head_dim, group = args.heads / kv.kv_heads;
    const int blind = rows.position() < tile.start ? tile.start - rows.position() : 0;  // tokens
    const RowTiles tiles((rows.count - blind) * group);
    for (int t = 0; t < tiles.tiles; ++t) {
        const int begin = blind * group + tiles.begin(t);
        const int height = tiles.begin(t + 1) - tiles.begin(t);
        const Value* q[kTileRows];
        for (int r = 0; r < height; ++r)
            q[r] = static_cast<const Value*>(args.queries) +
                   args.query_stride * (rows.span->row + rows.first + (begin + r) / group) +
                   static_cast<int64_t>(rows.head * group + (begin + r) % group) * d;
        score_rows<Kind>(kv, tile, rows.head, height, q, t == 0, s);
        Scales scales[kTileRows];
        for (int r = 0; r < height; ++r) {
            const int own = rows.position() + (begin + r) / group + 1 - tile.start;
            const Softmax softmax =
                soften(s.scores[r], own < tile.positions ? own : tile.positions,
                       (tile.positions + kPanel - 1) / kPanel * kPanel, args.scale);
            scales[r] = merge(to.softmax[begin + r], softmax);
        }
        for (int r = 0; r < height; r += kValueRows)
            add_values_of<Kind>(height - r < kValueRows ? height - r : kValueRows, kv, tile,
                                rows.head, t == 0 && r == 0, s.scores[r], scales + r,
                                to.sums + static_cast<int64_t>(begin + r) * value_stride(d));
    }
}

// The results of rows whose tiles are all merged.
template <class Kind>
static inline void write_rows(const AttentionArgs& args, const QueryRows& rows,
                              const Merged& from) {
    typedef typename Kind::Value Value;
    const int d = args.kv.head_dim, group = args.heads / args.kv.kv_heads;
    const int channels = value_stride(d);
    for (int r = 0; r < rows.count * group; ++r) {
        float* const sums = from.sums + static_cast<int64_t>(r) * channels;
        for (int i = 0; i < channels; i += kLanes)
            store(sums + i, load(sums + i) / broadcast(from.softmax[r].total));
        Value rounded[kMaxHeadDim + 2 * kPanel];
        to_inputs<Kind>(sums, d, channels, rounded);
        std::memcpy(static_cast<Value*>(args.out) +
                        args.out_stride * (rows.span->row + rows.first + r / group) +
                        static_cast<int64_t>(rows.head * group + r % group) * d,
                    rounded, sizeof(Value) * static_cast<size_t>(d));
    }
}

// A piece of work: some tiles of some rows; all of them, unless tiles of single tokens are shared
// out too.
struct AttentionPiece {
    QueryRows rows;
    int begin, end;  // tiles
    int partial;     // number of the (span, head) among those whose tiles are shared out
};

// Numbers the pieces. They are asked for in ascending order. Pieces of one head follow each other,
// as they share its keys and values.
class AttentionPieces {
  public:
    explicit AttentionPieces(const AttentionArgs& args)
        : args_(args), group_(args.heads / args.kv.kv_heads) {
        tokens_ = args.shares.rows < group_ ? 1 : args.shares.rows / group_;
    }

    int64_t count() const {
        int64_t pieces = 0;
        for (int i = 0; i < args_.span_count; ++i)
            pieces += each_head(args_.spans[i]) * args_.kv.kv_heads;
        return pieces;
    }

    AttentionPiece find(int64_t piece) {
        int64_t each;
        for (;; ++index_) {
            each = each_head(args_.spans[index_]);
            if (piece < before_ + each * args_.kv.kv_heads) break;
            before_ += each * args_.kv.kv_heads;
            singles_ += args_.spans[index_].rows == 1;
        }
        const Span& span = args_.spans[index_];
        const int head = static_cast<int>((piece - before_) / each);
        const int number = static_cast<int>((piece - before_) % each);
        if (span.rows == 1) {
            const QueryRows rows = {&span, head, 0, 1};
            const int tiles = rows.tiles(), runs = static_cast<int>(each);
            return {rows, tiles * number / runs, tiles * (number + 1) / runs,
                    singles_ * args_.kv.kv_heads + head};
        }
        // Late tokens see most positions; they go first, so that threads end together.
        const int first = static_cast<int>(each - 1 - number) * tokens_;
        const int left = span.rows - first;
        const QueryRows rows = {&span, head, first, left < tokens_ ? left : tokens_};
        return {rows, 0, rows.tiles(), 0};
    }

  private:
    int64_t each_head(const Span& span) const {
        return span.rows == 1 ? args_.shares.runs : (span.rows + tokens_ - 1) / tokens_;
    }

    const AttentionArgs& args_;
    const int group_;
    int tokens_;
    int index_ = 0;       // of the span found last
    int64_t before_ = 0;  // pieces of earlier spans
    int singles_ = 0;     // earlier spans of one token
};

// One tile's part of a (span, head) whose tiles are shared out.
static inline Merged partial_at(const AttentionArgs& args, int partial, int tile) {
    const int64_t group = args.heads / args.kv.kv_heads, channels = value_stride(args.kv.head_dim);
    float* const at =
        args.partials +
        group * (channels + 2) * (static_cast<int64_t>(partial) * args.shares.partial_tiles + tile);
    return {reinterpret_cast<Softmax*>(at), at + 2 * group};
}

// Merge the tiles of a (span, head), each of which has a part of its own.
static inline void merge_partials(const AttentionArgs& args, const AttentionPiece& piece,
                                  const Merged& to) {
    const int group = args.heads / args.kv.kv_heads, channels = value_stride(args.kv.head_dim);
    for (int tile = 0; tile < piece.rows.tiles(); ++tile) {
        const Merged part = partial_at(args, piece.partial, tile);
        for (int r = 0; r < group; ++r) {
            const Scales scales = merge(to.softmax[r], part.softmax[r]);
            float* const sums = to.sums + r * channels;
            for (int i = 0; i < channels; i += kLanes)
                store(sums + i, merge(load(sums + i), load(part.sums + r * channels + i), scales));
        }
    }
}

template <class Kind>
static void attend(const AttentionArgs& args, const AttentionPiece& piece,
                   const AttentionPiece& next) {
    RowScratch scratch;
    Softmax softmax[kMaxHeadsPerGroup];
    alignas(64) float sums[kMaxHeadsPerGroup * kMaxHeadDim];
    const Merged merged = {softmax, sums};
    const int channels = value_stride(args.kv.head_dim);
    const int rows = piece.rows.count * (args.heads / args.kv.kv_heads);
    const bool shared = piece.rows.span->rows == 1 && args.shares.runs > 1;
    merged.clear(rows, channels);
    for (int tile = piece.begin; tile < piece.end; ++tile) {
        const bool more = tile + 1 < piece.end;
        const Tile here =
            tile_at(piece.rows, tile, more ? piece.rows : next.rows, more ? tile + 1 : next.begin);
        const Merged& to = shared ? partial_at(args, piece.partial, tile) : merged;
        if (shared) to.clear(rows, channels);
        attend_tile<Kind>(args, piece.rows, here, to, scratch);
    }
    if (shared) {
        int32_t* const done = args.runs_done + piece.partial;
        if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) != args.shares.runs) return;
        *done = 0;  // for the next layer
        merge_partials(args, piece, merged);
    }
    write_rows<Kind>(args, piece.rows, merged);
}

// Phase: attention of all spans; `before(span, head)` comes before a piece of work is done.
template <class Kind, class Before>
static void run_attention(Member& member, const AttentionArgs& args, Before before_piece) {
    member.phase([&] { return AttentionPieces(args).count(); },
                 [&] {
                     return [&, pieces = AttentionPieces(args), known = AttentionPiece{},
                             known_number = int64_t{-1}](int64_t piece, int64_t next) mutable {
                         const AttentionPiece now =
                             piece == known_number ? known : pieces.find(piece);
                         // Known one piece early, so that its keys can be fetched.
                         known = next < 0 ? AttentionPiece{} : pieces.find(next);
                         known_number = next;
                         before_piece(*now.rows.span, now.rows.head);
                         attend<Kind>(args, now, known);
                     };
                 });
}

}  // namespace
