/* One tile of the tiled loss: for each token the running maximum, the running sum of exponentials and of the distances to the maximum, and the
 * tile's logits replaced by exp(logit - maximum), zero in the target's column, less their mean where it is asked for; with soft-capping,
 * cap * tanh(logit / cap) takes the logit's place, and what replaces it is multiplied by its slope, 1 - tanh^2. See kernels/cross_entropy.py,
 * whose `_tile_in_torch` is the twin of this.
 *
 * Plain C with vector types of 16 lanes, which the compiler maps to what the processor has; sums are kept by lane, so every processor adds in
 * the same order. `half` (bf16 rather than fp32) and `capped` are constants wherever these functions are inlined.
 */
#include "lanes.h"
#include "threads.h"

INLINE void cap_lanes(floats *x, floats *slope, float cap) {
  *x *= 1.0f / cap;
  tanh_lanes(x, slope);
  *x *= cap;
}

/* One token of a tile. What is left of its columns after the last 16 whole ones lies in edges padded to 16, so that the loops below hold no
 * copies of unknown length. own: the target's column, or -1 where it is in another tile. slopes: where they go, or null. */
typedef struct {
  char *logits, *slopes, edge[sizeof(floats)], slope_edge[sizeof(floats)];
  int64_t columns, whole, own;
  float cap, higher;
} Row;

INLINE char *place(const Row *row, int64_t column, int half) {
  return column < row->whole ? row->logits + column * width_of(half) : (char *)row->edge;
}

/* The largest of a row's numbers; a NaN is none. tanh keeps the order, so this is where the capped logits are largest too. */
INLINE float largest(const Row *row, int half) {
  floats most = (floats){} - INFINITY, value;
  for (int64_t i = 0; i < row->whole; i += LANES) {
    load(&value, place(row, i, half), half);
    SELECT(most, value > most, value);
  }
  float result = -INFINITY;
  for (int k = 0; k < LANES; k++) result = most[k] > result ? most[k] : result;
  load(&value, row->edge, half);
  for (int64_t k = 0; row->whole + k < row->columns; k++) result = value[k] > result ? value[k] : result;
  return result;
}

/* Which of the 16 lanes from `column` on are in the row, and which of these are not `own`: all bits set, or none. */
INLINE void masks(ints *inside, ints *others, int64_t column, int64_t columns, int64_t own) {
  *inside = *others = (ints){} - 1;
  if (column + LANES <= columns && (own < column || own >= column + LANES)) return;
  int32_t lanes[2][LANES];
  for (int k = 0; k < LANES; k++) {
    lanes[0][k] = -(column + k < columns);
    lanes[1][k] = -(column + k < columns && column + k != own);
  }
  memcpy(inside, lanes[0], sizeof *inside);
  memcpy(others, lanes[1], sizeof *others);
}

/* Sums exp(logit - higher) without the target's, and in `distance` logit - higher with it. With `writes`, the logits become these exponentials
 * (the target's zero) less `even`, times their slopes. */
INLINE float walk(Row *row, float even, float *distance, int half, int capped, int writes) {
  const float cap = row->cap, higher = row->higher;
  floats sum = {}, distances = {}, value, slope = {};
  ints inside, others;
  for (int64_t i = 0; i < row->columns; i += LANES) {
    char *at = place(row, i, half);
    masks(&inside, &others, i, row->columns, row->own);
    load(&value, at, half);
    if (capped) cap_lanes(&value, &slope, cap);
    value = (floats)((ints)(value - higher) & inside);
    distances += value;
    exp_lanes(&value);
    value = (floats)((ints)value & others);
    sum += value;
    if (!writes) continue;
    value -= even;
    if (capped) value *= slope;
    store(at, &value, half);
    if (capped && row->slopes) store(i < row->whole ? row->slopes + i * width_of(half) : row->slope_edge, &slope, half);
  }
  *distance = sum_of(&distances);
  return sum_of(&sum);
}

