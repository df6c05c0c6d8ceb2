/* What leaves memory between two uses, where it is at home, and when its transfers begin: simulated annealing, each candidate walked with both clocks.
 *
 * The runs stay as they are. A gap is a stretch between two uses of a storage; its value stays in memory for all of it, or is away: it is freed after the
 * first use (and written first, where no copy is on disk) and read back before the second. The walk is that of transfers.py: before each run, writes whose
 * memory the run needs are waited for and what it reads is asked for; while the disk would run dry during the run, it gets the ready write or the fitting
 * read that is due first. What is asked for while the run waits for its reads doesn't delay it. A read may begin no earlier than the lead before it is due.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "random.h"
#include "transfers.h"

#define EXPORT __attribute__((visibility("default")))
#define ENDLESS ((int64_t)1 << 62)

enum { BLOCK = 32, LOOK_AHEAD = 12, REPAIRS = 40, MOST_TOGETHER = 16, PARTNERS = 48, CLOCK_EVERY = 32 };

static const double NEW_LEAD = 0.02, HOMES = 0.5, ALONE = 0.4; /* shares of the candidates: with another lead; with other homes; with one gap turned */

typedef struct {
  int32_t runs, gaps, values, storages;
  const int64_t *time, *clock; /* of a run; of all runs before it (and of all: clock[runs]) */
  /* Of a gap: the runs between which it is (-1: the start, `runs`: the end), its storage, whether it may be away. due: gaps by `to`. */
  const int32_t *from, *to, *storage, *due;
  const uint8_t *free;
  /* Of a value: the run that made it (-1: there from the start), its gaps (first to last), whether a copy is on disk whatever its home is. made: values by `maker`. */
  const int32_t *maker, *first, *last, *made;
  const uint8_t *stored;
  /* Of a storage: bytes, microseconds of its transfers, its gaps, whether it is persistent. */
  const int64_t *size, *read_us, *write_us;
  const int32_t *first_gap, *last_gap;
  const uint8_t *persistent;
  const int32_t *open; /* gaps that are tried */
  int32_t opens;
  double interference;
} Step;

/* Free bytes at each run: room[k] - taken[k / BLOCK], and the least of each block. */
typedef struct {
  int64_t *room, *least, *taken;
} Room;

typedef struct {
  uint8_t *away, *home; /* of a gap, a storage */
  int64_t lead;         /* microseconds of compute */
  Room room;
} Plan;

typedef struct {
  const Step *step;
  Room room;
  int64_t clock, disk, left; /* left: of the transfers not yet asked for */
  int64_t carried_bytes, first_complete; /* of written values past their uses that are still in memory; the earliest end of a write asked for */
  int first_return;                      /* the run at which the first of those values is needed again */
  int64_t *complete, *done; /* of a value's write, a gap's read; ENDLESS before it is asked for */
  int32_t *written, *ready_at, *short_at; /* a value's gap at which it is written or -1; of a gap: where the storage is free to be read, the last run without room */
  int32_t *past, *next_past, *reads, *carried, *record;
  Queue queue;
  int64_t records;
} Walk;

static int blocks(const Step *s) { return s->runs / BLOCK + 1; }

static int64_t free_at(const Room *r, int run) { return r->room[run] - r->taken[run / BLOCK]; }

/* `size` bytes less (or more) for the runs [from, to). */
static void take(Room *r, int runs, int from, int to, int64_t size) {
  for (int run = from; run < to;) {
    const int block = run / BLOCK, begin = block * BLOCK, end = begin + BLOCK < runs ? begin + BLOCK : runs, until = to < end ? to : end;
    if (run == begin && until == end) {
      r->taken[block] += size;
    } else {
      for (int k = run; k < until; k++) r->room[k] -= size;
      int64_t least = ENDLESS;
      for (int k = begin; k < end; k++) least = r->room[k] < least ? r->room[k] : least;
      r->least[block] = least;
    }
    run = until;
  }
}

/* The last of the runs [from, to) without room for `size` bytes; from - 1: none. */
static int last_short(const Room *r, int from, int to, int64_t size) {
  for (int run = to - 1; run >= from;) {
    const int begin = run / BLOCK * BLOCK;
    if (r->least[run / BLOCK] - r->taken[run / BLOCK] < size)
      for (; run >= from && run >= begin; run--)
        if (free_at(r, run) < size) return run;
    run = begin - 1;
  }
  return from - 1;
}

