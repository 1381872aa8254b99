// The product that everything is made of: a few rows times a few panels.
//
// Each sum is one chain over all inputs in their order, whatever the number of rows and panels of
// the tile: a row's bits do not depend on its neighbours. Sixteen chains at once hide the latency
// of the multiply-add and read each weight once per `kTileRows` rows.
#pragma once

#include "core/values.h"

namespace {

// Sizes by the level's registers: of these tiles, of attention's sums of values
// (ops/attention.h), and of the columns of a float32 product (training/product.h).
#if defined(__AVX512F__)
constexpr int kTileRows = 8;  // 8 rows x 2 panels of one register each
constexpr int tile_panels(int rows) { return rows <= 4 ? 4 : 2; }
constexpr int kValueRows = 4, kValuePanels = 4;
constexpr int kColumnPanels = 2;
#elif defined(__AVX2__)
constexpr int kTileRows = 4;  // 4 rows x 1 panel of two registers
constexpr int tile_panels(int rows) { return rows == 1 ? 2 : 1; }
constexpr int kValueRows = 2, kValuePanels = 2;
constexpr int kColumnPanels = 1;
#else
constexpr int kTileRows = 2;  // 2 rows x 1 panel of four registers
constexpr int tile_panels(int rows) { return rows == 0 ? 2 : 1; }
constexpr int kValueRows = 1, kValuePanels = 2;
constexpr int kColumnPanels = 1;
#endif
constexpr int kTilePanels = tile_panels(1);
constexpr int kMostPanels = 4;                               // of any tile
constexpr int kTileSums = kTileRows * kMostPanels * kPanel;  // the sums of the largest tile

// Memory that a tile fetches into the second-level cache for what follows it: with every step, a
// line for each of its panels. Weights that are fetched a tile early have arrived when they are
// used, and only the first tile of a phase waits for memory.
struct Ahead {
    const char* line[kMostPanels];
    int64_t step;  // bytes
};

constexpr char kNothing[kStepBytes] = {};

// Nothing.
static inline Ahead fetch_nothing() { return {{kNothing, kNothing, kNothing, kNothing}, 0}; }

// The same places of the next tile, whose panels begin at `next`, `stride` values apart: the share
// of tile number `index` of `tiles` that multiply the same panels.
template <class Value>
static inline Ahead fetch_ahead(const Value* next, int64_t stride, int panels, int index, int tiles,
                                int steps) {
    int64_t step = (kStepBytes + tiles - 1) / tiles;
    if (step < 16) step = 16;  // the first tiles fetch all of it
    const int64_t from = step * steps * index;
    Ahead ahead = fetch_nothing();
    if (!next || from >= int64_t{kStepBytes} * steps) return ahead;
    for (int c = 0; c < panels; ++c)
        ahead.line[c] = reinterpret_cast<const char*>(next + c * stride) + from;
    ahead.step = step;
    return ahead;
}

// sums[r][c] = panel c . x[r], for panels at w[0..C-1]; rows of `sums` are `stride` apart.
template <class Kind, int R, int C>
static __attribute__((noinline)) void tile(const typename Kind::Value* const* x,
                                           const typename Kind::Value* const* w, int steps,
                                           float* sums, int stride, const Ahead& ahead) {
    Panel acc[R][C] = {};
    const typename Kind::Value *row[R], *panel[C];
    const char* line[C];
    for (int r = 0; r < R; ++r) row[r] = x[r];
    for (int c = 0; c < C; ++c) panel[c] = w[c];
    for (int c = 0; c < C; ++c) line[c] = ahead.line[c];
    int64_t fetched = 0;
    for (int step = 0; step < steps; ++step, fetched += ahead.step) {
        typename Kind::Weights weights[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            __builtin_prefetch(line[c] + fetched, 0, 2);
            weights[c] =
                Kind::weights(panel[c] + static_cast<int64_t>(step) * (kPanel * Kind::kDepth));
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c)
                Kind::add(acc[r][c], weights[c], row[r] + step * Kind::kDepth);
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            for (int i = 0; i < kParts; ++i)
                store(sums + r * stride + c * kPanel + i * kLanes, acc[r][c].part[i]);
}

template <class Kind, int R>
static inline void tile_of(const typename Kind::Value* const* x,
                           const typename Kind::Value* const* w, int steps, int panels, float* sums,
                           int stride, const Ahead& ahead) {
    if (panels == tile_panels(R))
        return tile<Kind, R, tile_panels(R)>(x, w, steps, sums, stride, ahead);
    if (tile_panels(R) == 4 && panels == 2)
        return tile<Kind, R, 2>(x, w, steps, sums, stride, ahead);
    for (int c = 0; c < panels; ++c)  // few panels are left: one by one
        tile<Kind, R, 1>(x, w + c, steps, sums + c * kPanel, stride, {{ahead.line[c]}, ahead.step});
}

// 1 <= rows <= kTileRows, 1 <= panels <= tile_panels(rows).
template <class Kind, int R = kTileRows>
static inline void multiply(int rows, const typename Kind::Value* const* x,
                            const typename Kind::Value* const* w, int steps, int panels,
                            float* sums, int stride, const Ahead& ahead) {
    if constexpr (R > 1)
        if (rows < R) return multiply<Kind, R - 1>(rows, x, w, steps, panels, sums, stride, ahead);
    tile_of<Kind, R>(x, w, steps, panels, sums, stride, ahead);
}

// The same for panels that begin at `w`, `stride` values apart; sums is [rows][panels][16].
template <class Kind>
static inline void multiply(int rows, const typename Kind::Value* const* x,
                            const typename Kind::Value* w, int64_t stride, int steps, int panels,
                            float* sums, const Ahead& ahead) {
    const typename Kind::Value* at[kMostPanels];
    for (int c = 0; c < panels; ++c) at[c] = w + c * stride;
    multiply<Kind>(rows, x, at, steps, panels, sums, panels * kPanel, ahead);
}

// Cuts n rows into ceil(n / kTileRows) tiles of nearly equal height.
struct RowTiles {
    int rows, tiles;

    explicit RowTiles(int n) : rows(n), tiles((n + kTileRows - 1) / kTileRows) {}
    int begin(int tile) const {
        return static_cast<int>(static_cast<int64_t>(rows) * tile / tiles);
    }
    int widest() const { return tiles ? (rows + tiles - 1) / tiles : 0; }
};

}  // namespace
