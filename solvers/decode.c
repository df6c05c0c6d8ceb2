/* Decisions to a trace and its memory profile: what decode.py and emit.py's `profile` do, step for step. Their words are used here: cuts, versions,
 * instances, segments, events, groups. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tables.h"

#define EXPORT __attribute__((visibility("default")))

enum { DONE = 0, NO_ROOM = 1, TOO_MANY = 2, TWO_VERSIONS = 3, GONE = 4, RUNS_ONCE = 5, LOST = 6, NOT_HOME = 7 }; /* as in native_decode.py */

typedef struct { /* cuts of a storage: cut[cut_from] up to cut[cut_to] */
  const int32_t *choice, *cut_from, *cut_to, *cut;
  const uint8_t *spilled, *away;
} Decisions;

typedef struct { /* room: elements of each column, the events' one more */
  int64_t room, events, instances, segments, writes, extras;
  int32_t *kind, *subject, *group, *storage, *birth, *last, *ready, *version, *touched, *seg_instance, *seg_start, *seg_end, *write, *extra_event, *extra;
  int64_t *live, peak, compute_us, transfer_us;
  int32_t error_storage, error_number; /* the number: a version or an op */
} Trace;

typedef struct { /* an op that waits for values, the first of which still missing is at `position` */
  int32_t op, from, to, position;
} Frame;

typedef struct {
  const Tables *p;
  const Decisions *d;
  Trace *t;
  int32_t *instance, *disk, group;
  uint8_t *ran, *open;
  Frame *stack;
  Value *wanted; /* of all frames, one above the other */
} Decoder;

static int fail(Decoder *c, int error, int32_t storage, int32_t number) {
  c->t->error_storage = storage, c->t->error_number = number;
  return error;
}

static int born(Decoder *c, int32_t storage, int32_t version, int32_t event, int32_t group) {
  Trace *t = c->t;
  if (t->instances == t->room) return NO_ROOM;
  const int64_t i = t->instances++;
  c->instance[storage] = (int32_t)i;
  t->storage[i] = storage, t->birth[i] = t->last[i] = t->ready[i] = event, t->version[i] = version, t->touched[i] = group;
  return DONE;
}

/* The value is in memory, and no cut lies between its last touch and now. */
static int available(const Decoder *c, Value value) {
  const int32_t i = c->instance[value.storage];
  if (i < 0 || c->t->version[i] != value.version) return 0;
  int32_t low = c->d->cut_from[value.storage];
  const int32_t end = c->d->cut_to[value.storage], touched = c->t->touched[i];
  for (int32_t high = end; low < high;) {
    const int32_t middle = low + (high - low) / 2;
    if (c->d->cut[middle] <= touched)
      low = middle + 1;
    else
      high = middle;
  }
  return low == end || c->d->cut[low] > c->group;
}

static int touch(Decoder *c, const Value *values, int64_t count, int32_t event) {
  Trace *t = c->t;
  for (int64_t k = 0; k < count; k++) {
    const int32_t i = c->instance[values[k].storage];
    if (t->last[i] != event) {
      if (t->segments == t->room) return NO_ROOM;
      t->seg_instance[t->segments] = i, t->seg_start[t->segments] = t->last[i], t->seg_end[t->segments++] = event;
      t->last[i] = event;
    }
    t->touched[i] = c->group;
  }
  return DONE;
}

static int64_t new_event(Decoder *c, int kind, int32_t subject) {
  Trace *t = c->t;
  if (t->events == t->room) return -1;
  t->kind[t->events] = kind, t->subject[t->events] = subject, t->group[t->events] = c->group;
  return t->events++;
}

/* The value can be read from disk: a copy is there, or can be written there at its last use. */
static int on_disk(const Decoder *c, Value value) {
  const int32_t s = value.storage, i = c->instance[s];
  if (c->disk[s] == value.version) return 1;
  return i >= 0 && c->t->version[i] == value.version && (c->d->spilled[s] || c->p->persistent[s]) && c->p->may_spill[s];
}

static int add_write(Decoder *c, int32_t instance) {
  if (c->t->writes == c->t->room) return NO_ROOM;
  c->t->write[c->t->writes++] = instance;
  return DONE;
}