/* The first of the runs [from, to) without room for `size` bytes; `to`: none. */
static int first_short(const Room *r, int from, int to, int64_t size) {
  for (int run = from; run < to;) {
    const int end = run / BLOCK * BLOCK + BLOCK;
    if (r->least[run / BLOCK] - r->taken[run / BLOCK] < size)
      for (; run < to && run < end; run++)
        if (free_at(r, run) < size) return run;
    run = end;
  }
  return to;
}

static void copy_room(const Step *s, Room *to, const Room *from) {
  memcpy(to->room, from->room, (size_t)s->runs * sizeof *to->room);
  memcpy(to->least, from->least, (size_t)blocks(s) * sizeof *to->least);
  memcpy(to->taken, from->taken, (size_t)blocks(s) * sizeof *to->taken);
}

/* The run with the least room. */
static int tightest(const Step *s, const Room *r) {
  int block = 0, run;
  for (int k = 1; k * BLOCK < s->runs; k++)
    if (r->least[k] - r->taken[k] < r->least[block] - r->taken[block]) block = k;
  for (run = block * BLOCK; r->room[run] != r->least[block];) run++;
  return run;
}

/* --- the walk --- */

static void note(Walk *w, int run, int what, int storage) {
  if (w->record) w->record[w->records++] = run, w->record[w->records++] = what, w->record[w->records++] = storage;
}

static int64_t transfer(Walk *w, int64_t us) {
  w->disk = (w->clock > w->disk ? w->clock : w->disk) + us;
  w->clock += (int64_t)floor(w->step->interference * (double)us);
  w->left -= us;
  return w->disk;
}

static void ask_read(Walk *w, int gap, int run) {
  const int storage = w->step->storage[gap];
  take(&w->room, w->step->runs, run, w->step->to[gap], w->step->size[storage]);
  w->done[gap] = transfer(w, w->step->read_us[storage]);
  note(w, run, PREFETCH, storage);
}

static void ask_write(Walk *w, int value, int run) {
  const int storage = w->step->storage[w->written[value]];
  w->complete[value] = transfer(w, w->step->write_us[storage]);
  if (w->complete[value] < w->first_complete) w->first_complete = w->complete[value];
  note(w, run, OFFLOAD, storage);
}

/* Waits for the write, and frees. */
static void release(Walk *w, int value, int run) {
  if (w->complete[value] == ENDLESS) ask_write(w, value, run);
  if (w->complete[value] > w->clock) w->clock = w->complete[value];
  note(w, run, RELEASE, w->step->storage[w->written[value]]);
  w->ready_at[w->written[value]] = run;
}

/* Before the first run: what is read and written; returns the number of reads. */
static int begin(Walk *w, const Plan *plan) {
  const Step *s = w->step;
  copy_room(s, &w->room, &plan->room);
  for (int run = 0; run <= s->runs; run++) w->past[run] = -1;
  w->clock = w->disk = w->left = w->records = w->carried_bytes = 0, w->queue.count = w->first_return = 0, w->first_complete = ENDLESS;
  for (int value = 0; value < s->values; value++) {
    const int storage = s->storage[s->first[value]];
    const int on_disk = s->stored[value] || (s->maker[value] < 0 && s->persistent[storage] && !plan->home[storage]);
    w->written[value] = -1, w->complete[value] = ENDLESS;
    for (int gap = s->first[value]; gap <= s->last[value]; gap++) {
      if (!plan->away[gap]) continue;
      w->done[gap] = ENDLESS, w->short_at[gap] = -1, w->ready_at[gap] = s->from[gap] + 1;
      if (on_disk || w->written[value] >= 0) continue;
      w->written[value] = gap, w->ready_at[gap] = s->runs + 1, w->left += s->write_us[storage];
      w->next_past[value] = w->past[s->from[gap] + 1], w->past[s->from[gap] + 1] = value;
    }
  }
  int reads = 0;
  for (int k = 0; k < s->gaps; k++)
    if (plan->away[s->due[k]] && s->to[s->due[k]] < s->runs) w->reads[reads++] = s->due[k], w->left += s->read_us[s->storage[s->due[k]]];
  return reads;
}

