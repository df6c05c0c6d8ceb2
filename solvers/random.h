/* Random numbers for the annealers: xorshift64*, the same on every machine. The state must not be 0. */
#ifndef SOLVERS_RANDOM_H
#define SOLVERS_RANDOM_H

#include <stdint.h>

static inline uint64_t draw(uint64_t *random) {
  *random ^= *random >> 12, *random ^= *random << 25, *random ^= *random >> 27;
  return *random * 0x2545F4914F6CDD1DULL;
}

static inline double draw_share(uint64_t *random) { return (double)(draw(random) >> 11) * 0x1p-53; }

static inline int draw_below(uint64_t *random, int end) { return (int)(draw_share(random) * end); }

#endif
