/* Chains of elementwise ops in one walk: the sum with a low-rank product, gated units, RMSNorm, rotary embeddings, forward and backward. See
 * the Python files of the same names, which have the formulas and the twins in torch. Everything is computed in fp32 and rounded once, but where
 * it is said.
 */
#include "lanes.h"
#include "threads.h"

/* `count` (at most 16) numbers, and zeros in the other lanes. */
INLINE void load_some(floats *to, const char *from, int64_t count, int half) {
  if (count >= LANES) {
    load(to, from, half);
  } else {
    char edge[sizeof(floats)] = {0};
    memcpy(edge, from, (size_t)(count * width_of(half)));
    load(to, edge, half);
  }
}

INLINE void store_some(char *to, const floats *from, int64_t count, int half) {
  if (count >= LANES) {
    store(to, from, half);
  } else {
    char edge[sizeof(floats)];
    store(edge, from, half);
    memcpy(to, edge, (size_t)(count * width_of(half)));
  }
}

INLINE float one_number(const char *from, int64_t index, int half) {
  uint16_t part;
  float result;
  if (!half) return memcpy(&result, from + index * 4, 4), result;
  memcpy(&part, from + index * 2, 2);
  const uint32_t bits = (uint32_t)part << 16;
  return memcpy(&result, &bits, 4), result;
}

#define BOTH_KINDS(NAME)                                                                                              \
  CLONES static void NAME##_bf16(const void *work, int64_t first, int64_t last) { NAME(work, first, last, 1); }       \
  CLONES static void NAME##_fp32(const void *work, int64_t first, int64_t last) { NAME(work, first, last, 0); }

/* ---- out = (base + alpha a b) + other, each sum rounded ---- */

enum { STRIP = 256, BAND = 32, TOGETHER = 4, MOST_RANK = 64 };

typedef struct {
  const char *base, *other, *a, *b; /* other: null for none */
  char *out;
  int64_t rows, columns, rank, base_row, other_row, a_row, a_step, b_step, b_column; /* distances in numbers; the rows of out are dense */
  float alpha;
  int half_factors; /* a and b are bf16 rather than fp32 */
} LowRank;

/* The columns of b in a strip, as fp32 rows of STRIP. */
INLINE void take_strip(float *strip, const LowRank *w, int64_t start, int64_t count, int half) {
  for (int64_t k = 0; k < w->rank; k++) {
    const char *from = w->b + (k * w->b_step + start * w->b_column) * width_of(half);
    for (int64_t j = 0; j < count; j++) strip[k * STRIP + j] = one_number(from, j * w->b_column, half);
    for (int64_t j = count; j < STRIP && j % LANES; j++) strip[k * STRIP + j] = 0;
  }
}

INLINE void low_rank_rows(const LowRank *w, const float *strip, int64_t row, int rows, int64_t start, int64_t count, int half) {
  float a[TOGETHER][MOST_RANK];
  const char *from[2][TOGETHER];
  char *to[TOGETHER];
  for (int r = 0; r < rows; r++) {
    for (int64_t k = 0; k < w->rank; k++) a[r][k] = w->alpha * one_number(w->a, (row + r) * w->a_row + k * w->a_step, w->half_factors);
    from[0][r] = w->base + ((row + r) * w->base_row + start) * width_of(half);
    from[1][r] = w->other ? w->other + ((row + r) * w->other_row + start) * width_of(half) : 0;
    to[r] = w->out + ((row + r) * w->columns + start) * width_of(half);
  }
  for (int64_t j = 0; j < count; j += LANES) {
    floats sum[TOGETHER], b, more;
    for (int r = 0; r < rows; r++) load_some(&sum[r], from[0][r] + j * width_of(half), count - j, half);
    for (int64_t k = 0; k < w->rank; k++) {
      memcpy(&b, strip + k * STRIP + j, sizeof b);
      for (int r = 0; r < rows; r++) sum[r] += b * a[r][k];
    }
    for (int r = 0; r < rows; r++) {
      if (w->other) {
        load_some(&more, from[1][r] + j * width_of(half), count - j, half);
        narrow(&sum[r], half);
        sum[r] += more;
      }
      store_some(to[r] + j * width_of(half), &sum[r], count - j, half);
    }
  }
}

