/* Lifespans into a given height by guided ejection: a block that has no place goes where it ejects the least, and those are placed again.
 *
 * What is ejected counts by its weight, which grows each time that a block found no place: so the search learns which blocks are hard to place, and
 * they stay where they got to. (The scheme of Nagata and Braysy, Operations Research Letters 37, 2009, for vehicle routes with time windows.)
 *
 * A block is tried at the ground, on every block and under every block that it meets in time, and under the height. What lies at such an offset is
 * what begins below its top, less what ends at or below its bottom: two running sums, over blocks by their bottoms and by their tops.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "random.h"

#define EXPORT __attribute__((visibility("default")))

static const double SOME = 1e-9;   /* weight of what is ejected, at least: sums are not exact */
static const double GROWTH = 0.3; /* of a weight, each time, as a share of what it was at first */

typedef struct { /* placed blocks by an edge of theirs */
  int32_t *block;
  int64_t *edge;
} Edges;

typedef struct { /* of those that a block meets in time */
  int64_t *edge;
  double *before; /* weight of all before each, one more than there are */
} Met;

typedef struct {
  int32_t placed;
  const int32_t *first, *last;
  const int64_t *size;
  int64_t height, *offset; /* -1: not placed */
  double *weight;
  Edges low, high;
  Met bottoms, tops;
  int64_t work;
  uint64_t random;
} Search;

static int32_t find(const Edges *edges, int32_t count, int64_t edge) {
  int32_t from = 0, to = count;
  while (from < to) {
    const int32_t middle = (from + to) / 2;
    if (edges->edge[middle] < edge)
      from = middle + 1;
    else
      to = middle;
  }
  return from;
}

static void insert(Edges *edges, int32_t count, int64_t edge, int32_t block) {
  const int32_t at = find(edges, count, edge);
  memmove(edges->block + at + 1, edges->block + at, (size_t)(count - at) * sizeof *edges->block);
  memmove(edges->edge + at + 1, edges->edge + at, (size_t)(count - at) * sizeof *edges->edge);
  edges->block[at] = block, edges->edge[at] = edge;
}

static void erase(Edges *edges, int32_t count, int64_t edge, int32_t block) {
  int32_t at = find(edges, count, edge);
  while (edges->block[at] != block) at++;
  memmove(edges->block + at, edges->block + at + 1, (size_t)(count - at - 1) * sizeof *edges->block);
  memmove(edges->edge + at, edges->edge + at + 1, (size_t)(count - at - 1) * sizeof *edges->edge);
}

static void put(Search *s, int32_t block, int64_t offset) {
  s->offset[block] = offset;
  insert(&s->low, s->placed, offset, block);
  insert(&s->high, s->placed++, offset + s->size[block], block);
}

static void eject(Search *s, int32_t block) {
  erase(&s->low, s->placed, s->offset[block], block);
  erase(&s->high, s->placed--, s->offset[block] + s->size[block], block);
  s->offset[block] = -1;
}

/* How many there are. */
static int32_t meet(const Search *s, const Edges *edges, int32_t block, const Met *met) {
  const int32_t first = s->first[block], last = s->last[block];
  int32_t count = 0;
  met->before[0] = 0;
  for (int32_t k = 0; k < s->placed; k++) {
    const int32_t other = edges->block[k];
    met->edge[count] = edges->edge[k];
    met->before[count + 1] = met->before[count] + s->weight[other];
    count += (s->first[other] < last) & (s->last[other] > first);
  }
  return count;
}

typedef struct {
  int64_t offset;
  double ejected;
  int ties;
} Place;

/* Take note of the offset, below whose top `below` bottoms are, and at or below which `above` tops: of equal ones any, or the lowest. */
static void try_at(Search *s, int64_t offset, int32_t below, int32_t above, int lowest, Place *best) {
  const double ejected = below == above ? 0 : fmax(SOME, s->bottoms.before[below] - s->tops.before[above]);
  if (ejected < best->ejected * (1 - 1e-12)) {
    *best = (Place){offset, ejected, 1};
  } else if (ejected <= best->ejected * (1 + 1e-12)) {
    best->ties++;
    if (lowest ? offset < best->offset : draw_below(&s->random, best->ties) == 0) best->offset = offset;
  }
}

