// Products with the weights of a model, by the fastest units that a processor has for them.
#pragma once

#include "model.h"

namespace mell {

#if defined(__AVX512FP16__)
#define MELL_HALVES 1
constexpr int PANEL = 64;  // outputs whose weights lie together
using Input = uint32_t;    // a float16, twice
constexpr int INPUTS = 32;  // a row's inputs are filled up with zeros to a multiple of it
constexpr int64_t CHUNK = 128;  // inputs at a time: a tile's weights stay in the first cache
constexpr int TILE_ROWS = 12;   // and two vectors of outputs: 24 of 32 registers are sums
#else
#define MELL_HALVES 0
constexpr int PANEL = 2 * LANES;
using Input = float;
constexpr int INPUTS = 2;
constexpr int64_t CHUNK = 256;
constexpr int TILE_ROWS = LANES == 16 ? 12 : 6;
#endif

inline int64_t filled_up(int64_t inputs) { return (inputs + INPUTS - 1) / INPUTS * INPUTS; }

struct Inputs {
  const Input *rows;
  const float *scales;  // what each row has been divided by; or none
  int64_t stride;
};

enum class Epilogue { STORE, ADD, GATE_SILU, GATE_GELU };

// Row `row` of float32 inputs, `size` of them, as a product wants it in `prepared`.
void prepare(const float *x, int64_t size, int64_t row, float *prepared, int64_t stride,
             float *scales);

// Up to TILE_ROWS rows times one panel of weights: sums[r, 0:PANEL] = or += x[r] W^T. Weights are
// fetched before their turn if nobody has read them.
void multiply_tile(bool fetch, int rows, const uint16_t *weight, const Input *x, int64_t x_stride,
                   int64_t inputs, float *sums, bool add);

// y = x W^T + bias, added to `y` times `factor` or gated, as the epilogue says.
void multiply(const Matrix &matrix, Inputs x, int64_t rows, Epilogue epilogue, float factor,
              float *y, int64_t y_stride, Team team);

// LANES outputs of one row of float32 inputs, those of `group` LANES: without bias, in float32.
Floats outputs(const Matrix &matrix, int64_t group, const float *x);

// gain * x / sqrt(mean(x^2) + eps)
void normalise(const float *x, const float *gain, float eps, int64_t size, float *to);

MELL_INLINE Floats activated(Floats x, Epilogue epilogue) {
  Floats power = epilogue == Epilogue::GATE_GELU ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
  return x / (1.0f + exponential(-power));
}

// What becomes of one row's sums for the PANEL outputs from `output` on. `scale` is the row's.
MELL_INLINE void finish(const Matrix &matrix, int64_t output, float *sums, float scale,
                        Epilogue epilogue, float factor, float *y) {
  bool gated = epilogue == Epilogue::GATE_SILU || epilogue == Epilogue::GATE_GELU;
  for (int i = 0; i < PANEL; i += LANES) {
    Floats value = load(sums + i);
    if (matrix.scales) value *= scale * load(matrix.scales + output + i);
    if (matrix.bias) value += load(matrix.bias + output + i);
    store(sums + i, value);
  }
  int64_t count = matrix.n - output < PANEL ? matrix.n - output : PANEL;
  if (gated) {
    output /= 2;
    count /= 2;
    for (int i = 0; i < PANEL / 2; i += LANES)
      store(sums + i, activated(load(sums + i), epilogue) * load(sums + PANEL / 2 + i));
  }
  y += output;
  int64_t i = 0;
  if (epilogue == Epilogue::ADD) {
    for (; i + LANES <= count; i += LANES) store(y + i, load(y + i) + factor * load(sums + i));
    for (; i < count; i++) y[i] += factor * sums[i];
    return;
  }
  for (; i + LANES <= count; i += LANES) store(y + i, load(sums + i));
  for (; i < count; i++) y[i] = sums[i];
}

}  // namespace mell
