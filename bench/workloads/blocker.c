/*
 * blocker: a small server that holds one thing which a checkpoint refuses, needs an option for, or
 * loses. For tests of the checks before a migration.
 *
 *     blocker KIND PORT [PATH]
 *
 * KIND is a row of the table below; `idle` holds nothing. PATH is where file kinds make their file
 * (default /tmp/blocked), for `unix` the socket to connect to.
 *
 * Lines (see line_server.h):
 *     <sequence>   ->  <sequence> <count>
 *     KIND         ->  KIND <kind> ok, or KIND <kind> ERR <why it could not be had on this kernel>
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if_alg.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <linux/userfaultfd.h>
#include <mqueue.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "line_server.h"

#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif

enum { SECRET_BYTES = 4096, RING_ENTRIES = 4, GHOST_BYTES = 2 * 1024 * 1024, SEMAPHORE_UNITS = 3 };

static const char *path = "/tmp/blocked";

/* Each returns a descriptor or another number that is not negative, or -1 and errno. */

static int hold_nothing(void)
{
	return 0;
}

static int hold_io_uring(void)
{
	struct io_uring_params parameters = {0};

	return (int)syscall(SYS_io_uring_setup, RING_ENTRIES, &parameters);
}

static int hold_memfd_secret(void)
{
	int fd = (int)syscall(SYS_memfd_secret, O_CLOEXEC);

	if (fd < 0 || ftruncate(fd, SECRET_BYTES))
		return -1;
	char *secret = mmap(NULL, SECRET_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (secret == MAP_FAILED)
		return -1;
	strcpy(secret, "secret");
	return fd;
}

static int hold_mqueue(void)
{
	struct mq_attr attributes = {.mq_maxmsg = 4, .mq_msgsize = 64};
	mqd_t queue = mq_open("/blocker", O_RDWR | O_CREAT, 0600, &attributes);

	return queue < 0 || mq_send(queue, "message", 8, 0) ? -1 : queue;
}

static int hold_userfaultfd(void)
{
	return (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
}

/* A child that is traced: CRIU is a tracer too, and there can be only one. */
static int hold_ptrace(void)
{
	pid_t child = fork();

	if (child == 0)
		for (prctl(PR_SET_PDEATHSIG, SIGKILL);;)
			pause();
	return child < 0 || ptrace(PTRACE_SEIZE, child, 0, 0) ? -1 : child;
}

static int hold_perf_event(void)
{
	struct perf_event_attr attributes = {
	        .type = PERF_TYPE_SOFTWARE,
	        .size = sizeof attributes,
	        .config = PERF_COUNT_SW_TASK_CLOCK,
	        .exclude_kernel = 1,
	};

	return (int)syscall(SYS_perf_event_open, &attributes, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
}

static int hold_fanotify(void)
{
	/* What a user without privileges may have: by file handles, of single inodes. */
	int fd = fanotify_init(FAN_CLASS_NOTIF | FAN_REPORT_FID | FAN_CLOEXEC, O_RDONLY);

	return fd < 0 || fanotify_mark(fd, FAN_MARK_ADD, FAN_OPEN, AT_FDCWD, "/tmp") ? -1 : fd;
}

static int hold_inotify(void)
{
	int fd = inotify_init1(IN_CLOEXEC);

	return fd < 0 || inotify_add_watch(fd, "/tmp", IN_CREATE) < 0 ? -1 : fd;
}

/* A socket of the kernel's cryptography: a family that CRIU does not know. */
static int hold_af_alg(void)
{
	struct sockaddr_alg address = {
	        .salg_family = AF_ALG, .salg_type = "hash", .salg_name = "sha256"};
	int fd = socket(AF_ALG, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	return fd < 0 || bind(fd, (void *)&address, sizeof address) ? -1 : fd;
}

/* Is not refused but comes back as an ordinary eventfd: CRIU does not keep the mode. */
static int hold_eventfd_semaphore(void)
{
	return eventfd(SEMAPHORE_UNITS, EFD_SEMAPHORE | EFD_CLOEXEC);
}

static int hold_flock(void)
{
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	return fd < 0 || flock(fd, LOCK_EX | LOCK_NB) ? -1 : fd;
}

/* A deleted file that is larger than CRIU puts into its images unless told to. */
static int hold_ghost(void)
{
	static const char block[4096] = "ghost";
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0 || unlink(path))
		return -1;
	for (int written = 0; written < GHOST_BYTES; written += (int)sizeof block)
		if (write(fd, block, sizeof block) != sizeof block)
			return -1;
	return fd;
}

/* Connected to somebody who is not in the container. */
static int hold_unix(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (strlen(path) >= sizeof address.sun_path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	return fd < 0 || connect(fd, (void *)&address, sizeof address) ? -1 : fd;
}

static const struct kind {
	const char *name;
	int (*hold)(void);
} kinds[] = {
        {"idle", hold_nothing},
        {"io_uring", hold_io_uring},
        {"memfd_secret", hold_memfd_secret},
        {"mqueue", hold_mqueue},
        {"userfaultfd", hold_userfaultfd},
        {"ptrace", hold_ptrace},
        {"perf_event", hold_perf_event},
        {"fanotify", hold_fanotify},
        {"inotify", hold_inotify},
        {"af_alg", hold_af_alg},
        {"eventfd_semaphore", hold_eventfd_semaphore},
        {"flock", hold_flock},
        {"ghost", hold_ghost},
        {"unix", hold_unix},
};

static const struct kind *held;
static int held_error; /* errno of the attempt, 0 if it is held */

static void answer_line(const char *line, struct reply *reply)
{
	if (reply_sequence(line, reply))
		return;
	if (strcmp(line, "KIND"))
		reply_add(reply, "ERR unknown command\n");
	else if (held_error)
		reply_add(reply, "KIND %s ERR %s\n", held->name, strerror(held_error));
	else
		reply_add(reply, "KIND %s ok\n", held->name);
}

int main(int argc, char **argv)
{
	for (unsigned i = 0; argc > 1 && i < sizeof kinds / sizeof *kinds; i++)
		if (!strcmp(argv[1], kinds[i].name))
			held = &kinds[i];
	if (!held || argc < 3 || argc > 4) {
		fprintf(stderr, "usage: blocker KIND PORT [PATH]; kinds:");
		for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++)
			fprintf(stderr, " %s", kinds[i].name);
		fprintf(stderr, "\n");
		return 2;
	}
	if (argc == 4)
		path = argv[3];
	int port = (int)number_argument("PORT", argv[2], 1, 65535);
	signal(SIGPIPE, SIG_IGN);
	held_error = held->hold() < 0 ? errno : 0;
	lines_serve(port, answer_line);
}
