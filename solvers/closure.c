/* What bringing a value back takes: what `Closures` in closure.py does, step for step, in its words. */
#include <math.h>
#include <stdlib.h>

#include "tables.h"

#define EXPORT __attribute__((visibility("default")))

typedef struct { /* what the search is asked with; reruns of an op: those of the trace in a list of lists, those added since in a chain */
  const Tables *tables;
  const int32_t *choice, *present, *first_rerun, *rerun, *added_head, *added_next, *added;
  const uint8_t *on_disk, *lost;
  double transfer_weight;
  int64_t tiny_bytes;
  int32_t nearby, room; /* room: elements of each list of a closure */
} Setting;

typedef struct {
  double cost_us;
  int64_t extended_bytes;
  int32_t visits, extended_count, rebuilt_count, op_count;
  int32_t *extended, *rebuilt, *ops;
} Closure;

typedef struct {
  const Setting *s;
  Closure *c;
  int32_t storage, use, limit;
  double price;
} Search;

static int has(const int32_t *list, int32_t count, int32_t wanted) {
  for (int32_t k = 0; k < count; k++)
    if (list[k] == wanted) return 1;
  return 0;
}

/* The version that base op `op` finds. */
static int32_t version_at(const Tables *p, int32_t storage, int32_t op) {
  int32_t low = p->first_writer[storage], high = p->first_writer[storage + 1];
  const int32_t first = low;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (p->writer[middle] < op)
      low = middle + 1;
    else
      high = middle;
  }
  return (p->created_by[storage] >= 0) + low - first;
}

static int near_use(const Search *q, int32_t group) { return abs(group - q->use) <= q->s->nearby; }

/* The op runs again anyway, at most a little before or after the use. */
static int runs_nearby(const Search *q, int32_t op) {
  const Setting *s = q->s;
  for (int32_t k = s->first_rerun[op]; k < s->first_rerun[op + 1]; k++)
    if (near_use(q, s->rerun[k])) return 1;
  for (int32_t k = s->added_head[op]; k >= 0; k = s->added_next[k])
    if (near_use(q, s->added[k])) return 1;
  return 0;
}

/* Microseconds, with each byte kept longer counted at the price. */
static double worth(const Search *q) { return q->c->cost_us + (q->c->extended_bytes ? q->price * (double)q->c->extended_bytes : 0.0); }

static int bring(Search *q, Value value, double cap);

/* Add what running the value's producer again takes. 0: impossible, or dearer than cap. */
static int rebuild(Search *q, Value value, double cap) {
  const Tables *p = q->s->tables;
  Closure *c = q->c;
  const int32_t producer = producer_of(p, value);
  if (producer < 0 || !p->rerunnable[producer] || q->s->lost[value.storage]) return 0;
  if (c->rebuilt_count == q->s->room) return 0;
  c->visits++;
  c->rebuilt[c->rebuilt_count++] = value.storage;
  if (has(c->ops, c->op_count, producer)) return 1;
  c->ops[c->op_count++] = producer;
  if (!runs_nearby(q, producer)) c->cost_us += (double)p->way_us[p->first_way[producer] + q->s->choice[producer]];
  if (c->visits > q->limit) return 0;
  int32_t count;
  const Value *values = needs(p, q->s->choice, producer, &count);
  for (int32_t k = 0; k < count; k++) {
    const int32_t need = values[k].storage;
    const int written = p->first_writer[need] < p->first_writer[need + 1], chained = need == value.storage && p->created_by[need] >= 0;
    if (written && !chained && version_at(p, need, q->use) != values[k].version) return 0;
    if (!bring(q, values[k], cap)) return 0;
  }
  return worth(q) <= cap;
}

/* Add what the input takes: nothing if live, a read, its own closure, or a longer life. */
static int bring(Search *q, Value value, double cap) {
  const Setting *s = q->s;
  const Tables *p = s->tables;
  Closure *c = q->c;
  const int32_t storage = value.storage;
  const int is_root = storage == q->storage;
  const int64_t size = p->size[storage];
  if ((!is_root && s->present[storage] == value.version) || has(c->extended, c->extended_count, storage)) return 1;
  if (!is_root && has(c->rebuilt, c->rebuilt_count, storage)) return 1;
  if (s->on_disk[storage]) {
    c->cost_us += s->transfer_weight * (double)p->read_us[storage];
    return 1;
  }
  const int may_stay = !is_root && version_at(p, storage, q->use) == value.version;
  const Closure mark = *c;
  if (!may_stay || (size > s->tiny_bytes && p->created_by[storage] >= 0)) {
    const double own_cap = may_stay ? worth(q) + q->price * (double)size : INFINITY;
    if (rebuild(q, value, own_cap < cap ? own_cap : cap)) return 1;
  }
  const int32_t visits = c->visits;
  *c = mark;
  c->visits = visits;
  if (!may_stay || (isinf(q->price) && size > s->tiny_bytes)) return 0;
  if (c->extended_count == s->room) return 0;
  c->extended[c->extended_count++] = storage;
  c->extended_bytes += size;
  return 1;
}

/* 1: `closure` has what it takes that the storage is back for the use, as base op `use` finds it; 0: it can't be. */
EXPORT int mebp_closure(const Setting *s, int32_t storage, int32_t use, double price, int32_t limit, Closure *closure) {
  Search q = {s, closure, storage, use, limit, price};
  closure->cost_us = 0, closure->extended_bytes = 0;
  closure->visits = closure->extended_count = closure->rebuilt_count = closure->op_count = 0;
  return rebuild(&q, (Value){storage, version_at(s->tables, storage, use)}, INFINITY);
}
