// The largest of many outputs, of which most are never computed exactly: see mell_kernels/screen.py.
//
// A product of 8-bit codes tells each output to within a bound. Groups of outputs that may hold the
// largest are computed again from the weights themselves.

#include <cmath>
#include <omp.h>

#include "product.h"

#if defined(__AVX512F__)

#include <immintrin.h>

#include <cstring>

namespace mell {
namespace {

constexpr int ROWS = 12, VECTORS = 2;
constexpr int OUTPUTS = VECTORS * LANES;  // whose codes lie together
constexpr int CODES = 4;                  // of a row, multiplied at once
constexpr float ROUNDING = 1.001f;        // of the bounds themselves
constexpr float LEAST = 1e-35f;  // of a row's largest: below it, it counts as all zeros
constexpr float NOT_FINITE = -1, ZEROS = -2;  // in place of a length

}  // namespace

// Codes of the weights of n outputs, in panels of OUTPUTS, for each CODES of their inputs by turns.
struct Screen {
  const int8_t *codes;
  const int32_t *offsets;  // what an input of all zeros gives, whose codes are 128
  const float *scales;     // that codes of an output are multiplied by
  const float *lengths;    // of an output's weights, as a vector
  const float *losses;     // of what rounding took from them
};

struct Rows {
  float *normed;   // [R, stride]
  uint8_t *codes;  // [R, k filled up]
  float *losts, *lengths;  // of a row in units of its codes: what rounding took, what is left
  float *uppers;   // [R, groups]: no output of a group exceeds it
  float *lowers;   // [threads, R]: some output reaches it
  float *best;     // [threads, R]
  int64_t *ids;    // [threads, R]
  int64_t count, stride, filled, groups;
};

namespace {

// Codes of a row, if it is finite and not all zeros.
void encode(const Rows &rows, int64_t row, int64_t size) {
  const float *x = rows.normed + row * rows.stride;
  uint8_t *codes = rows.codes + row * rows.filled;
  float most = 0, lost = 0, length = 0;
  bool finite = true;
  for (int64_t i = 0; i < size; i++) {
    most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    finite &= std::isfinite(x[i]);
  }
  memset(codes, 128, rows.filled);
  rows.lengths[row] = finite ? ZEROS : NOT_FINITE;
  if (!finite || most < LEAST) return;
  float factor = 127.0f / most;
  for (int64_t i = 0; i < size; i++) {
    float scaled = x[i] * factor, whole = std::nearbyint(scaled);
    codes[i] = uint8_t(int(whole) + 128);
    lost += (scaled - whole) * (scaled - whole);
    length += whole * whole;
  }
  rows.losts[row] = std::sqrt(lost) * ROUNDING;
  rows.lengths[row] = std::sqrt(length) * ROUNDING;
}

template <int COUNT>
[[gnu::target("avx512vnni")]] void code_products(const int8_t *weights, const uint8_t *x,
                                                 int64_t filled, Ints (*sums)[VECTORS]) {
  __m512i total[COUNT][VECTORS]{};
  for (int64_t i = 0; i < filled; i += CODES) {
    __builtin_prefetch(weights + 16 * OUTPUTS * CODES);
    __builtin_prefetch(weights + 16 * OUTPUTS * CODES + LANES * CODES);
    __m512i a = _mm512_loadu_si512(weights), b = _mm512_loadu_si512(weights + LANES * CODES);
    weights += OUTPUTS * CODES;
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      int32_t four;
      __builtin_memcpy(&four, x + r * filled + i, sizeof four);
      __m512i input = _mm512_set1_epi32(four);
      total[r][0] = _mm512_dpbusd_epi32(total[r][0], input, a);
      total[r][1] = _mm512_dpbusd_epi32(total[r][1], input, b);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < COUNT; r++)
    for (int v = 0; v < VECTORS; v++) sums[r][v] = Ints(total[r][v]);
}

template <int COUNT = ROWS>
void any_code_products(int rows, const int8_t *weights, const uint8_t *x, int64_t filled,
                       Ints (*sums)[VECTORS]) {
  if (rows == COUNT) return code_products<COUNT>(weights, x, filled, sums);
  if constexpr (COUNT > 1) any_code_products<COUNT - 1>(rows, weights, x, filled, sums);
}

// Bounds of one row's outputs [output, output + LANES), of which `left` are some.
MELL_INLINE void bound(const Screen &screen, const Rows &rows, int64_t row, int64_t output,
                       int64_t left, Ints sums, float *lower) {
  Ints offsets = *reinterpret_cast<const Ints *>(screen.offsets + output);
  Floats value = __builtin_convertvector(sums - offsets, Floats) * load(screen.scales + output);
  Floats reach = rows.losts[row] * load(screen.lengths + output) +
                 rows.lengths[row] * load(screen.losses + output);
  reach += 1e-6f * larger(value, -value);
  Floats high = value + reach, low = value - reach;
  if (left < LANES) {
    high = lanes() < int(left) ? high : splat(-INFINITY);
    low = lanes() < int(left) ? low : splat(-INFINITY);
  }
  rows.uppers[row * rows.groups + output / LANES] = largest(high);
  float most = largest(low);
  *lower = most > *lower ? most : *lower;
}

void bound_all(const Screen &screen, const Rows &rows, int64_t n, Team team) {
  float *lowers = rows.lowers + team.index * rows.count;
  for (int64_t row = 0; row < rows.count; row++) lowers[row] = -INFINITY;
  int64_t panels = (n + OUTPUTS - 1) / OUTPUTS, tiles = (rows.count + ROWS - 1) / ROWS;
  int64_t from = panels * team.index / team.count, to = panels * (team.index + 1) / team.count;
  Ints sums[ROWS][VECTORS];
  for (int64_t panel = from; panel < to; panel++)
    for (int64_t i = 0; i < tiles; i++) {
      int64_t row = rows.count * i / tiles, count = rows.count * (i + 1) / tiles - row;
      any_code_products(int(count), screen.codes + panel * OUTPUTS * rows.filled,
                        rows.codes + row * rows.filled, rows.filled, sums);
      for (int64_t r = 0; r < count; r++)
        for (int v = 0; v < VECTORS; v++) {
          int64_t output = panel * OUTPUTS + v * LANES;
          if (output < n)
            bound(screen, rows, row + r, output, n - output, sums[r][v], lowers + row + r);
        }
    }
}

// The largest of the groups [from, to) that may hold a row's largest; returns how many they are.
int64_t decide(const Matrix &matrix, const Rows &rows, int64_t row, Team team) {
  int64_t from = rows.groups * team.index / team.count;
  int64_t to = rows.groups * (team.index + 1) / team.count, computed = 0;
  float lower = -INFINITY, best = -INFINITY;
  int64_t id = rows.lengths[row] == ZEROS ? 0 : -1;
  for (int64_t t = 0; t < team.count; t++) {
    float each = rows.lowers[t * rows.count + row];
    lower = each > lower ? each : lower;
  }
  for (int64_t group = from; group < to && rows.lengths[row] >= 0; group++) {
    if (rows.uppers[row * rows.groups + group] < lower) continue;
    computed++;
    Floats values = outputs(matrix, group, rows.normed + row * rows.stride);
    for (int i = 0; i < LANES && group * LANES + i < matrix.n; i++)
      if (values[i] > best) {
        best = values[i];
        id = group * LANES + i;
      }
  }
  rows.best[team.index * rows.count + row] = best;
  rows.ids[team.index * rows.count + row] = id;
  return computed;
}

}  // namespace
}  // namespace mell

