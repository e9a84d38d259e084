// Causal attention of a ragged batch over bfloat16 keys and values in a paged pool.
//
// The queries of one KV head are rows of two products: with the keys, and, weighted by a softmax
// that runs over the keys as they come, with the values. WIDTH keys are served at a time. For many
// queries they are packed as weights are (tile.h); for few, that would take longer than the products
// do, and keys and values are used as they lie, pairs of dimensions side by side. All is computed in
// float32.

#include <cstring>
#include <type_traits>

#include "model.h"
#include "tile.h"

namespace mell {
namespace {

constexpr int64_t WIDEST = 256;   // head_dim
constexpr float HIDDEN = -1e30f;  // the score of a key out of reach: finite, as differences of it are
constexpr int FEW = 4;            // queries
constexpr int64_t CACHE_LINE = 32;  // in bfloat16
constexpr int SUM = 0, MOST = 1;  // behind the head_dim sums of a piece

struct Keys {
  const uint16_t *pool;  // of a layer and head: where the first block's keys begin
  const int32_t *table;
  int64_t block_stride, block_size, token_stride, plane_stride;

  // Where WIDTH keys from `key` on lie; those from `end` on do as the last before it.
  void find(int64_t key, int64_t end, const uint16_t **at) const {
    int64_t block = key / block_size, offset = key % block_size;
    for (int i = 0; i < WIDTH; i++) {
      at[i] = pool + table[block] * block_stride + offset * token_stride;
      if (key + i + 1 >= end) continue;
      if (++offset == block_size) block++, offset = 0;
    }
  }

