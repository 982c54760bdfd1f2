/*
 * Features of tree.c: open files, locks on them, and watches.
 */
#ifndef DOLLY_TREE_FILES_H
#define DOLLY_TREE_FILES_H

#include <sys/file.h>
#include <sys/inotify.h>

#include "tree_core.h"

/* ---- append: process 1 has a log open that grows ---- */

enum { RECORD_BYTES = 16, APPEND_BYTES_MAX = 4 * 1024 * 1024, APPEND_CHECKED = 256 };

static int append_fd;
static unsigned append_records;

static void append_begin(void)
{
	if (who != 1)
		return;
	append_fd = open(path_of("log"), O_RDWR | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
	need(append_fd >= 0, "log");
}

static void append_step(void)
{
	char record[RECORD_BYTES + 1];

	if (who != 1)
		return;
	if (append_records * RECORD_BYTES >= APPEND_BYTES_MAX) {
		need(!ftruncate(append_fd, 0), "ftruncate");
		append_records = 0;
	}
	snprintf(record, sizeof record, "%015u\n", append_records);
	if (write(append_fd, record, RECORD_BYTES) != RECORD_BYTES)
		bad("write: %s", strerror(errno));
	append_records++;
	progress();
}

static void append_check(void)
{
	struct stat status;
	char record[RECORD_BYTES + 1] = {0}, expected[RECORD_BYTES + 1];

	if (who != 1)
		return;
	if (fstat(append_fd, &status) || status.st_size != (off_t)append_records * RECORD_BYTES)
		bad("%lld bytes after %u records", (long long)status.st_size, append_records);
	if (!(fcntl(append_fd, F_GETFL) & O_APPEND))
		bad("no longer opened for appending");
	unsigned from = append_records > APPEND_CHECKED ? append_records - APPEND_CHECKED : 0;
	for (unsigned number = from; number < append_records; number++) {
		snprintf(expected, sizeof expected, "%015u\n", number);
		if (pread(append_fd, record, RECORD_BYTES, (off_t)number * RECORD_BYTES) != RECORD_BYTES ||
		    memcmp(record, expected, RECORD_BYTES))
			bad("record %u", number);
	}
}

/* ---- deleted: process 4 goes on using a file that has no name any more ---- */

enum { DELETED_PAGES = 32 }; /* 128 KiB; from 1 MiB on CRIU wants --ghost-limit */

static int deleted_fd;
static uint32_t deleted_versions[DELETED_PAGES];

static void deleted_write(unsigned page)
{
	uint64_t words[PAGE_WORDS];

	page_fill(words, 0xde1, page, deleted_versions[page]);
	if (pwrite(deleted_fd, words, PAGE_BYTES, (off_t)page * PAGE_BYTES) != PAGE_BYTES)
		bad("write of page %u: %s", page, strerror(errno));
}

static void deleted_begin(void)
{
	if (who != 4)
		return;
	deleted_fd = open(path_of("deleted"), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	need(deleted_fd >= 0 && !unlink(path_of("deleted")), "deleted file");
	for (unsigned page = 0; page < DELETED_PAGES; page++)
		deleted_write(page);
}

static void deleted_step(void)
{
	unsigned page = beat % DELETED_PAGES;

	if (who != 4)
		return;
	deleted_versions[page]++;
	deleted_write(page);
	progress();
}

static void deleted_check(void)
{
	uint64_t words[PAGE_WORDS];
	struct stat status;

	if (who != 4)
		return;
	if (fstat(deleted_fd, &status) || status.st_nlink)
		bad("has %lu names", (unsigned long)status.st_nlink);
	for (unsigned page = 0; page < DELETED_PAGES; page++)
		if (pread(deleted_fd, words, PAGE_BYTES, (off_t)page * PAGE_BYTES) != PAGE_BYTES ||
		    !page_is(words, 0xde1, page, deleted_versions[page]))
			bad("page %u", page);
}

/* ---- offset: one open file, one offset, inherited by all; 1, 4 and 6 move it ---- */

enum { OFFSET_BYTES_MAX = 64 * 1024 };

static int offset_fd;
static struct offset_shared {
	pthread_mutex_t mutex;
	off_t expected;
} *offset_shared;

static void offset_setup(void)
{
	offset_shared = map_anonymous(sizeof *offset_shared, MAP_SHARED);
	shared_mutex(&offset_shared->mutex);
	offset_fd = open(path_of("offset"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	need(offset_fd >= 0, "offset file");
}

static void offset_look(void)
{
	off_t offset = lseek(offset_fd, 0, SEEK_CUR);

	if (offset != offset_shared->expected)
		bad("is %lld, was left at %lld", (long long)offset, (long long)offset_shared->expected);
}

static void offset_step(void)
{
	uint64_t word = mix(beat);

	if ((who != 1 && who != 4 && who != 6) || !shared_lock(&offset_shared->mutex))
		return;
	offset_look();
	if (offset_shared->expected >= OFFSET_BYTES_MAX)
		offset_shared->expected = lseek(offset_fd, 0, SEEK_SET);
	if (write(offset_fd, &word, sizeof word) == sizeof word)
		offset_shared->expected += sizeof word;
	pthread_mutex_unlock(&offset_shared->mutex);
	progress();
}

static void offset_check(void)
{
	if (!shared_lock(&offset_shared->mutex))
		return;
	offset_look();
	pthread_mutex_unlock(&offset_shared->mutex);
}

/* ---- locks: 1 holds a flock, 2 a POSIX, 3 an open-file-description lock; 7 must not get them */

static const struct flock LOCKED_RANGE = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 20};

static int lock_file(const char *name)
{
	int fd = open(path_of(name), O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0)
		bad("%s: %s", name, strerror(errno));
	return fd;
}

static void locks_begin(void)
{
	struct flock range = LOCKED_RANGE;

	/* The files stay open as long as the processes live: that is the point of them. */
	if (who == 1)
		need(!flock(lock_file("lock-1"), LOCK_EX | LOCK_NB), "flock");
	if (who == 2)
		need(!fcntl(lock_file("lock-2"), F_SETLK, &range), "F_SETLK");
	if (who == 3)
		need(!fcntl(lock_file("lock-3"), F_OFD_SETLK, &range), "F_OFD_SETLK");
}

static void locks_check(void)
{
	struct flock posix = LOCKED_RANGE, ofd = LOCKED_RANGE;

	if (who != 7)
		return;
	int flock_fd = lock_file("lock-1");
	int posix_fd = lock_file("lock-2");
	int ofd_fd = lock_file("lock-3");
	if (!flock(flock_fd, LOCK_EX | LOCK_NB))
		bad("the flock is lost");
	if (fcntl(posix_fd, F_GETLK, &posix) || posix.l_type != F_WRLCK || posix.l_start != 10 ||
	    posix.l_len != 20 || posix.l_pid != board->pids[2])
		bad("the POSIX lock is lost: type %d of pid %d", posix.l_type, posix.l_pid);
	if (fcntl(ofd_fd, F_OFD_GETLK, &ofd) || ofd.l_type != F_WRLCK || ofd.l_start != 10 ||
	    ofd.l_len != 20)
		bad("the open-file-description lock is lost: type %d", ofd.l_type);
	close(flock_fd);
	close(posix_fd);
	close(ofd_fd);
}

/* ---- inotify: 3 watches a directory, and sees what it does there itself ---- */

enum { INOTIFY_BEATS = 16 };

static int inotify_fd, inotify_watch;
static char inotify_file[PATH_MAX];

static void inotify_begin(void)
{
	if (who != 3)
		return;
	mkdir(path_of("watched"), 0700);
	inotify_fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	inotify_watch = inotify_add_watch(inotify_fd, path_of("watched"), IN_CREATE | IN_DELETE);
	need(inotify_fd >= 0 && inotify_watch >= 0, "inotify");
	snprintf(inotify_file, sizeof inotify_file, "%s", path_of("watched/file"));
}

/* Makes and removes a file and reads the events. Events that a dump found unread may be lost. */
static void inotify_see(void)
{
	_Alignas(struct inotify_event) char events[4096];
	uint32_t seen = 0;
	int fd = open(inotify_file, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0 || close(fd) || unlink(inotify_file))
		bad("watched file: %s", strerror(errno));
	ssize_t n = read(inotify_fd, events, sizeof events);
	for (ssize_t at = 0; at < n;) {
		const struct inotify_event *event = (void *)(events + at);
		if (event->wd != inotify_watch)
			bad("an event of watch %d, not %d", event->wd, inotify_watch);
		seen |= event->mask;
		at += (ssize_t)(sizeof *event + event->len);
	}
	if ((seen & (IN_CREATE | IN_DELETE)) != (IN_CREATE | IN_DELETE))
		bad("the watch does not see a file made and removed: %#x", seen);
	progress();
}

static void inotify_step(void)
{
	if (who == 3 && beat % INOTIFY_BEATS == 0)
		inotify_see();
}

static void inotify_check(void)
{
	if (who == 3)
		inotify_see();
}

#define FILE_FEATURES                                                    \
	{"file_append", NULL, append_begin, append_step, append_check},      \
	{"file_deleted", NULL, deleted_begin, deleted_step, deleted_check},  \
	{"file_offset", offset_setup, NULL, offset_step, offset_check},      \
	{"file_locks", NULL, locks_begin, NULL, locks_check},                \
	{"inotify", NULL, inotify_begin, inotify_step, inotify_check}

#endif
