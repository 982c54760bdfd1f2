/*
 * Features of tree.c: memory, private and shared, that stays, and mappings that come and go.
 */
#ifndef DOLLY_TREE_MEMORY_H
#define DOLLY_TREE_MEMORY_H

#include <sys/ipc.h>
#include <sys/sem.h>
#include <sys/shm.h>

#include "tree_core.h"

/* ---- private: 4 MiB of each process's own, rewritten at random ---- */

enum { PRIVATE_PAGES = 1024, PRIVATE_WRITES = 4 };

static uint64_t *private_words;
static uint32_t private_versions[PRIVATE_PAGES];

static void private_begin(void)
{
	private_words = map_anonymous(PRIVATE_PAGES * PAGE_BYTES, MAP_PRIVATE);
	for (unsigned page = 0; page < PRIVATE_PAGES; page++)
		page_fill(private_words + page * PAGE_WORDS, (uint64_t)who, page, 0);
}

static void private_step(void)
{
	for (unsigned i = 0; i < PRIVATE_WRITES; i++) {
		unsigned page = mix(beat * PRIVATE_WRITES + i) % PRIVATE_PAGES;
		uint64_t *words = private_words + page * PAGE_WORDS;

		if (!page_is(words, (uint64_t)who, page, private_versions[page]))
			bad("page %u at %p, found before it was rewritten", page, (void *)words);
		page_fill(words, (uint64_t)who, page, ++private_versions[page]);
	}
	if (who == 0 && atomic_exchange(&board->corrupt, 0))
		*(unsigned char *)private_words ^= 1;
	progress();
}

static void private_check(void)
{
	for (unsigned page = 0; page < PRIVATE_PAGES; page++) {
		uint64_t *words = private_words + page * PAGE_WORDS;

		if (!page_is(words, (uint64_t)who, page, private_versions[page]))
			bad("page %u at %p", page, (void *)words);
	}
}

/* ---- cow: written before the forks, and by each process on its own copy afterwards ---- */

enum { COW_PAGES = 64 };
static const uint64_t COW_SALT = 0xc0c0;

static uint64_t *cow_words;
static uint32_t cow_versions[COW_PAGES];

static void cow_setup(void)
{
	cow_words = map_anonymous(COW_PAGES * PAGE_BYTES, MAP_PRIVATE);
	for (unsigned page = 0; page < COW_PAGES; page++)
		page_fill(cow_words + page * PAGE_WORDS, COW_SALT, page, 0);
}

static uint64_t cow_salt(unsigned page)
{
	return cow_versions[page] ? COW_SALT + 1 + (uint64_t)who : COW_SALT;
}

static void cow_step(void)
{
	/* Half of the pages are never written: they stay common to all processes. */
	unsigned page = beat % (COW_PAGES / 2);

	if (beat % 16)
		return;
	cow_versions[page]++;
	page_fill(cow_words + page * PAGE_WORDS, cow_salt(page), page, cow_versions[page]);
	progress();
}

static void cow_check(void)
{
	for (unsigned page = 0; page < COW_PAGES; page++)
		if (!page_is(cow_words + page * PAGE_WORDS, cow_salt(page), page, cow_versions[page]))
			bad("page %u", page);
}

/* ---- shared pages, by whatever way the memory is shared ---- */

enum { SHARED_PAGES = 16, SHARED_BYTES = PAGE_BYTES * (SHARED_PAGES + 1) };

struct shared_pages {
	pthread_mutex_t mutex;
	uint64_t turns; /* each turn rewrites the next page */
	_Alignas(PAGE_BYTES) uint64_t words[];
};

struct sharing {
	struct shared_pages *pages;
	uint64_t salt, turns_seen;
};

static void sharing_create(struct sharing *sharing, void *at, uint64_t salt)
{
	sharing->pages = at;
	sharing->salt = salt;
	shared_mutex(&sharing->pages->mutex);
	for (unsigned page = 0; page < SHARED_PAGES; page++)
		page_fill(sharing->pages->words + page * PAGE_WORDS, salt, page, 0);
}

/* The turn that wrote a page last: turn t writes page t % SHARED_PAGES; 0 before the first. */
static uint64_t last_turn(uint64_t turns, unsigned page)
{
	uint64_t back = (turns + SHARED_PAGES - page) % SHARED_PAGES;

	return turns > back ? turns - back : 0;
}

static void sharing_step(struct sharing *sharing)
{
	struct shared_pages *pages = sharing->pages;

	if (beat % PROCESSES != (uint64_t)who || !shared_lock(&pages->mutex))
		return;
	if (pages->turns < sharing->turns_seen)
		bad("went back from turn %llu to %llu", (unsigned long long)sharing->turns_seen,
		    (unsigned long long)pages->turns);
	uint64_t turn = ++pages->turns;
	page_fill(pages->words + turn % SHARED_PAGES * PAGE_WORDS, sharing->salt, turn % SHARED_PAGES,
	          turn);
	sharing->turns_seen = turn;
	pthread_mutex_unlock(&pages->mutex);
	progress();
}

