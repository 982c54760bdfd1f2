/*
 * busy_memory: the workload memory (bench/workloads/memory.c), with the same arguments and answers,
 * whose writer is bound by its processor: what it writes takes long to compute. So it writes less
 * when it gets less time, where the other one makes up for what it has missed.
 */
#define _GNU_SOURCE
#include "../../../bench/workloads/mix.h"

enum { TURNS = 25 }; /* some 40 us a page */

static uint64_t mix_in_turns(uint64_t x)
{
	for (int turn = 0; turn < TURNS; turn++)
		x = mix(x);
	return x;
}

#define mix mix_in_turns
#undef _GNU_SOURCE /* it defines it itself */
#include "../../../bench/workloads/memory.c"
