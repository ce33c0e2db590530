/* A CUDA driver for tests: "device memory" is a file in /dev/shm, which both sides map. It has the functions that
   lossgrad_server/shared_memory/cuda_driver.py calls, with the signatures of cuda.h, and fails as a handle says.

   A handle: 32 bytes of the file's name, a byte that says what goes wrong, zeros. */

#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
typedef struct { char reserved[64]; } CUipcMemHandle;

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
       ILLEGAL_ADDRESS = 700 };
enum { NOTHING = 0, COPY_FAILS = 1, COPY_HANGS = 2, COPY_CRASHES = 3, OPEN_CRASHES = 4, OPEN_HANGS = 5 };
enum { DEVICES = 2, MOST = 64, HANGING = 0xEE };

static struct { char *memory; size_t bytes; int fault; int opened; } regions[MOST];
static int is_initialised, current = -1, contexts[DEVICES];

static void hang(void) { for (;;) pause(); }

CUresult cuInit(unsigned flags) { is_initialised = flags == 0; return flags ? INVALID_VALUE : SUCCESS; }

CUresult cuDeviceGet(int *device, int ordinal) {
    if (!is_initialised) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = &contexts[device]; return SUCCESS; }

CUresult cuCtxSetCurrent(void *context) { current = (int)((int *)context - contexts); return SUCCESS; }

CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned flags) {
    char path[64] = "/dev/shm/";
    struct stat status;
    if (current < 0) return INVALID_CONTEXT;
    if (flags != 1) return INVALID_VALUE;
    if (handle.reserved[32] == OPEN_CRASHES) abort();
    if (handle.reserved[32] == OPEN_HANGS) hang();
    if (!handle.reserved[0] || memchr(handle.reserved, '/', 32)) return INVALID_HANDLE;
    strncat(path, handle.reserved, 32);
    int file = open(path, O_RDWR);
    if (file < 0 || fstat(file, &status)) return INVALID_HANDLE;
    for (int i = 0; i < MOST; i++) {
        if (regions[i].opened) continue;
        regions[i].memory = mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        regions[i].bytes = status.st_size;
        regions[i].fault = handle.reserved[32];
        regions[i].opened = 1;
        close(file);
        *address = (CUdeviceptr)(uintptr_t)regions[i].memory;
        return SUCCESS;
    }
    return INVALID_VALUE;
}

static int find(CUdeviceptr address, size_t bytes) {
    char *at = (char *)(uintptr_t)address;
    for (int i = 0; i < MOST; i++)
        if (regions[i].opened && at >= regions[i].memory && at + bytes <= regions[i].memory + regions[i].bytes) return i;
    return -1;
}

CUresult cuIpcCloseMemHandle(CUdeviceptr address) {
    int i = find(address, 0);
    if (i < 0) return INVALID_VALUE;
    munmap(regions[i].memory, regions[i].bytes);
    regions[i].opened = 0;
    return SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    int i = find(address, 0);
    if (i < 0) return INVALID_VALUE;
    *base = (CUdeviceptr)(uintptr_t)regions[i].memory;
    *bytes = regions[i].bytes;
    return SUCCESS;
}

static CUresult copy(CUdeviceptr device, size_t bytes, void *to, const void *from) {
    int i = find(device, bytes);
    if (i < 0) return INVALID_VALUE;
    if (regions[i].fault == COPY_FAILS) return ILLEGAL_ADDRESS;
    if (regions[i].fault == COPY_CRASHES) abort();
    if (regions[i].fault == COPY_HANGS) { regions[i].memory[0] = (char)HANGING; hang(); }
    memcpy(to, from, bytes);
    return SUCCESS;
}

/* As cuda.h says of pageable memory: what is written was taken when this returns, and need not have arrived. */
static struct { CUdeviceptr to; size_t bytes; void *from; } underway;

CUresult cuCtxSynchronize(void) {
    CUresult result = SUCCESS;
    if (current < 0) return INVALID_CONTEXT;
    if (underway.from) result = copy(underway.to, underway.bytes, (void *)(uintptr_t)underway.to, underway.from);
    free(underway.from);
    underway.from = NULL;
    return result;
}

CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    CUresult result = cuCtxSynchronize();
    return result ? result : copy(from, bytes, to, (const void *)(uintptr_t)from);
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    CUresult result = cuCtxSynchronize();
    if (result || !bytes) return result;
    underway.to = to;
    underway.bytes = bytes;
    underway.from = malloc(bytes);
    memcpy(underway.from, from, bytes);
    return SUCCESS;
}
