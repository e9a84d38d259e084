// Products with bfloat16 weights in pairs (tile.h): float32 inputs, products and sums.

#include <cstring>

#include "product.h"
#include "tile.h"

#if !MELL_HALVES

namespace mell {
namespace {

constexpr int64_t PAIRS = 128;  // at a time: a tile's weights and inputs stay in the first cache
constexpr int64_t BAND = 96;    // rows at a time: their inputs stay in the second

}  // namespace

void prepare(const float *x, int64_t size, int64_t row, float *prepared, int64_t stride, float *) {
  memcpy(prepared + row * stride, x, size * sizeof(float));
}

void multiply(const Matrix &matrix, Inputs x, int64_t rows, Epilogue epilogue, float factor,
              float *y, int64_t y_stride, Team team) {
  alignas(64) float sums[BAND * PANEL];
  int64_t pairs = matrix.k / 2, panels = (matrix.n + PANEL - 1) / PANEL;
  int64_t from = panels * team.index / team.count, to = panels * (team.index + 1) / team.count;
  auto weights = static_cast<const uint32_t *>(matrix.weight);
  for (int64_t start = 0; start < rows; start += BAND) {
    int64_t band = rows - start < BAND ? rows - start : BAND;
    int64_t tiles = (band + ROWS - 1) / ROWS;
    for (int64_t panel = from; panel < to; panel++) {
      const uint32_t *weight = weights + panel * pairs * PANEL;
      for (int64_t pair = 0; pair < pairs; pair += PAIRS) {
        int64_t some = pairs - pair < PAIRS ? pairs - pair : PAIRS;
        for (int64_t i = 0; i < tiles; i++) {
          int64_t row = band * i / tiles, count = band * (i + 1) / tiles - row;
          auto product = i ? any_tile<false> : any_tile<true>;
          product(int(count), weight + pair * PANEL, x.rows + (start + row) * x.stride + 2 * pair,
                  x.stride, some, sums + row * PANEL, PANEL, pair > 0);
        }
      }
      for (int64_t row = 0; row < band; row++)
        finish(matrix, panel * PANEL, sums + row * PANEL, 1.0f, epilogue, factor,
               y + (start + row) * y_stride);
    }
  }
}

Floats outputs(const Matrix &matrix, int64_t group, const float *x) {
  int64_t pairs = matrix.k / 2;
  auto weight = static_cast<const uint32_t *>(matrix.weight) + group / 2 * pairs * PANEL +
                group % 2 * LANES;
  Floats first{}, second{};
  for (int64_t pair = 0; pair < pairs; pair++) {
    Words both = load(weight + pair * PANEL);
    first += first_of_pairs(both) * x[2 * pair];
    second += second_of_pairs(both) * x[2 * pair + 1];
  }
  return first + second;
}

}  // namespace mell

#endif
