/* Counts the bytes that malloc has handed out: live now, and the highest since the last reset.
 *
 * LD_PRELOAD this library into a process; it wraps the whole malloc family and forwards to the next allocator. Sizes
 * are malloc_usable_size, so what is counted on allocation is what is taken off on free. It has no state but two
 * numbers and a small bootstrap buffer: dlsym, which finds the real functions, may itself allocate. Memory that a
 * program maps itself (mmap, thread stacks, Python's small-object arenas) is not malloc's and is not counted.
 *
 * Read it with ctypes.CDLL(None): mebp_malloc_live, mebp_malloc_peak, mebp_malloc_reset_peak.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

static _Atomic int64_t live_bytes, peak_bytes;

static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static void *(*next_realloc)(void *, size_t);
static void (*next_free)(void *);
static int (*next_posix_memalign)(void **, size_t, size_t);
static void *(*next_memalign)(size_t, size_t);
static size_t (*next_usable_size)(void *);

/* ---- start-up: allocations made while dlsym looks for the real functions ---- */

static _Alignas(64) unsigned char bootstrap[32768];
static _Atomic size_t bootstrap_used;
static _Atomic int resolved;
static __thread int resolving __attribute__((tls_model("initial-exec")));

static void *bootstrap_alloc(size_t size, size_t alignment) {
  if (size > sizeof bootstrap || alignment > 4096) return NULL;
  size_t start = atomic_fetch_add(&bootstrap_used, size + alignment);
  if (start + size + alignment > sizeof bootstrap) return NULL;
  uintptr_t address = ((uintptr_t)bootstrap + start + alignment - 1) & ~(uintptr_t)(alignment - 1);
  return (void *)address; /* static memory: already zero, and never given twice */
}

static int from_bootstrap(const void *pointer) {
  const unsigned char *p = pointer;
  return p >= bootstrap && p < bootstrap + sizeof bootstrap;
}

static void *find(const char *name) {
  void *function = dlsym(RTLD_NEXT, name);
  if (function == NULL) {
    static const char text[] = "malloc meter: the next allocator lacks a function\n";
    ssize_t ignored = write(2, text, sizeof text - 1);
    (void)ignored;
    _exit(127);
  }
  return function;
}

static void resolve(void) {
  resolving = 1;
  next_usable_size = find("malloc_usable_size");
  next_free = find("free");
  next_calloc = find("calloc");
  next_realloc = find("realloc");
  next_posix_memalign = find("posix_memalign");
  next_memalign = find("memalign");
  next_malloc = find("malloc");
  resolving = 0;
  atomic_store(&resolved, 1); /* two threads may both get here: they write the same pointers */
}

/* 1: call the real functions; 0: this thread is inside dlsym, use the bootstrap buffer. */
static int ready(void) {
  if (__builtin_expect(atomic_load_explicit(&resolved, memory_order_acquire), 1)) return 1;
  if (resolving) return 0;
  resolve();
  return 1;
}

/* ---- counting ---- */

static void add(int64_t size) {
  int64_t live = atomic_fetch_add_explicit(&live_bytes, size, memory_order_relaxed) + size;
  int64_t peak = atomic_load_explicit(&peak_bytes, memory_order_relaxed);
  while (live > peak &&
         !atomic_compare_exchange_weak_explicit(&peak_bytes, &peak, live, memory_order_relaxed, memory_order_relaxed)) {
  }
}

static void *counted(void *pointer) {
  if (pointer != NULL) add((int64_t)next_usable_size(pointer));
  return pointer;
}

static void uncount(void *pointer) {
  atomic_fetch_sub_explicit(&live_bytes, (int64_t)next_usable_size(pointer), memory_order_relaxed);
}

EXPORT int64_t mebp_malloc_live(void) { return atomic_load(&live_bytes); }
EXPORT int64_t mebp_malloc_peak(void) { return atomic_load(&peak_bytes); }

/* Sets the peak to what is live now and returns that. Another thread that allocates meanwhile may raise it again. */
EXPORT int64_t mebp_malloc_reset_peak(void) {
  int64_t live = atomic_load(&live_bytes);
  atomic_store(&peak_bytes, live);
  return live;
}

/* ---- the malloc family ---- */

EXPORT void *malloc(size_t size) { return ready() ? counted(next_malloc(size)) : bootstrap_alloc(size, 16); }

EXPORT void *calloc(size_t count, size_t size) {
  if (ready()) return counted(next_calloc(count, size));
  if (size != 0 && count > SIZE_MAX / size) return NULL;
  return bootstrap_alloc(count * size, 16);
}

EXPORT void free(void *pointer) {
  int kept_errno;
  if (pointer == NULL || from_bootstrap(pointer) || !ready()) return;
  kept_errno = errno;
  uncount(pointer);
  next_free(pointer);
  errno = kept_errno;
}

static void *leave_bootstrap(void *pointer, size_t size) {
  size_t available = (size_t)(bootstrap + sizeof bootstrap - (unsigned char *)pointer);
  void *moved = malloc(size);
  if (moved != NULL) memmove(moved, pointer, size < available ? size : available);
  return moved;
}

/* A block that moves holds its old and its new bytes together for a moment, unless the kernel remaps it; only the
 * change is counted. */
EXPORT void *realloc(void *pointer, size_t size) {
  if (pointer == NULL) return malloc(size);
  if (from_bootstrap(pointer) || !ready()) return leave_bootstrap(pointer, size);
  int64_t before = (int64_t)next_usable_size(pointer);
  void *moved = next_realloc(pointer, size);
  if (moved != NULL) {
    add((int64_t)next_usable_size(moved) - before);
  } else if (size == 0) { /* glibc frees; on failure (size > 0) the old block stays */
    atomic_fetch_sub_explicit(&live_bytes, before, memory_order_relaxed);
  }
  return moved;
}

EXPORT int posix_memalign(void **result, size_t alignment, size_t size) {
  if (!ready()) return (*result = bootstrap_alloc(size, alignment)) == NULL ? ENOMEM : 0;
  int error = next_posix_memalign(result, alignment, size);
  if (error == 0) counted(*result);
  return error;
}

EXPORT void *memalign(size_t alignment, size_t size) {
  return ready() ? counted(next_memalign(alignment, size)) : bootstrap_alloc(size, alignment);
}

EXPORT void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

EXPORT void *valloc(size_t size) { return memalign((size_t)sysconf(_SC_PAGESIZE), size); }

EXPORT void *pvalloc(size_t size) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  if (size > SIZE_MAX - page) {
    errno = ENOMEM;
    return NULL;
  }
  return memalign(page, (size + page - 1) / page * page);
}