/* Values that may be written from this run on join the queue; returns how many of `made` have been looked at. */
static int queue_writes(Walk *w, int run, int looked) {
  const Step *s = w->step;
  for (; looked < s->values && s->maker[s->made[looked]] < run; looked++) {
    const int value = s->made[looked], gap = w->written[value];
    if (gap < 0) continue;
    const int end = s->to[gap] < s->runs ? s->to[gap] : s->runs, needed = first_short(&w->room, s->from[gap] + 1, end, s->size[s->storage[gap]]);
    queue_push(&w->queue, s->clock[needed], value);
  }
  return looked;
}

/* Releases what is written, and of the rest what can't stay during the run: what is complete first leaves first. Returns how many values are carried on. */
static int make_room(Walk *w, int run, int carried) {
  const Step *s = w->step;
  if (w->past[run] < 0 && run < s->runs && run < w->first_return && w->first_complete > w->clock && free_at(&w->room, run) >= w->carried_bytes) {
    w->room.room[run] -= w->carried_bytes;
    return carried;
  }
  for (int value = w->past[run]; value >= 0; value = w->next_past[value]) w->carried[carried++] = value;
  for (int k = 1; k < carried; k++) {
    const int value = w->carried[k];
    int at = k;
    for (; at; at--) {
      const int other = w->carried[at - 1];
      if (w->complete[other] > w->complete[value] || (w->complete[other] == w->complete[value] && other < value)) break;
      w->carried[at] = other;
    }
    w->carried[at] = value;
  }
  int kept = 0;
  w->carried_bytes = 0, w->first_complete = ENDLESS, w->first_return = s->runs;
  for (int k = 0; k < carried; k++) {
    const int value = w->carried[k], gap = w->written[value];
    const int64_t size = s->size[s->storage[gap]];
    if (w->complete[value] <= w->clock || run >= s->to[gap] || run == s->runs || free_at(&w->room, run) < size) {
      release(w, value, run);
      continue;
    }
    w->room.room[run] -= size, w->carried[kept++] = value; /* `least` doesn't know: nobody asks it about this run */
    w->carried_bytes += size;
    if (w->complete[value] < w->first_complete) w->first_complete = w->complete[value];
    if (s->to[gap] < w->first_return) w->first_return = s->to[gap];
  }
  return kept;
}

/* The first read, of those due before a time, that may begin now; -1: none. */
static int fitting_read(Walk *w, int run, const int32_t *reads, int count, int64_t before, int64_t lead) {
  const Step *s = w->step;
  for (int k = 0; k < count && k < LOOK_AHEAD; k++) {
    const int gap = reads[k];
    const int64_t size = s->size[s->storage[gap]];
    if (s->clock[s->to[gap]] > before || s->clock[s->to[gap]] - s->clock[run] > lead) break;
    if (w->done[gap] != ENDLESS || w->ready_at[gap] > run || w->short_at[gap] > run || free_at(&w->room, run) < size) continue;
    w->short_at[gap] = last_short(&w->room, run + 1, s->to[gap], size); /* room only shrinks: until then it doesn't fit */
    if (w->short_at[gap] <= run) return gap;
  }
  return -1;
}

/* Microseconds of the step; ENDLESS where it takes more than `most`. */
static int64_t walk(Walk *w, const Plan *plan, int64_t most) {
  const Step *s = w->step;
  const int reads = begin(w, plan);
  for (int run = 0, looked = 0, carried = 0, due = 0, next = 0; run <= s->runs; run++) {
    looked = queue_writes(w, run, looked);
    if (carried || w->past[run] >= 0) carried = make_room(w, run, carried);
    if (run == s->runs) break;
    int64_t start = 0; /* of the run: when all that it reads is there. What is asked for meanwhile doesn't delay it */
    for (; due < reads && s->to[w->reads[due]] == run; due++) {
      const int gap = w->reads[due];
      if (w->done[gap] == ENDLESS) ask_read(w, gap, run);
      start = w->done[gap] > start ? w->done[gap] : start;
    }
    while (w->disk < (w->clock > start ? w->clock : start) + s->time[run]) {
      while (w->queue.count && w->complete[w->queue.item[0]] != ENDLESS) queue_pop(&w->queue);
      for (next = next > due ? next : due; next < reads && w->done[w->reads[next]] != ENDLESS;) next++;
      const int gap = fitting_read(w, run, w->reads + next, reads - next, w->queue.count ? w->queue.due[0] : ENDLESS, plan->lead);
      if (gap >= 0)
        ask_read(w, gap, run);
      else if (w->queue.count)
        ask_write(w, queue_pop(&w->queue), run);
      else
        break;
    }
    w->clock = w->clock > start ? w->clock : start;
    w->clock += s->time[run];
    if (w->clock + s->clock[s->runs] - s->clock[run + 1] > most || (w->disk > w->clock ? w->disk : w->clock) + w->left > most) return ENDLESS;
  }
  return w->clock;
}