INLINE Row row_of(char *logits, char *slopes, int64_t columns, int64_t aimed, float cap, int half) {
  const int64_t whole = columns / LANES * LANES;
  Row row = {logits, slopes, {0}, {0}, columns, whole, aimed >= 0 && aimed < columns ? aimed : -1, cap, 0};
  memcpy(row.edge, logits + whole * width_of(half), (size_t)((columns - whole) * width_of(half)));
  return row;
}

INLINE void put_edges(const Row *row, int half) {
  const size_t size = (size_t)((row->columns - row->whole) * width_of(half));
  memcpy(row->logits + row->whole * width_of(half), row->edge, size);
  if (row->slopes) memcpy(row->slopes + row->whole * width_of(half), row->slope_edge, size);
}

INLINE float number(const char *from, int half) {
  uint16_t part;
  float result;
  memcpy(&part, from, sizeof part);
  const uint32_t bits = (uint32_t)part << 16;
  memcpy(&result, half ? (const char *)&bits : from, sizeof result);
  return result;
}

/* Rows of `columns` logits, `stride` elements apart, and as many slopes (capped only; null: not wanted), dense. seen: columns of earlier
 * tiles. aimed[t]: the target's column in this tile, or a number outside it. keep[t]: by what everything summed before has to be multiplied.
 * even[t] (null: zero): the mean of the exponentials of the tile, which was subtracted from them. */
typedef struct {
  char *logits, *slopes;
  int64_t columns, stride, seen;
  float cap;
  const int64_t *aimed;
  float *top, *rest, *aim, *flat, *keep, *even;
} Tile;

INLINE void rows(const Tile *w, int64_t begin, int64_t end, int half, int capped) {
  const int64_t width = width_of(half), columns = w->columns;
  for (int64_t t = begin; t < end; t++) {
    char *first = w->logits + t * w->stride * width;
    Row row = row_of(first, w->slopes ? w->slopes + t * columns * width : 0, columns, w->aimed[t], w->cap, half);
    if (row.own >= 0) w->aim[t] = number(first + row.own * width, half);
    floats most = (floats){} + largest(&row, half), slope;
    if (capped) cap_lanes(&most, &slope, w->cap);
    const float before = w->top[t], higher = most[0] > before ? most[0] : before;
    row.higher = w->top[t] = higher;
    float distance, mean = 0;
    if (w->even) mean = w->even[t] = walk(&row, 0, &distance, half, capped, 0) / (float)columns;
    const float added = walk(&row, mean, &distance, half, capped, 1);
    put_edges(&row, half);
    w->keep[t] = before == -INFINITY ? 0.0f : expf(before - higher);
    w->rest[t] = w->rest[t] * w->keep[t] + added;
    w->flat[t] += (w->seen ? (before - higher) * (float)w->seen : 0.0f) + distance;
  }
}

#define ROWS(NAME, HALF, CAPPED)                                                                                                   \
  CLONES static void NAME(const void *work, int64_t first, int64_t last) { rows(work, first, last, HALF, CAPPED); }

ROWS(rows_bf16, 1, 0)
ROWS(rows_fp32, 0, 0)
ROWS(capped_rows_bf16, 1, 1)
ROWS(capped_rows_fp32, 0, 1)

/* The tokens of a tile, each by one thread, so that nothing depends on their number. cap: 0 for none. */
EXPORT void mebp_cross_entropy_tile(void *logits, void *slopes, int64_t tokens, int64_t columns, int64_t stride, int64_t seen, float cap,
                                    const int64_t *aimed, float *top, float *rest, float *aim, float *flat, float *keep, float *even, int half,
                                    int threads) {
  const Tile w = {logits, slopes, columns, stride, seen, cap, aimed, top, rest, aim, flat, keep, even};
  const Task plain = half ? rows_bf16 : rows_fp32, capped = half ? capped_rows_bf16 : capped_rows_fp32;
  in_parts(cap != 0 ? capped : plain, &w, tokens, tokens * columns, threads);
}
