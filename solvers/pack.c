/* Lifespans into a given height: depth-first search over canonical placements.
 *
 * Any packing can be pushed down until every block rests on the ground or on another block. Listed by offset, each block then rests on what the
 * list has before it: it lies at the highest top among the earlier blocks that it meets in time. So the search places one block after the other
 * at that offset, offsets never falling, blocks of one offset in the order of their ranks. What prunes it:
 *
 *   height      a block that can't begin low enough, or a step at which the lowest beginning of what is to come plus its bytes is too high
 *   dominance   a block that would fit whole below the offset at hand was to be placed there before
 *   parts       blocks that meet in time only through blocks already placed are independent problems: one without an answer ends all of them
 */
#include <stdint.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

enum { NO = 0, YES = 1, OUT_OF_WORK = -1 };

typedef struct {
  int block;
  int64_t offset;
} Raised;

typedef struct {
  const int32_t *first, *last; /* sections [first, last) of a block */
  const int64_t *size;
  int32_t *rank;
  int by_load; /* ranks go by the load that is left, in each part anew */
  int64_t height, work, *at, *rest, *low; /* at: of a block, where it would lie now; rest: of a section, bytes not placed; low: scratch */
  int32_t *stack;                         /* lists of blocks, the parts of each level above those of the level before */
  Raised *trail;                          /* what `at` was, to take back */
  int64_t trail_count, trail_room;
} Search;

static int raise_block(Search *s, int block, int64_t offset) {
  if (s->trail_count == s->trail_room) {
    Raised *larger = realloc(s->trail, (size_t)(2 * s->trail_room) * sizeof *larger);
    if (!larger) return 0;
    s->trail = larger;
    s->trail_room *= 2;
  }
  s->trail[s->trail_count++] = (Raised){block, s->at[block]};
  s->at[block] = offset;
  return 1;
}

static void take_back(Search *s, int64_t count) {
  while (s->trail_count > count) {
    const Raised *last = &s->trail[--s->trail_count];
    s->at[last->block] = last->offset;
  }
}

/* Whether the blocks may still fit: none too high, and at every section room for the rest above the lowest of them. */
static int may_fit(Search *s, const int32_t *blocks, int count, int64_t ground, int64_t *least_top) {
  int32_t end = 0;
  for (int k = 0; k < count; k++) end = s->last[blocks[k]] > end ? s->last[blocks[k]] : end;
  for (int32_t t = s->first[blocks[0]]; t < end; t++) s->low[t] = INT64_MAX;
  *least_top = INT64_MAX;
  for (int k = 0; k < count; k++) {
    const int b = blocks[k];
    const int64_t at = s->at[b], from = at > ground ? at : ground;
    if (from + s->size[b] > s->height) return 0;
    if (at + s->size[b] < *least_top) *least_top = at + s->size[b];
    for (int32_t t = s->first[b]; t < s->last[b]; t++)
      if (from < s->low[t]) s->low[t] = from;
    s->work -= s->last[b] - s->first[b] + 4;
  }
  if (*least_top <= ground) return 0;
  for (int32_t t = s->first[blocks[0]]; t < end; t++)
    if (s->low[t] != INT64_MAX && s->low[t] + s->rest[t] > s->height) return 0;
  return 1;
}

static int before(const Search *s, int a, int b) {
  return s->at[a] != s->at[b] ? s->at[a] < s->at[b] : s->rank[a] < s->rank[b];
}

/* Where the part that begins at `from` ends: blocks in order of their first section, up to where none lives on into the next one's. */
static int part_end(const Search *s, const int32_t *blocks, int count, int from) {
  int32_t end = s->last[blocks[from]];
  int to = from + 1;
  for (; to < count && s->first[blocks[to]] < end; to++)
    if (s->last[blocks[to]] > end) end = s->last[blocks[to]];
  return to;
}

static int solve(Search *s, const int32_t *blocks, int count, int64_t ground, int32_t rank, int32_t *room);

/* The most bytes not placed at a section of the block. */
static int64_t load_at(const Search *s, int block) {
  int64_t most = 0;
  for (int32_t t = s->first[block]; t < s->last[block]; t++) most = s->rest[t] > most ? s->rest[t] : most;
  return most;
}

