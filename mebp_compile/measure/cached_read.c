/* Reads of what the page cache holds, by all threads at once and without waiting for a disk: such a read is a copy, which one thread alone takes
 * twice as long for, while an op beside it waits for the core that it took.
 */
#define _GNU_SOURCE
#include <sys/uio.h>

#include "../kernels/threads.h"

enum { PAGE = 4096, WORTH_TWO = 256 << 10 }; /* bytes from which on a second thread is worth waking */

typedef struct {
  char *memory;
  int64_t offset, size;
  int fd;
  int *missing;
} Read;

static void read_pages(const void *work, int64_t first, int64_t last) {
  const Read *read = work;
  const int64_t end = last * PAGE < read->size ? last * PAGE : read->size;
  for (int64_t at = first * PAGE; at < end;) {
    const struct iovec part = {read->memory + at, (size_t)(end - at)};
    const ssize_t count = preadv2(read->fd, &part, 1, read->offset + at, RWF_NOWAIT);
    if (count <= 0) {
      __atomic_store_n(read->missing, 1, __ATOMIC_RELAXED);
      return;
    }
    at += count;
  }
}

/* Whether all bytes were there, and are in `memory` now; where not, some of them may be. */
int cached_read(int fd, int64_t offset, void *memory, int64_t size) {
  int missing = 0;
  const Read read = {memory, offset, size, fd, &missing};
  const int64_t pages = (size + PAGE - 1) / PAGE;
  Team team = {read_pages, &read, pages};
  if (size >= WORTH_TWO && has_threads())
    with_threads(&team, 0); /* as many as the next op has */
  else
    read_pages(&read, 0, pages);
  return !missing;
}

/* Whether the first and the last byte are there. */
int is_cached(int fd, int64_t offset, int64_t size) {
  char byte;
  return cached_read(fd, offset, &byte, 1) && cached_read(fd, offset + size - 1, &byte, 1);
}