static void sharing_check(struct sharing *sharing)
{
	struct shared_pages *pages = sharing->pages;

	if (!shared_lock(&pages->mutex))
		return;
	for (unsigned page = 0; page < SHARED_PAGES; page++)
		if (!page_is(pages->words + page * PAGE_WORDS, sharing->salt, page,
		             last_turn(pages->turns, page)))
			bad("page %u at turn %llu", page, (unsigned long long)pages->turns);
	pthread_mutex_unlock(&pages->mutex);
}

/* The same memory, read through its descriptor. */
static void sharing_check_file(struct sharing *sharing, int fd)
{
	uint64_t words[PAGE_WORDS];

	if (!shared_lock(&sharing->pages->mutex))
		return;
	for (unsigned page = 0; page < SHARED_PAGES; page++)
		if (pread(fd, words, PAGE_BYTES, PAGE_BYTES * (off_t)(page + 1)) != PAGE_BYTES ||
		    memcmp(words, sharing->pages->words + page * PAGE_WORDS, PAGE_BYTES))
			bad("page %u: file and mapping differ", page);
	pthread_mutex_unlock(&sharing->pages->mutex);
}

static void *map_file(int fd)
{
	need(fd >= 0 && !ftruncate(fd, SHARED_BYTES), "shared file");
	void *at = mmap(NULL, SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	need(at != MAP_FAILED, "mmap of a file");
	return at;
}

static struct sharing anonymous, sysv, memfd, posix_shm, file_map;
static int sysv_id = -1, memfd_fd, posix_shm_fd, file_map_fd;
static char posix_shm_name[32];

static void anonymous_setup(void)
{
	sharing_create(&anonymous, map_anonymous(SHARED_BYTES, MAP_SHARED), 0xa0);
}
static void anonymous_step(void) { sharing_step(&anonymous); }
static void anonymous_check(void) { sharing_check(&anonymous); }

static void sysv_setup(void)
{
	sysv_id = shmget(IPC_PRIVATE, SHARED_BYTES, IPC_CREAT | 0600);
	need(sysv_id >= 0, "shmget");
	void *at = shmat(sysv_id, NULL, 0);
	need(at != (void *)-1, "shmat");
	sharing_create(&sysv, at, 0xb0);
}
static void sysv_step(void) { sharing_step(&sysv); }
static void sysv_check(void)
{
	struct shmid_ds status;

	sharing_check(&sysv);
	/* 5 may be another user: it may not ask. */
	if (who != 5 && (shmctl(sysv_id, IPC_STAT, &status) || status.shm_nattch < PROCESSES))
		bad("segment %d: %s, %lu attached", sysv_id, strerror(errno),
		    (unsigned long)status.shm_nattch);
}

static void memfd_setup(void)
{
	memfd_fd = memfd_create("tree", MFD_CLOEXEC);
	sharing_create(&memfd, map_file(memfd_fd), 0xd0);
}
static void memfd_step(void) { sharing_step(&memfd); }
static void memfd_check(void)
{
	sharing_check(&memfd);
	sharing_check_file(&memfd, memfd_fd);
}

static void posix_shm_setup(void)
{
	/* Outside of containers several trees share /dev/shm. */
	snprintf(posix_shm_name, sizeof posix_shm_name, "/tree-%d", getpid());
	posix_shm_fd = shm_open(posix_shm_name, O_RDWR | O_CREAT, 0600);
	sharing_create(&posix_shm, map_file(posix_shm_fd), 0xe0);
}
static void posix_shm_step(void) { sharing_step(&posix_shm); }
static void posix_shm_check(void)
{
	sharing_check(&posix_shm);
	sharing_check_file(&posix_shm, posix_shm_fd);
}

static void file_map_setup(void)
{
	file_map_fd = open(path_of("map"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	sharing_create(&file_map, map_file(file_map_fd), 0xf0);
}
static void file_map_step(void) { sharing_step(&file_map); }
static void file_map_check(void)
{
	sharing_check(&file_map);
	sharing_check_file(&file_map, file_map_fd);
}

/* ---- churn: process 7 maps, moves, grows, shrinks, drops and unmaps, and moves its brk ---- */

enum { CHURN_SLOTS = 16, CHURN_PAGES_MAX = 64, BRK_BYTES = 64 * 1024 };

static struct churn_slot {
	uint64_t *words;
	unsigned pages;
	uint64_t version;
} churn_slots[CHURN_SLOTS];
static char *churn_break; /* lowest address of the part of the heap that is ours for the moment */

static void churn_fill(struct churn_slot *slot, unsigned from)
{
	for (unsigned page = from; page < slot->pages; page++)
		page_fill(slot->words + page * PAGE_WORDS, 0xcc, page, slot->version);
}

static void churn_verify(struct churn_slot *slot)
{
	for (unsigned page = 0; page < slot->pages; page++)
		if (!page_is(slot->words + page * PAGE_WORDS, 0xcc, page, slot->version))
			bad("mapping %p page %u of %u", (void *)slot->words, page, slot->pages);
}

static void churn_resize(struct churn_slot *slot, unsigned pages)
{
	unsigned before = slot->pages;
	void *at = mremap(slot->words, before * PAGE_BYTES, pages * PAGE_BYTES, MREMAP_MAYMOVE);

	if (at == MAP_FAILED) {
		bad("mremap: %s", strerror(errno));
		return;
	}
	slot->words = at;
	slot->pages = pages;
	churn_verify(&(struct churn_slot){at, before < pages ? before : pages, slot->version});
	churn_fill(slot, before);
}

static void churn_slot_step(struct churn_slot *slot, uint64_t random)
{
	unsigned pages = 1 + random / 8 % CHURN_PAGES_MAX;

	if (!slot->words) {
		slot->words = map_anonymous(pages * PAGE_BYTES, MAP_PRIVATE);
		slot->pages = pages;
		slot->version = beat;
		churn_fill(slot, 0);
	} else if (random % 8 < 3) {
		churn_resize(slot, pages);
	} else if (random % 8 == 3) {
		/* Dropped pages must read as zeros. */
		madvise(slot->words, slot->pages * PAGE_BYTES, MADV_DONTNEED);
		for (unsigned i = 0; i < slot->pages * PAGE_WORDS; i += PAGE_WORDS)
			if (slot->words[i])
				bad("page dropped at %p is not zero", (void *)(slot->words + i));
		churn_fill(slot, 0);
	} else if (random % 8 == 4) {
		churn_verify(slot);
		munmap(slot->words, slot->pages * PAGE_BYTES);
		slot->words = NULL;
		slot->pages = 0;
	} else if (random % 8 == 5) {
		mprotect(slot->words, slot->pages * PAGE_BYTES, PROT_READ);
		churn_verify(slot);
		mprotect(slot->words, slot->pages * PAGE_BYTES, PROT_READ | PROT_WRITE);
	} else {
		slot->version = beat;
		churn_fill(slot, 0);
	}
}

/* Nothing else in this process asks for memory after it began: the end of the heap is ours. */
static void churn_break_step(void)
{
	if (!churn_break) {
		churn_break = sbrk(BRK_BYTES);
		if (churn_break == (char *)-1) {
			bad("sbrk: %s", strerror(errno));
			churn_break = NULL;
			return;
		}
		memset(churn_break, 0x5b, BRK_BYTES);
		return;
	}
	for (unsigned i = 0; i < BRK_BYTES; i++)
		if (churn_break[i] != 0x5b)
			bad("heap at %p", (void *)(churn_break + i));
	if (sbrk(-BRK_BYTES) == (void *)-1)
		bad("sbrk: %s", strerror(errno));
	churn_break = NULL;
}

static void churn_step(void)
{
	if (who != 7)
		return;
	uint64_t random = mix(beat ^ 0xcc00);
	churn_slot_step(&churn_slots[random % CHURN_SLOTS], random / CHURN_SLOTS);
	if (beat % 8 == 0)
		churn_break_step();
	progress();
}

static void churn_check(void)
{
	if (who == 7)
		for (unsigned i = 0; i < CHURN_SLOTS; i++)
			churn_verify(&churn_slots[i]);
}

#define MEMORY_FEATURES                                                                 \
	{"private", NULL, private_begin, private_step, private_check},                      \
	{"cow", cow_setup, NULL, cow_step, cow_check},                                      \
	{"shm_anonymous", anonymous_setup, NULL, anonymous_step, anonymous_check},          \
	{"shm_sysv", sysv_setup, NULL, sysv_step, sysv_check},                              \
	{"shm_memfd", memfd_setup, NULL, memfd_step, memfd_check},                          \
	{"shm_posix", posix_shm_setup, NULL, posix_shm_step, posix_shm_check},              \
	{"file_map", file_map_setup, NULL, file_map_step, file_map_check},                  \
	{"churn", NULL, NULL, churn_step, churn_check}

static void memory_remove(void)
{
	shmctl(sysv_id, IPC_RMID, NULL);
	shm_unlink(posix_shm_name);
}

#endif
