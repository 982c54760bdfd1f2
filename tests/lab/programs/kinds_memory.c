/*
 * kinds_memory: the workload memory (bench/workloads/memory.c), with the same arguments and answers,
 * whose memory is not all alike:
 *
 *     | stack-like: grows downwards | huge pages of hugetlbfs | locked | transparent huge pages … |
 *
 * 2 MiB each, and the rest. The writer and the proof go over all of it.
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

enum { HUGE_BYTES = 2 << 20, SMALL_BYTES = 4096, KINDS = 4 };

static void *mmap_fixed(char *at, size_t bytes, int flags)
{
	return mmap(at, bytes, PROT_READ | PROT_WRITE,
	            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | flags, -1, 0);
}

/* In place of mmap: memory's own for what is too small to have every kind in it. */
static void *mmap_kinds(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
	if (bytes < KINDS * HUGE_BYTES)
		return mmap(at, bytes, protection, flags, fd, offset);
	/* Room below, which the kernel wants under what grows downwards, and for the alignment. */
	char *room = mmap(NULL, bytes + 2 * HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (room == MAP_FAILED)
		return room;
	char *start = (char *)(((uintptr_t)room / HUGE_BYTES + 2) * HUGE_BYTES);
	/* Its highest page alone: the others come when they are first written, by growing to them. */
	if (munmap(start, HUGE_BYTES) ||
	    mmap_fixed(start + HUGE_BYTES - SMALL_BYTES, SMALL_BYTES, MAP_GROWSDOWN) == MAP_FAILED ||
	    mmap_fixed(start + HUGE_BYTES, HUGE_BYTES, MAP_HUGETLB) == MAP_FAILED ||
	    mmap_fixed(start + 2 * HUGE_BYTES, HUGE_BYTES, 0) == MAP_FAILED ||
	    mlock(start + 2 * HUGE_BYTES, HUGE_BYTES) ||
	    mmap_fixed(start + 3 * HUGE_BYTES, bytes - 3 * HUGE_BYTES, 0) == MAP_FAILED)
		return MAP_FAILED;
	return start;
}

#define mmap mmap_kinds
#undef _GNU_SOURCE /* it defines it itself */
#include "../../../bench/workloads/memory.c"
