/* A CUDA runtime that computes nothing. Kernels are checked and counted by name, and not run; every
 * call for which the host would wait for the device is reported. What torch does on the host
 * (dispatch, checks of types and shapes, choice of kernels, allocator, autograd) is the real thing.
 * Loaded with LD_PRELOAD, before torch. */
#include "nullgpu.h"
#include <time.h>
#define CUDARTAPI
#include <cuda_runtime_api.h>

#define OK cudaSuccess

/* --- the card ------------------------------------------------------------------------------ */

size_t setting(const char *name, size_t otherwise) {
  const char *text = getenv(name);
  return text && *text ? strtoull(text, NULL, 0) : otherwise;
}
int capability(void) { return (int)setting("NULLGPU_CAPABILITY", 86); }
size_t card_memory(void) { return setting("NULLGPU_MEMORY", 25294995456ull); }
static const char *card_name(void) {
  const char *name = getenv("NULLGPU_NAME");
  return name ? name : "null GPU";
}
size_t most_shared_memory(void) { /* of a block, bytes: CUDA's programming guide */
  switch (capability()) {
    case 80: return 166912;
    case 90: return 232448;
    default: return 101376; /* 86, 89 */
  }
}

/* --- counters ------------------------------------------------------------------------------ */

uint64_t counts[NUM_COUNTERS];
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
char last_error[512];
static const char *NAMES[NUM_COUNTERS] = {
    "launch", "driver_launch", "gemm", "memset", "copy_h2d", "copy_d2h", "copy_d2d",
    "wait", "collective", "graph_launch", "malloc", "free", "module"};

void count(enum counter one) { __atomic_add_fetch(&counts[one], 1, __ATOMIC_RELAXED); }

typedef void (*wait_callback)(const char *call);
static wait_callback on_wait;
void host_waits(const char *call) {
  count(WAIT);
  if (on_wait) on_wait(call);
}

/* --- kernels, by the address of their host stub -------------------------------------------- */

typedef struct {
  const void *stub;
  const char *name;
  uint64_t launches;
  size_t shared_memory;
} Kernel;
static Kernel *table;
static size_t capacity, used;

static size_t hashed(const void *p) {
  uint64_t x = (uint64_t)p;
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
  return x ^ x >> 33;
}
static Kernel *place(Kernel *in, size_t size, const void *stub) {
  size_t i = hashed(stub) & (size - 1);
  while (in[i].stub && in[i].stub != stub) i = (i + 1) & (size - 1);
  return &in[i];
}
static Kernel *kernel(const void *stub) {
  if (used * 2 >= capacity) {
    size_t larger = capacity ? capacity * 2 : 1 << 18;
    Kernel *new = calloc(larger, sizeof *new);
    for (size_t i = 0; i < capacity; i++)
      if (table[i].stub) *place(new, larger, table[i].stub) = table[i];
    free(table);
    table = new;
    capacity = larger;
  }
  Kernel *found = place(table, capacity, stub);
  if (!found->stub) {
    found->stub = stub;
    used++;
  }
  return found;
}

API void **__cudaRegisterFatBinary(void *image) {
  static void *handle[8];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void **handle) {}
API void __cudaUnregisterFatBinary(void **handle) {}
API void __cudaRegisterVar(void **h, char *v, char *a, const char *n, int e, size_t s, int c, int g) {}
API void __cudaRegisterFunction(void **h, const char *stub, char *device, const char *name, int limit,
                                void *t, void *b, void *bd, void *gd, int *w) {
  pthread_mutex_lock(&lock);
  kernel(stub)->name = name;
  pthread_mutex_unlock(&lock);
}

/* --- launches ------------------------------------------------------------------------------ */

static __thread struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed[16];
static __thread int depth;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  if (depth < 16) {
    pushed[depth].grid = grid;
    pushed[depth].block = block;
    pushed[depth].shared = shared;
    pushed[depth++].stream = stream;
  }
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  if (depth > 0) {
    *grid = pushed[--depth].grid;
    *block = pushed[depth].block;
    *shared = pushed[depth].shared;
    *(cudaStream_t *)stream = pushed[depth].stream;
  }
  return OK;
}

