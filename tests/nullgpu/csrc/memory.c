/* Device memory: host memory that is mapped when it is first touched, limited to the card's size. */
#include "nullgpu.h"
#include <sys/mman.h>
#define CUDARTAPI
#include <cuda_runtime_api.h>

#define OK cudaSuccess
#define CONTEXT (400ull << 20) /* bytes that a CUDA context takes */
#define PAGE 4096ull
#define BUCKETS 4096

typedef struct Block {
  char *at;
  size_t size, asked;
  int is_host;
  struct Block *next;
} Block;

static Block *blocks[BUCKETS];
static uint64_t bytes_used;

static Block **bucket(const void *at) { return &blocks[((uintptr_t)at / PAGE) % BUCKETS]; }
static size_t pages(size_t bytes) { return bytes ? (bytes + PAGE - 1) / PAGE * PAGE : PAGE; }

static void add_block(void *at, size_t size, size_t asked, int is_host) {
  Block *block = malloc(sizeof *block);
  *block = (Block){at, size, asked, is_host, *bucket(at)};
  *bucket(at) = block;
}

/* Removes the block that starts there, and returns it; the caller frees it. */
static Block *take_block(void *at) {
  for (Block **link = bucket(at); *link; link = &(*link)->next)
    if ((*link)->at == at) {
      Block *block = *link;
      *link = block->next;
      return block;
    }
  return NULL;
}

static Block *block_with(const void *p) {
  for (int i = 0; i < BUCKETS; i++)
    for (Block *block = blocks[i]; block; block = block->next)
      if ((char *)p >= block->at && (char *)p < block->at + block->size) return block;
  return NULL;
}

int is_pinned(const void *host) {
  pthread_mutex_lock(&lock);
  Block *block = block_with(host);
  pthread_mutex_unlock(&lock);
  return block && block->is_host;
}

API cudaError_t cudaMalloc(void **p, size_t bytes) {
  pthread_mutex_lock(&lock);
  void *at = MAP_FAILED;
  if (bytes_used + bytes + CONTEXT <= card_memory())
    at = mmap(NULL, pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at != MAP_FAILED) {
    add_block(at, pages(bytes), bytes, 0);
    bytes_used += bytes;
    count(MALLOC);
    *p = at;
  }
  pthread_mutex_unlock(&lock);
  return at == MAP_FAILED ? cudaErrorMemoryAllocation : OK;
}

API cudaError_t cudaFree(void *p) {
  pthread_mutex_lock(&lock);
  Block *block = p ? take_block(p) : NULL;
  if (block) {
    munmap(block->at, block->size);
    bytes_used -= block->asked;
    count(FREE);
  }
  pthread_mutex_unlock(&lock);
  free(block);
  return OK;
}

/* For the driver's virtual memory, which the allocator's expandable segments use. */
API int nullgpu_take(size_t bytes) {
  pthread_mutex_lock(&lock);
  int fits = bytes_used + bytes + CONTEXT <= card_memory();
  if (fits) {
    bytes_used += bytes;
    count(MALLOC);
  }
  pthread_mutex_unlock(&lock);
  return fits;
}
API void nullgpu_give_back(size_t bytes) {
  pthread_mutex_lock(&lock);
  bytes_used -= bytes;
  count(FREE);
  pthread_mutex_unlock(&lock);
}
API void *nullgpu_reserve(size_t bytes) {
  void *at = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return NULL;
  pthread_mutex_lock(&lock);
  add_block(at, bytes, 0, 0);
  pthread_mutex_unlock(&lock);
  return at;
}

API cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t s) { return cudaMalloc(p, bytes); }
API cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
API cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
  *total = card_memory();
  *left = *total - bytes_used - CONTEXT;
  return OK;
}

API cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
  if (posix_memalign(p, PAGE, pages(bytes))) return cudaErrorMemoryAllocation;
  pthread_mutex_lock(&lock);
  add_block(*p, pages(bytes), bytes, 1);
  pthread_mutex_unlock(&lock);
  return OK;
}
API cudaError_t cudaFreeHost(void *p) {
  pthread_mutex_lock(&lock);
  Block *block = take_block(p);
  pthread_mutex_unlock(&lock);
  free(block);
  free(p);
  return OK;
}
API cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags) { return OK; }
API cudaError_t cudaHostUnregister(void *p) { return OK; }
API cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
  *device = host;
  return OK;
}
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  pthread_mutex_lock(&lock);
  Block *block = block_with(p);
  pthread_mutex_unlock(&lock);
  a->type = !block ? cudaMemoryTypeUnregistered : block->is_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  a->devicePointer = (void *)p;
  if (block && block->is_host) a->hostPointer = (void *)p;
  return OK;
}

/* Larger copies are counted and not made, or weights of gigabytes would fill the host's memory. */
static size_t most_copied(void) { return setting("NULLGPU_MOST_COPIED", 1ull << 20); }

void copy_bytes(void *to, const void *from, size_t bytes) {
  if (bytes && bytes <= most_copied()) memmove(to, from, bytes);
}
static void copied(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  count(kind == cudaMemcpyHostToDevice ? COPY_H2D : kind == cudaMemcpyDeviceToHost ? COPY_D2H : COPY_D2D);
  copy_bytes(to, from, bytes);
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  copied(to, from, bytes, kind);
  host_waits("cudaMemcpy");
  return OK;
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t s) {
  copied(to, from, bytes, kind);
  graph_node();
  /* To pageable memory the driver waits for the stream; from there only for its own staging. */
  if (kind == cudaMemcpyDeviceToHost && !is_pinned(to)) host_waits("cudaMemcpyAsync to pageable memory");
  return OK;
}
API cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t s) {
  copied(to, from, bytes, cudaMemcpyDeviceToDevice);
  return OK;
}
API cudaError_t cudaMemset(void *p, int value, size_t bytes) {
  count(MEMSET);
  graph_node();
  if (bytes <= most_copied()) memset(p, value, bytes);
  return OK;
}
API cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s) { return cudaMemset(p, value, bytes); }

API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
  *pool = (cudaMemPool_t)1;
  return OK;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr a, void *value) { return OK; }
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr a, void *value) {
  memset(value, 0, 8);
  return OK;
}
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const struct cudaMemAccessDesc *l, size_t n) { return OK; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t bytes) { return OK; }
API cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *h, void *p) { return cudaErrorNotSupported; }
API cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t h, unsigned f) { return cudaErrorNotSupported; }
API cudaError_t cudaIpcCloseMemHandle(void *p) { return OK; }
API cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *h, cudaEvent_t e) { return cudaErrorNotSupported; }
API cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *e, cudaIpcEventHandle_t h) { return cudaErrorNotSupported; }
