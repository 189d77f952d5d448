/* Ceilings of this machine (x86-64), run on one pinned thread per core at the same time.
 *
 * `limit_run` executes one kernel for a number of rounds on each thread. A kernel keeps either the
 * multiply units busy out of registers or the load units out of one level of the memory hierarchy,
 * and does nothing else. Its loop is one block of assembly: compilers put accumulators into memory
 * around single instructions, which costs a fifth of the rate. Threads live on between calls, start
 * together and warm up before their clocks do, so neither creating nor waking them counts.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 64
#define HUGE_PAGE ((size_t)2 << 20)

/* A kernel does `rounds` rounds and returns the operations, or bytes, of all of them. */
typedef double (*kernel_fn)(const char *arena, size_t bytes, long rounds);

/* Independent accumulators, enough for two issues a cycle at a latency of six: 24 of the 32
 * registers that EVEX encodes, else 12 of 16. Registers 12 and 13 hold operands, 14 is scratch. */
#define VEX "0,1,2,3,4,5,6,7,8,9,10,11"
#define VEX_CHAINS 12
#define VEX_CHANGED                                                                             \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",      \
      "xmm11", "xmm12", "xmm13", "xmm14"
#define EVEX VEX ",15,16,17,18,19,20,21,22,23,24,25,26"
#define EVEX_CHAINS 24
#define EVEX_CHANGED                                                                            \
  VEX_CHANGED, "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", \
      "xmm24", "xmm25", "xmm26"
#define UNROLL 4

/* step: instructions that add to accumulator \i; ops: multiplications and additions of a step;
 * clear: sets register \i to zero, a value that no instruction takes longer for. */
#define ARITHMETIC(name, encoding, ops, clear, step)                                     \
  static double name(const char *arena, size_t bytes, long rounds) {                     \
    (void)arena, (void)bytes;                                                            \
    long left = rounds;                                                                  \
    __asm__ volatile(".irp i," encoding ",12,13\n\t" clear "\n\t.endr\n\t"               \
                     ".p2align 6\n"                                                      \
                     "1:\n\t.rept %c[unroll]\n\t.irp i," encoding "\n\t" step "\n\t"     \
                     ".endr\n\t.endr\n\tdec %[left]\n\tjnz 1b"                           \
                     : [left] "+r"(left)                                                 \
                     : [unroll] "i"(UNROLL)                                              \
                     : encoding##_CHANGED, "cc");                                        \
    return (double)rounds * UNROLL * encoding##_CHAINS * (ops);                          \
  }
#define CLEAR512 "vpxord %%zmm\\i,%%zmm\\i,%%zmm\\i"
#define CLEAR256 "vxorps %%ymm\\i,%%ymm\\i,%%ymm\\i"
#define FUSED512(instruction) instruction " %%zmm12,%%zmm13,%%zmm\\i"
#define FUSED256(instruction) instruction " %%ymm12,%%ymm13,%%ymm\\i"
/* What a CPU without int8 dot products does instead: pairs of 16-bit products, then an addition. */
#define PAIRS512 "vpmaddwd %%zmm12,%%zmm13,%%zmm14\n\tvpaddd %%zmm14,%%zmm\\i,%%zmm\\i"
#define PAIRS256 "vpmaddwd %%ymm12,%%ymm13,%%ymm14\n\tvpaddd %%ymm14,%%ymm\\i,%%ymm\\i"

#if defined(__AVX512F__)
ARITHMETIC(fp32, EVEX, 32, CLEAR512, FUSED512("vfmadd231ps"))
#elif defined(__FMA__)
ARITHMETIC(fp32, VEX, 16, CLEAR256, FUSED256("vfmadd231ps"))
#endif
#if defined(__AVX2__)
ARITHMETIC(int16_256, VEX, 32, CLEAR256, PAIRS256)
#endif
#if defined(__AVX512BW__)
ARITHMETIC(int16_512, EVEX, 64, CLEAR512, PAIRS512)
#endif
#if defined(__AVX512VNNI__)
ARITHMETIC(int8_512, EVEX, 128, CLEAR512, FUSED512("vpdpbusd"))
#endif
#if defined(__AVXVNNI__)
ARITHMETIC(int8_256, VEX, 64, CLEAR256, FUSED256("%{vex%} vpdpbusd"))
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
ARITHMETIC(int8_256, VEX, 64, CLEAR256, FUSED256("vpdpbusd"))
#endif
#if defined(__AVX512BF16__)
ARITHMETIC(bf16, EVEX, 64, CLEAR512, FUSED512("vdpbf16ps"))
#endif

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__)
/* Tiles of 16 rows of 64 bytes: four of sums, as two tiles of A by two of B have, in turn. A product
 * takes 16 cycles and is ready after 52. Linux wants to be asked for the tiles, once a process. */
