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
constexpr int kTileSums = kTileRows * 4 * kPanel;  // the sums of the largest tile

// Memory that a tile fetches into the second-level cache for the tiles that follow: `step` bytes
// for every step of this one. Memory so far ahead has arrived when it is used, whatever it waits
// for, and only the first tile of a phase meets weights that nobody fetched.
struct Ahead {
    const char* at;
    int64_t step;
};

// Lines that a tile of R rows and C panels fetches per step, at most.
constexpr int ahead_lines(int rows, int panels) { return rows <= 4 && panels == 4 ? 4 : 2; }

// This tile's share of `bytes` at `next`, when tile number `index` of `tiles` has `steps` steps.
static inline Ahead fetch_ahead(const void* next, int64_t bytes, int index, int tiles, int steps) {
    const int64_t all = static_cast<int64_t>(tiles) * steps;
    int64_t step = (bytes + all - 1) / all;
    if (step < 16) step = 16;  // the first tiles fetch all of it
    const int64_t from = step * steps * index;
    return {static_cast<const char*>(next) + from, from < bytes ? step : 0};
}

// sums[r][c] = panel c . x[r]. `stride`: values from one panel to the next.
template <class Kind, int R, int C>
static __attribute__((noinline)) void tile(const typename Kind::Value* const* x,
                                           const typename Kind::Value* w, int64_t stride, int steps,
                                           float* sums, Ahead ahead) {
    Panel acc[R][C] = {};
    const typename Kind::Value* row[R];
    for (int r = 0; r < R; ++r) row[r] = x[r];
    for (int step = 0; step < steps; ++step) {
        for (int line = 0; line < ahead_lines(R, C); ++line)
            __builtin_prefetch(ahead.at + 64 * line, 0, 2);
        ahead.at += ahead.step;
        typename Kind::Weights weights[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const typename Kind::Value* p =
                w + c * stride + static_cast<int64_t>(step) * (kPanel * Kind::kDepth);
            weights[c] = Kind::weights(p);
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
                store(sums + (r * C + c) * kPanel + i * kLanes, acc[r][c].part[i]);
}

template <class Kind, int R>
static inline void tile_of(const typename Kind::Value* const* x, const typename Kind::Value* w,
                           int64_t stride, int steps, int panels, float* sums, Ahead ahead) {
    if (panels == tile_panels(R))
        return tile<Kind, R, tile_panels(R)>(x, w, stride, steps, sums, ahead);
    if (tile_panels(R) == 4 && panels == 2)
        return tile<Kind, R, 2>(x, w, stride, steps, sums, ahead);
    for (int c = 0; c < panels; ++c) {  // few panels are left: one by one
        float one[R * kPanel];
        tile<Kind, R, 1>(x, w + c * stride, stride, steps, one, ahead);
        for (int r = 0; r < R; ++r)
            std::memcpy(sums + (r * panels + c) * kPanel, one + r * kPanel, 4 * kPanel);
    }
}

// 1 <= rows <= kTileRows, 1 <= panels <= tile_panels(rows); sums is [rows][panels][16].
template <class Kind, int R = kTileRows>
static inline void multiply(int rows, const typename Kind::Value* const* x,
                            const typename Kind::Value* w, int64_t stride, int steps, int panels,
                            float* sums, Ahead ahead) {
    if constexpr (R > 1)
        if (rows < R) return multiply<Kind, R - 1>(rows, x, w, stride, steps, panels, sums, ahead);
    tile_of<Kind, R>(x, w, stride, steps, panels, sums, ahead);
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
