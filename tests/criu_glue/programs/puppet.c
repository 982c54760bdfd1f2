/* A program that does to its memory what it is told, one line at a time, over a unix socket.
 *
 *   puppet SOCKET-PATH           connects; each forked process connects again by itself
 *   puppet @FD                   goes on with a connection that it has (after its own execve)
 *
 * Numbers are hexadecimal. Every command is answered by one line: a number, or -errno as "!N".
 * It uses no allocator and no stdio, so that nothing but the commands touches anonymous memory,
 * except its stack and the page of its static buffers. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL

static int channel;
static const char *socket_path;
static volatile int writers_run;
static char child_stacks[2][16 * PAGE] __attribute__((aligned(4096)));

static void join(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	strncpy(address.sun_path, socket_path, sizeof(address.sun_path) - 1);
	channel = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(channel, (void *)&address, sizeof(address)))
		_exit(3);
}

static void answer(long value)
{
	char line[32];
	int length = value < 0 && value > -4096 ? snprintf(line, sizeof(line), "!%ld\n", -value)
						: snprintf(line, sizeof(line), "%lx\n", value);
	if (write(channel, line, length) != length)
		_exit(4);
}

static long result(void *value)
{
	return value == MAP_FAILED ? -errno : (long)value;
}

static void fill(uint64_t address, uint64_t pages, uint64_t seed)
{
	for (uint64_t i = 0; i < pages; i++) {
		volatile uint64_t *page = (void *)(address + i * PAGE);
		page[0] = seed + i;
		page[511] = ~(seed + i);
	}
}

static uint64_t touch(uint64_t address, uint64_t pages)
{
	uint64_t sum = 0;
	for (uint64_t i = 0; i < pages; i++)
		sum += *(volatile uint64_t *)(address + i * PAGE);
	return sum;
}

/* Writes a page of stack in each frame; the address of the deepest. */
static __attribute__((noinline)) uint64_t dig(uint64_t frames)
{
	volatile char hole[PAGE];
	hole[0] = frames;
	uint64_t deepest = frames > 1 ? dig(frames - 1) : (uint64_t)hole;
	return hole[0] == (char)frames ? deepest : 0;
}

struct range {
	uint64_t address, pages;
};

/* Writes its pages in turn, with a value that only grows. */
static void *writer(void *argument)
{
	struct range range = *(struct range *)argument;
	for (uint64_t value = 1; writers_run; value++)
		fill(range.address, range.pages, value << 32);
	return NULL;
}

#define WRITERS_MAX 4
static struct range ranges[WRITERS_MAX];
static pthread_t threads[WRITERS_MAX];
static int writers;

static long start_writer(uint64_t address, uint64_t pages)
{
	if (writers == WRITERS_MAX)
		return -EAGAIN;
	ranges[writers] = (struct range){ address, pages };
	writers_run = 1;
	int error = pthread_create(&threads[writers], NULL, writer, &ranges[writers]);
	writers++;
	return -error;
}

static long stop_writers(void)
{
	for (writers_run = 0; writers; writers--)
		pthread_join(threads[writers - 1], NULL);
	return 0;
}

/* Only what this program needs to go on; anything else kills it. */
static long confine(void)
{
	static const int allowed[] = { SYS_read, SYS_write, SYS_restart_syscall, SYS_exit_group,
				       SYS_rt_sigreturn };
	struct sock_filter code[2 * (sizeof(allowed) / sizeof(*allowed)) + 2];
	int n = 0;
	code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
						 offsetof(struct seccomp_data, nr));
	for (unsigned i = 0; i < sizeof(allowed) / sizeof(*allowed); i++) {
		code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed[i], 0, 1);
		code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	}
	code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	struct sock_fprog program = { n, code };
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) ? -errno : 0;
}

static void become(const char *self)
{
	char argument[16];
	int kept = dup(channel);
	snprintf(argument, sizeof(argument), "@%d", kept);
	execl("/proc/self/exe", self, argument, socket_path, NULL);
	_exit(5);
}

static void loop(const char *self);

