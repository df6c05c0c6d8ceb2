/* Where the transfers of a trace go: what `Placement` in transfers.py does, and with an arena `ArenaPlacement`, step for step, in
 * their words. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "tables.h"
#include "transfers.h"

#define EXPORT __attribute__((visibility("default")))

static const int64_t NEVER = (int64_t)1 << 62;

typedef struct { /* bytes [low, low + size) during events [begin, end): instances, then discarded copies. None: no arena */
  int32_t count, *begin, *end;
  int64_t height, *low;
  const int64_t *size;
} Arena;

typedef struct { /* columns of a trace, then what its storages and events take; live: bytes in every event */
  int32_t events, instances, writes, extras, storages, lookahead;
  const int32_t *kind, *subject, *storage, *birth, *last, *ready, *write, *extra_event, *extra;
  const int64_t *size, *read_us, *write_us, *times, *live;
  int64_t budget_bytes;
  double interference;
} Step;

typedef struct {
  const Step *p;
  const Arena *arena;
  double horizon_us;
  int held_back;
  int32_t read_count, next_read, carried_count;
  int64_t clock, disk;
  int64_t *slack, *before_us, *done, *complete; /* done: of an event; complete: of an instance, NEVER where it was not asked for */
  int32_t *reads, *blocked, *following, *ready_first, *ready, *past_first, *past, *carried, *recent, *made, *order; /* made: of a read the instance */
  Queue queue;
  int32_t *record; /* (event, what, storage) each */
  int64_t records;
} Walk;

static void note(Walk *w, int32_t event, int what, int32_t storage) {
  int32_t *to = w->record + 3 * w->records++;
  to[0] = event, to[1] = what, to[2] = storage;
}

static int lies_on(const Arena *a, int32_t i, int64_t low, int64_t high) { return a->size[i] && a->low[i] < high && a->low[i] + a->size[i] > low; }

/* The first event from this one on in which others lie on the bytes of i; NEVER: none. */
static int64_t taken(const Arena *a, int32_t i, int64_t event) {
  int64_t first = NEVER;
  for (int32_t k = 0; k < a->count; k++)
    if (k != i && a->end[k] > event && a->begin[k] < first && lies_on(a, k, a->low[i], a->low[i] + a->size[i])) first = a->begin[k];
  return first < event ? event : first;
}

/* An offset for i from this event on, its own or the lowest; -1: none. order: all by their offsets. */
static int64_t place_for(const Arena *a, const int32_t *order, int32_t i, int32_t event) {
  const int64_t own = a->low[i], end = own + a->size[i];
  int64_t bottom = 0, found = -1;
  int own_is_free = 1;
  for (int32_t n = 0; n < a->count; n++) {
    const int32_t k = order[n];
    if (k == i || !a->size[k] || a->begin[k] >= a->end[i] || a->end[k] <= event) continue;
    if (found < 0 && a->low[k] - bottom >= a->size[i]) found = bottom;
    if (lies_on(a, k, own, end)) own_is_free = 0;
    if (found >= 0 && (!own_is_free || a->low[k] >= end)) break;
    if (a->low[k] + a->size[k] > bottom) bottom = a->low[k] + a->size[k];
  }
  if (found < 0 && a->height - bottom >= a->size[i]) found = bottom;
  return own_is_free ? own : found;
}

/* Begin at that offset. */
static void move(const Arena *a, int32_t *order, int32_t i, int64_t low) {
  int32_t at = 0;
  while (order[at] != i) at++;
  for (; at + 1 < a->count && a->low[order[at + 1]] < low; at++) order[at] = order[at + 1];
  for (; at > 0 && a->low[order[at - 1]] > low; at--) order[at] = order[at - 1];
  order[at] = i;
  a->low[i] = low;
}

/* The written instances by the event after `at`: those of event e are list[first[e]] up to list[first[e + 1]], in the order of the trace's writes. */
static void bucket(const Step *p, const int32_t *at, int32_t *first, int32_t *list) {
  for (int32_t e = 0; e < p->events + 4; e++) first[e] = 0;
  for (int32_t k = 0; k < p->writes; k++) first[at[p->write[k]] + 3]++;
  for (int32_t e = 1; e < p->events + 4; e++) first[e] += first[e - 1];
  for (int32_t k = 0; k < p->writes; k++) list[first[at[p->write[k]] + 2]++] = p->write[k];
}

/* following: of a written instance the event in which the next of its storage begins. blocked: of a read the event before which its storage is in
 * memory once more; -1 elsewhere. */
