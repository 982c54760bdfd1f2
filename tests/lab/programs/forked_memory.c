/*
 * forked_memory: a process, its threads and its child, with every kind of private memory that a
 * lazy restore has to get right, and which prove on SIGUSR1 that all of it is.
 *
 *     forked_memory MIB REPORT        REPORT.<parent|child> says "ok" or what is wrong, per signal
 *
 * Every word of a page follows from (owner, page). Pages are of four kinds by their number: most
 * have content, every 5th was never touched, every 7th was filled with zeros, every 11th was given
 * up again. The child rewrites every 3rd page; the others it shares with its parent until the
 * restore. A part is read-only, one page is wiped in a fork (MADV_WIPEONFORK), one is locked.
 * After the proof, with the memory still partly missing, it moves, gives up and forks.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, THREADS = 3 };

static uint64_t *memory, *wiped, *locked;
static size_t pages;
static uint64_t owner = 1;
static const char *who = "parent";
static const char *report;
static char problem[200];

static uint64_t mix(uint64_t x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	x ^= x >> 33;
	x *= 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

static uint64_t word(uint64_t page, int at, uint64_t by)
{
	return mix(by << 48 ^ page << 12 ^ (uint64_t)at) | 1;
}

static int is_empty(size_t page)
{
	return page % 5 == 0 || page % 7 == 0 || page % 11 == 0;
}

static void fill(size_t page)
{
	uint64_t *to = memory + page * WORDS;

	if (page % 5 == 0)
		return;
	for (int i = 0; i < WORDS; i++)
		to[i] = page % 7 == 0 ? 0 : word(page, i, owner);
	if (page % 11 == 0)
		madvise(to, PAGE, MADV_DONTNEED);
}

static void complain(const char *what, size_t page)
{
	if (!problem[0])
		snprintf(problem, sizeof problem, "%s, page %zu", what, page);
}

/* `rewritten`: whether the child's changes are there. */
static void check(const uint64_t *base, size_t first, size_t count, int rewritten)
{
	for (size_t page = first; page < first + count; page++) {
		const uint64_t *found = base + (page - first) * WORDS;
		uint64_t by = rewritten && page % 3 == 0 ? 2 : 1;

		for (int i = 0; i < WORDS; i++)
			if (found[i] != (is_empty(page) ? 0 : word(page, i, by))) {
				complain("wrong content", page);
				return;
			}
	}
}

/* What a program goes on to do while its memory is still coming in. */
static void go_on(void)
{
	size_t quarter = pages / 4;
	int status = -1;
	pid_t pid = fork();

	if (!pid) {
		check(memory + quarter * WORDS, quarter, quarter, owner == 2);
		if (wiped[0])
			complain("a forked child found what is wiped in a fork", 0);
		_exit(problem[0] != 0);
	}
	uint64_t *moved = mremap(memory + 2 * quarter * WORDS, quarter * PAGE, 2 * quarter * PAGE,
	                         MREMAP_MAYMOVE);
	if (moved == MAP_FAILED)
		complain("can't move", 0);
	madvise(memory, quarter * PAGE, MADV_DONTNEED);
	check(moved, 2 * quarter, quarter, owner == 2);
	for (size_t i = 0; i < quarter * WORDS; i++)
		if (memory[i] || moved[quarter * WORDS + i]) {
			complain("old content in pages that are new", i / WORDS);
			break;
		}
	waitpid(pid, &status, 0);
	if (status)
		complain("the forked child", 0);
	memory = memory + 3 * quarter * WORDS;
	check(memory, 3 * quarter, quarter / 2, owner == 2);
	check(memory + quarter / 2 * WORDS, 3 * quarter + quarter / 2, quarter / 2, 0);
}

static void say(void)
{
	char path[300], partial[310];
	FILE *file;

	snprintf(path, sizeof path, "%s.%s", report, who);
	snprintf(partial, sizeof partial, "%s.new", path);
	file = fopen(partial, "w");
	fprintf(file, "%s\n", problem[0] ? problem : "ok");
	fclose(file);
	rename(partial, path);
}

static void *idle(void *unused)
{
	for (;;)
		pause();
	return unused;
}

int main(int count, char **arguments)
{
	sigset_t set;
	pthread_t thread;
	int signal_number;

	if (count != 3)
		return 2;
	pages = strtoul(arguments[1], NULL, 10) << 8;
	report = arguments[2];
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigprocmask(SIG_BLOCK, &set, NULL);
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	wiped = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	locked = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
	for (size_t page = 0; page < pages; page++)
		fill(page);
	mlock(locked, PAGE);
	locked[1] = 42;
	/* The last eighth becomes a mapping of its own, next to the rest. */
	mprotect(memory + (pages - pages / 8) * WORDS, pages / 8 * PAGE, PROT_READ);
	for (int i = 0; i < THREADS; i++)
		pthread_create(&thread, NULL, idle, NULL);
	if (!fork()) {
		owner = 2;
		who = "child";
		for (size_t page = 0; page < pages - pages / 8; page++)
			if (page % 3 == 0)
				fill(page);
	} else {
		locked[2] = 43;
	}
	madvise(wiped, PAGE, MADV_WIPEONFORK);
	wiped[0] = 44;
	for (;;) {
		say();
		sigwait(&set, &signal_number);
		problem[0] = 0;
		if (signal_number == SIGUSR1) {
			size_t last = pages - pages / 8;
			check(memory, 0, last, owner == 2);
			check(memory + last * WORDS, last, pages / 8, 0);
		} else {
			go_on();
		}
		if (wiped[0] != 44 || locked[1] != 42 || (owner == 1 && locked[2] != 43))
			complain("a wiped or locked page", 0);
	}
}
