// A dense matrix times many rows.
#pragma once

#include "core/team.h"
#include "core/tile.h"
#include "ops/args.h"

namespace {

using elastic_moe::Matrix;

template <class Kind>
static inline const typename Kind::Value* panels_at(const void* data, int64_t stride, int panel) {
    return static_cast<const typename Kind::Value*>(data) + stride * panel;
}

// A piece of work is about this many bytes of weights: small enough that threads end together,
// large enough that taking one costs nothing.
constexpr int64_t kPieceBytes = 128 << 10;

// Panels per piece of work: full tiles of one row where there are enough of them.
static inline int piece_panels(int panels, int64_t panel_bytes, int threads) {
    int64_t count = kPieceBytes / panel_bytes;
    const int64_t even = (panels + 2 * threads - 1) / (2 * threads);
    if (count > even) count = even;
    if (count > kTilePanels) count = count / kTilePanels * kTilePanels;
    return static_cast<int>(count < 1 ? 1 : count);
}

// Every row times panels begin..end-1 of `matrix`; panels from `next` on are fetched for what comes
// then, unless it is -1. `input(row)` gives a row's inputs; `output(row, column, count, sums)`
// takes `count` <= 16 sums beginning at that column.
template <class Kind, class Input, class Output>
static void multiply_panels(const Matrix& matrix, const RowTiles& tiles, int begin, int end,
                            int next, Input input, Output output) {
    typedef typename Kind::Value Value;
    const int steps = steps_of<Kind>(matrix.inputs);
    const int64_t stride = static_cast<int64_t>(steps) * kPanel * Kind::kDepth;
    const int per_tile = tile_panels(tiles.widest());
    for (int panel = begin; panel < end; panel += per_tile) {
        const int count = end - panel < per_tile ? end - panel : per_tile;
        const Value* w = panels_at<Kind>(matrix.data, stride, panel);
        const int following = panel + count < end ? panel + count : next;
        const Value* const then =
            following < 0 ? nullptr : panels_at<Kind>(matrix.data, stride, following);
        for (int t = 0; t < tiles.tiles; ++t) {
            const int first = tiles.begin(t), height = tiles.begin(t + 1) - first;
            const Value* x[kTileRows];
            float sums[kTileSums];
            for (int r = 0; r < height; ++r) x[r] = input(first + r);
            multiply<Kind>(height, x, w, stride, steps, count, sums,
                           fetch_ahead(then, stride, count, t, tiles.tiles, steps));
            for (int r = 0; r < height; ++r)
                for (int c = 0; c < count; ++c) {
                    const int column = (panel + c) * kPanel;
                    const int left = matrix.outputs - column;
                    output(first + r, column, left < kPanel ? left : kPanel,
                           sums + (r * count + c) * kPanel);
                }
        }
    }
}

static inline int panels_of(const Matrix& matrix) { return (matrix.outputs + kPanel - 1) / kPanel; }

// Phase: every row times all of `matrix`; a thread that takes part calls `before()` first.
template <class Kind, class Input, class Output, class Before>
static void multiply_rows(Member& member, const Matrix& matrix, int rows, Input input,
                          Output output, Before before) {
    const int panels = panels_of(matrix);
    const int64_t panel_bytes = static_cast<int64_t>(steps_of<Kind>(matrix.inputs)) * kStepBytes;
    const int grain = piece_panels(panels, panel_bytes, member.threads);
    const RowTiles tiles(rows);
    member.phase([&] { return (panels + grain - 1) / grain; },
                 [&] {
                     before();
                     return [&](int64_t piece, int64_t next) {
                         const int begin = static_cast<int>(piece) * grain;
                         const int end = begin + grain < panels ? begin + grain : panels;
                         const int then = next < 0 ? -1 : static_cast<int>(next) * grain;
                         multiply_panels<Kind>(matrix, tiles, begin, end, then, input, output);
                     };
                 });
}

template <class Kind, class Input, class Output>
static void multiply_rows(Member& member, const Matrix& matrix, int rows, Input input,
                          Output output) {
    multiply_rows<Kind>(member, matrix, rows, input, output, [] {});
}

// out[0..count-1] = sums
static inline void store_panel(float* out, const float* sums, int count) {
    if (count == kPanel) std::memcpy(out, sums, sizeof(float) * kPanel);  // no call
    else std::memcpy(out, sums, sizeof(float) * static_cast<size_t>(count));
}

// out[0..count-1] += sums
static inline void add_panel(float* out, const float* sums, int count) {
    if (count == kPanel) {
        for (int i = 0; i < kPanel; i += kLanes) store(out + i, load(out + i) + load(sums + i));
        return;
    }
    for (int i = 0; i < count; ++i) out[i] += sums[i];
}

}  // namespace