INLINE void low_rank(const void *work, int64_t first, int64_t last, int half) {
  const LowRank *w = work;
  const int64_t bands = (w->rows + BAND - 1) / BAND;
  float strip[MOST_RANK * STRIP] __attribute__((aligned(64)));
  for (int64_t part = first; part < last; part++) {
    const int64_t start = part / bands * STRIP, band = part % bands * BAND;
    const int64_t count = w->columns - start < STRIP ? w->columns - start : STRIP, end = w->rows - band < BAND ? w->rows : band + BAND;
    if (part == first || part % bands == 0) {
      if (w->half_factors)
        take_strip(strip, w, start, count, 1);
      else
        take_strip(strip, w, start, count, 0);
    }
    int64_t row = band;
    for (; row + TOGETHER <= end; row += TOGETHER) low_rank_rows(w, strip, row, TOGETHER, start, count, half);
    for (; row < end; row++) low_rank_rows(w, strip, row, 1, start, count, half);
  }
}

BOTH_KINDS(low_rank)

EXPORT void mebp_add_low_rank(const void *base, const void *other, const void *a, const void *b, void *out, int64_t rows, int64_t columns,
                              int64_t rank, int64_t base_row, int64_t other_row, int64_t a_row, int64_t a_step, int64_t b_step, int64_t b_column,
                              float alpha, int half_factors, int half, int threads) {
  const LowRank w = {base, other, a, b, out, rows, columns, rank, base_row, other_row, a_row, a_step, b_step, b_column, alpha, half_factors};
  const int64_t parts = (columns + STRIP - 1) / STRIP * ((rows + BAND - 1) / BAND);
  in_parts(half ? low_rank_bf16 : low_rank_fp32, &w, parts, rows * columns, threads);
}

/* ---- act(gate) * up, act one of silu and gelu in its tanh form ---- */

typedef struct {
  const char *grad, *gate, *up;
  char *out, *gate_out, *up_out; /* out: forward; the others: backward */
  int64_t count;
} Gated;

enum { SILU, GELU };

/* exp(x) for -87 < x <= 0, to 1e-5, a 200th of what rounding to bf16 takes: as `exp_lanes`, with a polynomial of degree 4. */
INLINE void short_exp_lanes(floats *x) {
  const floats shift = (floats){} + 12582912.0f, low = (floats){} - 87.0f;
  SELECT(*x, *x < low, low);
  const floats n = (*x * 1.44269504f + shift) - shift, r = *x - n * 0.693147181f;
  const floats p = ((r * 4.094631e-2f + 1.6744001e-1f) * r + 5.0007257e-1f) * r * r + r + 1.0f;
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  *x = p * (floats)power;
}

/* act(x), and its slope. silu: s = 1 / (1 + exp(-x)), x s, s (1 + x (1 - s)); s and 1 - s both from exp(-|x|), so that neither cancels.
 * gelu: t = tanh(c (x + 0.044715 x^3)), x (1 + t) / 2, (1 + t) / 2 + x (1 - t^2) c (1 + 0.134145 x^2) / 2. */
INLINE void activate(const floats *given, floats *value, floats *slope, int kind, int half) {
  const floats x = *given;
  if (kind == SILU) {
    floats q = (floats)((ints)x | INT32_MIN);
    if (half)
      short_exp_lanes(&q);
    else
      exp_lanes(&q);
    const floats larger = 1.0f / (q + 1.0f), smaller = q * larger;
    floats s = larger;
    SELECT(s, x < 0.0f, smaller);
    *value = x * s;
    *slope = s + *value * (larger + smaller - s);
  } else {
    const float c = 0.7978845608028654f;
    const floats square = x * x;
    floats t = x * (square * (c * 0.044715f) + c), bend;
    tanh_lanes(&t, &bend);
    const floats share = t * 0.5f + 0.5f;
    *value = x * share;
    *slope = share + x * bend * (square * (c * 0.0670725f) + 0.5f * c);
  }
}