#define TILE_SUMS "0,1,2,3"
#define TILES(name, instruction, row)                                                              \
  static double name(const char *arena, size_t bytes, long rounds) {                               \
    (void)arena, (void)bytes;                                                                      \
    const long request_permission = 0x1023, tile_data = 18;                                        \
    if (syscall(SYS_arch_prctl, request_permission, tile_data)) return -1;                         \
    struct {                                                                                       \
      uint8_t palette, start, reserved[14];                                                        \
      uint16_t row_bytes[16];                                                                      \
      uint8_t rows[16];                                                                            \
    } config = {.palette = 1};                                                                     \
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;      \
    long left = rounds;                                                                            \
    __asm__ volatile("ldtilecfg %[config]\n\t"                                                     \
                     ".irp i," TILE_SUMS ",4,5\n\ttilezero %%tmm\\i\n\t.endr\n\t"                   \
                     ".p2align 6\n"                                                                \
                     "1:\n\t.rept %c[unroll]\n\t.irp i," TILE_SUMS "\n\t" instruction             \
                     " %%tmm5,%%tmm4,%%tmm\\i\n\t.endr\n\t.endr\n\tdec %[left]\n\tjnz 1b\n\t"         \
                     "tilerelease"                                                                 \
                     : [left] "+r"(left)                                                           \
                     : [config] "m"(config), [unroll] "i"(UNROLL)                                  \
                     : "cc");                                                                      \
    return (double)rounds * UNROLL * 4 * (2.0 * 16 * 16 * (row));                                  \
  }
TILES(int8_amx, "tdpbssd", 64)
#if defined(__AMX_BF16__)
TILES(bf16_amx, "tdpbf16ps", 32)
#endif
#endif

#if defined(__AVX512F__)
#define LOAD(at) "vmovdqa64 " at ",%%zmm0\n\t"
#define VECTOR 64
#elif defined(__AVX__)
#define LOAD(at) "vmovdqa " at ",%%ymm0\n\t"
#define VECTOR 32
#else
#define LOAD(at) "movdqa " at ",%%xmm0\n\t"
#define VECTOR 16
#endif

/* Several places of the arena at once: prefetchers follow many streams, and 8 of them bring up to a
 * quarter more from the last-level cache than one does, from memory as much. */
#define STREAMS 8
static double read_all(const char *arena, size_t bytes, long rounds) {
  const size_t stream = bytes / STREAMS / 256 * 256;
  for (long r = 0; r < rounds; ++r)
    for (size_t at = 0; at < stream; at += 256)
      for (int s = 0; s < STREAMS; ++s) {
        const char *from = arena + s * stream + at;
        for (int v = 0; v < 256; v += VECTOR)
          __asm__ volatile(LOAD("(%[from])") : : [from] "r"(from + v) : "xmm0");
      }
  return (double)rounds * (double)(stream * STREAMS);
}

static const struct {
  const char *kind;
  kernel_fn kernel;
  int reads; /* the arena, else registers only */
} KERNELS[] = {
#if defined(__AVX512F__) || defined(__FMA__)
    {"fp32", fp32, 0},
#endif
#if defined(__AVX2__)
    {"int16-256", int16_256, 0},
#endif
#if defined(__AVX512BW__)
    {"int16-512", int16_512, 0},
#endif
#if defined(__AVX512VNNI__)
    {"int8", int8_512, 0},
#endif
#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__)
    {"int8-amx", int8_amx, 0},
#if defined(__AMX_BF16__)
    {"bf16-amx", bf16_amx, 0},
#endif
#endif
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
    {"int8-256", int8_256, 0},
#endif
#if defined(__AVX512BF16__)
    {"bf16", bf16, 0},
#endif
    {"read", read_all, 1},
};

/* What one thread does in a call, and how it went. */
static struct job {
  kernel_fn kernel;
  const char *arena;
  size_t bytes;
  long rounds;
  double work, elapsed, busy;
} jobs[MAX_THREADS];

static struct {
  pthread_mutex_t lock;
  pthread_cond_t posted, finished;
  long call;    /* number of the current one */
  int threads;  /* that take part in it */
  int running;  /* that have not finished it */
  atomic_int ready;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER,
          .posted = PTHREAD_COND_INITIALIZER,
          .finished = PTHREAD_COND_INITIALIZER};

