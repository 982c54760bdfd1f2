/*
 * Features of tree.c: the processes and threads themselves.
 */
#ifndef DOLLY_TREE_TASKS_H
#define DOLLY_TREE_TASKS_H

#include <linux/futex.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/wait.h>

#include "tree_core.h"
#include "tree_signals.h"

/* ---- ids: who a process is, and the settings that it made ---- */

static struct identity {
	pid_t pid, parent, session, group;
	uid_t user;
	mode_t umask;
	int nice, no_file_limit;
	char name[16], cwd[PATH_MAX];
} identity;

static int other_user;

static struct identity identity_now(void)
{
	/* Static and so all zero: the whole struct is compared, with its padding. */
	static struct identity now;
	struct rlimit limit = {0};

	now.pid = getpid();
	now.parent = getppid();
	now.session = getsid(0);
	now.group = getpgrp();
	now.user = getuid();
	now.umask = umask(0);
	umask(now.umask);
	now.nice = getpriority(PRIO_PROCESS, 0);
	getrlimit(RLIMIT_NOFILE, &limit);
	now.no_file_limit = (int)limit.rlim_cur;
	prctl(PR_GET_NAME, now.name);
	need(getcwd(now.cwd, sizeof now.cwd) != NULL, "getcwd");
	return now;
}

