// Products with bfloat16 weights: float32 inputs, sums and outputs.
//
// Weights are packed so that they are read once and in order: for each PANEL outputs, for each pair
// of inputs, LANES pairs for the first outputs and LANES for the others. A shift and a mask make
// float32 of them, which serve as many rows as there are registers for sums. How an output is
// summed up does not depend on how many rows there are.

#include "model.h"

namespace mell {
namespace {

constexpr int64_t PAIRS = 128;  // at a time: a tile's weights and inputs stay in the first cache
constexpr int64_t BAND = 96;    // rows at a time: their inputs stay in the second
constexpr int AHEAD = 16;       // pairs by which weights are fetched before they are needed

template <int COUNT, bool FETCH>
void tile(const uint32_t *weight, const float *x, int64_t x_stride, int64_t pairs, float *y,
          int64_t y_stride, bool add) {
  Floats left[COUNT], right[COUNT];
#pragma GCC unroll 12
  for (int r = 0; r < COUNT; r++) {
    left[r] = add ? load(y + r * y_stride) : Floats{};
    right[r] = add ? load(y + r * y_stride + LANES) : Floats{};
  }
  for (int64_t pair = 0; pair < pairs; pair++) {
    if constexpr (FETCH) {
      __builtin_prefetch(weight + AHEAD * PANEL);
      __builtin_prefetch(weight + AHEAD * PANEL + LANES);
    }
    Words a = load(weight), b = load(weight + LANES);
    Floats first = first_of_pairs(a), second = first_of_pairs(b);
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      Floats input = splat(x[r * x_stride]);
      left[r] += first * input;
      right[r] += second * input;
    }
    first = second_of_pairs(a), second = second_of_pairs(b);
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      Floats input = splat(x[r * x_stride + 1]);
      left[r] += first * input;
      right[r] += second * input;
    }
    weight += PANEL;
    x += 2;
  }
#pragma GCC unroll 12
  for (int r = 0; r < COUNT; r++) {
    store(y + r * y_stride, left[r]);
    store(y + r * y_stride + LANES, right[r]);
  }
}

template <bool FETCH, int COUNT = ROWS>
void any_tile(int rows, const uint32_t *weight, const float *x, int64_t x_stride, int64_t pairs,
              float *y, int64_t y_stride, bool add) {
  if (rows == COUNT) return tile<COUNT, FETCH>(weight, x, x_stride, pairs, y, y_stride, add);
  if constexpr (COUNT > 1)
    any_tile<FETCH, COUNT - 1>(rows, weight, x, x_stride, pairs, y, y_stride, add);
}

MELL_INLINE Floats activated(Floats x, Epilogue epilogue) {
  Floats power = epilogue == Epilogue::GATE_GELU ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
  return x / (1.0f + exponential(-power));
}

// What becomes of one row's sums for the PANEL outputs from `output` on.
MELL_INLINE void finish(const Matrix &matrix, int64_t output, const float *sums, Epilogue epilogue,
                        float factor, float *y) {
  Floats a = load(sums), b = load(sums + LANES);
  if (matrix.bias) {
    a += load(matrix.bias + output);
    b += load(matrix.bias + output + LANES);
  }
  int64_t count = matrix.n - output < PANEL ? matrix.n - output : PANEL;
  float made[PANEL];
  if (epilogue == Epilogue::GATE_SILU || epilogue == Epilogue::GATE_GELU) {
    y += output / 2;
    count /= 2;
    a = activated(a, epilogue) * b;
    if (count == LANES) return store(y, a);
    store(made, a);
  } else {
    y += output;
    if (count == PANEL) {
      if (epilogue == Epilogue::ADD) {
        a = load(y) + factor * a;
        b = load(y + LANES) + factor * b;
      }
      store(y, a);
      return store(y + LANES, b);
    }
    store(made, a);
    store(made + LANES, b);
  }
  for (int64_t i = 0; i < count; i++)
    y[i] = epilogue == Epilogue::ADD ? y[i] + factor * made[i] : made[i];
}

}  // namespace

void multiply_tile(int rows, const uint32_t *weight, const float *x, int64_t x_stride,
                   int64_t pairs, float *y, int64_t y_stride, bool add) {
  any_tile<false>(rows, weight, x, x_stride, pairs, y, y_stride, add);
}

void multiply(const Matrix &matrix, const float *x, int64_t x_stride, int64_t rows,
              Epilogue epilogue, float factor, float *y, int64_t y_stride, Team team) {
  alignas(64) float sums[BAND * PANEL];
  int64_t pairs = matrix.k / 2, panels = (matrix.n + PANEL - 1) / PANEL;
  int64_t from = panels * team.index / team.count, to = panels * (team.index + 1) / team.count;
  for (int64_t start = 0; start < rows; start += BAND) {
    int64_t band = rows - start < BAND ? rows - start : BAND;
    int64_t tiles = (band + ROWS - 1) / ROWS;
    for (int64_t panel = from; panel < to; panel++) {
      const uint32_t *weight = matrix.weight + panel * pairs * PANEL;
      for (int64_t pair = 0; pair < pairs; pair += PAIRS) {
        int64_t some = pairs - pair < PAIRS ? pairs - pair : PAIRS;
        for (int64_t i = 0; i < tiles; i++) {
          int64_t row = band * i / tiles, count = band * (i + 1) / tiles - row;
          auto product = i ? any_tile<false> : any_tile<true>;
          product(int(count), weight + pair * PANEL, x + (start + row) * x_stride + 2 * pair,
                  x_stride, some, sums + row * PANEL, PANEL, pair > 0);
        }
      }
      for (int64_t row = 0; row < band; row++)
        finish(matrix, panel * PANEL, sums + row * PANEL, epilogue, factor,
               y + (start + row) * y_stride);
    }
  }
}

}  // namespace mell
