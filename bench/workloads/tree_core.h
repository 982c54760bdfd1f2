/*
 * What the features of tree.c share: the processes and their parents, the board on which they
 * report, and pages whose content can be checked.
 *
 * A feature is something that a checkpoint must carry over: a pipe with data in it, a pending
 * signal, a mapping. Its functions are called in every process and act in those it is about:
 *
 *     setup()   in process 0 before any fork: what the processes inherit
 *     begin()   in every process once all of them exist
 *     step()    in every process, at every beat of its main loop: use it, and notice faults
 *     check()   in every process when CHECK asks for it: look at all of it
 *
 * A fault is noted once, by bad(), and stays: CHECK also tells what went wrong between two checks.
 */
#ifndef DOLLY_TREE_CORE_H
#define DOLLY_TREE_CORE_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "line_server.h"
#include "mix.h"

enum {
	PROCESSES = 8,
	THREADS = 4,
	FEATURES_MAX = 48,
	REASON_BYTES = 128,
	BEAT_NS = 10 * 1000 * 1000,
	PAGE_BYTES = 4096,
	PAGE_WORDS = PAGE_BYTES / 8,
	USER_UID = 1000,
};

/*
 *     0 ─┬─ 1 ─┬─ 4 ─── 7
 *        │     └─ 6
 *        ├─ 2 ─── 5          2 leads a session, 5 a process group in it
 *        └─ 3                3 leads a process group
 *
 * 5 runs as another user if asked to. 6 forks children of a short life.
 */
static const int parent_of[PROCESSES] = {-1, 0, 0, 0, 1, 2, 1, 4};

struct feature {
	const char *name;
	void (*setup)(void);
	void (*begin)(void);
	void (*step)(void);
	void (*check)(void);
};

/* Shared by all processes. The anonymous shared memory below it is itself a feature. */
struct board {
	atomic_uint check_wanted;           /* the number of the last CHECK */
	atomic_uint check_done[PROCESSES];  /* the last one that each process is through with */
	atomic_int begun;                   /* processes that are through with begin() */
	atomic_int corrupt;                 /* 1: process 0 falsifies a byte of its memory, once */
	pid_t pids[PROCESSES];
	atomic_uint_fast64_t beats[PROCESSES][THREADS];
	atomic_uint_fast64_t progress[FEATURES_MAX];
	char reasons[FEATURES_MAX][PROCESSES][REASON_BYTES];
};

static struct board *board;
static const char *directory = "/tmp"; /* where the features make their files */
static int who;                        /* the number of this process */
static unsigned feature_index;         /* of the feature whose function is running */
static uint64_t beat;                  /* of this process */
static int beyond_criu;                /* also use what CRIU is known to lose */

__attribute__((format(printf, 1, 2))) static inline void bad(const char *format, ...)
{
	char *reason = board->reasons[feature_index][who];
	va_list arguments;

	if (*reason)
		return;
	va_start(arguments, format);
	vsnprintf(reason, REASON_BYTES, format, arguments);
	va_end(arguments);
}

/* For setup and begin: without what it asks for there is nothing to test. */
static inline void need(int fine, const char *what)
{
	if (!fine)
		die(what);
}

static inline void progress(void)
{
	atomic_fetch_add(&board->progress[feature_index], 1);
}

static inline const char *path_of(const char *name)
{
	static char path[PATH_MAX];

	snprintf(path, sizeof path, "%s/tree-%s", directory, name);
	return path;
}

static inline void *map_anonymous(size_t bytes, int sharing)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);

	need(at != MAP_FAILED, "mmap");
	return at;
}

static inline int64_t monotonic_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- pages whose content follows from (salt, number, version) ---- */

static inline void page_fill(uint64_t *words, uint64_t salt, uint64_t number, uint64_t version)
{
	uint64_t base = mix(salt ^ mix(number << 32 ^ version));

	for (unsigned i = 0; i < PAGE_WORDS; i++)
		words[i] = mix(base + i);
}

static inline int page_is(const uint64_t *words, uint64_t salt, uint64_t number, uint64_t version)
{
	uint64_t expected[PAGE_WORDS];

	page_fill(expected, salt, number, version);
	return !memcmp(words, expected, PAGE_BYTES);
}

/* ---- a mutex of several processes; robust, so that a lost holder is noticed ---- */

static inline void shared_mutex(pthread_mutex_t *mutex)
{
	pthread_mutexattr_t attributes;

	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	need(!pthread_mutex_init(mutex, &attributes), "pthread_mutex_init");
}

static inline int shared_lock(pthread_mutex_t *mutex)
{
	int error = pthread_mutex_lock(mutex);

	if (error)
		bad("mutex: %s", strerror(error));
	return !error;
}

#endif