static void look_around(Walk *w) {
  const Step *p = w->p;
  for (int32_t i = 0; i < p->instances; i++) w->following[i] = -1;
  for (int32_t k = 0; k < p->writes; k++) w->following[p->write[k]] = p->events;
  for (int32_t e = 0; e < p->events; e++) w->blocked[e] = -1;
  for (int32_t s = 0; s < p->storages; s++) w->recent[s] = 0;
  for (int32_t i = 0; i < p->instances; i++) {
    const int32_t birth = p->birth[i], s = p->storage[i];
    if (birth >= 0 && p->kind[birth] == READ && p->subject[birth] == s) w->blocked[birth] = w->recent[s], w->made[birth] = i;
    w->recent[s] = w->following[i] >= 0 ? p->events + 1 : p->last[i] + 1;
  }
  for (int32_t s = 0; s < p->storages; s++) w->recent[s] = p->events;
  for (int32_t i = p->instances - 1; i >= 0; i--) {
    if (w->following[i] >= 0) w->following[i] = w->recent[p->storage[i]];
    w->recent[p->storage[i]] = p->birth[i];
  }
  for (int32_t k = 0; k < p->extras; k++)
    for (int32_t r = 0; r < w->read_count; r++) {
      const int32_t read = w->reads[r], event = p->extra_event[k];
      if (p->subject[read] == p->extra[k] && w->blocked[read] <= event && event < read) w->blocked[read] = event + 1;
    }
}

/* The event that needs the memory of a written instance. */
static int64_t deadline(const Walk *w, int32_t i) {
  const int64_t size = w->p->size[w->p->storage[i]];
  const int64_t needed = w->arena ? taken(w->arena, i, w->p->last[i] + 1) : NEVER, end = needed < w->following[i] ? needed : w->following[i];
  for (int32_t e = w->p->last[i] + 1; e < end; e++)
    if (w->slack[e] < size) return e;
  return end;
}

static void queue_writes(Walk *w, int32_t event) {
  for (int32_t k = w->ready_first[event]; k < w->ready_first[event + 1]; k++) queue_push(&w->queue, deadline(w, w->ready[k]), w->ready[k]);
}

static int64_t transfer(Walk *w, int64_t duration) {
  w->disk = (w->clock > w->disk ? w->clock : w->disk) + duration;
  w->clock += (int64_t)floor(w->p->interference * (double)duration);
  return w->disk;
}

static void ask_read(Walk *w, int32_t read, int32_t event) {
  const int32_t s = w->p->subject[read];
  if (w->arena && event < read) move(w->arena, w->order, w->made[read], place_for(w->arena, w->order, w->made[read], event));
  if (w->arena) w->arena->begin[w->made[read]] = event;
  for (int32_t e = event; e < read; e++) w->slack[e] -= w->p->size[s];
  w->done[read] = transfer(w, w->p->read_us[s]);
  note(w, event, PREFETCH, s);
}

static void ask_write(Walk *w, int32_t i, int32_t event) {
  const int32_t s = w->p->storage[i];
  w->complete[i] = transfer(w, w->p->write_us[s]);
  note(w, event, OFFLOAD, s);
}

/* Wait for the write, and free. */
static void release(Walk *w, int32_t i, int32_t event) {
  if (w->complete[i] == NEVER) ask_write(w, i, event);
  const int32_t following = w->following[i];
  if (w->complete[i] > w->clock) w->clock = w->complete[i];
  note(w, event, RELEASE, w->p->storage[i]);
  if (w->arena) w->arena->end[i] = event;
  if (following < w->p->events && w->blocked[following] >= 0) w->blocked[following] = event;
}

/* Release what is written, what was complete last first; of the others, what can't stay in memory during the event. */
static void make_room(Walk *w, int32_t event) {
  int32_t count = w->carried_count, kept = 0;
  for (int32_t k = w->past_first[event]; k < w->past_first[event + 1]; k++) w->carried[count++] = w->past[k];
  for (int32_t k = 1; k < count; k++) {
    const int32_t i = w->carried[k];
    int32_t to = k;
    for (; to > 0; to--) {
      const int32_t other = w->carried[to - 1];
      if (w->complete[other] > w->complete[i] || (w->complete[other] == w->complete[i] && other < i)) break;
      w->carried[to] = other;
    }
    w->carried[to] = i;
  }
  for (int32_t k = 0; k < count; k++) {
    const int32_t i = w->carried[k];
    const int64_t size = w->p->size[w->p->storage[i]];
    if (w->complete[i] <= w->clock || event >= w->following[i] || w->slack[event] < size || (w->arena && taken(w->arena, i, event) <= event)) {
      release(w, i, event);
    } else {
      w->slack[event] -= size;
      if (w->arena) w->arena->end[i] = event + 1;
      w->carried[kept++] = i;
    }
  }
  w->carried_count = kept;
}

