// How fast this process reads memory: every thread sums its part of a buffer, several times; GB/s of each pass.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    const uint64_t *data;
    size_t count;
    uint64_t sum;
} Part;

static void *sum_part(void *given) {
    Part *part = given;
    uint64_t sums[32] = {0};
    for (size_t i = 0; i + 32 <= part->count; i += 32) {
        __builtin_prefetch(part->data + i + 512);  // 4 KiB ahead
        __builtin_prefetch(part->data + i + 520);
        __builtin_prefetch(part->data + i + 528);
        __builtin_prefetch(part->data + i + 536);
        for (int j = 0; j < 32; j++) sums[j] += part->data[i + j];
    }
    for (int j = 0; j < 32; j++) part->sum += sums[j];
    return NULL;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// gb_s[passes] is filled; returns the sum of everything, or 0 without memory.
uint64_t read_rate(size_t bytes, int threads, int passes, double *gb_s) {
    uint64_t *data = aligned_alloc(1 << 21, bytes);
    if (!data) return 0;
    memset(data, 1, bytes);
    pthread_t ids[64];
    Part parts[64];
    uint64_t sum = 0;
    for (int pass = 0; pass < passes; pass++) {
        double start = now();
        for (int t = 0; t < threads; t++) {
            size_t count = bytes / 8 / threads;
            parts[t] = (Part){data + t * count, count, 0};
            pthread_create(&ids[t], NULL, sum_part, &parts[t]);
        }
        for (int t = 0; t < threads; t++) {
            pthread_join(ids[t], NULL);
            sum += parts[t].sum;
        }
        gb_s[pass] = bytes / (now() - start) / 1e9;
    }
    free(data);
    return sum;
}
