// Vectors as wide as the processor's registers, in GCC's notation.
#pragma once

#include <cstdint>

namespace mell {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

// They may lie anywhere, and alias what they are read from.
template <typename T>
using Vector [[gnu::vector_size(LANES * sizeof(T)), gnu::aligned(sizeof(T)), gnu::may_alias]] = T;
using Floats = Vector<float>;
using Ints = Vector<int32_t>;
using Words = Vector<uint32_t>;
using Halves = Vector<uint16_t>;

#define MELL_INLINE [[gnu::always_inline]] inline

MELL_INLINE Floats load(const float *from) { return *reinterpret_cast<const Floats *>(from); }
MELL_INLINE Words load(const uint32_t *from) { return *reinterpret_cast<const Words *>(from); }
MELL_INLINE void store(float *to, Floats v) { *reinterpret_cast<Floats *>(to) = v; }
MELL_INLINE Floats splat(float x) { return x - Floats{}; }
MELL_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

MELL_INLINE Ints lanes() {
  Ints all{};
  for (int i = 0; i < LANES; i++) all[i] = i;
  return all;
}

MELL_INLINE float sum(Floats v) {
  for (int half = LANES / 2; half; half /= 2) v += __builtin_shuffle(v, lanes() ^ half);
  return v[0];
}

MELL_INLINE float largest(Floats v) {
  for (int half = LANES / 2; half; half /= 2) v = larger(v, __builtin_shuffle(v, lanes() ^ half));
  return v[0];
}

// Two bfloat16 lie in 32 bits, the first in the lower half.
MELL_INLINE Floats first_of_pairs(Words pairs) { return (Floats)(pairs << 16); }
MELL_INLINE Floats second_of_pairs(Words pairs) { return (Floats)(pairs & 0xffff0000u); }

// To the nearest, halves to even; a NaN stays one.
inline uint16_t to_bf16(float x) {
  if (x != x) return 0x7fc0;
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e to the x, to 2e-7 of it; below -87 it is 0.
MELL_INLINE Floats exponential(Floats x) {
  const float whole = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
  Floats kept = x < -87.0f ? splat(-87.0f) : x > 88.0f ? splat(88.0f) : x;
  Floats power = (kept * 1.44269504f + whole) - whole;
  Floats rest = kept - power * 0.693359375f + power * 2.12194440e-4f;
  Floats y = splat(1.9875691500e-4f);
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  Ints scale = (__builtin_convertvector(power, Ints) + 127) << 23;
  return x < -87.0f ? Floats{} : y * (Floats)scale;
}

// Turn LANES rows of LANES words into their columns.
MELL_INLINE void transpose(Words *rows) {
#pragma GCC unroll 4
  for (int apart = LANES / 2; apart; apart /= 2) {
    Ints lane = lanes(), second = (lane & apart) != 0;
    Words low = (Words)(second ? lane - apart + LANES : lane);
    Words high = (Words)(second ? lane + LANES : lane + apart);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & apart) continue;
      Words a = rows[i], b = rows[i + apart];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + apart] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace mell