  void fetch(const uint16_t *const *at, int64_t dim) const {
    for (int i = 0; i < WIDTH; i++)
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
        *reinterpret_cast<Words *>(packed + (pair + i) * WIDTH + half * LANES) = rows[i];
    }
}

// Pairs of keys: a linear layer whose outputs are dimensions, here `WIDTH` of them.
void pack_values(const uint16_t *const *values, uint32_t *packed) {
  for (int pair = 0; pair < WIDTH / 2; pair++)
    for (int half = 0; half < 2; half++) {
      auto read = [&](int key) {
        auto from = reinterpret_cast<const Halves *>(values[key] + half * LANES);
        return __builtin_convertvector(*from, Words);
      };
      *reinterpret_cast<Words *>(packed + pair * WIDTH + half * LANES) =
          read(2 * pair) | read(2 * pair + 1) << 16;
    }
}

// The sum of each of LANES vectors, in one.
MELL_INLINE Floats sums_of(Floats *each) {
#pragma GCC unroll 4
  for (int apart = LANES / 2; apart; apart /= 2) {
    Ints lane = lanes(), second = (lane & apart) != 0;
    Ints low = second ? lane - apart + LANES : lane, high = second ? lane + LANES : lane + apart;
#pragma GCC unroll 8
    for (int i = 0; i < apart; i++) {
      Floats a = each[i], b = each[i + apart];
      each[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
    }
  }
  return each[0];
}

MELL_INLINE Words pairs_at(const uint16_t *from, int64_t pair) {
  return load(reinterpret_cast<const uint32_t *>(from) + pair);
}

// Scores of WIDTH keys. Of a query, the dimensions that come first in a pair lie before the others.
template <int COUNT, int VECTORS>
void score_few(const uint16_t *const *keys, int64_t dim, const float *query, int64_t query_stride,
               float *scores) {
  const int64_t pairs = VECTORS ? VECTORS * LANES : dim / 2;
  for (int half = 0; half < 2; half++) {
    Floats each[COUNT][LANES];
    for (int i = 0; i < LANES; i++) {
      Floats sums[COUNT]{};
#pragma GCC unroll 4
      for (int64_t pair = 0; pair < pairs; pair += LANES) {
        Words both = pairs_at(keys[half * LANES + i], pair);
        Floats first = first_of_pairs(both), second = second_of_pairs(both);
        for (int r = 0; r < COUNT; r++) {
          sums[r] += first * load(query + r * query_stride + pair);
          sums[r] += second * load(query + r * query_stride + pairs + pair);
        }
      }
      for (int r = 0; r < COUNT; r++) each[r][i] = sums[r];
    }
    for (int r = 0; r < COUNT; r++)
      store(scores + r * WIDTH + half * LANES, sums_of(each[r]));
  }
}

// Adds WIDTH weighted values to `acc`, whose dimensions lie as those of a query do.
template <int COUNT, int VECTORS>
void add_few(const uint16_t *const *values, int64_t dim, const float *weights, float *acc) {
  const int64_t pairs = VECTORS ? VECTORS * LANES : dim / 2;
  for (int64_t pair = 0; pair < pairs; pair += LANES) {
    Floats first[COUNT], second[COUNT];
    for (int r = 0; r < COUNT; r++) {
      first[r] = load(acc + r * 2 * pairs + pair);
      second[r] = load(acc + r * 2 * pairs + pairs + pair);
    }
    for (int i = 0; i < WIDTH; i++) {
      Words both = pairs_at(values[i], pair);
      for (int r = 0; r < COUNT; r++) {
        first[r] += weights[r * WIDTH + i] * first_of_pairs(both);
        second[r] += weights[r * WIDTH + i] * second_of_pairs(both);
      }
    }
    for (int r = 0; r < COUNT; r++) {
      store(acc + r * 2 * pairs + pair, first[r]);
      store(acc + r * 2 * pairs + pairs + pair, second[r]);
    }
  }
}

// Calls `function` with the number of rows and, for usual heads, that of a key's vectors as
// constants.
template <int COUNT = FEW, typename Function>
void with_constants(int rows, int64_t dim, Function function) {
  using Count = std::integral_constant<int, COUNT>;
  if (rows == COUNT) {
    if (dim == 2 * LANES) return function(Count(), std::integral_constant<int, 1>());
    if (dim == 4 * LANES) return function(Count(), std::integral_constant<int, 2>());
    if (dim == 8 * LANES) return function(Count(), std::integral_constant<int, 4>());
    return function(Count(), std::integral_constant<int, 0>());
  }
  if constexpr (COUNT > 1) with_constants<COUNT - 1>(rows, dim, function);
}

// Pairs of numbers to all that come first and all that come second, and back.
void part_pairs(float *x, int64_t pairs) {
  float parted[WIDEST];
  for (int64_t i = 0; i < pairs; i++) {
    parted[i] = x[2 * i];
    parted[pairs + i] = x[2 * i + 1];
  }
  memcpy(x, parted, 2 * pairs * sizeof(float));
}

void join_pairs(float *x, int64_t pairs) {
  float joined[WIDEST];
  for (int64_t i = 0; i < pairs; i++) {
    joined[2 * i] = x[i];
    joined[2 * i + 1] = x[pairs + i];
  }
  memcpy(x, joined, 2 * pairs * sizeof(float));
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

// Scores of WIDTH keys from `key` on become weights; `sums` and `acc` are what has been added up.
MELL_INLINE void weigh(float *scores, int64_t first, int64_t last, int64_t key, Floats *sum,
                       float *most, float *acc, int64_t dim) {
  Floats a = load(scores), b = load(scores + LANES);
  if (key < first || key + WIDTH - 1 > last) {
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
// of head_dim, `acc` too, both with parted pairs if there are few. Sums and largest scores are added
// to `sums` and `most`.
void over_keys(const Queries &queries, const Keys &keys, int64_t key, int64_t end, int64_t dim,
               const float *query, int64_t query_stride, float *acc, Floats *sums, float *most) {
  alignas(64) uint32_t packed[WIDEST / 2 * WIDTH];
  alignas(64) float scores[ROWS * WIDTH];
  const uint16_t *at[WIDTH], *next[WIDTH];
  int rows = queries.rows();
  keys.find(key, end, next);
  for (; key < end; key += WIDTH) {
    memcpy(at, next, sizeof at);
    if (key + WIDTH < end) {
      keys.find(key + WIDTH, end, next);
      keys.fetch(next, dim);
    }
    if (rows <= FEW) {
      with_constants(rows, dim, [&](auto count, auto vectors) {
        score_few<count, vectors>(at, dim, query, query_stride, scores);
      });
    } else {
      pack_keys(at, dim / 2, packed);
      any_tile<false>(rows, packed, query, query_stride, dim / 2, scores, WIDTH, false);
    }
    for (int row = 0; row < rows; row++) {
      int64_t last = queries.position(row);
      weigh(scores + row * WIDTH, queries.first_key(row), last < end ? last : end - 1, key,
            sums + row, most + row, acc + row * dim, dim);
    }
    for (int i = 0; i < WIDTH; i++) at[i] += keys.plane_stride;
    if (rows <= FEW) {
      with_constants(rows, dim, [&](auto count, auto vectors) {
        add_few<count, vectors>(at, dim, scores, acc);
      });
      continue;
    }
    for (int64_t d = 0; d < dim; d += WIDTH) {
      pack_values(at, packed);
      any_tile<false>(rows, packed, scores, WIDTH, WIDTH / 2, acc + d, dim, true);
      for (int i = 0; i < WIDTH; i++) at[i] += WIDTH;
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
    bool few = queries.rows() <= FEW;
    alignas(64) float query[ROWS * (WIDEST + LANES)], acc[ROWS * WIDEST];
    Floats sums[ROWS];
    float most[ROWS];
    for (int i = 0; i < queries.rows(); i++) {
      const float *from = row(step.qkv, step.qkv_stride, sequence, head, queries.from + i);
      for (int64_t d = 0; d < dim; d += LANES)
        store(query + i * stride + d, layer.scale * load(from + d));
      if (few) part_pairs(query + i * stride, dim / 2);
      sums[i] = Floats{};
      most[i] = HIDDEN;
    }
    memset(acc, 0, queries.rows() * dim * sizeof(float));
    over_keys(queries, keys(sequence, head), key, end, dim, query, stride, acc, sums, most);
    for (int i = 0; i < queries.rows(); i++) {
      if (few) join_pairs(acc + i * dim, dim / 2);
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
  team.wait();
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
