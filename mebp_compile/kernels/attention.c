/* Attention, forward and backward, block by block, in fp32: see attention.py, which has the formulas and the twins in torch.
 *
 * A block is 64 queries by 64 keys of one head. Every product is one function, `product`, which keeps a tile of its result in registers. What has
 * to be read the other way round, keys and values, is turned once into memory of the caller. The backward goes through the blocks once where the
 * heads of keys divide evenly among the threads: each thread sums the gradients of keys and values of a whole head. Else it goes through them
 * twice, for keys and values and then for queries, and makes the scores twice. Sums are in the same order either way, so that the bits do not
 * depend on the number of threads.
 */
#include "lanes.h"
#include "threads.h"

enum { BLOCK = 64, MOST_SIZE = 256 };

typedef struct {
  char *data;
  int64_t batch, head, token; /* distances in numbers; the numbers of a token are adjacent */
} Heads;

typedef struct {
  Heads q, k, v, out, sums, grad, to_q, to_k, to_v; /* sums: log of the sum of exp, fp32, one a token */
  float *keys, *values; /* turned: [batch, groups, size, columns] */
  float *slots;         /* for each thread: gradients of keys and of values of one head, [2, columns, size]; null for two walks */
  int64_t threads, batch, heads, groups, tokens, sources, size, columns; /* sources: keys; columns: sources, rounded up to BLOCK */
  float scale;
  int causal;
} Attention;

/* ---- c = a b, or c += a b: c [m, n], a [m, k] (any strides), b [k, n]; m, n: multiples of 8 and 16 ---- */

INLINE void tile(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_step, const char *b, int64_t b_row, int half, int64_t steps,
                 int more, const int rows, const int wide) {
  floats sum[8][2];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int l = 0; l < wide; l++)
      if (more)
        load(&sum[r][l], c + r * c_row + l * LANES, 0);
      else
        sum[r][l] = (floats){};
  for (int64_t k = 0; k < steps; k++) {
    floats part[2];
#pragma GCC unroll 2
    for (int l = 0; l < wide; l++) load(&part[l], b + (k * b_row + l * LANES) * width_of(half), half);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const float x = a[r * a_row + k * a_step];
#pragma GCC unroll 2
      for (int l = 0; l < wide; l++) sum[r][l] += part[l] * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int l = 0; l < wide; l++) store(c + r * c_row + l * LANES, &sum[r][l], 0);
}

INLINE void product(float *c, int64_t c_row, const float *a, int64_t a_row, int64_t a_step, const void *b, int64_t b_row, int half, int64_t n,
                    int64_t steps, int more, int large) {
  const int rows = large ? 8 : 4;
  for (int64_t i = 0; i < BLOCK; i += rows) {
    int64_t j = 0;
    if (large)
      for (; j + 2 * LANES <= n; j += 2 * LANES)
        tile(c + i * c_row + j, c_row, a + i * a_row, a_row, a_step, (const char *)b + j * width_of(half), b_row, half, steps, more, rows, 2);
    for (; j < n; j += LANES)
      tile(c + i * c_row + j, c_row, a + i * a_row, a_row, a_step, (const char *)b + j * width_of(half), b_row, half, steps, more, rows, 1);
  }
}

/* ---- blocks of rows ---- */

INLINE char *at(const Heads *x, int64_t batch, int64_t head, int64_t token, int half) {
  return x->data + (batch * x->batch + head * x->head + token * x->token) * width_of(half);
}

/* BLOCK rows from `token` on as fp32, zeros from row `count` on. */
INLINE void take(float *to, const Heads *x, int64_t batch, int64_t head, int64_t token, int64_t count, int64_t size, float scale, int half) {
  for (int64_t r = 0; r < BLOCK; r++) {
    const char *from = at(x, batch, head, token + r, half);
    for (int64_t d = 0; d < size; d += LANES) {
      floats value = {};
      if (r < count) load(&value, from + d * width_of(half), half);
      value *= scale;
      store(to + r * size + d, &value, 0);
    }
  }
}

