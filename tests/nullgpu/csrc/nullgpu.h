/* What the two libraries share: the card, the counters, and the call that reports a wait. */
#ifndef NULLGPU_H
#define NULLGPU_H
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum counter {
  LAUNCH, DRIVER_LAUNCH, GEMM, MEMSET, COPY_H2D, COPY_D2H, COPY_D2D,
  WAIT, COLLECTIVE, GRAPH_LAUNCH, MALLOC, FREE, MODULE, NUM_COUNTERS
};

extern uint64_t counts[NUM_COUNTERS];
extern pthread_mutex_t lock;
extern char last_error[512];

size_t setting(const char *name, size_t otherwise);
int capability(void);
size_t card_memory(void);
size_t most_shared_memory(void);
void count(enum counter one);
void graph_node(void); /* counts an operation of a graph that is being captured */
void host_waits(const char *call);
int is_pinned(const void *host);
void copy_bytes(void *to, const void *from, size_t bytes);

#endif