INLINE void gated_part(const Gated *w, int64_t i, int64_t count, int kind, int backward, int half) {
  const int64_t at = i * width_of(half);
  floats grad, gate, up, value, slope;
  load_some(&gate, w->gate + at, count, half);
  load_some(&up, w->up + at, count, half);
  activate(&gate, &value, &slope, kind, half);
  if (backward) {
    load_some(&grad, w->grad + at, count, half);
    value *= grad;
    slope *= grad * up;
    store_some(w->up_out + at, &value, count, half);
    store_some(w->gate_out + at, &slope, count, half);
  } else {
    value *= up;
    store_some(w->out + at, &value, count, half);
  }
}

INLINE void gated_parts(const Gated *w, int64_t i, int64_t end, int kind, int backward, int half) {
  for (; i + LANES <= end; i += LANES) gated_part(w, i, LANES, kind, backward, half);
  if (i < end) gated_part(w, i, end - i, kind, backward, half);
}

INLINE void gated(const void *work, int64_t first, int64_t last, int kind, int half) {
  const Gated w = *(const Gated *)work;
  const int64_t end = last * LANES < w.count ? last * LANES : w.count;
  if (w.grad)
    gated_parts(&w, first * LANES, end, kind, 1, half);
  else
    gated_parts(&w, first * LANES, end, kind, 0, half);
}

INLINE void silu_gated(const void *work, int64_t first, int64_t last, int half) { gated(work, first, last, SILU, half); }
INLINE void gelu_gated(const void *work, int64_t first, int64_t last, int half) { gated(work, first, last, GELU, half); }

BOTH_KINDS(silu_gated)
BOTH_KINDS(gelu_gated)

EXPORT void mebp_gated(const void *grad, const void *gate, const void *up, void *out, void *gate_out, void *up_out, int64_t count, int kind,
                       int half, int threads) {
  const Gated w = {grad, gate, up, out, gate_out, up_out, count};
  const Task task = kind == SILU ? (half ? silu_gated_bf16 : silu_gated_fp32) : (half ? gelu_gated_bf16 : gelu_gated_fp32);
  in_parts(task, &w, (count + LANES - 1) / LANES, count, threads);
}

/* ---- RMSNorm: y = x r w with r = 1 / sqrt(mean(x^2) + eps), and dx = r (dy w - x r^2 mean(dy w x)) + other ---- */

typedef struct {
  const char *grad, *x, *weight, *other; /* grad: null forward; other: null for none */
  char *out;
  float *scale; /* r, one a row: written forward, read backward */
  int64_t columns;
  float eps;
  int half_weight;
} Norm;

INLINE void weighted(floats *to, const Norm *w, int64_t j, int64_t count) {
  floats weight;
  if (w->half_weight)
    load_some(&weight, w->weight + j * width_of(1), count, 1);
  else
    load_some(&weight, w->weight + j * width_of(0), count, 0);
  *to *= weight;
}

INLINE void gradient(floats *to, const Norm *w, const char *grad, int64_t j, int64_t count, int half) {
  load_some(to, grad + j * width_of(half), count, half);
  weighted(to, w, j, count);
}

INLINE void norm_row(const Norm *w, int64_t row, int half) {
  const int64_t first = row * w->columns * width_of(half);
  const char *x = w->x + first, *grad = w->grad ? w->grad + first : 0;
  floats sum = {}, value, other;
  for (int64_t j = 0; j < w->columns; j += LANES) {
    const int64_t at = j * width_of(half), count = w->columns - j;
    load_some(&value, x + at, count, half);
    if (grad) {
      gradient(&other, w, grad, j, count, half);
      sum += value * other;
    } else {
      sum += value * value;
    }
  }
  const float mean = sum_of(&sum) / (float)w->columns;
  const float scale = grad ? w->scale[row] : 1.0f / sqrtf(mean + w->eps), pull = scale * scale * mean;
  w->scale[row] = scale;
  for (int64_t j = 0; j < w->columns; j += LANES) {
    const int64_t at = j * width_of(half), count = w->columns - j;
    load_some(&value, x + at, count, half);
    if (grad) {
      gradient(&other, w, grad, j, count, half);
      value = (other - value * pull) * scale;
      if (w->other) {
        load_some(&other, w->other + first + at, count, half);
        value += other;
      }
    } else {
      value *= scale;
      weighted(&value, w, j, count);
    }
    store_some(w->out + first + at, &value, count, half);
  }
}

