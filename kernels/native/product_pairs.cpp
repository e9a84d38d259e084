// Products with bfloat16 weights in pairs (tile.h): float32 inputs, products and sums.

#include <cstring>

#include "product.h"
#include "tile.h"

#if !MELL_HALVES

namespace mell {

static_assert(TILE_ROWS == ROWS);

void prepare(const float *x, int64_t size, int64_t row, float *prepared, int64_t stride, float *) {
  memcpy(prepared + row * stride, x, size * sizeof(float));
}

void multiply_tile(bool fetch, int rows, const uint16_t *weight, const Input *x, int64_t x_stride,
                   int64_t inputs, float *sums, bool add) {
  auto product = fetch ? any_tile<true> : any_tile<false>;
  product(rows, reinterpret_cast<const uint32_t *>(weight), x, x_stride, inputs / 2, sums, PANEL,
          add);
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
