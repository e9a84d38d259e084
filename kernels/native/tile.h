// A few rows times bfloat16 weights of a few outputs: the inner loop of products and of attention.
//
// Weights are packed so that they are read once and in order: for each pair of inputs, LANES pairs
// of bfloat16 for the first outputs and LANES for the others. A shift and a mask make float32 of
// them, which serve as many rows as there are registers for sums.
#pragma once

#include "vectors.h"

namespace mell {

constexpr int WIDTH = 2 * LANES;             // outputs of a tile
constexpr int ROWS = LANES == 16 ? 12 : 6;   // rows of it, at most
constexpr int AHEAD = 16;                    // pairs by which weights are fetched before their turn

// y[r, 0:WIDTH] = or += x[r] W^T
template <int COUNT, bool FETCH>
void tile(const uint32_t *weight, const float *x, int64_t x_stride, int64_t pairs, float *y,
          int64_t y_stride, bool add) {
  constexpr int SETS = COUNT <= 3 ? 2 : 1;  // of sums: few would wait for each other
  Floats sums[COUNT][2][SETS]{};
  if (add) {
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      sums[r][0][0] = load(y + r * y_stride);
      sums[r][1][0] = load(y + r * y_stride + LANES);
    }
  }
  for (int64_t pair = 0; pair < pairs; pair++) {
    if constexpr (FETCH) {
      __builtin_prefetch(weight + AHEAD * WIDTH);
      __builtin_prefetch(weight + AHEAD * WIDTH + LANES);
    }
    Words left = load(weight), right = load(weight + LANES);
    Floats a = first_of_pairs(left), b = first_of_pairs(right);
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      Floats input = splat(x[r * x_stride]);
      sums[r][0][0] += a * input;
      sums[r][1][0] += b * input;
    }
    a = second_of_pairs(left), b = second_of_pairs(right);
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      Floats input = splat(x[r * x_stride + 1]);
      sums[r][0][SETS - 1] += a * input;
      sums[r][1][SETS - 1] += b * input;
    }
    weight += WIDTH;
    x += 2;
  }
#pragma GCC unroll 12
  for (int r = 0; r < COUNT; r++)
    for (int half = 0; half < 2; half++) {
      Floats total = sums[r][half][0];
      if constexpr (SETS == 2) total += sums[r][half][1];
      store(y + r * y_stride + half * LANES, total);
    }
}

template <bool FETCH, int COUNT = ROWS>
void any_tile(int rows, const uint32_t *weight, const float *x, int64_t x_stride, int64_t pairs,
              float *y, int64_t y_stride, bool add) {
  if (rows == COUNT) return tile<COUNT, FETCH>(weight, x, x_stride, pairs, y, y_stride, add);
  if constexpr (COUNT > 1)
    any_tile<FETCH, COUNT - 1>(rows, weight, x, x_stride, pairs, y, y_stride, add);
}

}  // namespace mell