static int read_back(Decoder *c, Value value) {
  if (c->disk[value.storage] != value.version) {
    if (add_write(c, c->instance[value.storage])) return NO_ROOM;
    c->disk[value.storage] = value.version;
  }
  const int64_t event = new_event(c, READ, value.storage);
  return event < 0 ? NO_ROOM : born(c, value.storage, value.version, (int32_t)event, c->group);
}

static int run(Decoder *c, int32_t op) {
  const Tables *p = c->p;
  Trace *t = c->t;
  const int64_t at = new_event(c, RUN, op);
  if (at < 0) return NO_ROOM;
  if (at > p->most_events) return fail(c, TOO_MANY, p->first_create[op] < p->first_create[op + 1] ? p->create[p->first_create[op]] : -1, 0);
  const int32_t event = (int32_t)at;
  c->ran[op] = 1;
  int32_t count;
  const Value *values = needs(p, c->d->choice, op, &count);
  for (int32_t k = 0; k < count; k++)
    if (t->version[c->instance[values[k].storage]] != values[k].version) return fail(c, TWO_VERSIONS, values[k].storage, 0);
  if (touch(c, values, count, event)) return NO_ROOM;
  for (int32_t k = p->first_write[op]; k < p->first_write[op + 1]; k++) {
    const int32_t i = c->instance[p->write[k].storage];
    t->version[i] = p->write[k].version + 1, t->ready[i] = event;
  }
  for (int32_t k = p->first_create[op]; k < p->first_create[op + 1]; k++) {
    const int32_t s = p->create[k], i = c->instance[s];
    if (i >= 0 && t->version[i] > 1 && available(c, (Value){s, t->version[i]})) {
      if (t->extras == t->room) return NO_ROOM;
      t->extra_event[t->extras] = event, t->extra[t->extras++] = s;
    } else if (born(c, s, 1, event, c->group)) {
      return NO_ROOM;
    }
  }
  return DONE;
}

/* Of the values those to bring back, in the order in which to do it: what is recomputed first, what is read from disk right before the use. */
static int32_t missing(const Decoder *c, const Value *values, int32_t count, Value *result) {
  int32_t found = 0;
  for (int from_disk = 0; from_disk < 2; from_disk++)
    for (int32_t k = 0; k < count; k++)
      if (!available(c, values[k]) && on_disk(c, values[k]) == from_disk) result[found++] = values[k];
  return found;
}

static int check_rerun(Decoder *c, int32_t producer, Value value, int32_t asker) {
  const Tables *p = c->p;
  const int32_t blamed = asker >= 0 && p->first_create[asker] < p->first_create[asker + 1] ? p->create[p->first_create[asker]] : value.storage;
  if (producer < 0 || c->open[producer]) return fail(c, GONE, blamed, value.version);
  if (c->ran[producer] && !p->rerunnable[producer]) return fail(c, RUNS_ONCE, value.storage, producer);
  return DONE;
}

/* Make the values available, then run op `first` (if any). Depth first. */
static int obtain(Decoder *c, const Value *values, int32_t count, int32_t first) {
  const Tables *p = c->p;
  int32_t top = missing(c, values, count, c->wanted), depth = 0;
  if (!top) return first >= 0 ? run(c, first) : DONE;
  c->stack[depth++] = (Frame){first, 0, top, 0};
  if (first >= 0) c->open[first] = 1;
  while (depth) {
    Frame *f = &c->stack[depth - 1];
    int error = DONE;
    for (; f->from + f->position < f->to && !error; f->position++) {
      const Value value = c->wanted[f->from + f->position];
      if (available(c, value)) continue;
      if (!on_disk(c, value)) break;
      error = read_back(c, value);
    }
    if (error) return error;
    if (f->from + f->position == f->to) {
      top = f->from, depth--;
      if (f->op < 0) continue;
      c->open[f->op] = 0;
      if ((error = run(c, f->op))) return error;
      continue;
    }
    const Value value = c->wanted[f->from + f->position];
    const int32_t producer = producer_of(p, value);
    if ((error = check_rerun(c, producer, value, f->op != first ? f->op : -1))) return error;
    c->open[producer] = 1;
    int32_t needed;
    const Value *inner = needs(p, c->d->choice, producer, &needed);
    const int32_t found = missing(c, inner, needed, c->wanted + top);
    c->stack[depth++] = (Frame){producer, top, top + found, 0};
    top += found;
  }
  return DONE;
}

