/* Waits in one system call and tells how it ended: "RESULT ERRNO ELAPSED_US\n" on stdout.
 *
 *   waiter CALL LIMIT_MS    LIMIT_MS 0: without a limit, until a byte comes on stdin or a signal
 *
 * SIGUSR1 has a handler without SA_RESTART, SIGUSR2 is what sigwait waits for. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void noted(int number)
{
	(void)number;
}

static int64_t now_us(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
	const char *call = argv[1];
	long limit_ms = atol(argv[2]);
	struct timespec limit = { limit_ms / 1000, limit_ms % 1000 * 1000000 };
	struct timespec *limit_or_null = limit_ms ? &limit : NULL;
	int limit_or_minus = limit_ms ? limit_ms : -1;
	struct pollfd polled = { 0, POLLIN, 0 };
	struct epoll_event event = { .events = EPOLLIN };
	int epoll = epoll_create1(0);
	epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
	uint32_t word = 0;
	char byte;
	fd_set set;
	FD_ZERO(&set);
	FD_SET(0, &set);
	sigset_t waited;
	sigemptyset(&waited);
	sigaddset(&waited, SIGUSR2);
	sigprocmask(SIG_BLOCK, &waited, NULL);
	sigset_t none;
	sigemptyset(&none);
	struct sigaction action = { .sa_handler = noted };
	sigaction(SIGUSR1, &action, NULL);
	int semaphore = semget(IPC_PRIVATE, 1, 0600);
	struct sembuf take = { 0, -1, 0 };
	(void)argc;

	long result = -2;
	int64_t begin = now_us();
	if (!strcmp(call, "nanosleep"))
		result = nanosleep(&limit, NULL);
	else if (!strcmp(call, "clock_nanosleep"))
		errno = result = clock_nanosleep(CLOCK_MONOTONIC, 0, &limit, NULL);
	else if (!strcmp(call, "poll"))
		result = poll(&polled, 1, limit_or_minus);
	else if (!strcmp(call, "ppoll"))
		result = ppoll(&polled, 1, limit_or_null, &none);
	else if (!strcmp(call, "select"))
		result = pselect(1, &set, NULL, NULL, limit_or_null, NULL);
	else if (!strcmp(call, "epoll_wait"))
		result = epoll_wait(epoll, &event, 1, limit_or_minus);
	else if (!strcmp(call, "epoll_pwait"))
		result = epoll_pwait(epoll, &event, 1, limit_or_minus, &none);
	else if (!strcmp(call, "futex"))
		result = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, limit_or_null, NULL, 0);
	else if (!strcmp(call, "read"))
		result = read(0, &byte, 1);
	else if (!strcmp(call, "sigwaitinfo"))
		result = sigwaitinfo(&waited, NULL);
	else if (!strcmp(call, "sigtimedwait"))
		result = sigtimedwait(&waited, NULL, &limit);
	else if (!strcmp(call, "pause"))
		result = pause();
	else if (!strcmp(call, "sigsuspend"))
		result = sigsuspend(&none);
	else if (!strcmp(call, "semop"))
		result = syscall(SYS_semop, semaphore, &take, 1);
	else if (!strcmp(call, "semtimedop"))
		result = syscall(SYS_semtimedop, semaphore, &take, 1, limit_or_null);
	int number = result < 0 ? errno : 0;
	int64_t elapsed = now_us() - begin;
	semctl(semaphore, 0, IPC_RMID);
	printf("%ld %d %ld\n", result, number, (long)elapsed);
	return 0;
}
