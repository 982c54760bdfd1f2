/*
 * memory: a TCP server with much memory, part of which changes all the time, that can prove that
 * all of it is right.
 *
 *     memory PORT MIB RATE_MIB_S [--hot-mib N] [--text PERCENT] [--zero PERCENT]
 *            [--dirty-words N] [--small-pages]
 *
 * Every 8-byte word follows from (page, version of the page), the versions are kept apart from the
 * pages, and their sum is kept apart from the versions. So a page that is missing, stale, torn or
 * somebody else's is seen, and so is a page that went back in time together with its version.
 *
 * The writer rewrites random pages among the first --hot-mib (default: all), each written page
 * counts 4096 bytes of the rate. --dirty-words (a power of two, default 512 = all of the page) is
 * how many words of the page one write changes. Of the pages, --zero percent start as zeros (they
 * become text when written), --text percent compress well, the rest not at all.
 *
 * Lines (see line_server.h), answered in order:
 *     <sequence>   ->  <sequence> <answers given by this server to all clients, strictly growing>
 *     VERIFY       ->  VERIFY ok|BAD pages=N bad=WORDS words=N generation=N [first=ADDRESS …]
 *     RATE n       ->  RATE ok n                    MiB/s from now on, 0 stops the writer
 *     STATS        ->  STATS pause_us=N wall_pause_us=N dirtied=PAGES rate_mib_s=N answers=N
 *     CORRUPT      ->  CORRUPT ok address=A         flips a bit of the last page; again: flips back
 *
 * Sequences are answered in datagrams too, on the same port number.
 *
 * pause_us is the longest pause of a 1 ms ticker since the last STATS. CRIU restores a process into
 * a time namespace in which CLOCK_MONOTONIC goes on from the dump, so a migration does not appear
 * there; wall_pause_us is the same by CLOCK_REALTIME, where it does.
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#include "line_server.h"
#include "mix.h"

enum {
	PAGE_BYTES = 4096,
	PAGE_WORDS = PAGE_BYTES / 8,
	PAGES_PER_MIB = 256,
	BATCH_PAGES = 64,         /* written under one hold of the lock: about 50 us */
	WRITER_PERIOD_NS = 1000000,
	TICK_NS = 1000000,
	MIB_MAX = 1 << 20,
};

/* A writer that was stopped (frozen, verifying) does not make up for more than this. */
static const double CREDIT_MAX_S = 0.25;
static const double RATE_MIB_S_MAX = 1 << 20;
/* A page. */
static const double HOT_MIB_MIN = 1.0 / PAGES_PER_MIB;
static const uint64_t KIND_SALT = 0x9e3779b97f4a7c15ULL;

static struct {
	uint64_t *words;
	uint32_t *versions;
	uint64_t generation; /* the sum of all versions */
	size_t pages, hot_pages;
	unsigned text_percent, zero_percent;
	unsigned dirty_words;
	pthread_mutex_t lock; /* words, versions, generation */
} memory = {.dirty_words = PAGE_WORDS, .lock = PTHREAD_MUTEX_INITIALIZER};

static _Atomic double rate_mib_s;
static atomic_uint_fast64_t pages_dirtied, pause_ns_max, wall_pause_ns_max;

/* ---- what a word must be ---- */

enum kind { RANDOM, TEXT, ZERO };

static enum kind kind_of(uint64_t page, uint32_t epoch)
{
	unsigned share = mix(page ^ KIND_SALT) % 100;

	if (share < memory.zero_percent)
		return epoch ? TEXT : ZERO;
	return share < memory.zero_percent + memory.text_percent ? TEXT : RANDOM;
}

/* Eight letters: a syllable out of 16, thrice, and a number of two digits. */
static uint64_t text_word(uint64_t h)
{
	static const char syllables[16][2] = {"la", "mi", "no", "re", "ta", "si", "ko", "du",
	                                      "an", "er", "is", "on", "ut", "el", "ar", "im"};
	char text[8];
	uint64_t word;

	for (int i = 0; i < 3; i++)
		memcpy(text + 2 * i, syllables[h >> (4 * i) & 15], 2);
	text[6] = (char)('0' + (h >> 16) % 10);
	text[7] = ' ';
	memcpy(&word, text, sizeof word);
	return word;
}

/*
 * The words are written in groups of dirty_words, one group a version, in turn. A group's epoch
 * is how often it was written in `version` versions of its page.
 */
static uint32_t group_epoch(uint32_t version, unsigned group)
{
	unsigned groups = PAGE_WORDS / memory.dirty_words;

	return version > group ? (version - group - 1) / groups + 1 : 0;
}

static void expected_group(uint64_t page, uint32_t epoch, unsigned group, uint64_t *out)
{
	enum kind kind = kind_of(page, epoch);
	uint64_t base = mix(page << 32 | epoch);

	for (unsigned i = 0; i < memory.dirty_words; i++) {
		uint64_t h = mix(base + group * memory.dirty_words + i);
		out[i] = kind == ZERO ? 0 : kind == TEXT ? text_word(h) : h;
	}
}

