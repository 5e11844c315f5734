// Preloaded by test_memory.py. While `guard_on` is set, an aligned allocation ends at a page that may not be touched,
// so that reading or writing past it ends the process; the bytes before it are checked when it is freed. Tensors
// (libtorch allocates them by posix_memalign) end exactly at that page; scratch (aligned operator new) keeps its
// alignment.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { kPage = 4096, kSlots = 4096, kFill = 0xA5 };

int guard_on = 0;
int guard_count = 0;  // allocations guarded so far

static struct Slot {
  unsigned char *start, *data;
  size_t bytes;
} slots[kSlots];
static int slots_used = 0;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void* allocate(size_t alignment, size_t size) {
  const size_t body = (size + alignment + kPage - 1) / kPage * kPage, bytes = body + kPage;
  unsigned char* start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(start + body, kPage, PROT_NONE) != 0) abort();
  unsigned char* data = (unsigned char*)((uintptr_t)(start + body - size) / alignment * alignment);
  memset(start, kFill, (size_t)(data - start));
  pthread_mutex_lock(&lock);
  int slot = 0;
  while (slot < slots_used && slots[slot].data != NULL) ++slot;
  if (slot == kSlots) abort();
  if (slot == slots_used) ++slots_used;
  slots[slot] = (struct Slot){start, data, bytes};
  ++guard_count;
  pthread_mutex_unlock(&lock);
  return data;
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  int (*original)(void**, size_t, size_t) = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  if (!guard_on) return original(out, alignment, size);
  *out = allocate(1, size);
  return 0;
}

void* aligned_alloc(size_t alignment, size_t size) {
  void* (*original)(size_t, size_t) = (void* (*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  return guard_on ? allocate(alignment, size) : original(alignment, size);
}

void free(void* pointer) {
  static void (*original)(void*);
  if (original == NULL) original = (void (*)(void*))dlsym(RTLD_NEXT, "free");
  struct Slot found = {NULL, NULL, 0};
  if (pointer != NULL && slots_used != 0) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < slots_used && found.data == NULL; ++i) {
      if (slots[i].data == pointer) {
        found = slots[i];
        slots[i].data = NULL;
      }
    }
    pthread_mutex_unlock(&lock);
  }
  if (found.data == NULL) {
    original(pointer);
    return;
  }
  for (unsigned char* byte = found.start; byte < found.data; ++byte) {
    if (*byte != kFill) abort();
  }
  munmap(found.start, found.bytes);
}