/* Where the block ejects the least. */
static Place best_place(Search *s, int32_t block, int lowest) {
  const int64_t size = s->size[block], *bottom = s->bottoms.edge, *top = s->tops.edge;
  Place best = {0, 1e300, 0};
  const int32_t count = meet(s, &s->low, block, &s->bottoms);
  meet(s, &s->high, block, &s->tops);
  s->work -= 2 * s->placed;
  int32_t below = 0, above = 0;
  while (below < count && bottom[below] < size) below++;
  try_at(s, 0, below, 0, lowest, &best);
  for (int32_t k = 0; k < count && top[k] + size <= s->height; k++) { /* on each */
    if (k && top[k - 1] == top[k]) continue;
    while (below < count && bottom[below] < top[k] + size) below++;
    for (above = k + 1; above < count && top[above] <= top[k];) above++;
    try_at(s, top[k], below, above, lowest, &best);
  }
  above = 0;
  for (int32_t k = 0; k <= count; k++) { /* under each, and under the height */
    const int64_t end = k < count ? bottom[k] : s->height;
    if (end < size || (k && k < count && bottom[k - 1] == end)) continue;
    while (above < count && top[above] <= end - size) above++;
    for (below = k; below > 0 && bottom[below - 1] >= end;) below--;
    try_at(s, end - size, below, above, lowest, &best);
  }
  return best;
}

/* Eject what lies there, to the end of the list; returns how many are on it then. */
static int32_t make_way(Search *s, int32_t block, int64_t offset, int32_t *waiting, int32_t count) {
  const int32_t before = count;
  for (int32_t k = 0; k < s->placed && s->low.edge[k] < offset + s->size[block]; k++) {
    const int32_t other = s->low.block[k];
    if (s->first[other] < s->last[block] && s->last[other] > s->first[block] && s->low.edge[k] + s->size[other] > offset) waiting[count++] = other;
  }
  for (int32_t k = before; k < count; k++) eject(s, waiting[k]);
  return count;
}

/* How many blocks have no place when all have, or after so much `work`, a look at a placed block each; -1 without memory. offsets: -1 for those that
 * are to be placed; the best that was found. light: what a block weighs at first; weight: by now, changed. At first each in the order given that has a
 * place gets the lowest. */
EXPORT int32_t mebp_eject(int32_t count, const int32_t *first, const int32_t *last, const int64_t *size, const int32_t *order, int64_t height,
                          int64_t work, uint64_t seed, const double *light, int64_t *offsets, double *weight) {
  const size_t n = (size_t)count + 1;
  int32_t *narrow = malloc(3 * n * sizeof *narrow), *waiting = narrow + 2 * n, left = 0, least = count + 1, too_high = 0;
  int64_t *wide = malloc(6 * n * sizeof *wide), *found = wide + 4 * n;
  double *real = malloc(2 * n * sizeof *real);
  if (narrow && wide && real) {
    Search s = {.first = first, .last = last, .size = size, .height = height, .offset = offsets, .weight = weight, .work = work, .random = seed * 2 + 1,
                .low = {narrow, wide}, .high = {narrow + n, wide + n}, .bottoms = {wide + 2 * n, real}, .tops = {wide + 3 * n, real + n}};
    for (int32_t k = 0; k < count; k++)
      if (offsets[k] >= 0) put(&s, k, offsets[k]);
    for (int32_t k = 0; k < count; k++) {
      if (offsets[order[k]] >= 0) continue;
      if (size[order[k]] > height) {
        too_high++;
        continue;
      }
      const Place place = best_place(&s, order[k], 1);
      if (place.ejected == 0)
        put(&s, order[k], place.offset);
      else
        waiting[left++] = order[k];
    }
    for (;;) {
      if (left < least) {
        least = left;
        memcpy(found, offsets, (size_t)count * sizeof *found);
      }
      if (!left || s.work <= 0) break;
      const int32_t at = draw_below(&s.random, left), block = waiting[at];
      waiting[at] = waiting[--left];
      const Place place = best_place(&s, block, 0);
      if (place.ejected > 0) {
        weight[block] += GROWTH * light[block];
        left = make_way(&s, block, place.offset, waiting, left);
      }
      put(&s, block, place.offset);
    }
    memcpy(offsets, found, (size_t)count * sizeof *found);
  }
  free(narrow), free(wide), free(real);
  return least > count ? -1 : least + too_high;
}