static void ids_begin(void)
{
	const struct rlimit limit = {.rlim_cur = 200, .rlim_max = 300};
	char name[16];

	snprintf(name, sizeof name, "tree-%d", who);
	prctl(PR_SET_NAME, name);
	if (who == 2)
		need(!chdir(directory), "chdir");
	if (who == 3)
		umask(027);
	if (who == 6)
		need(!setpriority(PRIO_PROCESS, 0, 5), "setpriority");
	if (who == 7)
		need(!setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
	if (who == 5 && other_user) {
		need(!setresgid(USER_UID, USER_UID, USER_UID) && !setresuid(USER_UID, USER_UID, USER_UID),
		     "setresuid");
		need(!prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl"); /* setresuid clears it */
	}
	identity = identity_now();
}

static void ids_check(void)
{
	struct identity now = identity_now();

	if (memcmp(&now, &identity, sizeof now))
		bad("pid %d parent %d session %d group %d user %d umask %o nice %d files %d name %s",
		    now.pid, now.parent, now.session, now.group, (int)now.user, (unsigned)now.umask,
		    now.nice, now.no_file_limit, now.name);
}

/* ---- children: none of the processes ended ---- */

static void children_check(void)
{
	for (int child = 0; child < PROCESSES; child++) {
		int status;
		pid_t ended;

		if (child == who || parent_of[child] != who)
			continue;
		ended = waitpid(board->pids[child], &status, WNOHANG);
		if (ended)
			bad("process %d, pid %d: waitpid %d: %s", child, board->pids[child], ended,
			    ended < 0 ? strerror(errno) : WIFSIGNALED(status) ? strsignal(WTERMSIG(status))
			                                                      : "it exited");
	}
}

static void children_step(void)
{
	if (beat % 16 == 0)
		children_check();
}

/* ---- threads: one waits for a futex, one sleeps, one polls; each knows itself by its TLS ---- */

static struct thread {
	pthread_t id;
	pid_t tid;
	char name[16];
	char fault[REASON_BYTES];
} threads[THREADS];
static atomic_uint futex_word;
static int poll_fd;
static __thread uint64_t cookie;

static uint64_t cookie_of(int number)
{
	return mix((uint64_t)who << 8 | (uint64_t)number);
}

static void thread_begin(int number)
{
	struct thread *thread = &threads[number];

	cookie = cookie_of(number);
	thread->tid = (pid_t)syscall(SYS_gettid);
	snprintf(thread->name, sizeof thread->name, "tree-%d-%d", who, number);
	prctl(PR_SET_NAME, thread->name);
}

static void thread_beat(int number)
{
	struct thread *thread = &threads[number];
	pid_t tid = (pid_t)syscall(SYS_gettid);
	char name[16];

	prctl(PR_GET_NAME, name);
	if (!*thread->fault && (cookie != cookie_of(number) || tid != thread->tid ||
	                        strcmp(name, thread->name)))
		snprintf(thread->fault, REASON_BYTES, "thread %d: tid %d, was %d; name %s; cookie %s",
		         number, tid, thread->tid, name,
		         cookie == cookie_of(number) ? "kept" : "lost");
	atomic_fetch_add(&board->beats[who][number], 1);
}

static void *futex_thread(void *unused)
{
	unsigned seen = 0;

	thread_begin(1);
	for (;;) {
		while (atomic_load(&futex_word) == seen)
			syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
		seen = atomic_load(&futex_word);
		thread_beat(1);
	}
	return unused;
}

static void *sleep_thread(void *unused)
{
	const struct timespec nap = {.tv_nsec = 7 * 1000 * 1000};

	thread_begin(2);
	for (;; nanosleep(&nap, NULL)) {
		if (who == 5)
			thread_signals(threads[2].tid);
		thread_beat(2);
	}
	return unused;
}

static void *poll_thread(void *unused)
{
	struct pollfd waited = {.fd = poll_fd, .events = POLLIN};
	uint64_t value;

	thread_begin(3);
	for (;;)
		if (poll(&waited, 1, -1) == 1 && read(poll_fd, &value, sizeof value) == sizeof value)
			thread_beat(3);
	return unused;
}

/* Not a begin(): the threads must inherit what every feature did to the signal mask. */
static void threads_start(void)
{
	static void *(*const bodies[THREADS])(void *) = {NULL, futex_thread, sleep_thread, poll_thread};
	pthread_attr_t attributes;

	poll_fd = eventfd(0, EFD_CLOEXEC);
	need(poll_fd >= 0, "eventfd");
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, CLIENT_STACK_BYTES);
	for (int number = 1; number < THREADS; number++)
		need(!pthread_create(&threads[number].id, &attributes, bodies[number], NULL),
		     "pthread_create");
	pthread_attr_destroy(&attributes);
	cookie = cookie_of(0);
}

static void threads_step(void)
{
	uint64_t one = 1;

	atomic_fetch_add(&futex_word, 1);
	syscall(SYS_futex, &futex_word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	if (write(poll_fd, &one, sizeof one) != sizeof one)
		bad("eventfd: %s", strerror(errno));
	if (cookie != cookie_of(0))
		bad("thread 0 lost its cookie");
	progress();
}

static void threads_check(void)
{
	for (int number = 1; number < THREADS; number++)
		if (*threads[number].fault)
			bad("%s", threads[number].fault);
}

/* ---- forks: 6 has a child of a short life, again and again, and reaps it ---- */

enum { FORK_BEATS = 5 };

static int forks_enabled = 1;
static pid_t fork_child;
static int fork_number;

static void forks_reap(void)
{
	int status;
	pid_t ended = waitpid(fork_child, &status, WNOHANG);

	if (!ended)
		return;
	if (ended != fork_child || !WIFEXITED(status) || WEXITSTATUS(status) != fork_number % 128)
		bad("child %d: waitpid %d, status %#x in place of exit %d", fork_child, ended, status,
		    fork_number % 128);
	fork_child = 0;
	progress();
}

static void forks_step(void)
{
	if (who != 6 || !forks_enabled)
		return;
	if (fork_child) {
		forks_reap();
	} else if (beat % FORK_BEATS == 0) {
		fork_number++;
		fork_child = fork();
		if (fork_child == 0) {
			nanosleep(&(struct timespec){.tv_nsec = BEAT_NS}, NULL);
			_exit(fork_number % 128);
		}
		if (fork_child < 0) {
			bad("fork: %s", strerror(errno));
			fork_child = 0;
		}
	}
}

/* ---- zombie: a child of 2 that ended and is not reaped. stopped: one of 4 that is stopped ---- */

enum { ZOMBIE_STATUS = 42 };

static int stopped_enabled;
static pid_t zombie, stopped;

static void zombie_begin(void)
{
	siginfo_t info;

	if (who != 2)
		return;
	zombie = fork();
	if (zombie == 0)
		_exit(ZOMBIE_STATUS);
	need(zombie > 0 && !waitid(P_PID, (id_t)zombie, &info, WEXITED | WNOWAIT), "zombie");
}

static void zombie_check(void)
{
	siginfo_t info = {0};

	if (who == 2 && (waitid(P_PID, (id_t)zombie, &info, WEXITED | WNOWAIT | WNOHANG) ||
	                 info.si_pid != zombie || info.si_code != CLD_EXITED ||
	                 info.si_status != ZOMBIE_STATUS))
		bad("pid %d, code %d, status %d", info.si_pid, info.si_code, info.si_status);
}

static void stopped_begin(void)
{
	siginfo_t info;

	if (who != 4 || !stopped_enabled)
		return;
	stopped = fork();
	if (stopped == 0)
		for (prctl(PR_SET_PDEATHSIG, SIGKILL);;)
			raise(SIGSTOP);
	need(stopped > 0 && !waitid(P_PID, (id_t)stopped, &info, WSTOPPED), "stopped child");
}

static void stopped_check(void)
{
	char path[64], status[512] = "";

	if (!stopped)
		return;
	snprintf(path, sizeof path, "/proc/%d/stat", stopped);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, status, sizeof status - 1);
	close(fd);
	char *state = n > 0 ? strrchr(status, ')') : NULL;
	if (!state || strncmp(state, ") T", 3))
		bad("pid %d: %.40s", stopped, state ? state : "gone");
}

/* ---- sysv_semaphores: 1 moves one up and down ---- */

enum { SEMAPHORE_MAX = 20 };

static int semaphores = -1;
static int semaphore_value;

static void semaphores_setup(void)
{
	semaphores = semget(IPC_PRIVATE, 2, IPC_CREAT | 0600);
	need(semaphores >= 0, "semget");
}

static void semaphores_step(void)
{
	int wanted = (int)(mix(beat) % SEMAPHORE_MAX);
	struct sembuf operation = {.sem_num = 1, .sem_op = (short)(wanted - semaphore_value),
	                           .sem_flg = IPC_NOWAIT};

	/* An operation of 0 waits for 0. */
	if (who != 1 || !operation.sem_op)
		return;
	if (semop(semaphores, &operation, 1))
		bad("semop: %s", strerror(errno));
	semaphore_value = wanted;
	progress();
}

static void semaphores_check(void)
{
	int value;

	if (who == 1 && (value = semctl(semaphores, 1, GETVAL)) != semaphore_value)
		bad("is %d, was left at %d", value, semaphore_value);
}

static void tasks_remove(void)
{
	semctl(semaphores, 0, IPC_RMID);
}

#define TASK_FEATURES                                                                 \
	{"children", NULL, NULL, children_step, children_check},                          \
	{"threads", NULL, NULL, threads_step, threads_check},                             \
	{"forks", NULL, NULL, forks_step, NULL},                                          \
	{"zombie", NULL, zombie_begin, NULL, zombie_check},                               \
	{"stopped", NULL, stopped_begin, NULL, stopped_check},                            \
	{"sysv_semaphores", semaphores_setup, NULL, semaphores_step, semaphores_check},   \
	/* The last one: process 5 may do less once it is another user. */                \
	{"ids", NULL, ids_begin, NULL, ids_check}

#endif
