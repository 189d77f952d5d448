/* Ceilings of this machine, run on one pinned thread per core at the same time.
 *
 * `limit_run` executes one kernel for a number of rounds on each thread. A kernel keeps either the
 * multiply units busy out of registers or the load units out of one level of the memory hierarchy,
 * and does nothing else. Threads meet at a barrier before they start their clocks, so starting them
 * costs nothing of the result.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define MAX_THREADS 64
#define HUGE_PAGE ((size_t)2 << 20)

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define REGISTER "v"
#define CHAINS 24
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define REGISTER "x"
#define CHAINS 12
#else
#define VECTOR_BYTES 16
#define REGISTER "x"
#define CHAINS 12
#endif

typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
typedef float vector256 __attribute__((vector_size(32)));

/* CHAINS independent accumulators cover two issues a cycle at a latency of six, and leave registers
 * for the operands. */
#define UNROLL 2

/* A kernel does `rounds` rounds and returns the operations, or bytes, of all of them. */
typedef double (*kernel_fn)(const char *arena, size_t bytes, long rounds);

/* ops: multiplications and additions that one STEP does. */
#define ARITHMETIC(name, type, ops, STEP)                                       \
  static double name(const char *arena, size_t bytes, long rounds) {            \
    (void)arena, (void)bytes;                                                   \
    type acc[CHAINS], a, b;                                                     \
    memset(acc, 0, sizeof acc);                                                 \
    memset(&a, 0, sizeof a);                                                    \
    memset(&b, 0, sizeof b);                                                    \
    for (long r = 0; r < rounds; ++r) {                                         \
      _Pragma("GCC unroll 2") for (int u = 0; u < UNROLL; ++u)                  \
        _Pragma("GCC unroll 24") for (int i = 0; i < CHAINS; ++i) { STEP; }     \
    }                                                                           \
    for (int i = 0; i < CHAINS; ++i) __asm__ volatile("" : : "m"(acc[i]));      \
    return (double)rounds * UNROLL * CHAINS * (ops);                            \
  }

#define FUSED(instruction) \
  __asm__ volatile(instruction " %2,%1,%0" : "+" REGISTER(acc[i]) : REGISTER(a), REGISTER(b))
/* What a CPU without int8 dot products does instead: pairs of 16-bit products, then an addition. */
#define PAIRS(type)                                                             \
  {                                                                             \
    type t;                                                                     \
    __asm__ volatile("vpmaddwd %3,%2,%1\n\tvpaddd %1,%0,%0"                     \
                     : "+" REGISTER(acc[i]), "=&" REGISTER(t)                   \
                     : REGISTER(a), REGISTER(b));                               \
  }

#if defined(__FMA__)
ARITHMETIC(fp32, vector, VECTOR_BYTES / 2, FUSED("vfmadd231ps"))
#else
ARITHMETIC(fp32, vector, VECTOR_BYTES / 2,
           acc[i] += a * b; __asm__ volatile("" : "+x"(acc[i]), "+x"(a)))
#endif
#if defined(__AVX2__)
ARITHMETIC(int16_256, vector256, 32, PAIRS(vector256))
#endif
#if defined(__AVX512BW__)
ARITHMETIC(int16_512, vector, 64, PAIRS(vector))
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
ARITHMETIC(int8_512, vector, 128, FUSED("vpdpbusd"))
ARITHMETIC(int8_256, vector256, 64, FUSED("vpdpbusd"))
#elif defined(__AVXVNNI__)
ARITHMETIC(int8_256, vector256, 64, FUSED("{vex} vpdpbusd"))
#endif
#if defined(__AVX512BF16__)
ARITHMETIC(bf16, vector, 64, FUSED("vdpbf16ps"))
#endif

static double read_all(const char *arena, size_t bytes, long rounds) {
  for (long r = 0; r < rounds; ++r)
    for (size_t at = 0; at < bytes; at += 8 * sizeof(vector)) {
      const vector *line = (const vector *)(arena + at);
      _Pragma("GCC unroll 8") for (int i = 0; i < 8; ++i)
        __asm__ volatile("" : : REGISTER(line[i]));
    }
  return (double)rounds * (double)bytes;
}

