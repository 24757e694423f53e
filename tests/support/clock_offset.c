// Preloaded into a server: its wall clock, and nothing else, is off by the seconds that a shared file says.
//
// Waits until a moment of that clock are given to the kernel by the kernel's own.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

typedef long (*syscall_function)(long, long, long, long, long, long, long);

static volatile const long* offset;
static syscall_function next_syscall;

__attribute__((constructor)) static void begin(void) {
    next_syscall = (syscall_function)dlsym(RTLD_NEXT, "syscall");
    int file = open(getenv("CLOCK_OFFSET_FILE"), O_RDONLY);
    void* page = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (page == MAP_FAILED)
        abort();
    offset = page;
}

static long seconds(void) { return offset ? *offset : 0; }

int clock_gettime(clockid_t clock, struct timespec* now) {
    if (!next_syscall)
        next_syscall = (syscall_function)dlsym(RTLD_NEXT, "syscall");
    int result = (int)next_syscall(SYS_clock_gettime, clock, (long)now, 0, 0, 0, 0);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += seconds();
    return result;
}

int gettimeofday(struct timeval* now, void* zone) {
    (void)zone;
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t* result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result)
        *result = now.tv_sec;
    return now.tv_sec;
}

// Declared as variadic in unistd.h, which comes to the same for words.
long every_syscall(long number, long a, long b, long c, long d, long e, long f) __asm__("syscall");

long every_syscall(long number, long a, long b, long c, long d, long e, long f) {
    if (number == SYS_futex && d && (b & FUTEX_CLOCK_REALTIME)) {
        struct timespec until = *(const struct timespec*)d;
        until.tv_sec -= seconds();
        return next_syscall(number, a, b, c, (long)&until, e, f);
    }
    return next_syscall(number, a, b, c, d, e, f);
}