/* --- the annealing --- */

static void set_away(const Step *s, Plan *plan, int gap, int away) {
  if (plan->away[gap] == away) return;
  const int64_t size = s->size[s->storage[gap]];
  plan->away[gap] = (uint8_t)away;
  take(&plan->room, s->runs, s->from[gap] + 1, s->to[gap], away ? -size : size);
}

/* The storage lives in memory, or on disk, before and after the step. */
static void set_home(const Step *s, Plan *plan, int storage, int home) {
  plan->home[storage] = (uint8_t)home;
  set_away(s, plan, s->first_gap[storage], !home);
  set_away(s, plan, s->last_gap[storage], !home);
}

static int at_an_end(const Step *s, const Plan *plan, int gap) { /* that its storage's home decides about */
  const int storage = s->storage[gap];
  return s->persistent[storage] && (gap == s->last_gap[storage] || (gap == s->first_gap[storage] && !plan->home[storage]));
}

/* A gap that is tried, large ones more often. */
static int some_gap(const Step *s, uint64_t *random) {
  const double share = draw_share(random);
  return (int)(share * share * s->opens);
}

/* The home of a gap's storage, or whether it is away, is the other one. */
static void turn(const Step *s, Plan *plan, int gap, int homes) {
  const int storage = s->storage[gap];
  if (homes && s->persistent[storage])
    set_home(s, plan, storage, !plan->home[storage]);
  else if (!homes && s->free[gap] && !at_an_end(s, plan, gap))
    set_away(s, plan, gap, !plan->away[gap]);
}

/* A gap turns, and some like it that follow, or one that is the other way. */
static void flip(const Step *s, Plan *plan, uint64_t *random) {
  const int at = some_gap(s, random), homes = draw_share(random) < HOMES, gap = s->open[at], storage = s->storage[gap];
  const int was_home = plan->home[storage], was_away = plan->away[gap];
  const int others = draw_share(random) < ALONE ? 0 : 1 + draw_below(random, MOST_TOGETHER), swap = others && draw(random) & 1;
  turn(s, plan, gap, homes);
  if (swap) {
    for (int k = 0; k < PARTNERS; k++) {
      const int other = s->open[some_gap(s, random)];
      if (s->storage[other] == storage || (homes ? plan->home[s->storage[other]] == was_home : plan->away[other] == was_away)) continue;
      turn(s, plan, other, homes);
      return;
    }
  }
  for (int k = at + 1; k <= at + others && k < s->opens; k++) {
    const int other = s->open[k];
    if (s->size[s->storage[other]] != s->size[storage]) break;
    if (homes ? plan->home[s->storage[other]] == was_home : plan->away[other] == was_away) turn(s, plan, other, homes);
  }
}

/* Gaps across the tightest run go away until all fits; 0 where that fails. */
static int repair(const Step *s, Plan *plan, int32_t *found, uint64_t *random) {
  for (int k = 0; k < REPAIRS; k++) {
    const int run = tightest(s, &plan->room);
    if (free_at(&plan->room, run) >= 0) return 1;
    int count = 0;
    for (int i = 0; i < s->opens; i++) {
      const int gap = s->open[i];
      if (!plan->away[gap] && s->from[gap] < run && run < s->to[gap] && s->free[gap] && !at_an_end(s, plan, gap)) found[count++] = gap;
    }
    if (!count) return 0;
    set_away(s, plan, found[draw_below(random, count)], 1);
  }
  return 0;
}

static void copy_plan(const Step *s, Plan *to, const Plan *from) {
  memcpy(to->away, from->away, (size_t)s->gaps), memcpy(to->home, from->home, (size_t)s->storages);
  to->lead = from->lead;
  copy_room(s, &to->room, &from->room);
}

/* A candidate near the plan, in its place; 0: none. */
static int change(const Step *s, Plan *plan, int32_t *found, uint64_t *random) {
  if (draw_share(random) < NEW_LEAD) {
    plan->lead = (int64_t)((double)plan->lead * pow(2, 4 * draw_share(random) - 2));
    return 1;
  }
  flip(s, plan, random);
  return repair(s, plan, found, random);
}

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Memory for so many elements, taken from the front of a block. */
static void *some(char **block, int64_t count, size_t size) {
  char *front = *block;
  *block += ((size_t)count + 1) * size / 8 * 8 + 8;
  return front;
}