/* Solve a part with its blocks ranked anew: by the load that is left, then as before. */
static int solve_anew(Search *s, const int32_t *blocks, int count, int64_t ground, int32_t *room) {
  int32_t *order = room, *old = room + count;
  for (int k = 0; k < count; k++) {
    int to = k;
    s->low[blocks[k]] = load_at(s, blocks[k]);
    for (; to > 0; to--) {
      const int64_t more = s->low[blocks[k]] - s->low[order[to - 1]];
      if (more < 0 || (more == 0 && s->rank[blocks[k]] > s->rank[order[to - 1]])) break;
      order[to] = order[to - 1];
    }
    s->work -= k - to + s->last[blocks[k]] - s->first[blocks[k]];
    order[to] = blocks[k];
    old[k] = s->rank[blocks[k]];
  }
  for (int k = 0; k < count; k++) s->rank[order[k]] = k;
  const int answer = solve(s, blocks, count, ground, -1, old + count);
  for (int k = 0; k < count; k++) s->rank[blocks[k]] = old[k];
  return answer;
}

/* Place one of the blocks, then solve each part that is left. */
static int place(Search *s, const int32_t *blocks, int count, int chosen, int32_t *room) {
  const int64_t offset = s->at[chosen], top = offset + s->size[chosen], mark = s->trail_count;
  int left = 0, answer = YES;
  for (int k = 0; k < count; k++) {
    const int b = blocks[k];
    if (b == chosen) continue;
    room[left++] = b;
    if (s->first[b] < s->last[chosen] && s->first[chosen] < s->last[b] && s->at[b] < top && !raise_block(s, b, top)) return OUT_OF_WORK;
  }
  for (int32_t t = s->first[chosen]; t < s->last[chosen]; t++) s->rest[t] -= s->size[chosen];
  s->work -= count;
  for (int from = 0, to = 0; from < left && answer == YES; from = to) {
    to = part_end(s, room, left, from);
    if (s->by_load && to - from < left)
      answer = solve_anew(s, room + from, to - from, offset, room + left);
    else
      answer = solve(s, room + from, to - from, offset, s->rank[chosen], room + left);
  }
  if (answer == YES) return YES;
  for (int32_t t = s->first[chosen]; t < s->last[chosen]; t++) s->rest[t] += s->size[chosen];
  take_back(s, mark);
  return answer;
}

/* Blocks in order of their first section, connected in time, none to lie below `ground`, and of those at `ground` only ranks above `rank`. */
static int solve(Search *s, const int32_t *blocks, int count, int64_t ground, int32_t rank, int32_t *room) {
  int64_t least_top;
  int choices = 0;
  if (s->work <= 0) return OUT_OF_WORK;
  if (count == 1) return s->at[blocks[0]] + s->size[blocks[0]] <= s->height;
  if (!may_fit(s, blocks, count, ground, &least_top)) return NO;
  for (int k = 0; k < count; k++) {
    const int b = blocks[k];
    if (s->at[b] >= least_top || s->at[b] < ground || (s->at[b] == ground && s->rank[b] < rank)) continue;
    int place_at = choices++;
    for (; place_at > 0 && before(s, b, room[place_at - 1]); place_at--) room[place_at] = room[place_at - 1];
    room[place_at] = b;
    s->work -= choices - place_at;
  }
  for (int k = 0; k < choices; k++) {
    const int answer = place(s, blocks, count, room[k], room + choices);
    if (answer != NO) return answer;
  }
  return NO;
}

/* 1: `offsets` has a packing of the blocks, which are sorted by `first`, into `height`; 0: there is none; -1: not known after so much `work`.
 * `rank` is changed. */
EXPORT int mebp_pack(int32_t count, int32_t sections, const int32_t *first, const int32_t *last, const int64_t *size, int32_t *rank, int by_load,
                     int64_t height, int64_t work, int64_t *offsets) {
  const size_t pairs = ((size_t)count + 2) * ((size_t)count + 2), scratch = (size_t)(count > sections ? count : sections) + 1;
  Search s = {first, last, size, rank, by_load, height, work, offsets, calloc(scratch, 8), calloc(scratch, 8),
              malloc(2 * pairs * sizeof(int32_t)), malloc(1024 * sizeof(Raised)), 0, 1024};
  int answer = OUT_OF_WORK;
  if (s.rest && s.low && s.stack && s.trail) {
    for (int k = 0; k < count; k++) {
      offsets[k] = 0;
      for (int32_t t = first[k]; t < last[k]; t++) s.rest[t] += size[k];
      s.stack[k] = k;
    }
    answer = YES;
    for (int from = 0, to = 0; from < count && answer == YES; from = to) {
      to = part_end(&s, s.stack, count, from);
      answer = solve(&s, s.stack + from, to - from, 0, -1, s.stack + count);
    }
  }
  free(s.rest), free(s.low), free(s.stack), free(s.trail);
  return answer;
}
