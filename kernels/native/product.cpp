// Products of any size, made of tiles that stay in the caches.

#include "product.h"

namespace mell {
namespace {

constexpr int64_t BAND = 96;  // rows at a time: their inputs stay in the second cache

}  // namespace

void multiply(const Matrix &matrix, Inputs x, int64_t rows, Epilogue epilogue, float factor,
              float *y, int64_t y_stride, Team team) {
  alignas(64) float sums[BAND * PANEL];
  int64_t inputs = filled_up(matrix.k), panels = (matrix.n + PANEL - 1) / PANEL;
  int64_t from = panels * team.index / team.count, to = panels * (team.index + 1) / team.count;
  auto weights = static_cast<const uint16_t *>(matrix.weight);
  for (int64_t start = 0; start < rows; start += BAND) {
    int64_t band = rows - start < BAND ? rows - start : BAND;
    int64_t tiles = (band + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t panel = from; panel < to; panel++) {
      const uint16_t *weight = weights + panel * inputs * PANEL;
      for (int64_t input = 0; input < inputs; input += CHUNK) {
        int64_t some = inputs - input < CHUNK ? inputs - input : CHUNK;
        for (int64_t i = 0; i < tiles; i++) {
          int64_t row = band * i / tiles, count = band * (i + 1) / tiles - row;
          multiply_tile(i == 0, int(count), weight + input * PANEL,
                        x.rows + (start + row) * x.stride + input, x.stride, some,
                        sums + row * PANEL, input > 0);
        }
      }
      for (int64_t row = 0; row < band; row++)
        finish(matrix, panel * PANEL, sums + row * PANEL, x.scales ? x.scales[start + row] : 1.0f,
               epilogue, factor, y + (start + row) * y_stride);
    }
  }
}

}  // namespace mell
