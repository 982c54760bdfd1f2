/*
 * keeper: a server that keeps files of every kind and memory that never changes, while it writes to
 * all of them.
 *
 *     keeper NAME PORT MIB ZERO_PERCENT MAPPED_MIB        NAME is not used
 *
 *     /data/log       open for appending, grows by records "%015u\n"
 *     /data/deleted   open, has no name any more; pages are rewritten in place
 *     /data/mapped    MAPPED_MIB, mapped shared; written through the mapping, never by write(2)
 *     /dev/shm/kept   a file on a tmpfs of the container
 *     memory          MIB, every page written all the time with what it holds already; the first
 *                     ZERO_PERCENT are zeros, the rest does not compress
 *
 * Which version each page of a file has is kept in private memory: content that is older than that
 * memory is seen. Lines (see line_server.h):
 *     <sequence>   ->  <sequence> <count>
 *     CHECK        ->  CHECK ok records=N | CHECK BAD what; all of the above, from inside
 *     STOP, GO     ->  STOP ok, GO ok      the writers stand still: files can be compared
 *     SWEEPS       ->  SWEEPS n            how often all of the memory was written
 *     SPOIL        ->  SPOIL ok            falsifies a word of the mapped file
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#include "line_server.h"
#include "mix.h"

enum {
	PAGE_BYTES = 4096,
	PAGE_WORDS = PAGE_BYTES / 8,
	PAGES_PER_MIB = 256,
	RECORD_BYTES = 16,
	DELETED_PAGES = 512, /* 2 MiB: more than CRIU keeps of a deleted file by itself */
	KEPT_PAGES = 16,
	STEP_NS = 1000000,
	SWEEP_STEPS = 10, /* all of the memory is written every 10 ms */
	MIB_MAX = 1024,
	MAPPED_MIB_MAX = 256,
};

/* A file of pages, and the version that each page must have. */
struct pages_file {
	int fd;
	unsigned pages;
	uint64_t salt;
	uint64_t *mapped; /* NULL: written by pwrite */
	uint32_t versions[MAPPED_MIB_MAX * PAGES_PER_MIB];
};

static struct pages_file mapped = {.salt = 1};
static struct pages_file deleted = {.pages = DELETED_PAGES, .salt = 2};
static struct pages_file kept = {.pages = KEPT_PAGES, .salt = 3};
static int log_fd;
static unsigned records;
static uint64_t *memory;
static size_t memory_pages, zero_pages;
static atomic_uint_fast64_t sweeps;
static int stopped;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t word_of(const struct pages_file *file, unsigned page, int at)
{
	return mix(file->salt << 60 ^ (uint64_t)page << 41 ^ (uint64_t)file->versions[page] << 9 ^
	           (uint64_t)at);
}

static void write_page(struct pages_file *file, unsigned page)
{
	uint64_t words[PAGE_WORDS];
	uint64_t *to = file->mapped ? file->mapped + (size_t)page * PAGE_WORDS : words;

	for (int at = 0; at < PAGE_WORDS; at++)
		to[at] = word_of(file, page, at);
	if (!file->mapped &&
	    pwrite(file->fd, words, PAGE_BYTES, (off_t)page * PAGE_BYTES) != PAGE_BYTES)
		die("pwrite");
}

static void rewrite_page(struct pages_file *file, uint64_t step)
{
	unsigned page = (unsigned)(step % file->pages);

	file->versions[page]++;
	write_page(file, page);
}

/* The word of the memory: never changes. */
static uint64_t still(size_t index)
{
	return index / PAGE_WORDS < zero_pages ? 0 : mix(index + 1);
}

static void sweep(void)
{
	for (size_t page = 0; page < memory_pages; page++)
		((volatile uint64_t *)memory)[page * PAGE_WORDS] = still(page * PAGE_WORDS);
	atomic_fetch_add(&sweeps, 1);
}

static void *writer(void *unused)
{
	const struct timespec pause = {.tv_nsec = STEP_NS};
	char record[RECORD_BYTES + 1];

	for (uint64_t step = 0;; step++, nanosleep(&pause, NULL)) {
		pthread_mutex_lock(&lock);
		if (!stopped) {
			snprintf(record, sizeof record, "%015u\n", records);
			if (write(log_fd, record, RECORD_BYTES) != RECORD_BYTES)
				die("log");
			records++;
			rewrite_page(&mapped, step);
			rewrite_page(&deleted, step);
			rewrite_page(&kept, step);
			if (step % SWEEP_STEPS == 0)
				sweep();
		}
		pthread_mutex_unlock(&lock);
	}
	return unused;
}

/* ---- looking at all of it ---- */

static const char *check_pages(const struct pages_file *file)
{
	uint64_t words[PAGE_WORDS];

	for (unsigned page = 0; page < file->pages; page++) {
		/* Of a mapped file too: the mapping and the file must be one. */
		if (pread(file->fd, words, PAGE_BYTES, (off_t)page * PAGE_BYTES) != PAGE_BYTES)
			return "can't be read";
		for (int at = 0; at < PAGE_WORDS; at++)
			if (words[at] != word_of(file, page, at))
				return "has wrong content";
		if (file->mapped &&
		    memcmp(words, file->mapped + (size_t)page * PAGE_WORDS, PAGE_BYTES))
			return "is not what is mapped";
	}
	return NULL;
}