static const struct {
  const char *kind;
  kernel_fn kernel;
  size_t bytes; /* read by each thread in a round */
} KERNELS[] = {
    {"fp32", fp32, 0},
#if defined(__AVX2__)
    {"int16-256", int16_256, 0},
#endif
#if defined(__AVX512BW__)
    {"int16-512", int16_512, 0},
#endif
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__))
    {"int8", int8_512, 0},
#endif
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
    {"int8-256", int8_256, 0},
#endif
#if defined(__AVX512BF16__)
    {"bf16", bf16, 0},
#endif
    {"read-cache", read_all, (size_t)8 << 20},
    {"read", read_all, (size_t)96 << 20},
};

struct job {
  kernel_fn kernel;
  const char *arena;
  size_t bytes;
  long rounds;
  int cpu;
  pthread_barrier_t *start;
  double work, elapsed, busy;
};

static double read_clock(clockid_t which) {
  struct timespec t;
  clock_gettime(which, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *run_job(void *argument) {
  struct job *job = argument;
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(job->cpu, &only);
  sched_setaffinity(0, sizeof only, &only);
  pthread_barrier_wait(job->start);
  double wall = read_clock(CLOCK_MONOTONIC), cpu = read_clock(CLOCK_THREAD_CPUTIME_ID);
  job->work = job->kernel(job->arena, job->bytes, job->rounds);
  job->busy = read_clock(CLOCK_THREAD_CPUTIME_ID) - cpu;
  job->elapsed = read_clock(CLOCK_MONOTONIC) - wall;
  return NULL;
}

/* Memory that a thread reads, mapped and touched at the first call that needs so much. */
static const char *arena_of(int thread, size_t bytes) {
  static char *arenas[MAX_THREADS];
  static size_t sizes[MAX_THREADS];
  if (sizes[thread] < bytes) {
    if (arenas[thread]) free(arenas[thread]);
    sizes[thread] = 0;
    if (posix_memalign((void **)&arenas[thread], HUGE_PAGE, bytes)) return arenas[thread] = NULL;
    madvise(arenas[thread], bytes, MADV_HUGEPAGE);
    memset(arenas[thread], 1, bytes);
    sizes[thread] = bytes;
  }
  return arenas[thread];
}

/* Runs `kind` on the first `threads` cores of this process's affinity mask. rates[t] receives what
 * thread t did in a second by the clock on the wall, which tells whether it had its core to itself;
 * *seconds the longest time that a thread was on its core, which does not depend on that. Returns
 * the work of all threads, or -1 where there is no such kind, core or memory. */
double limit_run(const char *kind, int threads, long rounds, double *rates, double *seconds) {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  if (threads < 1 || threads > MAX_THREADS || threads > CPU_COUNT(&allowed)) return -1;
  size_t k = 0;
  while (k < sizeof KERNELS / sizeof *KERNELS && strcmp(KERNELS[k].kind, kind)) ++k;
  if (k == sizeof KERNELS / sizeof *KERNELS) return -1;

  pthread_barrier_t start;
  pthread_barrier_init(&start, NULL, (unsigned)threads);
  struct job jobs[MAX_THREADS];
  pthread_t ids[MAX_THREADS];
  int cpu = -1;
  for (int t = 0; t < threads; ++t) {
    do ++cpu; while (!CPU_ISSET(cpu, &allowed));
    const char *arena = KERNELS[k].bytes ? arena_of(t, KERNELS[k].bytes) : NULL;
    if (KERNELS[k].bytes && !arena) return -1;
    jobs[t] = (struct job){KERNELS[k].kernel, arena, KERNELS[k].bytes, rounds, cpu, &start, 0, 0, 0};
  }
  for (int t = 0; t < threads; ++t) pthread_create(&ids[t], NULL, run_job, &jobs[t]);
  double work = 0;
  *seconds = 0;
  for (int t = 0; t < threads; ++t) {
    pthread_join(ids[t], NULL);
    rates[t] = jobs[t].work / jobs[t].elapsed;
    work += jobs[t].work;
    if (jobs[t].busy > *seconds) *seconds = jobs[t].busy;
  }
  pthread_barrier_destroy(&start);
  return work;
}