INLINE void norm(const void *work, int64_t first, int64_t last, int half) {
  for (int64_t row = first; row < last; row++) norm_row(work, row, half);
}

BOTH_KINDS(norm)

EXPORT void mebp_rms_norm(const void *grad, const void *x, const void *weight, const void *other, void *out, float *scale, int64_t rows,
                          int64_t columns, float eps, int half_weight, int half, int threads) {
  const Norm w = {grad, x, weight, other, out, scale, columns, eps, half_weight};
  in_parts(half ? norm_bf16 : norm_fp32, &w, rows, rows * columns, threads);
}

/* ---- rotary embedding of the halves of each head: (x1 c1 - x2 s1, x2 c2 + x1 s2), and its transpose (x1 c1 + x2 s2, x2 c2 - x1 s1) ---- */

typedef struct {
  const char *x, *cos, *sin;
  char *out;
  int64_t heads, tokens, size, x_batch, x_head, x_token, out_batch, out_head, out_token, turn_batch, turn_token;
  int transposed;
} Rope;

INLINE void rope_head(const Rope *w, const char *x, const char *cos, const char *sin, char *out, int half) {
  const int64_t middle = w->size / 2, far = middle * width_of(half);
  for (int64_t j = 0; j < middle; j += LANES) {
    const int64_t at = j * width_of(half), count = middle - j;
    floats x1, x2, c1, c2, s1, s2;
    load_some(&x1, x + at, count, half);
    load_some(&x2, x + far + at, count, half);
    load_some(&c1, cos + at, count, half);
    load_some(&c2, cos + far + at, count, half);
    load_some(&s1, sin + at, count, half);
    load_some(&s2, sin + far + at, count, half);
    const floats y1 = w->transposed ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1;
    const floats y2 = w->transposed ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2;
    store_some(out + at, &y1, count, half);
    store_some(out + far + at, &y2, count, half);
  }
}

/* A part is one token of one sequence, all heads. */
INLINE void rope(const void *work, int64_t first, int64_t last, int half) {
  const Rope *w = work;
  const int64_t width = width_of(half);
  for (int64_t part = first; part < last; part++) {
    const int64_t batch = part / w->tokens, token = part % w->tokens, turn = (batch * w->turn_batch + token * w->turn_token) * width;
    for (int64_t head = 0; head < w->heads; head++) {
      const char *x = w->x + (batch * w->x_batch + head * w->x_head + token * w->x_token) * width;
      char *out = w->out + (batch * w->out_batch + head * w->out_head + token * w->out_token) * width;
      rope_head(w, x, w->cos + turn, w->sin + turn, out, half);
    }
  }
}

BOTH_KINDS(rope)

EXPORT void mebp_rope(const void *x, const void *cos, const void *sin, void *out, int64_t batch, int64_t heads, int64_t tokens, int64_t size,
                      int64_t x_batch, int64_t x_head, int64_t x_token, int64_t out_batch, int64_t out_head, int64_t out_token,
                      int64_t turn_batch, int64_t turn_token, int transposed, int half, int threads) {
  const Rope w = {x,       cos,       sin,      out,      heads,     tokens,     size,       x_batch,
                  x_head,  x_token,   out_batch, out_head, out_token, turn_batch, turn_token, transposed};
  in_parts(half ? rope_bf16 : rope_fp32, &w, batch * tokens, batch * heads * tokens * size, threads);
}