INLINE float *sum_at(const Attention *w, int64_t batch, int64_t head, int64_t token) {
  return (float *)(void *)at(&w->sums, batch, head, token, 0);
}

INLINE void give(const float *from, const Heads *x, int64_t batch, int64_t head, int64_t token, int64_t count, int64_t size, int half) {
  for (int64_t r = 0; r < count; r++)
    for (int64_t d = 0; d < size; d += LANES) {
      floats value;
      load(&value, from + r * size + d, 0);
      store(at(x, batch, head, token + r, half) + d * width_of(half), &value, half);
    }
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Numbers of a row that a query may see, from key `first` on. */
INLINE int64_t seen(const Attention *w, int64_t query, int64_t first) {
  const int64_t all = w->causal ? least(w->sources, query + 1) : w->sources;
  return all - first;
}

INLINE void only(floats *x, int64_t first, int64_t count, float otherwise) {
  ints lane;
  for (int k = 0; k < LANES; k++) lane[k] = (int32_t)(first + k);
  const floats other = (floats){} + otherwise;
  SELECT(*x, lane >= (int32_t)count, other);
}

/* Blocks in an order in which both halves take about as long where later ones are longer: first, last, second, last but one, ... */
INLINE int64_t folded(int64_t index, int64_t count) { return index % 2 ? count - 1 - index / 2 : index / 2; }

INLINE int64_t blocks(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

/* ---- keys and values, turned: a part is one head of one sequence ---- */

INLINE void turn_head(float *to, const Heads *x, int64_t batch, int64_t head, const Attention *w, int half) {
  for (int64_t first = 0; first < w->columns; first += BLOCK) {
    float rows[BLOCK * MOST_SIZE];
    take(rows, x, batch, head, first, w->sources - first, w->size, 1.0f, half);
    for (int64_t d = 0; d < w->size; d++)
      for (int64_t r = 0; r < BLOCK; r++) to[d * w->columns + first + r] = rows[r * w->size + d];
  }
}

INLINE void turned(const void *work, int64_t first, int64_t last, int half, int large) {
  const Attention *w = work;
  (void)large;
  for (int64_t part = first; part < last; part++) {
    const int64_t batch = part / w->groups, head = part % w->groups, place = part * w->size * w->columns;
    turn_head(w->keys + place, &w->k, batch, head, w, half);
    if (w->values) turn_head(w->values + place, &w->v, batch, head, w, half);
  }
}

/* ---- forward: a part is BLOCK queries of one head ---- */

/* The scores of a row become weights relative to its largest score so far; what was summed before shrinks with it. */
INLINE void soften(float *score, int64_t count, float *largest, float *sum, float *row, int64_t size) {
  floats top = (floats){} - INFINITY, total = {};
  for (int64_t j = 0; j < BLOCK; j += LANES) {
    floats x;
    load(&x, score + j, 0);
    if (count < BLOCK) only(&x, j, count, -INFINITY);
    store(score + j, &x, 0);
    SELECT(top, x > top, x);
  }
  float most = *largest;
  for (int k = 0; k < LANES; k++) most = top[k] > most ? top[k] : most;
  for (int64_t j = 0; j < BLOCK; j += LANES) {
    floats x;
    load(&x, score + j, 0);
    x -= most;
    exp_lanes(&x);
    if (count < BLOCK) only(&x, j, count, 0.0f);
    store(score + j, &x, 0);
    total += x;
  }
  const float shrunk = *largest == -INFINITY ? 0.0f : expf(*largest - most);
  *largest = most;
  *sum = *sum * shrunk + sum_of(&total);
  if (shrunk != 1.0f)
    for (int64_t d = 0; d < size; d += LANES) {
      floats x;
      load(&x, row + d, 0);
      x *= shrunk;
      store(row + d, &x, 0);
    }
}

INLINE void attend(const void *work, int64_t first, int64_t last, int half, int large) {
  const Attention *w = work;
  const int64_t all = blocks(w->tokens), size = w->size;
  float q[BLOCK * MOST_SIZE], sum[BLOCK * MOST_SIZE], score[BLOCK * BLOCK], largest[BLOCK], weight[BLOCK];
  for (int64_t part = first; part < last; part++) {
    const int64_t batch = part / all / w->heads, head = part / all % w->heads, group = head / (w->heads / w->groups);
    const int64_t token = folded(part % all, all) * BLOCK, count = least(BLOCK, w->tokens - token);
    const int64_t end = w->causal ? least(w->sources, token + BLOCK) : w->sources;
    const float *keys = w->keys + (batch * w->groups + group) * size * w->columns;
    take(q, &w->q, batch, head, token, count, size, w->scale, half);
    memset(sum, 0, (size_t)(BLOCK * size) * sizeof(float));
    for (int64_t r = 0; r < BLOCK; r++) largest[r] = -INFINITY, weight[r] = 0;
    for (int64_t key = 0; key < end; key += BLOCK) {
      product(score, BLOCK, q, size, 1, keys + key, w->columns, 0, BLOCK, size, 0, large);
      for (int64_t r = 0; r < BLOCK; r++)
        soften(score + r * BLOCK, seen(w, token + r, key), &largest[r], &weight[r], sum + r * size, size);
      const int64_t rows = least(BLOCK, w->sources - key);
      product(sum, size, score, BLOCK, 1, at(&w->v, batch, group, key, half), w->v.token, half, size, rows, 1, large);
    }
    for (int64_t r = 0; r < count; r++) {
      for (int64_t d = 0; d < size; d += LANES) {
        floats x;
        load(&x, sum + r * size + d, 0);
        x /= weight[r];
        store(sum + r * size + d, &x, 0);
      }
      *sum_at(w, batch, head, token + r) = largest[r] + logf(weight[r]);
    }
    give(sum, &w->out, batch, head, token, count, size, half);
  }
}

/* ---- backward ---- */

typedef struct {
  float q[BLOCK * MOST_SIZE], grad[BLOCK * MOST_SIZE], weight[BLOCK * BLOCK], slope[BLOCK * BLOCK], sums[BLOCK], dots[BLOCK];
  int64_t batch, head, group, token, count;
} Queries;

/* A block of queries with its gradients: rows past the last token are zeros, and give nothing. */
INLINE void take_queries(Queries *b, const Attention *w, int64_t batch, int64_t head, int64_t token, int half) {
  b->batch = batch, b->head = head, b->group = head / (w->heads / w->groups), b->token = token, b->count = least(BLOCK, w->tokens - token);
  take(b->q, &w->q, batch, head, token, b->count, w->size, 1.0f, half);
  take(b->grad, &w->grad, batch, head, token, b->count, w->size, 1.0f, half);
  for (int64_t r = 0; r < BLOCK; r++) {
    b->sums[r] = r < b->count ? *sum_at(w, batch, head, token + r) : 0.0f;
    floats total = {}, x, y;
    for (int64_t d = 0; d < w->size && r < b->count; d += LANES) {
      load(&x, at(&w->out, batch, head, token + r, half) + d * width_of(half), half);
      load(&y, b->grad + r * w->size + d, 0);
      total += x * y;
    }
    b->dots[r] = sum_of(&total);
  }
}

/* Weights and the gradients of scores of a block of queries and the keys from `key` on. */
INLINE void score_again(Queries *b, const Attention *w, int64_t key, int large) {
  const int64_t place = (b->batch * w->groups + b->group) * w->size * w->columns + key;
  product(b->weight, BLOCK, b->q, w->size, 1, w->keys + place, w->columns, 0, BLOCK, w->size, 0, large);
  product(b->slope, BLOCK, b->grad, w->size, 1, w->values + place, w->columns, 0, BLOCK, w->size, 0, large);
  for (int64_t r = 0; r < BLOCK; r++) {
    const int64_t count = seen(w, b->token + r, key);
    for (int64_t j = 0; j < BLOCK; j += LANES) {
      float *weight = b->weight + r * BLOCK + j, *slope = b->slope + r * BLOCK + j;
      floats x, y;
      load(&x, weight, 0);
      load(&y, slope, 0);
      x = x * w->scale - b->sums[r];
      exp_lanes(&x);
      y = x * (y - b->dots[r]) * w->scale;
      if (count < BLOCK) {
        only(&x, j, count, 0.0f);
        only(&y, j, count, 0.0f);
      }
      store(weight, &x, 0);
      store(slope, &y, 0);
    }
  }
}

/* What one block of scores gives the gradients of its keys and values. */
INLINE void add_to_keys(const Queries *b, float *to_k, float *to_v, int64_t size, int large) {
  product(to_v, size, b->weight, 1, BLOCK, b->grad, size, 0, size, b->count, 1, large);
  product(to_k, size, b->slope, 1, BLOCK, b->q, size, 0, size, b->count, 1, large);
}

/* The gradient of a block of queries; where `to_k` is not null also what it gives those of all keys and values. */
INLINE void pull_block(Queries *b, const Attention *w, float *to_k, float *to_v, int half, int large) {
  const int64_t size = w->size, end = w->causal ? least(w->sources, b->token + BLOCK) : w->sources;
  float to_q[BLOCK * MOST_SIZE];
  memset(to_q, 0, (size_t)(BLOCK * size) * sizeof(float));
  for (int64_t key = 0; key < end; key += BLOCK) {
    const char *keys = at(&w->k, b->batch, b->group, key, half);
    score_again(b, w, key, large);
    if (to_k) add_to_keys(b, to_k + key * size, to_v + key * size, size, large);
    product(to_q, size, b->slope, BLOCK, 1, keys, w->k.token, half, size, least(BLOCK, w->sources - key), 1, large);
  }
  give(to_q, &w->to_q, b->batch, b->head, b->token, b->count, size, half);
}

/* A part is one head of keys with all heads of queries that read them. */
INLINE void pull_all(const void *work, int64_t first, int64_t last, int half, int large) {
  const Attention *w = work;
  const int64_t size = w->size, numbers = w->columns * size, together = w->heads / w->groups;
  float *to_k = w->slots + first / (w->batch * w->groups / w->threads) * 2 * numbers, *to_v = to_k + numbers;
  Queries b;
  for (int64_t part = first; part < last; part++) {
    const int64_t batch = part / w->groups, group = part % w->groups;
    memset(to_k, 0, (size_t)(2 * numbers) * sizeof(float));
    for (int64_t head = group * together; head < (group + 1) * together; head++)
      for (int64_t token = 0; token < w->tokens; token += BLOCK) {
        take_queries(&b, w, batch, head, token, half);
        pull_block(&b, w, to_k, to_v, half, large);
      }
    give(to_k, &w->to_k, batch, group, 0, w->sources, size, half);
    give(to_v, &w->to_v, batch, group, 0, w->sources, size, half);
  }
}

/* The gradients of keys and values: a part is BLOCK keys of one head of keys, for all heads of queries that read them. */
INLINE void pull_keys(const void *work, int64_t first, int64_t last, int half, int large) {
  const Attention *w = work;
  const int64_t all = blocks(w->sources), size = w->size, together = w->heads / w->groups;
  float to_k[BLOCK * MOST_SIZE], to_v[BLOCK * MOST_SIZE];
  Queries b;
  for (int64_t part = first; part < last; part++) {
    const int64_t batch = part / all / w->groups, group = part / all % w->groups, key = folded(part % all, all) * BLOCK;
    memset(to_k, 0, (size_t)(BLOCK * size) * sizeof(float));
    memset(to_v, 0, (size_t)(BLOCK * size) * sizeof(float));
    for (int64_t head = group * together; head < (group + 1) * together; head++)
      for (int64_t token = w->causal ? key : 0; token < w->tokens; token += BLOCK) {
        take_queries(&b, w, batch, head, token, half);
        score_again(&b, w, key, large);
        add_to_keys(&b, to_k, to_v, size, large);
      }
    const int64_t count = least(BLOCK, w->sources - key);
    give(to_k, &w->to_k, batch, group, key, count, size, half);
    give(to_v, &w->to_v, batch, group, key, count, size, half);
  }
}

/* The gradient of queries: a part is BLOCK queries of one head. */
INLINE void pull_queries(const void *work, int64_t first, int64_t last, int half, int large) {
  const Attention *w = work;
  const int64_t all = blocks(w->tokens);
  Queries b;
  for (int64_t part = first; part < last; part++) {
    const int64_t batch = part / all / w->heads, head = part / all % w->heads;
    take_queries(&b, w, batch, head, folded(part % all, all) * BLOCK, half);
    pull_block(&b, w, 0, 0, half, large);
  }
}

/* ---- one function for each processor and dtype: 32 vector registers hold a larger tile ---- */

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define LARGE __attribute__((target("arch=x86-64-v4")))
#define SMALL __attribute__((target_clones("avx2", "default")))
static int has_large(void) { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"); }
#else
#define LARGE
#define SMALL
static int has_large(void) { return 0; }
#endif

#define KINDS(NAME)                                                                                                             \
  LARGE static void NAME##_large_bf16(const void *work, int64_t first, int64_t last) { NAME(work, first, last, 1, 1); }         \
  LARGE static void NAME##_large_fp32(const void *work, int64_t first, int64_t last) { NAME(work, first, last, 0, 1); }         \
  SMALL static void NAME##_small_bf16(const void *work, int64_t first, int64_t last) { NAME(work, first, last, 1, 0); }         \
  SMALL static void NAME##_small_fp32(const void *work, int64_t first, int64_t last) { NAME(work, first, last, 0, 0); }         \
  static Task NAME##_task(int half) {                                                                                           \
    if (has_large()) return half ? NAME##_large_bf16 : NAME##_large_fp32;                                                       \
    return half ? NAME##_small_bf16 : NAME##_small_fp32;                                                                        \
  }

KINDS(turned)
KINDS(attend)
KINDS(pull_all)
KINDS(pull_keys)
KINDS(pull_queries)

/* Whether this processor has the registers that the tiles are made for. */
EXPORT int mebp_attention_is_fast(void) { return has_large(); }

/* pointers and distances (batch, head, token): q, k, v, out, sums and, for the backward, grad, to_q, to_k, to_v. sizes: batch, heads, groups,
 * tokens, sources, size. room: batch * groups * size * columns numbers; for the backward twice as many, and with one walk, which needs that
 * `threads` divides batch * groups, 2 * threads * size * columns more. */
EXPORT void mebp_attention(void *const *pointers, const int64_t *distances, const int64_t *sizes, float *room, float scale, int causal,
                           int backward, int one_walk, int half, int threads) {
  Attention w = {.batch = sizes[0], .heads = sizes[1], .groups = sizes[2], .tokens = sizes[3], .sources = sizes[4], .size = sizes[5],
                 .columns = blocks(sizes[4]) * BLOCK, .keys = room, .threads = threads, .scale = scale, .causal = causal};
  Heads *all[] = {&w.q, &w.k, &w.v, &w.out, &w.sums, &w.grad, &w.to_q, &w.to_k, &w.to_v};
  for (int i = 0; i < (backward ? 9 : 5); i++) *all[i] = (Heads){pointers[i], distances[3 * i], distances[3 * i + 1], distances[3 * i + 2]};
  const int64_t turned_numbers = w.batch * w.groups * w.size * w.columns, pairs = w.batch * w.heads * w.tokens * w.sources;
  if (backward) w.values = room + turned_numbers;
  if (one_walk) w.slots = room + 2 * turned_numbers;
  in_parts(turned_task(half), &w, w.batch * w.groups, turned_numbers, threads);
  if (!backward) {
    in_parts(attend_task(half), &w, w.batch * w.heads * blocks(w.tokens), pairs, threads);
  } else if (one_walk) {
    in_parts(pull_all_task(half), &w, w.batch * w.groups, pairs, threads);
  } else {
    in_parts(pull_keys_task(half), &w, w.batch * w.groups * blocks(w.sources), pairs, threads);
    in_parts(pull_queries_task(half), &w, w.batch * w.heads * blocks(w.tokens), pairs, threads);
  }
}
