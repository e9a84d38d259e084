// Products in float16, where a processor multiplies it twice as fast as float32.
//
// A row of inputs, and the weights of an output, are divided by powers of two so that the largest
// number of each lies from 16 to 32. So the 32 products that are summed up in float16 cannot exceed
// what it holds, whatever the inputs are; their sum goes on in float32. What rounding adds is half
// of what rounding the inputs to bfloat16 would.

#include "product.h"

#if MELL_HALVES

#include <immintrin.h>

#include <cstring>

namespace mell {
namespace {

using Sixteens [[gnu::vector_size(64), gnu::aligned(2), gnu::may_alias]] = _Float16;

constexpr int AHEAD = 16;     // inputs by which weights are fetched before their turn
constexpr int EXPONENT = 4;   // of the largest number of a row
static_assert(PANEL == 64 && CHUNK % INPUTS == 0);

MELL_INLINE Floats wide(Halves halves) {
  return Floats(_mm512_cvtxph_ps(reinterpret_cast<__m256h>(halves)));
}

MELL_INLINE void add_up(Sixteens sums, float *to, bool add) {
  Halves parts[2];
  __builtin_memcpy(parts, &sums, sizeof parts);
  for (int i = 0; i < 2; i++) {
    Floats each = wide(parts[i]);
    store(to + i * LANES, add ? load(to + i * LANES) + each : each);
  }
}

// y[r, 0:PANEL] = or += x[r] W^T
template <int COUNT, bool FETCH>
void tile(const uint16_t *weight, const Input *x, int64_t x_stride, int64_t inputs, float *y,
          bool add) {
  for (int64_t start = 0; start < inputs; start += INPUTS) {
    Sixteens left[COUNT]{}, right[COUNT]{};
    for (int i = 0; i < INPUTS; i++) {
      if constexpr (FETCH) {
        __builtin_prefetch(weight + AHEAD * PANEL);
        __builtin_prefetch(weight + AHEAD * PANEL + PANEL / 2);
      }
      auto a = *reinterpret_cast<const Sixteens *>(weight);
      auto b = *reinterpret_cast<const Sixteens *>(weight + PANEL / 2);
      weight += PANEL;
#pragma GCC unroll 12
      for (int r = 0; r < COUNT; r++) {
        auto input = Sixteens(x[r * x_stride + start + i] - Words{});
        left[r] += a * input;
        right[r] += b * input;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < COUNT; r++) {
      add_up(left[r], y + r * PANEL, add || start);
      add_up(right[r], y + r * PANEL + PANEL / 2, add || start);
    }
  }
}

template <bool FETCH, int COUNT = TILE_ROWS>
void any_tile(int rows, const uint16_t *weight, const Input *x, int64_t x_stride, int64_t inputs,
              float *y, bool add) {
  if (rows == COUNT) return tile<COUNT, FETCH>(weight, x, x_stride, inputs, y, add);
  if constexpr (COUNT > 1)
    any_tile<FETCH, COUNT - 1>(rows, weight, x, x_stride, inputs, y, add);
}

// 2 to the power, by its bits
float power_of_two(int power) {
  uint32_t bits = uint32_t(power + 127) << 23;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace

void prepare(const float *x, int64_t size, int64_t row, float *prepared, int64_t stride,
             float *scales) {
  Floats most{};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    Floats each = load(x + i);
    most = larger(most, larger(each, -each));
  }
  float highest = largest(most);
  for (; i < size; i++) {
    float each = x[i] < 0 ? -x[i] : x[i];
    highest = each > highest ? each : highest;
  }
  uint32_t bits;
  memcpy(&bits, &highest, sizeof bits);
  int power = int(bits >> 23) - 127 - EXPONENT;  // nothing is gained for the smallest
  power = power < -100 ? -100 : power > 100 ? 100 : power;
  scales[row] = power_of_two(power);
  float factor = power_of_two(-power);
  auto to = reinterpret_cast<Input *>(prepared) + row * stride;
  for (i = 0; i < filled_up(size); i += LANES) {
    int64_t left = size - i;
    auto inside = __mmask16(left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
    __m512 each = _mm512_maskz_loadu_ps(inside, x + i);
    auto halves = __m256i(_mm512_cvtxps_ph(__m512(Floats(each) * factor)));
    auto words = Words(_mm512_cvtepu16_epi32(halves));
    *reinterpret_cast<Words *>(to + i) = words | words << 16;
  }
}

void multiply_tile(bool fetch, int rows, const uint16_t *weight, const Input *x, int64_t x_stride,
                   int64_t inputs, float *sums, bool add) {
  auto product = fetch ? any_tile<true> : any_tile<false>;
  product(rows, weight, x, x_stride, inputs, sums, add);
}

Floats outputs(const Matrix &matrix, int64_t group, const float *x) {
  constexpr int GROUPS = PANEL / LANES, AT_ONCE = 4;
  auto weight = static_cast<const uint16_t *>(matrix.weight) +
                group / GROUPS * filled_up(matrix.k) * PANEL + group % GROUPS * LANES;
  Floats sums[AT_ONCE]{};
  for (int64_t start = 0; start < matrix.k; start += AT_ONCE)
    for (int i = 0; i < AT_ONCE && start + i < matrix.k; i++) {
      auto halves = reinterpret_cast<const Halves *>(weight + (start + i) * PANEL);
      sums[i] += wide(*halves) * x[start + i];
    }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) * load(matrix.scales + group * LANES);
}

}  // namespace mell

#endif
