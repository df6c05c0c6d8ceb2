/* A sequence of runs, ops repeated as it pays: simulated annealing over the whole sequence, its order included.
 *
 * After FastSA (Kusumoto et al., NeurIPS 2023): a run is moved, added or removed; what follows is found by walking the sequence from its end. A value
 * lives from its last making before a read to that read. The cost is the time of all runs, and a price for each byte above the budget at each run.
 * A walk ends as soon as the cost exceeds what the draw would accept.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "random.h"

#define EXPORT __attribute__((visibility("default")))

enum { UNLESS_REPEATED = 1, ALWAYS = 2 }; /* in `after` */

typedef struct {
  int32_t ops, storages;
  const int32_t *reads_from, *reads, *makes_from, *makes; /* lists of op k: [from[k], from[k + 1]) */
  const int64_t *size, *more;                             /* bytes of a storage; bytes beside storages while an op runs */
  const double *time;
  const uint8_t *after, *once, *outlives; /* after[a * ops + b]: a can't run before b; once: no second run; outlives: needed at the end, from 1 on */
  double budget, price;
  uint32_t *needed; /* the walk in which a storage was last found needed */
  uint32_t walk;
  uint64_t random;
} Search;

/* The cost of a sequence; more than `most` where it costs that, or has no meaning: a value is read that nothing before it makes. */
static double cost_of(Search *s, const int32_t *sequence, int count, double most) {
  const uint32_t walk = s->walk += 1;
  double cost = 0, live = 0;
  int open = 0; /* needed storages */
  for (int k = 0; k < s->storages; k++)
    if (s->outlives[k]) s->needed[k] = walk, live += (double)s->size[k], open++;
  for (int k = count - 1; k >= 0; k--) {
    const int op = sequence[k];
    double here = (double)s->more[op];
    for (int32_t i = s->makes_from[op]; i < s->makes_from[op + 1]; i++) {
      const int made = s->makes[i];
      if (s->needed[made] == walk) live -= (double)s->size[made], s->needed[made] = 0, open--;
      here += (double)s->size[made];
    }
    for (int32_t i = s->reads_from[op]; i < s->reads_from[op + 1]; i++) {
      const int read = s->reads[i];
      if (s->needed[read] != walk) s->needed[read] = walk, live += (double)s->size[read], open++;
    }
    const double excess = live + here - s->budget;
    cost += s->time[op] + (excess > 0 ? s->price * excess : 0);
    if (cost > most) return INFINITY;
  }
  return open ? INFINITY : cost;
}

static void move(int32_t *sequence, int from, int to) {
  const int32_t op = sequence[from];
  if (from < to)
    memmove(sequence + from, sequence + from + 1, (size_t)(to - from) * sizeof *sequence);
  else
    memmove(sequence + to + 1, sequence + to, (size_t)(from - to) * sizeof *sequence);
  sequence[to] = op;
}

/* How far a run may move towards `step` (-1 or 1), at most `far`: not past what must stay on its side. */
static int reach(const Search *s, const int32_t *sequence, int count, const int32_t *runs, int from, int step, int far) {
  const int op = sequence[from];
  int to = from;
  while (far-- > 0 && to + step >= 0 && to + step < count) {
    const int other = sequence[to + step];
    const int first = step < 0 ? other : op, second = step < 0 ? op : other, bound = s->after[(size_t)second * s->ops + first];
    if (other == op || bound == ALWAYS || (bound && runs[first] < 2)) break;
    to += step;
  }
  return to;
}

/* One change of the sequence into `next`, or 0. */
static int change(Search *s, const int32_t *sequence, int count, int most, const int32_t *runs, int32_t *next) {
  const double kind = draw_share(&s->random);
  const int at = draw_below(&s->random, count), op = sequence[at];
  memcpy(next, sequence, (size_t)count * sizeof *next);
  if (kind < 0.6 || (kind < 0.8 && count == most)) {
    const int far = 1 + (int)pow(count, draw_share(&s->random));
    const int to = reach(s, sequence, count, runs, at, draw(&s->random) & 1 ? 1 : -1, 1 + draw_below(&s->random, far));
    if (to == at) return 0;
    move(next, at, to);
    return count;
  }
  if (kind < 0.8) { /* run again what makes something that `op` reads, somewhere before it */
    const int reads = s->reads_from[op + 1] - s->reads_from[op];
    if (!reads) return 0;
    const int read = s->reads[s->reads_from[op] + draw_below(&s->random, reads)];
    int maker = -1, k = at - 1, gap = 0;
    for (; k >= 0 && maker < 0; k--)
      for (int32_t i = s->makes_from[sequence[k]]; i < s->makes_from[sequence[k] + 1]; i++)
        if (s->makes[i] == read) maker = sequence[k];
    gap = at - (k + 2);
    if (maker < 0 || s->once[maker] || gap < 1) return 0;
    const int to = at - (int)(gap * pow(draw_share(&s->random), 4));
    memmove(next + to + 1, next + to, (size_t)(count - to) * sizeof *next);
    next[to] = maker;
    return count + 1;
  }
  if (runs[op] < 2) return 0;
  memmove(next + at, next + at + 1, (size_t)(count - at - 1) * sizeof *next);
  return count - 1;
}

/* Anneals `sequence` (room for `most` runs, `count` at first) in place into the best found; returns its number of runs, or -1 without memory.
 * `steps` changes are tried while the temperature falls from `hot` to `cold`, in units of time. */
EXPORT int mebp_anneal(int32_t ops, int32_t storages, const int32_t *reads_from, const int32_t *reads, const int32_t *makes_from, const int32_t *makes,
                       const int64_t *size, const int64_t *more, const double *time, const uint8_t *after, const uint8_t *once, const uint8_t *outlives,
                       double budget, double price, double hot, double cold, int64_t steps, uint64_t seed, int32_t *sequence, int32_t count, int32_t most) {
  Search s = {ops, storages, reads_from, reads, makes_from, makes, size, more, time, after, once, outlives, budget, price,
              calloc((size_t)storages + 1, sizeof(uint32_t)), 0, seed * 2 + 1};
  int32_t *now = malloc((size_t)most * sizeof *now), *next = malloc((size_t)most * sizeof *next), *runs = calloc((size_t)ops + 1, sizeof *runs);
  int best_count = -1;
  if (s.needed && now && next && runs) {
    best_count = count;
    memcpy(now, sequence, (size_t)count * sizeof *now);
    for (int k = 0; k < count; k++) runs[now[k]]++;
    double cost = cost_of(&s, now, count, INFINITY), best = cost;
    for (int64_t step = 0; step < steps; step++) {
      const double heat = hot * pow(cold / hot, (double)step / (double)steps);
      const int length = change(&s, now, count, most, runs, next);
      if (!length) continue;
      if (s.walk == UINT32_MAX) memset(s.needed, 0, (size_t)storages * sizeof *s.needed), s.walk = 0;
      const double other = cost_of(&s, next, length, cost - heat * log(1 - draw_share(&s.random)));
      if (other == INFINITY) continue;
      if (length != count) {
        memset(runs, 0, (size_t)ops * sizeof *runs);
        for (int k = 0; k < length; k++) runs[next[k]]++;
      }
      int32_t *swap = now;
      now = next, next = swap, count = length, cost = other;
      if (cost < best) {
        best = cost, best_count = count;
        memcpy(sequence, now, (size_t)count * sizeof *now);
      }
    }
  }
  free(s.needed), free(now), free(next), free(runs);
  return best_count;
}