static void *second_thread(void *self)
{
	loop(self);
	return NULL;
}

static __attribute__((noreturn)) int linger(void *unused)
{
	(void)unused;
	for (;;)
		pause();
}

static void obey(char *line, const char *self)
{
	char name[16];
	uint64_t a = 0, b = 0, c = 0, d = 0;
	sscanf(line, "%15s %lx %lx %lx %lx", name, &a, &b, &c, &d);
	if (!strcmp(name, "map"))
		answer(result(mmap((void *)a, b * PAGE, c,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | d, -1, 0)));
	else if (!strcmp(name, "droppable"))
		answer(result(mmap((void *)a, b * PAGE, PROT_READ | PROT_WRITE,
				   0x08 | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)));
	else if (!strcmp(name, "unmap"))
		answer(munmap((void *)a, b * PAGE) ? -errno : 0);
	else if (!strcmp(name, "protect"))
		answer(mprotect((void *)a, b * PAGE, c) ? -errno : 0);
	else if (!strcmp(name, "remap"))
		answer(result(mremap((void *)a, b * PAGE, c * PAGE,
				     d ? MREMAP_MAYMOVE | MREMAP_FIXED : 0, d)));
	else if (!strcmp(name, "advise"))
		answer(madvise((void *)a, b * PAGE, c) ? -errno : 0);
	else if (!strcmp(name, "write"))
		fill(a, b, c), answer(0);
	else if (!strcmp(name, "touch"))
		answer(touch(a, b) & 0xff);
	else if (!strcmp(name, "brk"))
		answer((long)sbrk(a * PAGE));
	else if (!strcmp(name, "dig"))
		answer(dig(a));
	else if (!strcmp(name, "lock"))
		answer(mlock((void *)a, b * PAGE) ? -errno : 0);
	else if (!strcmp(name, "writer"))
		answer(start_writer(a, b));
	else if (!strcmp(name, "still"))
		answer(stop_writers());
	else if (!strcmp(name, "fork")) {
		pid_t child = fork();
		if (!child) {
			close(channel);
			join();
		} else
			answer(child);
	} else if (!strcmp(name, "reap")) {
		int status;
		answer(waitpid(a, &status, 0) < 0 ? -errno : status);
	} else if (!strcmp(name, "confine"))
		answer(confine());
	else if (!strcmp(name, "userfault"))
		answer(syscall(SYS_userfaultfd, 1) < 0 ? -errno : 0);
	else if (!strcmp(name, "exec"))
		become(self);
	else if (!strcmp(name, "forsake")) {
		/* a second thread goes on, the main one exits */
		pthread_t thread;
		pthread_create(&thread, NULL, second_thread, (void *)self);
		pthread_exit(NULL);
	} else if (!strcmp(name, "share")) {
		/* a child in the same memory, as between vfork and execve, until it is killed */
		answer(clone(linger, child_stacks[0] + sizeof(child_stacks[0]), CLONE_VM | SIGCHLD,
			     NULL));
	} else if (!strcmp(name, "vfork")) {
		/* stops this thread, uninterruptibly, until somebody kills the child */
		answer(clone(linger, child_stacks[1] + sizeof(child_stacks[1]),
			     CLONE_VM | CLONE_VFORK | SIGCHLD, NULL));
	} else if (!strcmp(name, "exit"))
		_exit(a);
	else
		answer(-EINVAL);
}

static void loop(const char *self)
{
	char line[256];
	size_t used = 0;
	for (;;) {
		ssize_t n = read(channel, line + used, 1);
		if (n == 0)
			_exit(0);
		if (n < 0)
			_exit(errno);
		if (line[used++] == '\n') {
			line[used - 1] = 0;
			used = 0;
			obey(line, self);
		} else if (used == sizeof(line))
			_exit(6);
	}
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	if (argv[1][0] == '@') {
		channel = atoi(argv[1] + 1);
		socket_path = argv[2];
		answer(0);
	} else {
		socket_path = argv[1];
		join();
	}
	loop(argv[0]);
}
