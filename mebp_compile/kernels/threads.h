/* One piece of work on several threads: those of the OpenMP library that the process has loaded (torch's own pool, so that no second one competes
 * with it), through the entry point that compilers call; without it, or where the work is small, one thread does all.
 */
#ifndef MEBP_THREADS_H
#define MEBP_THREADS_H
#include <stdint.h>

typedef void (*Task)(const void *work, int64_t first, int64_t last);
typedef struct {
  Task task;
  const void *work;
  int64_t count;
} Team;

#if defined(__GNUC__) && !defined(_WIN32)
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));

static void member(void *data) {
  const Team *team = data;
  const int64_t all = omp_get_num_threads(), own = omp_get_thread_num();
  team->task(team->work, team->count * own / all, team->count * (own + 1) / all);
}

static int has_threads(void) { return GOMP_parallel && omp_get_thread_num && omp_get_num_threads; }
static void with_threads(Team *team, int threads) { GOMP_parallel(member, team, (unsigned)threads, 0); }
#else
static int has_threads(void) { return 0; }
static void with_threads(Team *team, int threads) { (void)team, (void)threads; }
#endif

enum { FEW = 1 << 14 }; /* numbers, below which a second thread costs more than it gives */

/* `task` on the parts of 0..count, which touch `numbers` numbers together. */
static inline void in_parts(Task task, const void *work, int64_t count, int64_t numbers, int threads) {
  Team team = {task, work, count};
  if (threads > 1 && numbers >= FEW && count > 1 && has_threads())
    with_threads(&team, threads);
  else
    task(work, 0, count);
}

#endif
