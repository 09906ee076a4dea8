/* What libtorch asks of CUDA's runtime and driver, for bench/deviceless.py: there is one device, of BYTES of memory and
   capability MAJOR.MINOR; nothing can be launched. */
#include <string.h>

#define GIVES(name, type, value) int name(type *x, ...) { *x = value; return 0; }
GIVES(cudaGetDeviceCount, int, 1)
GIVES(cudaGetDevice, int, 0)
GIVES(cudaDriverGetVersion, int, 13000)
GIVES(cudaRuntimeGetVersion, int, 13000)
GIVES(cudaEventCreateWithFlags, void *, (void *)1)
GIVES(cudaStreamCreateWithPriority, void *, (void *)1)
GIVES(cudaEventElapsedTime, float, 1)
GIVES(cudaDeviceCanAccessPeer, int, 0)
int cudaDeviceGetStreamPriorityRange(int *x, int *y) { *x = *y = 0; return 0; }
int cudaMemGetInfo(size_t *x, size_t *y) { *x = *y = BYTES; return 0; }
int cudaStreamIsCapturing(void *s, int *x) { *x = 0; return 0; }
int cudaStreamGetPriority(void *s, int *x) { *x = 0; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *x, int *y) { *x = *y = 0; return 0; }
int cuGetErrorString(int e, const char **x) { *x = "stub"; return 0; }

int cudaGetDeviceProperties(char *x, int d) { /* places of CUDA 12 and 13 */
    memset(x, 0, 800);
    *(size_t *)(x + 288) = BYTES;
    *(int *)(x + 308) = 32; /* threads of a warp */
    *(int *)(x + 360) = MAJOR;
    *(int *)(x + 364) = MINOR;
    return 0;
}
int cudaGetDeviceProperties_v2(char *x, int d) { return cudaGetDeviceProperties(x, d); }

#define NOTHING(name) int name() { return 0; }
NOTHING(cudaSetDevice)
NOTHING(cudaGetLastError)
NOTHING(cudaPeekAtLastError)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaStreamSynchronize)
NOTHING(cudaStreamQuery)
NOTHING(cudaStreamWaitEvent)
NOTHING(cudaThreadExchangeStreamCaptureMode)
NOTHING(cudaEventDestroy)
NOTHING(cudaEventQuery)
NOTHING(cudaEventRecord)
NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaEventSynchronize)