static void write_group(uint64_t page, unsigned group)
{
	uint64_t *to = memory.words + page * PAGE_WORDS + group * memory.dirty_words;

	expected_group(page, group_epoch(memory.versions[page], group), group, to);
}

/* ---- the writer ---- */

static void fill(void)
{
	for (size_t page = 0; page < memory.pages; page++)
		for (unsigned group = 0; group < PAGE_WORDS / memory.dirty_words; group++)
			write_group(page, group);
}

static void dirty_one(uint64_t page)
{
	unsigned groups = PAGE_WORDS / memory.dirty_words;

	write_group(page, memory.versions[page]++ % groups);
	memory.generation++;
}

static double seconds(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void *writer_thread(void *unused)
{
	const struct timespec period = {.tv_nsec = WRITER_PERIOD_NS};
	double last = seconds(CLOCK_MONOTONIC), credit = 0; /* pages */
	uint64_t random = 1;

	for (;; nanosleep(&period, NULL)) {
		double now = seconds(CLOCK_MONOTONIC);
		double rate = atomic_load(&rate_mib_s) * PAGES_PER_MIB;

		credit += (now - last) * rate;
		last = now;
		if (credit > CREDIT_MAX_S * rate + 1)
			credit = CREDIT_MAX_S * rate + 1;
		while (credit >= 1) {
			unsigned batch = credit < BATCH_PAGES ? (unsigned)credit : BATCH_PAGES;

			pthread_mutex_lock(&memory.lock);
			for (unsigned i = 0; i < batch; i++) {
				random = mix(random + KIND_SALT);
				dirty_one(random % memory.hot_pages);
			}
			pthread_mutex_unlock(&memory.lock);
			credit -= batch;
			atomic_fetch_add(&pages_dirtied, batch);
		}
	}
	return unused;
}

/* ---- the proof ---- */

struct verdict {
	uint64_t bad_words, first_page, generation, version_sum;
	unsigned first_word;
	uint64_t first_expected, first_found;
};

static void verify_group(uint64_t page, unsigned group, struct verdict *verdict)
{
	uint64_t expected[PAGE_WORDS];
	const uint64_t *found = memory.words + page * PAGE_WORDS + group * memory.dirty_words;

	expected_group(page, group_epoch(memory.versions[page], group), group, expected);
	if (!memcmp(expected, found, memory.dirty_words * 8))
		return;
	for (unsigned i = 0; i < memory.dirty_words; i++) {
		if (found[i] == expected[i])
			continue;
		if (!verdict->bad_words++) {
			verdict->first_page = page;
			verdict->first_word = group * memory.dirty_words + i;
			verdict->first_expected = expected[i];
			verdict->first_found = found[i];
		}
	}
}

static void answer_verify(struct reply *reply)
{
	struct verdict verdict = {0};

	pthread_mutex_lock(&memory.lock);
	for (size_t page = 0; page < memory.pages; page++) {
		verdict.version_sum += memory.versions[page];
		for (unsigned group = 0; group < PAGE_WORDS / memory.dirty_words; group++)
			verify_group(page, group, &verdict);
	}
	verdict.generation = memory.generation;
	pthread_mutex_unlock(&memory.lock);

	int ok = !verdict.bad_words && verdict.version_sum == verdict.generation;
	reply_add(reply, "VERIFY %s pages=%zu bad=%" PRIu64 " words=%zu generation=%" PRIu64,
	          ok ? "ok" : "BAD", memory.pages, verdict.bad_words, memory.pages * PAGE_WORDS,
	          verdict.generation);
	if (!ok)
		reply_add(reply, " version_sum=%" PRIu64, verdict.version_sum);
	if (verdict.bad_words)
		reply_add(reply, " first=%p page=%" PRIu64 " word=%u expected=%016" PRIx64
		          " found=%016" PRIx64,
		          (void *)(memory.words + verdict.first_page * PAGE_WORDS + verdict.first_word),
		          verdict.first_page, verdict.first_word, verdict.first_expected,
		          verdict.first_found);
	reply_add(reply, "\n");
}

/* ---- the ticker ---- */

static void keep_maximum(atomic_uint_fast64_t *maximum, double value_s)
{
	uint64_t value = value_s > 0 ? (uint64_t)(value_s * 1e9) : 0;

	/* A STATS in between may reset it: then this pause belongs to the next STATS. */
	if (value > atomic_load(maximum))
		atomic_store(maximum, value);
}

static void *ticker_thread(void *unused)
{
	const struct timespec tick = {.tv_nsec = TICK_NS};
	double last = seconds(CLOCK_MONOTONIC), last_wall = seconds(CLOCK_REALTIME);

	for (;; nanosleep(&tick, NULL)) {
		double now = seconds(CLOCK_MONOTONIC), wall = seconds(CLOCK_REALTIME);

		keep_maximum(&pause_ns_max, now - last);
		keep_maximum(&wall_pause_ns_max, wall - last_wall);
		last = now;
		last_wall = wall;
	}
	return unused;
}

/* ---- the lines ---- */

static void answer_stats(struct reply *reply)
{
	reply_add(reply,
	          "STATS pause_us=%" PRIu64 " wall_pause_us=%" PRIu64 " dirtied=%" PRIu64
	          " rate_mib_s=%g answers=%" PRIu64 "\n",
	          (uint64_t)atomic_exchange(&pause_ns_max, 0) / 1000,
	          (uint64_t)atomic_exchange(&wall_pause_ns_max, 0) / 1000,
	          (uint64_t)atomic_load(&pages_dirtied), atomic_load(&rate_mib_s),
	          (uint64_t)atomic_load(&lines_answered));
}

static void answer_rate(const char *text, struct reply *reply)
{
	char *end;
	double rate = strtod(text, &end);

	if (end == text || *end || !(rate >= 0 && rate <= RATE_MIB_S_MAX)) {
		reply_add(reply, "ERR rate\n");
		return;
	}
	atomic_store(&rate_mib_s, rate);
	reply_add(reply, "RATE ok %g\n", rate);
}

static void answer_corrupt(struct reply *reply)
{
	uint64_t *victim = memory.words + memory.pages * PAGE_WORDS - 1;

	pthread_mutex_lock(&memory.lock);
	*(unsigned char *)victim ^= 0x10;
	pthread_mutex_unlock(&memory.lock);
	reply_add(reply, "CORRUPT ok address=%p\n", (void *)victim);
}

static void answer_line(const char *line, struct reply *reply)
{
	if (reply_sequence(line, reply))
		return;
	if (!strcmp(line, "VERIFY"))
		answer_verify(reply);
	else if (!strncmp(line, "RATE ", 5))
		answer_rate(line + 5, reply);
	else if (!strcmp(line, "STATS"))
		answer_stats(reply);
	else if (!strcmp(line, "CORRUPT"))
		answer_corrupt(reply);
	else
		reply_add(reply, "ERR unknown command\n");
}

static void *map_pages(size_t bytes, int small_pages)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		die("mmap");
	/* Soft-dirty tracking of a huge page is 2 MiB coarse; tests that count pages want it fine. */
	if (small_pages && madvise(at, bytes, MADV_NOHUGEPAGE))
		die("madvise");
	return at;
}