/* The last group: outputs and residents in memory, the others written home. */
static int end(Decoder *c, Value *stay) {
  const Tables *p = c->p;
  Trace *t = c->t;
  int32_t count = 0, error;
  c->group = p->ops;
  for (int32_t s = 0; s < p->storages; s++)
    if (p->output[s] || (p->persistent[s] && !c->d->away[s])) stay[count++] = (Value){s, p->final[s]};
  if ((error = obtain(c, stay, count, -1))) return error;
  for (int32_t k = 0; k < count; k++)
    if (!available(c, stay[k])) return fail(c, LOST, stay[k].storage, 0);
  if (touch(c, stay, count, (int32_t)t->events)) return NO_ROOM;
  for (int32_t s = 0; s < p->storages; s++) {
    if (!c->d->away[s] || c->disk[s] == p->final[s]) continue;
    const int32_t i = c->instance[s];
    if (i < 0 || t->version[i] != p->final[s]) return fail(c, NOT_HOME, s, 0);
    if (add_write(c, i)) return NO_ROOM;
  }
  return DONE;
}

static int decode(Decoder *c) {
  const Tables *p = c->p;
  int error;
  for (int32_t s = 0; s < p->storages; s++) {
    c->instance[s] = c->disk[s] = -1;
    if (!p->persistent[s]) continue;
    if (c->d->away[s] || p->stored[s]) c->disk[s] = 0;
    if (!c->d->away[s] && (error = born(c, s, 0, -1, -1))) return error;
  }
  for (c->group = 0; c->group < p->ops; c->group++) {
    if (p->optional[c->group]) continue; /* it runs when somebody reads what it makes */
    int32_t count;
    const Value *values = needs(p, c->d->choice, c->group, &count);
    if ((error = obtain(c, values, count, c->group))) return error;
  }
  return end(c, c->wanted + p->first_need[p->first_way[p->ops]] + p->storages);
}

/* Bytes live in every event, their peak, and time. */
static void profile(const Tables *p, const Decisions *d, Trace *t) {
  memset(t->live, 0, (size_t)(t->events + 2) * sizeof *t->live);
  int64_t start = p->constant_bytes, bytes = p->constant_bytes;
  for (int64_t i = 0; i < t->instances; i++) {
    const int64_t size = p->size[t->storage[i]];
    if (t->birth[i] < 0) start += size;
    t->live[t->birth[i] < 0 ? 0 : t->birth[i]] += size, t->live[t->last[i] + 1] -= size;
  }
  t->compute_us = t->transfer_us = 0;
  for (int64_t e = 0; e < t->events; e++) {
    t->live[e] = bytes += t->live[e];
    if (t->kind[e] == READ) t->transfer_us += p->read_us[t->subject[e]];
    if (t->kind[e] == READ) continue;
    const int32_t way = p->first_way[t->subject[e]] + d->choice[t->subject[e]];
    t->live[e] += p->workspace[way], t->compute_us += p->way_us[way];
  }
  for (int64_t k = 0; k < t->extras; k++) t->live[t->extra_event[k]] += p->size[t->extra[k]];
  for (int64_t k = 0; k < t->writes; k++) t->transfer_us += p->write_us[t->storage[t->write[k]]];
  t->peak = start;
  for (int64_t e = 0; e < t->events; e++) t->peak = t->live[e] > t->peak ? t->live[e] : t->peak;
}

/* The trace of the decisions and its profile, or what is wrong with them. */
EXPORT int mebp_decode(const Tables *p, const Decisions *d, Trace *t) {
  const size_t ops = (size_t)p->ops, storages = (size_t)p->storages, all_needs = (size_t)p->first_need[p->first_way[p->ops]];
  Decoder c = {p, d, t, malloc((storages + 1) * 4), malloc((storages + 1) * 4), 0, calloc(ops + 1, 1), calloc(ops + 1, 1),
               malloc((ops + 1) * sizeof(Frame)), malloc((all_needs + 2 * storages + 1) * sizeof(Value))};
  int error = NO_ROOM;
  t->events = t->instances = t->segments = t->writes = t->extras = 0;
  if (c.instance && c.disk && c.ran && c.open && c.stack && c.wanted) error = decode(&c);
  if (!error) profile(p, d, t);
  free(c.instance), free(c.disk), free(c.ran), free(c.open), free(c.stack), free(c.wanted);
  return error;
}
