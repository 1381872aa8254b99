// Products of float32 matrices for training: C = A B or C += A B, by one thread.
//
// A is read number by number and may lie either way round; B is read in vectors of columns. What
// is read often is packed first: panels of kColumns columns, the rows of each one after the other.
#pragma once

#include "core/tile.h"

namespace {

constexpr int kColumns = kColumnPanels * kPanel;
constexpr int kBlockRows = elastic_moe::kTrainingBlockRows;  // that a piece of work takes at once
constexpr int kProductSteps = 256;  // of a sum between two visits to memory; 32 kB of B

using elastic_moe::round_up;

// A[r][k] = data[r * row + k * step]: row-major with step 1, transposed with row 1.
struct Left {
    const float* data;
    int64_t row, step;
};

// B[k][c] = data[c / kColumns * panel + k * row + c % kColumns].
struct Right {
    const float* data;
    int64_t row, panel;
};

static inline Right row_major(const float* data, int64_t row) { return {data, row, kColumns}; }
static inline Right packed(const float* data, int64_t steps) {
    return {data, kColumns, steps * kColumns};
}
static inline int64_t packed_size(int64_t steps, int64_t columns) {
    return steps * round_up(columns, kColumns);
}

template <int R, int P>
static __attribute__((noinline)) void product_tile(const float* a, int64_t row, int64_t step,
                                                   const float* b, int64_t b_row, int steps,
                                                   float* c, int64_t c_row, bool add) {
    constexpr int N = P * kParts;
    VFloat acc[R][N] = {};
    if (add)
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < N; ++i) acc[r][i] = load(c + r * c_row + i * kLanes);
    const float* at[R];
    for (int r = 0; r < R; ++r) at[r] = a + r * row;
    for (int s = 0; s < steps; ++s) {
        VFloat w[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) w[i] = load(b + i * kLanes);
        b += b_row;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const VFloat x = broadcast(*at[r]);
            at[r] += step;
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) acc[r][i] = fma(w[i], x, acc[r][i]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < N; ++i) store(c + r * c_row + i * kLanes, acc[r][i]);
}

// 1 <= rows <= kTileRows.
template <int P, int R = kTileRows>
static inline void product_rows(int rows, const float* a, int64_t row, int64_t step, const float* b,
                                int64_t b_row, int steps, float* c, int64_t c_row, bool add) {
    if constexpr (R > 1)
        if (rows < R)
            return product_rows<P, R - 1>(rows, a, row, step, b, b_row, steps, c, c_row, add);
    product_tile<R, P>(a, row, step, b, b_row, steps, c, c_row, add);
}

// C (rows, columns) = A (rows, steps) B (steps, columns), or added to C. Columns are whole panels
// of 16. A sum's association depends on `steps` alone.
static inline void product(int64_t rows, int64_t columns, int64_t steps, Left a, Right b, float* c,
                           int64_t c_row, bool add = false) {
    for (int64_t k = 0; k < steps || !k; k += kProductSteps) {
        const int now = static_cast<int>(steps - k < kProductSteps ? steps - k : kProductSteps);
        for (int64_t column = 0; column < columns; column += kColumns) {
            const float* const panel = b.data + column / kColumns * b.panel + k * b.row;
            for (int64_t r = 0; r < rows; r += kTileRows) {
                const int tall = static_cast<int>(rows - r < kTileRows ? rows - r : kTileRows);
                const float* const from = a.data + r * a.row + k * a.step;
                float* const to = c + r * c_row + column;
                if (columns - column >= kColumns)
                    product_rows<kColumnPanels>(tall, from, a.row, a.step, panel, b.row, now, to,
                                                c_row, add || k);
                else
                    product_rows<1>(tall, from, a.row, a.step, panel, b.row, now, to, c_row,
                                    add || k);
            }
        }
    }
}

// Pack columns `first`..`first + outputs - 1` of B from the rows of W (outputs, inputs): B = W^T.
static inline void pack_rows_as_columns(const float* w, int64_t w_row, int64_t outputs,
                                        int64_t inputs, int64_t first, float* to) {
    for (int64_t o = 0; o < outputs; ++o) {
        const int64_t column = first + o;
        float* const panel = to + column / kColumns * (inputs * kColumns) + column % kColumns;
        for (int64_t i = 0; i < inputs; ++i) panel[i * kColumns] = w[o * w_row + i];
    }
}

// Zero the columns from `columns` to the end of the last panel.
static inline void pack_nothing(int64_t columns, int64_t steps, float* to) {
    for (int64_t column = columns; column % kColumns; ++column) {
        float* const panel = to + column / kColumns * (steps * kColumns) + column % kColumns;
        for (int64_t k = 0; k < steps; ++k) panel[k * kColumns] = 0.0f;
    }
}

// Pack rows `first`..`first + rows - 1` of B, which has `steps` rows in all, as they lie in W.
static inline void pack_rows(const float* w, int64_t w_row, int64_t rows, int64_t columns,
                             int64_t first, int64_t steps, float* to) {
    for (int64_t column = 0; column < columns; column += kColumns) {
        float* const panel = to + column / kColumns * (steps * kColumns) + first * kColumns;
        const int64_t wide = columns - column < kColumns ? columns - column : kColumns;
        for (int64_t r = 0; r < rows; ++r) {
            std::memcpy(panel + r * kColumns, w + r * w_row + column,
                        sizeof(float) * static_cast<size_t>(wide));
            for (int64_t i = wide; i < kColumns; ++i) panel[r * kColumns + i] = 0.0f;
        }
    }
}

}  // namespace