using namespace mell;

extern "C" {

// The likeliest outputs of rows of x, normalised, in the first `count` of rows->ids: the lowest of
// equals, -1 for a row that is not finite. Returns how many groups were computed twice.
int64_t mell_likeliest(const Screen *screen, const Matrix *matrix, const float *x, int64_t x_stride,
                       const float *gain, float eps, Rows *rows, int threads) {
  int64_t computed = 0;
  Barrier barrier;
#pragma omp parallel num_threads(threads) reduction(+ : computed)
  {
    Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
    for (int64_t row = team.index; row < rows->count; row += team.count) {
      normalise(x + row * x_stride, gain, eps, matrix->k, rows->normed + row * rows->stride);
      encode(*rows, row, matrix->k);
    }
    team.wait();
    bound_all(*screen, *rows, matrix->n, team);
    team.wait();
    for (int64_t row = 0; row < rows->count; row++) computed += decide(*matrix, *rows, row, team);
    team.wait();
    if (team.index == 0)
      for (int64_t row = 0; row < rows->count; row++)
        for (int64_t t = 1; t < team.count; t++) {
          int64_t other = t * rows->count + row;
          if (rows->best[other] > rows->best[row]) {
            rows->best[row] = rows->best[other];
            rows->ids[row] = rows->ids[other];
          }
        }
  }
  return computed;
}
}

#endif
