// Causal attention of a ragged batch over bfloat16 keys and values in a paged pool.
//
// The queries of one KV head are rows of two products: with the keys, and, weighted by a softmax
// that runs over the keys as they come, with the values. For each, PANEL keys at a time are packed
// as the weights of a linear layer are (linear.cpp). All is computed in float32.

#include <cstring>

#include "model.h"

namespace mell {
namespace {

constexpr int64_t WIDEST = 256;   // head_dim
constexpr float HIDDEN = -1e30f;  // the score of a key out of reach: finite, so that rows of it are
constexpr int64_t CACHE_LINE = 32;  // in bfloat16
constexpr int SUM = 0, MOST = 1;  // behind the head_dim sums of a piece

struct Keys {
  const uint16_t *pool;  // of a layer and head: where the first block's keys begin
  const int32_t *table;
  int64_t block_stride, block_size, token_stride, plane_stride;

  // Where PANEL keys from `key` on lie; those from `end` on do as the last before it.
  void find(int64_t key, int64_t end, const uint16_t **at) const {
    int64_t block = key / block_size, offset = key % block_size;
    for (int i = 0; i < PANEL; i++) {
      at[i] = pool + table[block] * block_stride + offset * token_stride;
      if (key + i + 1 >= end) continue;
      if (++offset == block_size) block++, offset = 0;
    }
  }

  void fetch(const uint16_t *const *at, int64_t dim) const {
    for (int i = 0; i < PANEL; i++)
      for (int64_t d = 0; d < dim; d += CACHE_LINE) {
        __builtin_prefetch(at[i] + d);
        __builtin_prefetch(at[i] + plane_stride + d);
      }
  }
};

// Pairs of a key's dimensions: a linear layer whose outputs are keys.
void pack_keys(const uint16_t *const *keys, int64_t pairs, uint32_t *packed) {
  for (int64_t pair = 0; pair < pairs; pair += LANES)
    for (int half = 0; half < 2; half++) {
      Words rows[LANES];
      for (int i = 0; i < LANES; i++)
        rows[i] = load(reinterpret_cast<const uint32_t *>(keys[half * LANES + i]) + pair);
      transpose(rows);
      for (int i = 0; i < LANES; i++)
        *reinterpret_cast<Words *>(packed + (pair + i) * PANEL + half * LANES) = rows[i];
    }
}

// Pairs of keys: a linear layer whose outputs are dimensions, here `PANEL` of them.
void pack_values(const uint16_t *const *values, uint32_t *packed) {
  for (int pair = 0; pair < PANEL / 2; pair++)
    for (int half = 0; half < 2; half++) {
      auto read = [&](int key) {
        auto from = reinterpret_cast<const Halves *>(values[key] + half * LANES);
        return __builtin_convertvector(*from, Words);
      };
      *reinterpret_cast<Words *>(packed + pair * PANEL + half * LANES) =
          read(2 * pair) | read(2 * pair + 1) << 16;
    }
}

// Queries [from, to) of one KV head of one sequence, counted by token, then by head.
struct Queries {
  int64_t from, to, per_token;
  int64_t first_position;  // of the sequence's first query
  int64_t window;

