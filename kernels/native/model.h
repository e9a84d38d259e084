// What Python hands over (mell_kernels/native.py mirrors these structures) and what works on it.
#pragma once

#include <cstdint>

#include "barrier.h"
#include "vectors.h"

namespace mell {

constexpr int64_t LAYOUT = 1;  // grows whenever one of the structures, or a packing, changes

// y = x W^T + bias, packed as product_pairs.cpp or product_halves.cpp says. There is a scale and a
// bias for each output that is packed, or none.
struct Matrix {
  const void *weight;
  const float *scales, *bias;
  int64_t n, k;
};

// A decoder layer of Llama's kind. Gains are those of RMSNorm.
struct Layer {
  Matrix qkv, out, gate_up, down;  // gate_up: PANEL / 2 outputs of each by turns
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
  float *qkv, *attended, *gated;
  float *normed;                   // [threads, hidden]
  float *prepared, *scales;        // inputs of a product and, where it wants them, their scales
  float *partial;                  // [pieces, heads / kv_heads, head_dim + 2] of split decodes
  int64_t tokens, sequences, table_width, num_wanted;
  int64_t hidden, width, heads, kv_heads, head_dim;
  int64_t num_layers, block_size;
  int64_t x_stride, qkv_stride, attended_stride, gated_stride, prepared_stride;
  int64_t piece;                   // keys of a decode that one thread serves
  int64_t splits;                  // whether a decode has more
  int64_t next;                    // work that nobody has taken yet; 0 before and after
};

// One of `count` threads that all do the same.
struct Team {
  int64_t index, count;
  Barrier *barrier;

  void wait() const {
    if (count > 1) barrier->wait(count);
  }
};

// step.attended = attention of step.qkv's queries over the pool, which has their keys already.
void attend(const Layer &layer, int64_t index, Step &step, Team team);

}  // namespace mell