static Room new_room(const Step *s, char **block) { return (Room){some(block, s->runs, 8), some(block, blocks(s), 8), some(block, blocks(s), 8)}; }

static Plan new_plan(const Step *s, char **block) {
  return (Plan){some(block, s->gaps, 1), some(block, s->storages, 1), 0, new_room(s, block)};
}

static Walk new_walk(const Step *s, char **block) {
  return (Walk){.step = s, .room = new_room(s, block), .complete = some(block, s->values, 8), .done = some(block, s->gaps, 8),
                .written = some(block, s->values, 4), .ready_at = some(block, s->gaps, 4), .short_at = some(block, s->gaps, 4),
                .past = some(block, s->runs + 1, 4), .next_past = some(block, s->values, 4), .reads = some(block, s->gaps, 4),
                .carried = some(block, s->values, 4), .queue = {0, some(block, s->values, 4), some(block, s->values, 8)}};
}

static size_t memory(const Step *s) { return 128 * ((size_t)s->runs + (size_t)s->gaps + (size_t)s->values + (size_t)s->storages + 64); }

/* Anneals the plan (away, home, lead) in place into the best found, and returns its microseconds, or -1 where it doesn't fit. room: bytes free at each
 * run beside all gaps. `record` gets its transfers, (run before which, what, storage) each, and `records` how many numbers. The temperature falls from `hot` to
 * `cold`, in microseconds, over so many candidates, sooner where they take more than `limit` seconds. `tried`: how many there were. */
EXPORT int64_t mebp_disk_anneal(const Step *s, uint8_t *away, uint8_t *home, int64_t *lead, const int64_t *room, double hot, double cold, int64_t candidates,
                                double limit, uint64_t seed, int32_t *record, int64_t *records, int64_t *tried) {
  const double began = seconds();
  char *const all = calloc(memory(s), 1), *block = all;
  if (!all) return -1;
  uint64_t random = seed * 2 + 1;
  Plan now = new_plan(s, &block), next = new_plan(s, &block), best = new_plan(s, &block);
  Walk w = new_walk(s, &block);
  int32_t *found = some(&block, s->gaps, 4);
  memcpy(now.away, away, (size_t)s->gaps), memcpy(now.home, home, (size_t)s->storages);
  memcpy(now.room.room, room, (size_t)s->runs * 8), now.lead = *lead;
  for (int k = 0; k < blocks(s); k++) now.room.least[k] = ENDLESS;
  for (int run = 0; run < s->runs; run++) now.room.least[run / BLOCK] = room[run] < now.room.least[run / BLOCK] ? room[run] : now.room.least[run / BLOCK];
  for (int gap = 0; gap < s->gaps; gap++)
    if (!now.away[gap]) take(&now.room, s->runs, s->from[gap] + 1, s->to[gap], s->size[s->storage[gap]]);
  if (!repair(s, &now, found, &random)) {
    free(all);
    return -1;
  }
  int64_t cost = walk(&w, &now, ENDLESS), least = cost;
  double gone = 0; /* of the time or the candidates, whichever has gone further */
  copy_plan(s, &best, &now);
  for (*tried = 0;; ++*tried) {
    if (*tried % CLOCK_EVERY == 0) gone = limit > 0 ? (seconds() - began) / limit : 1;
    if ((double)*tried >= gone * (double)candidates) gone = candidates > 0 ? (double)*tried / (double)candidates : 1;
    if (gone >= 1) break;
    const double heat = hot * pow(cold / hot, gone), most = (double)cost - heat * log(1 - draw_share(&random));
    copy_plan(s, &next, &now);
    if (!change(s, &next, found, &random)) continue;
    const int64_t other = walk(&w, &next, (int64_t)most);
    if ((double)other > most) continue;
    const Plan swap = now;
    now = next, next = swap, cost = other;
    if (cost < least) least = cost, copy_plan(s, &best, &now);
  }
  w.record = record;
  least = walk(&w, &best, ENDLESS);
  *records = w.records;
  memcpy(away, best.away, (size_t)s->gaps), memcpy(home, best.home, (size_t)s->storages);
  *lead = best.lead;
  free(all);
  return least;
}
