/*
 * mix(x): a number that looks random and follows from x alone: the last steps of MurmurHash3. All
 * that the workloads store is made of it, so that all of it can be checked.
 */
#ifndef DOLLY_MIX_H
#define DOLLY_MIX_H

#include <stdint.h>

static inline uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

#endif
