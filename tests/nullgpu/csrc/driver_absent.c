/* Calls of libcuda.so.1 that torch links against, and that nothing here makes. Without cuda.h, whose
 * declarations these would contradict. */
#define NOT_SUPPORTED 801
#define ABSENT(name) int name(void) { return NOT_SUPPORTED; }
ABSENT(cuMemExportToShareableHandle)
ABSENT(cuMemImportFromShareableHandle)
ABSENT(cuMemRetainAllocationHandle)
ABSENT(cuMemsetD32Async)
ABSENT(cuMulticastAddDevice)
ABSENT(cuMulticastBindMem)
ABSENT(cuMulticastCreate)
ABSENT(cuStreamWriteValue32)
ABSENT(cuStreamWriteValue32_v2)
ABSENT(cuLinkAddData_v2)
int cuTensorMapEncodeTiled(void) { return 0; }