/* Why a card would refuse a launch, or NULL. */
static const char *launch_fault(const Kernel *k, dim3 grid, dim3 block, size_t shared) {
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  size_t allowed = k->shared_memory > 49152 ? k->shared_memory : 49152;
  if (!threads || threads > 1024) return "block";
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) return "grid";
  return shared > allowed ? "shared memory" : NULL;
}
API cudaError_t cudaLaunchKernel(const void *stub, dim3 grid, dim3 block, void **a, size_t shared, cudaStream_t s) {
  pthread_mutex_lock(&lock);
  Kernel *k = kernel(stub);
  const char *fault = launch_fault(k, grid, block, shared);
  if (!fault) k->launches++;
  else
    snprintf(last_error, sizeof last_error, "%s of a launch: grid %u %u %u, block %u %u %u, %zu bytes: %.200s", fault,
             grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, k->name ? k->name : "?");
  pthread_mutex_unlock(&lock);
  if (fault) return cudaErrorInvalidConfiguration;
  count(LAUNCH);
  graph_node();
  return OK;
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *stub, void **a) {
  return cudaLaunchKernel(stub, c->gridDim, c->blockDim, a, c->dynamicSmemBytes, c->stream);
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t call, void *data) {
  call(data);
  return OK;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t call, void *data, unsigned flags) {
  call(s, OK, data);
  return OK;
}
API cudaError_t cudaFuncSetAttribute(const void *stub, enum cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return OK;
  if ((size_t)value > most_shared_memory()) {
    snprintf(last_error, sizeof last_error, "%d bytes of shared memory are more than sm_%d's", value, capability());
    return cudaErrorInvalidValue;
  }
  pthread_mutex_lock(&lock);
  kernel(stub)->shared_memory = value;
  pthread_mutex_unlock(&lock);
  return OK;
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *stub) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = capability();
  a->maxDynamicSharedSizeBytes = 49152;
  return OK;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned g) {
  *n = 2;
  return OK;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) {
  *n = 2;
  return OK;
}

/* --- device -------------------------------------------------------------------------------- */

static __thread int current;
API cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, OK; }
API cudaError_t cudaGetDevice(int *device) { return *device = current, OK; }
API cudaError_t cudaSetDevice(int device) {
  if (device) return snprintf(last_error, sizeof last_error, "invalid device ordinal"), cudaErrorInvalidDevice;
  return OK;
}
API cudaError_t cudaDeviceSynchronize(void) { return host_waits("cudaDeviceSynchronize"), OK; }
API cudaError_t cudaDriverGetVersion(int *version) { return *version = 12060, OK; }
API cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 12060, OK; }
API cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, OK; }
API cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return OK; }
API cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  snprintf(id, size, "0000:01:00.0");
  return OK;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return OK;
}
API cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", card_name());
  p->totalGlobalMem = card_memory();
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = (int)setting("NULLGPU_SMS", 82);
  p->maxThreadsPerMultiProcessor = capability() == 86 || capability() == 89 ? 1536 : 2048;
  p->l2CacheSize = (int)setting("NULLGPU_L2", 6291456);
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = most_shared_memory();
  p->sharedMemPerMultiprocessor = most_shared_memory() + 1024;
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxBlocksPerMultiProcessor = 16;
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  p->texturePitchAlignment = 32;
  p->clockRate = 1695000;
  p->memoryClockRate = 9751000;
  p->memoryBusWidth = 384;
  p->asyncEngineCount = 2;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = 1;
  p->streamPrioritiesSupported = p->managedMemory = p->cooperativeLaunch = 1;
  return OK;
}
API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties_v2(&p, device);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrClockRate: *value = p.clockRate; break;
    case cudaDevAttrMemoryClockRate: *value = p.memoryClockRate; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    default: *value = 0;
  }
  return OK;
}
API cudaError_t cudaGetLastError(void) { return OK; }
API cudaError_t cudaPeekAtLastError(void) { return OK; }
API const char *cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorNullGpu";
}
API const char *cudaGetErrorString(cudaError_t e) {
  return e == OK ? "no error" : e == cudaErrorMemoryAllocation ? "out of memory" : last_error;
}
API cudaError_t cudaProfilerStart(void) { return OK; }
API cudaError_t cudaProfilerStop(void) { return OK; }
API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return OK; }
API cudaError_t cudaGetDriverEntryPoint(const char *name, void **f, unsigned long long flags,
                                        enum cudaDriverEntryPointQueryResult *result) {
  *f = NULL;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return OK;
}

