/* A problem as Tables in decode.py has it, for what is written in C. Lists of lists: those of k are list[first[k]] up to list[first[k + 1]]. */
#ifndef SOLVERS_TABLES_H
#define SOLVERS_TABLES_H

#include <stdint.h>

enum { RUN, READ }; /* kinds of events */

typedef struct {
  int32_t storage, version;
} Value;

typedef struct {
  int32_t ops, storages;
  int64_t constant_bytes, most_events;
  const int32_t *first_way, *first_need, *first_write, *first_create, *create, *first_producer, *producer, *first_writer, *writer, *created_by, *final;
  const Value *need, *write;
  const int64_t *way_us, *workspace, *size, *read_us, *write_us;
  const uint8_t *optional, *rerunnable, *persistent, *output, *stored, *may_spill;
} Tables;

/* What an op needs in the way that is chosen. */
static inline const Value *needs(const Tables *p, const int32_t *choice, int32_t op, int32_t *count) {
  const int32_t way = p->first_way[op] + choice[op];
  *count = p->first_need[way + 1] - p->first_need[way];
  return p->need + p->first_need[way];
}

/* The op that makes a value, or -1. */
static inline int32_t producer_of(const Tables *p, Value value) {
  const int32_t at = p->first_producer[value.storage] + value.version;
  return at < p->first_producer[value.storage + 1] ? p->producer[at] : -1;
}

#endif
