/* cuBLAS, cuBLASLt and NCCL: matrix products are counted with their FLOPs, collectives of one rank
 * copy. */
#include "nullgpu.h"

/* --- cuBLAS -------------------------------------------------------------------------------- */

static double flops;
static int product(double m, double n, double k) {
  count(GEMM);
  graph_node();
  pthread_mutex_lock(&lock);
  flops += 2 * m * n * k;
  pthread_mutex_unlock(&lock);
  return 0;
}
API double nullgpu_flops(void) { return flops; }
void nullgpu_reset_products(void) { flops = 0; }

API int cublasCreate_v2(void **h) { return *h = malloc(64), 0; }
API int cublasDestroy_v2(void *h) { return 0; }
API int cublasGetMathMode(void *h, int *mode) { return *mode = 0, 0; }
API int cublasSetMathMode(void *h, int mode) { return 0; }
API int cublasGetPointerMode_v2(void *h, int *mode) { return *mode = 0, 0; }
API int cublasSetPointerMode_v2(void *h, int mode) { return 0; }
API int cublasSetStream_v2(void *h, void *s) { return 0; }
API int cublasSetWorkspace_v2(void *h, void *w, size_t n) { return 0; }
/* Of a batched product one member's FLOPs are counted: the batch is a later argument. */
API int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k) { return product(m, n, k); }
API int cublasSgemm_v2(void *h, int ta, int tb, int m, int n, int k) { return product(m, n, k); }
API int cublasSgemmEx(void *h, int ta, int tb, int m, int n, int k) { return product(m, n, k); }
API int cublasDgemm_v2(void *h, int ta, int tb, int m, int n, int k) { return product(m, n, k); }
API int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k) { return product(m, n, k); }
API int cublasSgemmStridedBatched(void *h, int ta, int tb, int m, int n, int k) { return product(m, n, k); }
API int cublasSgemv_v2(void *h, int t, int m, int n) { return product(m, n, 1); }
API int cublasSdot_v2(void *h, int n) { return product(n, 1, 1); }
API int cublasDotEx(void *h, int n) { return product(n, 1, 1); }

/* --- cuBLASLt ------------------------------------------------------------------------------ */

typedef struct {
  uint64_t rows, columns;
  char rest[240];
} Layout;
typedef struct {
  int transposes_a;
  char rest[252];
} Product;
#define TRANSPOSE_A 3 /* CUBLASLT_MATMUL_DESC_TRANSA */

API int cublasLtMatmulDescCreate(void **d, int compute, int scale) { return *d = calloc(1, sizeof(Product)), 0; }
API int cublasLtMatmulDescDestroy(void *d) { return free(d), 0; }
API int cublasLtMatmulDescSetAttribute(Product *d, int attribute, const void *value, size_t size) {
  if (attribute == TRANSPOSE_A && size == 4) d->transposes_a = *(const int *)value;
  return 0;
}
API int cublasLtMatmulPreferenceCreate(void **p) { return *p = calloc(1, 256), 0; }
API int cublasLtMatmulPreferenceDestroy(void *p) { return free(p), 0; }
API int cublasLtMatmulPreferenceSetAttribute(void *p, int attribute, const void *value, size_t size) { return 0; }
API int cublasLtMatrixLayoutCreate(void **l, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  Layout *made = calloc(1, sizeof *made);
  made->rows = rows;
  made->columns = columns;
  return *l = made, 0;
}
API int cublasLtMatrixLayoutDestroy(void *l) { return free(l), 0; }
API int cublasLtMatrixLayoutSetAttribute(void *l, int attribute, const void *value, size_t size) { return 0; }
API int cublasLtMatmulAlgoGetHeuristic(void *h, void *product, void *a, void *b, void *c, void *d, void *preference,
                                       int wanted, char *results, int *found) {
  memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t without workspace */
  return *found = 1, 0;
}
API int cublasLtMatmul(void *h, Product *p, const void *alpha, const void *A, Layout *a, const void *B, Layout *b,
                       const void *beta, const void *C, Layout *c, void *D, Layout *d) {
  return product(d->rows, d->columns, p->transposes_a ? a->rows : a->columns);
}

/* --- NCCL, for one rank -------------------------------------------------------------------- */

typedef struct {
  int rank, size;
} Communicator;
typedef struct {
  char bytes[128];
} UniqueId;

API int ncclGetVersion(int *version) { return *version = 22602, 0; }
API int ncclGetUniqueId(UniqueId *id) { return memset(id, 0, sizeof *id), 0; }
API int ncclCommInitRank(void **c, int size, UniqueId id, int rank) {
  Communicator *made = malloc(sizeof *made);
  *made = (Communicator){rank, size};
  return *c = made, 0;
}
API int ncclCommInitRankConfig(void **c, int size, UniqueId id, int rank, void *config) {
  return ncclCommInitRank(c, size, id, rank);
}
API int ncclCommInitRankScalable(void **c, int size, int rank, int num_ids, void *ids, void *config) {
  UniqueId id = {{0}};
  return ncclCommInitRank(c, size, id, rank);
}
API int ncclCommCount(Communicator *c, int *size) { return *size = c->size, 0; }
API int ncclCommUserRank(Communicator *c, int *rank) { return *rank = c->rank, 0; }
API int ncclCommDestroy(void *c) { return 0; }
API int ncclCommAbort(void *c) { return 0; }
API int ncclCommFinalize(void *c) { return 0; }
API int ncclCommGetAsyncError(void *c, int *error) { return *error = 0, 0; }
API int ncclCommRegister(void *c, void *buffer, size_t bytes, void **handle) { return *handle = NULL, 0; }
API int ncclCommDeregister(void *c, void *handle) { return 0; }
API const char *ncclGetErrorString(int error) { return "error of the null GPU"; }
API const char *ncclGetLastError(void *c) { return ""; }
API int ncclGroupStart(void) { return 0; }
API int ncclGroupEnd(void) { return 0; }

static int collective(const void *sent, void *received, size_t elements, int type) {
  static const size_t SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2}; /* ncclDataType_t */
  count(COLLECTIVE);
  if (sent != received) copy_bytes(received, sent, elements * (type < 10 ? SIZES[type] : 1));
  return 0;
}
API int ncclAllReduce(const void *s, void *r, size_t n, int t, int op, void *c, void *st) { return collective(s, r, n, t); }
API int ncclBroadcast(const void *s, void *r, size_t n, int t, int root, void *c, void *st) { return collective(s, r, n, t); }
API int ncclBcast(void *r, size_t n, int t, int root, void *c, void *st) { return collective(r, r, n, t); }
API int ncclReduce(const void *s, void *r, size_t n, int t, int op, int o, void *c, void *st) { return collective(s, r, n, t); }
API int ncclAllGather(const void *s, void *r, size_t n, int t, void *c, void *st) { return collective(s, r, n, t); }
API int ncclReduceScatter(const void *s, void *r, size_t n, int t, int op, void *c, void *st) { return collective(s, r, n, t); }
API int ncclSend(void) { return 0; }
API int ncclRecv(void) { return 0; }