static int fits(const Walk *w, int32_t read, int32_t event) {
  const int64_t size = w->p->size[w->p->subject[read]];
  for (int32_t e = event; e < read; e++)
    if (w->slack[e] < size) return 0;
  return !w->arena || place_for(w->arena, w->order, w->made[read], event) >= 0;
}

/* The first read, of those due before a deadline, that may begin now; -1: none. */
static int32_t fitting_read(Walk *w, int32_t event, int64_t before) {
  while (w->next_read < w->read_count && (w->reads[w->next_read] < event || w->done[w->reads[w->next_read]] >= 0)) w->next_read++;
  for (int32_t r = w->next_read; r < w->read_count && r < w->next_read + w->p->lookahead; r++) {
    const int32_t read = w->reads[r];
    if (read > before) return -1;
    if ((double)(w->before_us[read] - w->before_us[event]) > w->horizon_us) {
      w->held_back = 1;
      return -1;
    }
    if (w->done[read] < 0 && w->blocked[read] <= event && fits(w, read, event)) return read;
  }
  return -1;
}

/* Ask for transfers until the disk has enough to do during the event. */
static void keep_busy(Walk *w, int32_t event) {
  while (w->disk < w->clock + w->p->times[event]) {
    while (w->queue.count && w->complete[w->queue.item[0]] != NEVER) queue_pop(&w->queue);
    const int32_t read = fitting_read(w, event, w->queue.count ? w->queue.due[0] : w->p->events);
    if (read >= 0)
      ask_read(w, read, event);
    else if (w->queue.count)
      ask_write(w, queue_pop(&w->queue), event);
    else
      return;
  }
}

static void sort_places(const Arena *a, int32_t *order) {
  for (int32_t k = 0; k < a->count; k++) {
    int32_t at = k;
    for (; at > 0 && a->low[order[at - 1]] > a->low[k]; at--) order[at] = order[at - 1];
    order[at] = k;
  }
}

static void begin(Walk *w, double horizon) {
  const Step *p = w->p;
  if (w->arena) sort_places(w->arena, w->order);
  w->before_us[0] = 0;
  for (int32_t e = 0; e < p->events; e++) {
    w->slack[e] = p->budget_bytes - p->live[e];
    w->before_us[e + 1] = w->before_us[e] + p->times[e];
    w->done[e] = -1;
    if (p->kind[e] == READ) w->reads[w->read_count++] = e;
  }
  for (int32_t i = 0; i < p->instances; i++) w->complete[i] = NEVER;
  w->horizon_us = horizon * (double)w->before_us[p->events];
  look_around(w);
  bucket(p, p->ready, w->ready_first, w->ready);
  bucket(p, p->last, w->past_first, w->past);
}

static void walk(Walk *w) {
  const Step *p = w->p;
  for (int32_t event = 0; event <= p->events; event++) {
    queue_writes(w, event);
    make_room(w, event);
    if (event == p->events) return;
    if (p->kind[event] == READ) {
      if (w->done[event] < 0) ask_read(w, event, event);
      if (w->done[event] > w->clock) w->clock = w->done[event];
    } else {
      keep_busy(w, event);
      w->clock += p->times[event];
    }
  }
}

/* Microseconds of the walk, or -1 without memory. arena: NULL, or where things lie, with each as short as it can be; changed to what they take.
 * record, with room for three numbers for each read and six for each write: its transfers; records: how many. held_back: a read could not begin yet because of the horizon, a share of the step's compute. */
EXPORT int64_t mebp_place_transfers(const Step *p, const Arena *arena, double horizon, int32_t *record, int64_t *records, int32_t *held_back) {
  const size_t events = (size_t)p->events + 4, instances = (size_t)p->instances + 1, storages = (size_t)p->storages + 1, writes = (size_t)p->writes + 1;
  const size_t places = arena ? (size_t)arena->count : 0;
  int64_t *wide = malloc((3 * events + instances + writes) * sizeof *wide);
  int32_t *narrow = malloc((5 * events + instances + storages + 4 * writes + places) * sizeof *narrow), *at = narrow;
  int64_t result = -1;
  if (wide && narrow) {
    Walk w = {.p = p, .arena = arena, .record = record, .slack = wide, .before_us = wide + events, .done = wide + 2 * events, .complete = wide + 3 * events,
              .queue.due = wide + 3 * events + instances};
    w.reads = at, at += events, w.blocked = at, at += events, w.ready_first = at, at += events, w.past_first = at, at += events;
    w.made = at, at += events, w.order = at, at += places;
    w.following = at, at += instances, w.recent = at, at += storages;
    w.ready = at, at += writes, w.past = at, at += writes, w.carried = at, at += writes, w.queue.item = at;
    begin(&w, horizon);
    walk(&w);
    result = w.clock, *records = w.records, *held_back = w.held_back;
  }
  free(wide), free(narrow);
  return result;
}
