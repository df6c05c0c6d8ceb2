/* Sixteen numbers at a time, for the kernels of this folder: vector types that the compiler maps to what the processor has, bf16 and fp32 in and
 * out of them, exp and tanh. `half` (bf16 rather than fp32) is a constant wherever these functions are inlined.
 */
#ifndef MEBP_LANES_H
#define MEBP_LANES_H
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

/* exp(x): n = round(x / ln 2), r = x - n ln 2, a polynomial of degree 6 in r (coefficients of Cephes' expf), times 2^n: within 2 units in the
 * last place for -87 < x <= 0. Smaller x, -inf included, count as -87: exp(-87) is 1.6e-38. */
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

/* x becomes tanh(x), slope 1 - tanh(x)^2. With q = exp(-2 |x|): tanh = (1 - q) / (1 + q), or for |x| < 0.625, where 1 - q cancels, x + x^3 P(x^2)
 * (coefficients of Cephes' tanhf); slope = 4 q / (1 + q)^2, whose relative precision stays where tanh is 1. */
INLINE void tanh_lanes(floats *x, floats *slope) {
  const ints sign = (ints)*x & INT32_MIN;
  const floats size = (floats)((ints)*x ^ sign), square = size * size;
  floats q = size * -2.0f;
  exp_lanes(&q);
  const floats share = 1.0f / (q + 1.0f);
  floats small = (floats){} - 5.70498872745e-3f;
  small = small * square + 2.06390887954e-2f;
  small = small * square - 5.37397155531e-2f;
  small = small * square + 1.33314422036e-1f;
  small = small * square - 3.33332819422e-1f;
  small = small * square * size + size;
  floats result = (1.0f - q) * share;
  SELECT(result, size < 0.625f, small);
  *x = (floats)((ints)result | sign);
  *slope = 4.0f * q * share * share;
}

INLINE void load(floats *to, const void *from, int half) {
  if (half) {
    halves part;
    memcpy(&part, from, sizeof part);
    *to = (floats)(__builtin_convertvector(part, words) << 16);
  } else {
    memcpy(to, from, sizeof *to);
  }
}

/* The nearest numbers that bf16 has, ties to even; as they are where `half` is 0. */
INLINE void narrow(floats *x, int half) {
  const words bits = (words)*x;
  if (half) *x = (floats)((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

INLINE void store(void *to, const floats *from, int half) {
  if (half) {
    floats narrowed = *from;
    narrow(&narrowed, half);
    const halves part = __builtin_convertvector((words)narrowed >> 16, halves);
    memcpy(to, &part, sizeof part);
  } else {
    memcpy(to, from, sizeof *from);
  }
}

INLINE int64_t width_of(int half) { return half ? sizeof(uint16_t) : sizeof(float); }

INLINE float sum_of(const floats *lanes) {
  float sum = 0;
  for (int k = 0; k < LANES; k++) sum += (*lanes)[k];
  return sum;
}

#endif