  int rows() const { return int(to - from); }
  int64_t position(int64_t row) const { return first_position + (from + row) / per_token; }
  int64_t first_key(int64_t row) const {
    return window && position(row) >= window ? position(row) - window + 1 : 0;
  }
};

// Scores of PANEL keys from `key` on become weights; `sums` and `acc` are what has been added up.
MELL_INLINE void weigh(float *scores, int64_t first, int64_t last, int64_t key, Floats *sum,
                       float *most, float *acc, int64_t dim) {
  Floats a = load(scores), b = load(scores + LANES);
  if (key < first || key + PANEL - 1 > last) {
    Ints at = lanes() + int(key);
    a = (at < int(first)) | (at > int(last)) ? splat(HIDDEN) : a;
    at += LANES;
    b = (at < int(first)) | (at > int(last)) ? splat(HIDDEN) : b;
  }
  float highest = largest(larger(a, b));
  if (highest > *most) {
    Floats scale = exponential(splat(*most - highest));
    *most = highest;
    *sum *= scale;
    for (int64_t d = 0; d < dim; d += LANES) store(acc + d, load(acc + d) * scale);
  }
  a = exponential(a - *most);
  b = exponential(b - *most);
  *sum += a + b;
  store(scores, a);
  store(scores + LANES, b);
}

// Attention over the keys [key, end), not yet divided by the sums of its weights. `query` has rows
// of head_dim, `acc` too. Sums and largest scores are added to `sums` and `most`.
void over_keys(const Queries &queries, const Keys &keys, int64_t key, int64_t end, int64_t dim,
               const float *query, int64_t query_stride, float *acc, Floats *sums, float *most) {
  alignas(64) uint32_t packed[WIDEST / 2 * PANEL];
  alignas(64) float scores[ROWS * PANEL];
  const uint16_t *at[PANEL], *next[PANEL];
  keys.find(key, end, next);
  for (; key < end; key += PANEL) {
    memcpy(at, next, sizeof at);
    if (key + PANEL < end) {
      keys.find(key + PANEL, end, next);
      keys.fetch(next, dim);
    }
    pack_keys(at, dim / 2, packed);
    multiply_tile(queries.rows(), packed, query, query_stride, dim / 2, scores, PANEL, false);
    for (int row = 0; row < queries.rows(); row++) {
      int64_t last = queries.position(row);
      weigh(scores + row * PANEL, queries.first_key(row), last < end ? last : end - 1, key,
            sums + row, most + row, acc + row * dim, dim);
    }
    for (int i = 0; i < PANEL; i++) at[i] += keys.plane_stride;
    for (int64_t d = 0; d < dim; d += PANEL) {
      pack_values(at, packed);
      multiply_tile(queries.rows(), packed, scores, PANEL, PANEL / 2, acc + d, dim, true);
      for (int i = 0; i < PANEL; i++) at[i] += PANEL;
    }
  }
}

struct Work {
  const Layer &layer;
  const Step &step;
  int64_t index;

  int64_t per_token() const { return step.heads / step.kv_heads; }

  Keys keys(int64_t sequence, int64_t head) const {
    int64_t token = step.kv_heads * step.head_dim, plane = step.block_size * token;
    return {step.pool + 2 * index * plane + head * step.head_dim,
            step.tables + sequence * step.table_width,
            step.num_layers * 2 * plane,
            step.block_size,
            token,
            plane};
  }

  float *row(float *rows, int64_t stride, int64_t sequence, int64_t head, int64_t query) const {
    return rows + (step.starts[sequence] + query / per_token()) * stride +
           (head * per_token() + query % per_token()) * step.head_dim;
  }

  // One tile of queries over the keys [key, end); a whole decode's, or a piece of it if `piece`.
  void run(int64_t sequence, int64_t head, const Queries &queries, int64_t key, int64_t end,
           float *piece) const {
    int64_t dim = step.head_dim, stride = dim + LANES;
    alignas(64) float query[ROWS * (WIDEST + LANES)], acc[ROWS * WIDEST];
    Floats sums[ROWS];
    float most[ROWS];
    for (int i = 0; i < queries.rows(); i++) {
      const float *from = row(step.qkv, step.qkv_stride, sequence, head, queries.from + i);
      for (int64_t d = 0; d < dim; d += LANES)
        store(query + i * stride + d, layer.scale * load(from + d));
      sums[i] = Floats{};
      most[i] = HIDDEN;
    }
    memset(acc, 0, queries.rows() * dim * sizeof(float));
    over_keys(queries, keys(sequence, head), key, end, dim, query, stride, acc, sums, most);
    for (int i = 0; i < queries.rows(); i++) {
      if (piece) {
        float *to = piece + i * (dim + 2);
        memcpy(to, acc + i * dim, dim * sizeof(float));
        to[dim + SUM] = sum(sums[i]);
        to[dim + MOST] = most[i];
        continue;
      }
      float share = 1.0f / sum(sums[i]);
      float *to = row(step.attended, step.attended_stride, sequence, head, queries.from + i);
      for (int64_t d = 0; d < dim; d += LANES) store(to + d, share * load(acc + i * dim + d));
    }
  }