/* --- streams, events, graphs --------------------------------------------------------------- */

typedef struct {
  uint64_t nodes;
} Graph;
static int capturing;
static uint64_t nodes, capture_id;
void graph_node(void) {
  if (capturing) nodes++;
}
static enum cudaStreamCaptureStatus capture_status(void) {
  return capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

API cudaError_t cudaStreamCreate(cudaStream_t *s) { return *s = malloc(16), OK; }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int p) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamDestroy(cudaStream_t s) { return OK; }
API cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return *priority = 0, OK; }
API cudaError_t cudaStreamQuery(cudaStream_t s) { return OK; }
API cudaError_t cudaStreamSynchronize(cudaStream_t s) { return host_waits("cudaStreamSynchronize"), OK; }
API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return OK; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  return *status = capture_status(), OK;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  capturing = 1;
  nodes = 0;
  capture_id++;
  return OK;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  capturing = 0;
  Graph *made = malloc(sizeof *made);
  made->nodes = nodes;
  *graph = (cudaGraph_t)made;
  return OK;
}
API cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **dependencies, size_t *num) {
  *status = capture_status();
  if (id) *id = capture_id;
  if (num) *num = 0;
  return OK;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *out, size_t *num) {
  return *num = ((Graph *)graph)->nodes, OK;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
  return *exec = (cudaGraphExec_t)graph, OK;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
  return *exec = (cudaGraphExec_t)graph, OK;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) { return count(GRAPH_LAUNCH), OK; }
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return OK; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return OK; }
API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags) { return OK; }

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
  return *e = calloc(1, sizeof(struct timespec)), OK;
}
API cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), OK; }
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  clock_gettime(CLOCK_MONOTONIC, (struct timespec *)e);
  return OK;
}
API cudaError_t cudaEventQuery(cudaEvent_t e) { return OK; }
API cudaError_t cudaEventSynchronize(cudaEvent_t e) { return host_waits("cudaEventSynchronize"), OK; }
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  struct timespec *x = (struct timespec *)a, *y = (struct timespec *)b;
  *ms = (y->tv_sec - x->tv_sec) * 1e3f + (y->tv_nsec - x->tv_nsec) * 1e-6f;
  return OK;
}

/* --- what counters.py asks ----------------------------------------------------------------- */

extern void nullgpu_reset_products(void);
API uint64_t nullgpu_count(int i) { return counts[i]; }
API const char *nullgpu_name(int i) { return i < NUM_COUNTERS ? NAMES[i] : NULL; }
API void nullgpu_on_wait(wait_callback call) { on_wait = call; }
API void nullgpu_add(int i) {
  count(i);
  if (i == DRIVER_LAUNCH) graph_node();
}
API void nullgpu_reset(void) {
  memset(counts, 0, sizeof counts);
  for (size_t i = 0; i < capacity; i++) table[i].launches = 0;
  nullgpu_reset_products();
}
API void nullgpu_kernels(void (*call)(const char *name, uint64_t launches)) {
  for (size_t i = 0; i < capacity; i++)
    if (table[i].launches) call(table[i].name ? table[i].name : "?", table[i].launches);
}
