/* One tile of the tiled loss: for each token the running maximum, the running sum of exponentials, and the tile's logits replaced by
 * exp(logit - maximum), zero in the target's column. See kernels/cross_entropy.py, whose `tile` in torch is the twin of this.
 *
 * Plain C with vector types of 16 lanes, which the compiler maps to what the processor has; sums are kept by lane, so every processor adds in
 * the same order. exp: n = round(x / ln 2), r = x - n ln 2, a polynomial of degree 6 in r (coefficients of Cephes' expf), times 2^n: within
 * 2 units in the last place for -87 < x <= 0. Smaller x, -inf included, count as -87: exp(-87) is 1.6e-38.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES
#endif

#define INLINE static inline __attribute__((always_inline))
enum { LANES = 16 };

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#define SELECT(to, mask, from) ((to) = (floats)(((ints)(from) & (mask)) | ((ints)(to) & ~(mask))))

INLINE void exp_lanes(floats *x) {
  const floats low = (floats){} - 87.0f, shift = (floats){} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  SELECT(*x, *x < low, low);       /* a NaN is not smaller, and stays */
  floats n = *x * 1.44269504088896341f + shift;
  n -= shift;
  floats r = *x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  floats p = (floats){} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  *x = p * (floats)power;
}

INLINE void load_bf16(floats *to, const uint16_t *from) {
  halves part;
  memcpy(&part, from, sizeof part);
  *to = (floats)(__builtin_convertvector(part, words) << 16);
}

INLINE void store_bf16(uint16_t *to, const floats *from) {
  const words bits = (words)*from;
  const halves part = __builtin_convertvector((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, halves);
  memcpy(to, &part, sizeof part);
}

INLINE void load_fp32(floats *to, const float *from) { memcpy(to, from, sizeof *to); }
INLINE void store_fp32(float *to, const floats *from) { memcpy(to, from, sizeof *from); }

/* tokens rows of `columns` logits, `stride` elements apart; aimed[t]: the target's column in this tile, or a number outside it. keep[t]: by what
 * everything summed before has to be multiplied. */
#define TILE(NAME, TYPE, LOAD, STORE, MINUS_INFINITY)                                                                             \
  CLONES EXPORT void NAME(TYPE *logits, int64_t tokens, int64_t columns, int64_t stride, const int64_t *aimed, float *top,       \
                          float *rest, float *aim, float *keep) {                                                               \
    const int64_t whole = columns / LANES * LANES;                                                                               \
    for (int64_t t = 0; t < tokens; t++) {                                                                                       \
      TYPE *row = logits + t * stride, edge[LANES];                                                                              \
      for (int k = 0; k < LANES; k++) edge[k] = MINUS_INFINITY;                                                                  \
      memcpy(edge, row + whole, (size_t)(columns - whole) * sizeof(TYPE));                                                       \
      floats value, most;                                                                                                        \
      LOAD(&most, edge);                                                                                                         \
      for (int64_t i = 0; i < whole; i += LANES) {                                                                               \
        LOAD(&value, row + i);                                                                                                   \
        SELECT(most, value > most, value);                                                                                       \
      }                                                                                                                          \
      float higher = top[t];                                                                                                     \
      for (int k = 0; k < LANES; k++) higher = most[k] > higher ? most[k] : higher;                                              \
      keep[t] = top[t] == -INFINITY ? 0.0f : expf(top[t] - higher);                                                              \
      top[t] = higher;                                                                                                           \
      const int64_t own = aimed[t];                                                                                              \
      const int here = own >= 0 && own < columns;                                                                                \
      if (here) {                                                                                                                \
        TYPE *place = own < whole ? row + own : edge + (own - whole), one[LANES] = {*place};                                     \
        LOAD(&value, one);                                                                                                       \
        aim[t] = value[0];                                                                                                       \
        *place = MINUS_INFINITY;                                                                                                 \
      }                                                                                                                          \
      floats sum = {};                                                                                                           \
      for (int64_t i = 0; i < columns; i += LANES) {                                                                             \
        TYPE *place = i < whole ? row + i : edge;                                                                                \
        LOAD(&value, place);                                                                                                     \
        value -= higher;                                                                                                         \
        exp_lanes(&value);                                                                                                       \
        sum += value;                                                                                                            \
        STORE(place, &value);                                                                                                    \
      }                                                                                                                          \
      memcpy(row + whole, edge, (size_t)(columns - whole) * sizeof(TYPE));                                                       \
      if (here) row[own] = 0;                                                                                                    \
      float added = 0;                                                                                                           \
      for (int k = 0; k < LANES; k++) added += sum[k];                                                                           \
      rest[t] = rest[t] * keep[t] + added;                                                                                       \
    }                                                                                                                            \
  }

TILE(mebp_cross_entropy_tile_bf16, uint16_t, load_bf16, store_bf16, 0xFF80u)
TILE(mebp_cross_entropy_tile_fp32, float, load_fp32, store_fp32, -INFINITY)
