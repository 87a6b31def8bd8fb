/* Makes fdatasync and fsync wait for as long as a file exists: a disk that stalls without an error. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int stalled(const char *name, int file) {
    const char *flag = getenv("STALL_WHILE");
    while (flag && access(flag, F_OK) == 0) {
        usleep(10000);
    }
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return sync(file);
}

int fdatasync(int file) { return stalled("fdatasync", file); }
int fsync(int file) { return stalled("fsync", file); }