static const char *check_log(void)
{
	char record[RECORD_BYTES + 1] = {0}, expected[RECORD_BYTES + 1];
	struct stat status;

	if (fstat(log_fd, &status) || status.st_size != (off_t)records * RECORD_BYTES)
		return "has another length";
	for (unsigned number = 0; number < records; number++) {
		snprintf(expected, sizeof expected, "%015u\n", number);
		if (pread(log_fd, record, RECORD_BYTES, (off_t)number * RECORD_BYTES) !=
		            RECORD_BYTES ||
		    memcmp(record, expected, RECORD_BYTES))
			return "has a wrong record";
	}
	return NULL;
}

static const char *check_memory(void)
{
	for (size_t index = 0; index < memory_pages * PAGE_WORDS; index++)
		if (memory[index] != still(index))
			return "has wrong content";
	return NULL;
}

static void answer_check(struct reply *reply)
{
	struct stat status;
	const char *reason;

	if ((reason = check_log()))
		reply_add(reply, "CHECK BAD log %s\n", reason);
	else if ((reason = check_pages(&mapped)))
		reply_add(reply, "CHECK BAD mapped %s\n", reason);
	else if ((reason = check_pages(&deleted)))
		reply_add(reply, "CHECK BAD deleted %s\n", reason);
	else if (fstat(deleted.fd, &status) || status.st_nlink)
		reply_add(reply, "CHECK BAD deleted has a name\n");
	else if ((reason = check_pages(&kept)))
		reply_add(reply, "CHECK BAD kept %s\n", reason);
	else if ((reason = check_memory()))
		reply_add(reply, "CHECK BAD memory %s\n", reason);
	else
		reply_add(reply, "CHECK ok records=%u\n", records);
}

static void answer_line(const char *line, struct reply *reply)
{
	if (reply_sequence(line, reply))
		return;
	pthread_mutex_lock(&lock);
	if (!strcmp(line, "CHECK")) {
		answer_check(reply);
	} else if (!strcmp(line, "STOP") || !strcmp(line, "GO")) {
		stopped = *line == 'S';
		reply_add(reply, "%s ok\n", line);
	} else if (!strcmp(line, "SWEEPS")) {
		reply_add(reply, "SWEEPS %llu\n", (unsigned long long)atomic_load(&sweeps));
	} else if (!strcmp(line, "SPOIL")) {
		mapped.mapped[0] ^= 1;
		reply_add(reply, "SPOIL ok\n");
	} else {
		reply_add(reply, "ERR unknown command\n");
	}
	pthread_mutex_unlock(&lock);
}

static void open_pages(struct pages_file *file, const char *path, int is_mapped)
{
	size_t size = (size_t)file->pages * PAGE_BYTES;

	file->fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (file->fd < 0 || ftruncate(file->fd, (off_t)size))
		die(path);
	if (is_mapped) {
		file->mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);
		if (file->mapped == MAP_FAILED)
			die("mmap");
	}
	for (unsigned page = 0; page < file->pages; page++)
		write_page(file, page);
}

int main(int argc, char **argv)
{
	pthread_t thread;

	if (argc != 6) {
		fprintf(stderr, "usage: keeper NAME PORT MIB ZERO_PERCENT MAPPED_MIB\n");
		return 2;
	}
	int port = (int)number_argument("PORT", argv[2], 1, 65535);
	memory_pages = (size_t)number_argument("MIB", argv[3], 1, MIB_MAX) * PAGES_PER_MIB;
	zero_pages = memory_pages * (size_t)number_argument("ZERO", argv[4], 0, 100) / 100;
	mapped.pages = (unsigned)number_argument("MAPPED", argv[5], 1, MAPPED_MIB_MAX) * PAGES_PER_MIB;
	log_fd = open("/data/log", O_RDWR | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
	if (log_fd < 0)
		die("/data/log");
	open_pages(&mapped, "/data/mapped", 1);
	open_pages(&deleted, "/data/deleted", 0);
	open_pages(&kept, "/dev/shm/kept", 0);
	memory = mmap(NULL, memory_pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
	              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (unlink("/data/deleted") || memory == MAP_FAILED)
		die("/data/deleted or memory");
	/* Pages of 4 KiB only: of a huge page the zeros beside a written word would be dirty too. */
	madvise(memory, memory_pages * PAGE_BYTES, MADV_NOHUGEPAGE);
	for (size_t index = 0; index < memory_pages * PAGE_WORDS; index++)
		((volatile uint64_t *)memory)[index] = still(index);
	if (pthread_create(&thread, NULL, writer, NULL))
		die("pthread_create");
	lines_serve(port, answer_line);
}
