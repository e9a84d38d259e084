// What Python hands over (mell_kernels/native.py mirrors these structures) and what works on it.
#pragma once

#include <cstdint>

#include "vectors.h"

namespace mell {

// y = x W^T + bias. How `weight` is packed: see linear.cpp. `bias` has a number for each output
// that is packed, or is none. `k` is even.
struct Matrix {
  const uint32_t *weight;
  const float *bias;
  int64_t n, k;
};

// A decoder layer of Llama's kind. Gains are those of RMSNorm.
struct Layer {
  Matrix qkv, out, gate_up, down;  // gate_up: LANES outputs of each by turns
  const float *norm_1, *norm_2;
  const float *q_norm, *k_norm;  // over a head; or none
  int64_t window;                // keys in reach; 0: all
  float eps, qk_eps, scale, factor;
  int32_t rotates, gelu;
};

// A ragged batch of T tokens of B sequences, its place in the paged pool, and room to work in.
// What belongs to a row begins `..._stride` behind that of the one before.
struct Step {
  float *x;                        // [T, hidden], the residual stream, which is replaced
  const float *cosines, *sines;    // [T, head_dim]; the sines of the first half are negated
  const int64_t *slots;            // [T]
  const int32_t *starts;           // [B + 1] of queries
  const int32_t *lengths;          // [B] of keys
  const int32_t *tables;           // [B, table_width] of blocks
  const int64_t *wanted;           // [num_wanted] rising rows, of which alone more than keys and
                                   // values is needed in the last layer
  uint16_t *pool;                  // bfloat16 [blocks, layers, 2, block_size, kv_heads, head_dim]
  float *normed, *qkv, *attended, *gated;
  float *partial;                  // [pieces, heads / kv_heads, head_dim + 2] of split decodes
  int64_t tokens, sequences, table_width, num_wanted;
  int64_t hidden, width, heads, kv_heads, head_dim;
  int64_t num_layers, block_size;
  int64_t x_stride, normed_stride, qkv_stride, attended_stride, gated_stride;
  int64_t piece;                   // keys of a decode that one thread serves
  int64_t splits;                  // whether a decode has more
  int64_t next;                    // work that nobody has taken yet; 0 before and after
};

// One of `count` threads that all do the same.
struct Team {
  int64_t index, count;
};

constexpr int PANEL = 2 * LANES;              // outputs whose weights lie together
constexpr int ROWS = LANES == 16 ? 12 : 6;    // rows that a tile has registers for

enum class Epilogue { STORE, ADD, GATE_SILU, GATE_GELU };

// y = x W^T + bias, added to `y` times `factor` or gated, as the epilogue says.
void multiply(const Matrix &matrix, const float *x, int64_t x_stride, int64_t rows,
              Epilogue epilogue, float factor, float *y, int64_t y_stride, Team team);

// y[r, 0:PANEL] = or += x[r] W^T for up to ROWS rows and one panel of weights.
void multiply_tile(int rows, const uint32_t *weight, const float *x, int64_t x_stride,
                   int64_t pairs, float *y, int64_t y_stride, bool add);

// step.attended = attention of step.qkv's queries over the pool, which has their keys already.
void attend(const Layer &layer, int64_t index, Step &step, Team team);

}  // namespace mell