static void start(void *(*body)(void *))
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, body, NULL))
		die("pthread_create");
}

__attribute__((noreturn)) static void usage(void)
{
	fprintf(stderr, "usage: memory PORT MIB RATE_MIB_S [--hot-mib N] [--text PERCENT] "
	                "[--zero PERCENT] [--dirty-words N] [--small-pages]\n");
	exit(2);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
	        {"hot-mib", 1, NULL, 'h'},     {"text", 1, NULL, 't'},
	        {"zero", 1, NULL, 'z'},        {"dirty-words", 1, NULL, 'd'},
	        {"small-pages", 0, NULL, 's'}, {0},
	};
	double hot_mib = MIB_MAX;
	int option, small_pages = 0;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'h')
			hot_mib = number_argument("--hot-mib", optarg, HOT_MIB_MIN, MIB_MAX);
		else if (option == 't')
			memory.text_percent = (unsigned)number_argument("--text", optarg, 0, 100);
		else if (option == 'z')
			memory.zero_percent = (unsigned)number_argument("--zero", optarg, 0, 100);
		else if (option == 'd')
			memory.dirty_words = (unsigned)number_argument("--dirty-words", optarg, 1, PAGE_WORDS);
		else if (option == 's')
			small_pages = 1;
		else
			usage();
	}
	if (argc - optind != 3 || memory.dirty_words & (memory.dirty_words - 1) ||
	    memory.text_percent + memory.zero_percent > 100)
		usage();
	int port = (int)number_argument("PORT", argv[optind], 1, 65535);
	memory.pages = (size_t)number_argument("MIB", argv[optind + 1], 1, MIB_MAX) * PAGES_PER_MIB;
	atomic_store(&rate_mib_s, number_argument("RATE", argv[optind + 2], 0, RATE_MIB_S_MAX));
	memory.hot_pages = hot_mib * PAGES_PER_MIB;
	if (memory.hot_pages > memory.pages)
		memory.hot_pages = memory.pages;

	signal(SIGPIPE, SIG_IGN);
	memory.words = map_pages(memory.pages * PAGE_BYTES, small_pages);
	memory.versions = map_pages(memory.pages * sizeof *memory.versions, small_pages);
	fill();
	start(writer_thread);
	start(ticker_thread);
	ticks_serve(port);
	lines_serve(port, answer_line); /* the port opens when the memory is ready */
}
