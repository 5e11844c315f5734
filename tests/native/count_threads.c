// Preloaded by test_threads.py. While `count_on` is set, notes the threads that allocate scratch, by aligned operator
// new, as every thread does that works for an operator.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { kMost = 1024 };

int count_on = 0;
int count_threads = 0;

static long ids[kMost];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void* aligned_alloc(size_t alignment, size_t size) {
  static void* (*original)(size_t, size_t);
  if (original == NULL) original = (void* (*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  if (count_on) {
    const long id = syscall(SYS_gettid);
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < count_threads && ids[i] != id) ++i;
    if (i == count_threads && i < kMost) ids[count_threads++] = id;
    pthread_mutex_unlock(&lock);
  }
  return original(alignment, size);
}