  // A decode's pieces, of which there are `count`, as one.
  void merge(int64_t sequence, int64_t head, const float *pieces, int64_t count,
             int64_t piece_stride) const {
    int64_t dim = step.head_dim;
    for (int64_t i = 0; i < per_token(); i++) {
      const float *from = pieces + i * (dim + 2);
      float *to = row(step.attended, step.attended_stride, sequence, head, i);
      float most = HIDDEN, total = 0;
      for (int64_t p = 0; p < count; p++) {
        float each = from[p * piece_stride + dim + MOST];
        most = each > most ? each : most;
      }
      memset(to, 0, dim * sizeof(float));
      for (int64_t p = 0; p < count; p++) {
        const float *part = from + p * piece_stride;
        Floats scale = exponential(splat(part[dim + MOST] - most));
        total += scale[0] * part[dim + SUM];
        for (int64_t d = 0; d < dim; d += LANES)
          store(to + d, load(to + d) + scale * load(part + d));
      }
      for (int64_t d = 0; d < dim; d += LANES) store(to + d, load(to + d) * (1.0f / total));
    }
  }
};

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void attend(const Layer &layer, int64_t index, Step &step, Team team) {
  Work work{layer, step, index};
  int64_t per_token = work.per_token();
  int64_t piece_stride = per_token * (step.head_dim + 2);
  auto take = [&] { return __atomic_fetch_add(&step.next, 1, __ATOMIC_RELAXED); };
  int64_t mine = take(), item = 0, piece = 0;
  for (int64_t s = 0; s < step.sequences; s++) {
    int64_t tokens = step.starts[s + 1] - step.starts[s], length = step.lengths[s];
    Queries all{0, tokens * per_token, per_token, length - tokens, layer.window};
    for (int64_t head = 0; head < step.kv_heads; head++) {
      int64_t first = all.first_key(0), pieces = divided(length - first, step.piece);
      if (tokens == 1 && per_token <= ROWS && pieces > 1) {
        for (int64_t p = 0; p < pieces; p++, piece++)
          if (item++ == mine) {
            int64_t key = first + p * step.piece, end = key + step.piece;
            work.run(s, head, all, key, end < length ? end : length,
                     step.partial + piece * piece_stride);
            mine = take();
          }
        continue;
      }
      for (int64_t from = 0; from < all.to; from += ROWS)
        if (item++ == mine) {
          Queries some = all;
          some.from = from;
          some.to = from + ROWS < all.to ? from + ROWS : all.to;
          work.run(s, head, some, some.first_key(0), some.position(some.rows() - 1) + 1, nullptr);
          mine = take();
        }
    }
  }
  if (!step.splits) return;
#pragma omp barrier
  item = piece = 0;
  for (int64_t s = 0; s < step.sequences; s++) {
    int64_t length = step.lengths[s];
    if (step.starts[s + 1] - step.starts[s] != 1 || per_token > ROWS) continue;
    Queries all{0, per_token, per_token, length - 1, layer.window};
    int64_t pieces = divided(length - all.first_key(0), step.piece);
    for (int64_t head = 0; pieces > 1 && head < step.kv_heads; head++, piece += pieces)
      if (item++ % team.count == team.index)
        work.merge(s, head, step.partial + piece * piece_stride, pieces, piece_stride);
  }
}

}  // namespace mell
