// Decoder layers of Llama's kind, as one call for all threads.

#include <cmath>
#include <cstring>
#include <omp.h>

#include "product.h"

namespace mell {

void normalise(const float *x, const float *gain, float eps, int64_t size, float *to) {
  Floats squares{};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; i++) total += x[i] * x[i];
  float scale = 1.0f / std::sqrt(total / float(size) + eps);
  for (i = 0; i + LANES <= size; i += LANES) store(to + i, load(x + i) * scale * load(gain + i));
  for (; i < size; i++) to[i] = x[i] * scale * gain[i];
}

namespace {

// What a product is to read from now on, once all threads have come so far.
Inputs inputs(const Step &step) {
  return {reinterpret_cast<const Input *>(step.prepared), step.scales, step.prepared_stride};
}

void prepare_normalised(const Step &step, const float *gain, float eps, int64_t rows, Team team) {
  for (int64_t row = team.index; row < rows; row += team.count) {
    float *normed = step.normed + team.index * step.hidden;
    normalise(step.x + row * step.x_stride, gain, eps, step.hidden, normed);
    prepare(normed, step.hidden, row, step.prepared, step.prepared_stride, step.scales);
  }
  team.wait();
}

// Inputs that lie in rows of odd numbers of cache lines already.
Inputs prepared(const Step &step, const float *x, int64_t stride, int64_t size, int64_t rows,
                Team team) {
#if MELL_HALVES
  for (int64_t row = team.index; row < rows; row += team.count)
    prepare(x + row * stride, size, row, step.prepared, step.prepared_stride, step.scales);
  team.wait();
  return inputs(step);
#else
  (void)step, (void)size, (void)rows, (void)team;
  return {x, nullptr, stride};
#endif
}

// A head by its position's angles, in place.
MELL_INLINE void rotate(float *x, const float *cosines, const float *sines, int64_t dim) {
  int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += LANES) {
    Floats a = load(x + i), b = load(x + half + i);
    store(x + i, a * load(cosines + i) + b * load(sines + i));
    store(x + half + i, b * load(cosines + half + i) + a * load(sines + half + i));
  }
}

// Queries and keys are normalised and rotated, keys and values written to the pool.
void place(const Layer &layer, int64_t index, const Step &step, Team team) {
  int64_t dim = step.head_dim, token_size = step.kv_heads * dim;
  int64_t plane = step.block_size * token_size;
  for (int64_t token = team.index; token < step.tokens; token += team.count) {
    float *row = step.qkv + token * step.qkv_stride;
    for (int64_t head = 0; head < step.heads + step.kv_heads; head++) {
      float *x = row + head * dim;
      const float *gain = head < step.heads ? layer.q_norm : layer.k_norm;
      if (gain) normalise(x, gain, layer.qk_eps, dim, x);
      if (layer.rotates) rotate(x, step.cosines + token * dim, step.sines + token * dim, dim);
    }
    if (!step.pool) continue;
    int64_t block = step.slots[token] / step.block_size, offset = step.slots[token] % step.block_size;
    uint16_t *keys =
        step.pool + (block * step.num_layers + index) * 2 * plane + offset * token_size;
    const float *from = row + step.heads * dim;
    for (int64_t i = 0; i < token_size; i++) keys[i] = to_bf16(from[i]);
    for (int64_t i = 0; i < token_size; i++) keys[plane + i] = to_bf16(from[token_size + i]);
  }
}

void before_attention(const Layer &layer, int64_t index, Step &step, Team team) {
  prepare_normalised(step, layer.norm_1, layer.eps, step.tokens, team);
  if (team.index == 0) step.next = 0;
  multiply(layer.qkv, inputs(step), step.tokens, Epilogue::STORE, 1.0f, step.qkv, step.qkv_stride,
           team);
  team.wait();
  place(layer, index, step, team);
  team.wait();
}

// The rows that are wanted move to the front.
void keep(float *rows, int64_t stride, int64_t size, const int64_t *wanted, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (wanted[i] != i) memcpy(rows + i * stride, rows + wanted[i] * stride, size * sizeof(float));
}

void after_attention(const Layer &layer, bool last, Step &step, Team team) {
  team.wait();
  int64_t rows = step.tokens;
  if (last && step.num_wanted < step.tokens) {
    rows = step.num_wanted;
    if (team.index == 0) {
      keep(step.attended, step.attended_stride, step.heads * step.head_dim, step.wanted, rows);
      keep(step.x, step.x_stride, step.hidden, step.wanted, rows);
    }
    team.wait();
  }
  Inputs attended = prepared(step, step.attended, step.attended_stride,
                             step.heads * step.head_dim, rows, team);
  multiply(layer.out, attended, rows, Epilogue::ADD, layer.factor, step.x, step.x_stride, team);
  team.wait();
  prepare_normalised(step, layer.norm_2, layer.eps, rows, team);
  multiply(layer.gate_up, inputs(step), rows,
           layer.gelu ? Epilogue::GATE_GELU : Epilogue::GATE_SILU, 1.0f, step.gated,
           step.gated_stride, team);
  team.wait();
  Inputs gated = prepared(step, step.gated, step.gated_stride, step.width, rows, team);
  multiply(layer.down, gated, rows, Epilogue::ADD, layer.factor, step.x, step.x_stride, team);
  team.wait();
}

Team member(Barrier &barrier) {
  return {omp_get_thread_num(), omp_get_num_threads(), &barrier};
}

}  // namespace
}  // namespace mell

using namespace mell;

extern "C" {

// What the two sides of this interface must agree about.
int64_t mell_layout() { return LAYOUT * 1000000 + sizeof(Layer) * 1000 + sizeof(Step); }

int mell_panel() { return PANEL; }
int mell_lanes() { return LANES; }
int mell_halves() { return MELL_HALVES; }

// All layers of a step whose keys and values are in the pool.
void mell_layers(const Layer *layers, Step *step, int threads) {
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    Team team = member(barrier);
    for (int64_t i = 0; i < step->num_layers; i++) {
      before_attention(layers[i], i, *step, team);
      attend(layers[i], i, *step, team);
      after_attention(layers[i], i == step->num_layers - 1, *step, team);
    }
  }
}

// The two halves of layer `index`, where another computes its attention.
void mell_before_attention(int64_t index, const Layer *layers, Step *step, int threads) {
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  before_attention(layers[index], index, *step, member(barrier));
}

void mell_after_attention(int64_t index, const Layer *layers, Step *step, int threads) {
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  after_attention(layers[index], index == step->num_layers - 1, *step, member(barrier));
}

// y = x W^T + bias of any rows.
void mell_multiply(const Matrix *matrix, const float *x, int64_t x_stride, int64_t rows,
                   float *prepared, int64_t stride, float *scales, float *y, int64_t y_stride,
                   int threads) {
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    Team team = member(barrier);
    for (int64_t row = team.index; row < rows; row += team.count)
      prepare(x + row * x_stride, matrix->k, row, prepared, stride, scales);
    team.wait();
    multiply(*matrix, {reinterpret_cast<const Input *>(prepared), scales, stride}, rows,
             Epilogue::STORE, 1.0f, y, y_stride, team);
  }
}
}