static double read_clock(clockid_t which) {
  struct timespec t;
  clock_gettime(which, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void run_job(struct job *job, int threads) {
  if (!job->bytes) job->kernel(NULL, 0, job->rounds / 8 + 1); /* the core's clock rises */
  atomic_fetch_add(&pool.ready, 1);
  while (atomic_load(&pool.ready) < threads) __builtin_ia32_pause();
  double wall = read_clock(CLOCK_MONOTONIC), cpu = read_clock(CLOCK_THREAD_CPUTIME_ID);
  job->work = job->kernel(job->arena, job->bytes, job->rounds);
  job->busy = read_clock(CLOCK_THREAD_CPUTIME_ID) - cpu;
  job->elapsed = read_clock(CLOCK_MONOTONIC) - wall;
}

static void *worker(void *number) {
  const int me = (int)(intptr_t)number;
  long done = 0;
  for (;;) {
    pthread_mutex_lock(&pool.lock);
    while (pool.call == done || me >= pool.threads) pthread_cond_wait(&pool.posted, &pool.lock);
    done = pool.call;
    const int threads = pool.threads;
    pthread_mutex_unlock(&pool.lock);
    run_job(&jobs[me], threads);
    pthread_mutex_lock(&pool.lock);
    if (--pool.running == 0) pthread_cond_signal(&pool.finished);
    pthread_mutex_unlock(&pool.lock);
  }
  return NULL;
}

/* Threads 0 to `threads` - 1, each pinned to its core of the affinity mask; 0 when there are. */
static int start_threads(int threads, const cpu_set_t *allowed) {
  static int started;
  int cpu = -1;
  for (int t = 0; t < threads; ++t) {
    do ++cpu; while (!CPU_ISSET(cpu, allowed));
    if (t < started) continue;
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(cpu, &only);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setaffinity_np(&attributes, sizeof only, &only);
    pthread_t id;
    const int failed = pthread_create(&id, &attributes, worker, (void *)(intptr_t)t);
    pthread_attr_destroy(&attributes);
    if (failed) return failed;
    pthread_detach(id);
    started = t + 1;
  }
  return 0;
}

/* Memory that a thread reads, mapped and touched at the first call that needs so much. */
static const char *arena_of(int thread, size_t bytes) {
  static char *arenas[MAX_THREADS];
  static size_t sizes[MAX_THREADS];
  if (sizes[thread] < bytes) {
    free(arenas[thread]);
    arenas[thread] = NULL;
    sizes[thread] = 0;
    if (posix_memalign((void **)&arenas[thread], HUGE_PAGE, bytes)) return NULL;
    madvise(arenas[thread], bytes, MADV_HUGEPAGE);
    memset(arenas[thread], 1, bytes);
    sizes[thread] = bytes;
  }
  return arenas[thread];
}

/* Runs `kind` on the first `threads` cores of this process's affinity mask; one call at a time.
 * bytes: of the memory that all threads together read in a round, where the kind reads memory.
 * rates[t] receives what thread t did in a second by the clock on the wall, which tells whether it
 * had its core to itself; *seconds the longest time that a thread was on its core, which does not
 * depend on that. Returns the work of all threads, or -1 where there is no such kind, core or
 * memory. */
double limit_run(const char *kind, int threads, long rounds, size_t bytes, double *rates,
                 double *seconds) {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  if (threads < 1 || threads > MAX_THREADS || threads > CPU_COUNT(&allowed)) return -1;
  const size_t kinds = sizeof KERNELS / sizeof *KERNELS;
  size_t k = 0;
  while (k < kinds && strcmp(KERNELS[k].kind, kind)) ++k;
  if (k == kinds || start_threads(threads, &allowed)) return -1;

  const size_t share = KERNELS[k].reads ? bytes / threads : 0;
  for (int t = 0; t < threads; ++t) {
    const char *arena = share ? arena_of(t, share) : NULL;
    if (share && !arena) return -1;
    jobs[t] = (struct job){KERNELS[k].kernel, arena, share, rounds, 0, 0, 0};
  }
  pthread_mutex_lock(&pool.lock);
  atomic_store(&pool.ready, 0);
  pool.threads = pool.running = threads;
  ++pool.call;
  pthread_cond_broadcast(&pool.posted);
  while (pool.running) pthread_cond_wait(&pool.finished, &pool.lock);
  pthread_mutex_unlock(&pool.lock);

  double work = 0;
  *seconds = 0;
  for (int t = 0; t < threads; ++t) {
    rates[t] = jobs[t].work / jobs[t].elapsed;
    work += jobs[t].work;
    if (jobs[t].busy > *seconds) *seconds = jobs[t].busy;
  }
  return work;
}
