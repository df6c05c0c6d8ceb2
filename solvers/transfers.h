/* What the walks of transfers share: the words of their record, and the writes that are ready, earliest deadline first. */
#ifndef SOLVERS_TRANSFERS_H
#define SOLVERS_TRANSFERS_H

#include <stdint.h>

enum { PREFETCH, OFFLOAD, RELEASE }; /* as in emit.py */

typedef struct { /* a heap of items, each at most once: those of one deadline in their own order */
  int32_t count, *item;
  int64_t *due;
} Queue;

static inline int queue_before(const Queue *q, int64_t due, int32_t item, int32_t at) {
  return due < q->due[at] || (due == q->due[at] && item < q->item[at]);
}

static inline void queue_push(Queue *q, int64_t due, int32_t item) {
  int32_t at = q->count++;
  for (; at && queue_before(q, due, item, (at - 1) / 2); at = (at - 1) / 2) q->item[at] = q->item[(at - 1) / 2], q->due[at] = q->due[(at - 1) / 2];
  q->item[at] = item, q->due[at] = due;
}

static inline int32_t queue_pop(Queue *q) {
  const int32_t top = q->item[0], item = q->item[--q->count];
  const int64_t due = q->due[q->count];
  int32_t at = 0;
  for (int32_t below = 1; below < q->count; below = 2 * at + 1) {
    if (below + 1 < q->count && queue_before(q, q->due[below + 1], q->item[below + 1], below)) below++;
    if (queue_before(q, due, item, below)) break;
    q->item[at] = q->item[below], q->due[at] = q->due[below], at = below;
  }
  q->item[at] = item, q->due[at] = due;
  return top;
}

#endif
