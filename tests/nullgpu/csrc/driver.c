/* libcuda.so.1: what Triton and torch ask of the driver. Cubins are checked for their SM. */
#include "nullgpu.h"
#include <cuda.h>
#include <dlfcn.h>
#include <sys/mman.h>

#define OK CUDA_SUCCESS
#define MOST_FUNCTIONS 65536

/* Of the preloaded library, which a process without it, such as ptxas, lacks. */
extern int cudaDeviceGetAttribute(int *value, int attribute, int device) __attribute__((weak));
extern int cudaFree(void *p) __attribute__((weak));
extern void nullgpu_add(int counter) __attribute__((weak));
extern int nullgpu_take(size_t bytes) __attribute__((weak));
extern void nullgpu_give_back(size_t bytes) __attribute__((weak));
extern void *nullgpu_reserve(size_t bytes) __attribute__((weak));

typedef struct {
  char name[200];
  uint64_t launches;
} Function;
static Function *functions[MOST_FUNCTIONS];
static int num_functions;

CUresult cuInit(unsigned flags) { return OK; }
CUresult cuDriverGetVersion(int *version) { return *version = 12060, OK; }
CUresult cuDeviceGet(CUdevice *device, int i) { return *device = i, OK; }
CUresult cuDeviceGetCount(int *n) { return *n = 1, OK; }
CUresult cuDeviceGetName(char *name, int size, CUdevice d) { return snprintf(name, size, "null GPU"), OK; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice d) {
  *value = 0;
  if (cudaDeviceGetAttribute) cudaDeviceGetAttribute(value, (int)attribute, d);
  return OK;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return *c = (CUcontext)1, OK; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice d) { return OK; }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  return *active = 1, OK;
}
CUresult cuCtxGetCurrent(CUcontext *c) { return *c = (CUcontext)1, OK; }
CUresult cuCtxSetCurrent(CUcontext c) { return OK; }
CUresult cuCtxGetDevice(CUdevice *d) { return *d = 0, OK; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, OK; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return OK; }
CUresult cuGetErrorString(CUresult e, const char **text) { return *text = "error of the null GPU", OK; }
CUresult cuGetErrorName(CUresult e, const char **text) { return *text = "CUDA_ERROR_NULLGPU", OK; }

static int sm_of(const unsigned char *image) { /* in e_flags of the ELF header; 0 if it is none */
  uint32_t flags;
  if (image[0] != 0x7f || image[1] != 'E') return 0;
  memcpy(&flags, image + 48, sizeof flags);
  return flags & 0xff;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const char *text = getenv("NULLGPU_CAPABILITY");
  int card = text ? atoi(text) : 86, sm = sm_of(image);
  if (nullgpu_add) nullgpu_add(MODULE);
  if (sm && sm / 10 != card / 10) {
    fprintf(stderr, "null GPU: a cubin of sm_%d on a card of sm_%d\n", sm, card);
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  return *module = (CUmodule)1, OK;
}
CUresult cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned n, CUjit_option *o, void **v) {
  return cuModuleLoadData(m, image);
}
CUresult cuModuleUnload(CUmodule m) { return OK; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  Function *made = calloc(1, sizeof *made);
  snprintf(made->name, sizeof made->name, "%s", name);
  if (num_functions < MOST_FUNCTIONS) functions[num_functions++] = made;
  return *f = (CUfunction)made, OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0, OK;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  int most;
  cuDeviceGetAttribute(&most, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 0);
  int is_shared = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  return is_shared && value > most ? CUDA_ERROR_INVALID_VALUE : OK;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return OK; }

static CUresult launch(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned threads) {
  if (!x || !y || !z || y > 65535 || z > 65535 || !threads || threads > 1024) {
    fprintf(stderr, "null GPU: grid %u %u %u, %u threads of %s\n", x, y, z, threads, ((Function *)f)->name);
    return CUDA_ERROR_INVALID_VALUE;
  }
  ((Function *)f)->launches++;
  if (nullgpu_add) nullgpu_add(DRIVER_LAUNCH);
  return OK;
}
CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **p, void **extra) {
  return launch(f, x, y, z, bx * by * bz);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **extra) {
  return launch(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX * c->blockDimY * c->blockDimZ);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream s, void **p) {
  return launch(f, x, y, z, bx * by * bz);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int b, size_t s) { return *n = 2, OK; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { return *n = 1, OK; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute a, CUdeviceptr p) {
  return memcpy(value, &p, sizeof p), OK;
}
CUresult cuGetProcAddress_v2(const char *name, void **f, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (!*f) {
    void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *f = self ? dlsym(self, name) : NULL;
  }
  return *f ? OK : CUDA_ERROR_NOT_FOUND;
}
/* Virtual memory: addresses are reserved, and become usable when memory is mapped to them. */
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags f) {
  return *size = 2ull << 20, OK;
}
CUresult cuMemAddressReserve(CUdeviceptr *p, size_t size, size_t alignment, CUdeviceptr wanted, unsigned long long f) {
  *p = (CUdeviceptr)nullgpu_reserve(size);
  return *p ? OK : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAddressFree(CUdeviceptr p, size_t size) { return cudaFree((void *)p), OK; }
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *p, unsigned long long f) {
  if (!nullgpu_take(size)) return CUDA_ERROR_OUT_OF_MEMORY;
  return *handle = size, OK; /* its size is all that is known of it */
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) { return nullgpu_give_back(handle), OK; }
CUresult cuMemMap(CUdeviceptr p, size_t size, size_t offset, CUmemGenericAllocationHandle h, unsigned long long f) {
  return mprotect((void *)p, size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : OK;
}
CUresult cuMemUnmap(CUdeviceptr p, size_t size) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  return mmap((void *)p, size, PROT_NONE, flags, -1, 0) == MAP_FAILED ? CUDA_ERROR_INVALID_VALUE : OK;
}
CUresult cuMemSetAccess(CUdeviceptr p, size_t size, const CUmemAccessDesc *d, size_t n) { return OK; }

CUresult cuLinkCreate_v2(unsigned n, CUjit_option *o, void **v, CUlinkState *s) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuLinkComplete(CUlinkState s, void **out, size_t *n) { return CUDA_ERROR_NOT_SUPPORTED; }

void nullcuda_kernels(void (*call)(const char *name, uint64_t launches)) {
  for (int i = 0; i < num_functions; i++)
    if (functions[i]->launches) call(functions[i]->name, functions[i]->launches);
}
void nullcuda_reset(void) {
  for (int i = 0; i < num_functions; i++) functions[i]->launches = 0;
}
