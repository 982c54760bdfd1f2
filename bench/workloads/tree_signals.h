/*
 * Features of tree.c: signals, blocked and pending with their values, and where they are handled.
 */
#ifndef DOLLY_TREE_SIGNALS_H
#define DOLLY_TREE_SIGNALS_H

#include <sys/signalfd.h>

#include "tree_core.h"

/* ---- signals: 5 has blocked signals pending, of the process and of a thread, with values ---- */

enum { PENDING = 3 };

static int pending_value; /* of the first signal of the present generation */
static pid_t pending_thread;
static atomic_int thread_drain_wanted; /* asks the sleeping thread to take and renew its own */
static char thread_fault[REASON_BYTES];

static int queue_signal(pid_t thread, int number, int value)
{
	siginfo_t info = {.si_signo = number, .si_code = SI_QUEUE};

	info.si_pid = getpid();
	info.si_uid = getuid();
	info.si_value.sival_int = value;
	if (thread)
		return (int)syscall(SYS_rt_tgsigqueueinfo, getpid(), thread, number, &info);
	return (int)syscall(SYS_rt_sigqueueinfo, getpid(), number, &info);
}

/* Takes one pending signal; it must be this one, from this process, with this value. */
static int take_signal(int number, int value, char *fault)
{
	const struct timespec at_once = {0};
	siginfo_t info = {0};
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, number);
	int taken = sigtimedwait(&set, &info, &at_once);
	if (taken == number && info.si_code == SI_QUEUE && info.si_pid == getpid() &&
	    info.si_value.sival_int == value)
		return 1;
	if (!*fault)
		snprintf(fault, REASON_BYTES, "signal %d: took %d, code %d, pid %d, value %d, not value %d",
		         number, taken, info.si_code, info.si_pid, info.si_value.sival_int, value);
	return 0;
}

static void signals_begin(void)
{
	sigset_t blocked;

	if (who != 5)
		return;
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigaddset(&blocked, SIGRTMIN + 5);
	sigaddset(&blocked, SIGRTMIN + 6);
	/* Before the threads exist: they inherit it. */
	need(!sigprocmask(SIG_BLOCK, &blocked, NULL), "sigprocmask");
	for (int i = 0; i < PENDING; i++)
		need(!queue_signal(0, SIGRTMIN + 5, pending_value + i), "rt_sigqueueinfo");
	need(!kill(getpid(), SIGUSR1), "kill");
}

/* In the sleeping thread of process 5. */
static void thread_signals(pid_t thread)
{
	static int value;

	if (!pending_thread) {
		pending_thread = thread;
		need(!queue_signal(thread, SIGRTMIN + 6, ++value), "rt_tgsigqueueinfo");
	}
	if (atomic_load(&thread_drain_wanted)) {
		take_signal(SIGRTMIN + 6, value, thread_fault);
		need(!queue_signal(thread, SIGRTMIN + 6, ++value), "rt_tgsigqueueinfo");
		atomic_store(&thread_drain_wanted, 0);
	}
}

static void signals_check(void)
{
	char fault[REASON_BYTES] = "";
	sigset_t set;

	if (who != 5)
		return;
	sigpending(&set);
	if (!sigismember(&set, SIGUSR1))
		bad("SIGUSR1 is not pending");
	for (int i = 0; i < PENDING; i++)
		take_signal(SIGRTMIN + 5, pending_value + i, fault);
	pending_value += PENDING;
	for (int i = 0; i < PENDING; i++)
		queue_signal(0, SIGRTMIN + 5, pending_value + i);
	atomic_store(&thread_drain_wanted, 1);
	while (atomic_load(&thread_drain_wanted))
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	if (*fault || *thread_fault)
		bad("%s", *fault ? fault : thread_fault);
}

/* ---- signalfd: 2 reads numbered signals from one, two of them always pending ---- */

static int signal_fd;
static int signalfd_sent, signalfd_received;

static void signalfd_begin(void)
{
	sigset_t set;

	if (who != 2)
		return;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 4);
	signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
	need(!sigprocmask(SIG_BLOCK, &set, NULL) && signal_fd >= 0, "signalfd");
	for (int i = 0; i < 2; i++)
		need(!queue_signal(0, SIGRTMIN + 4, ++signalfd_sent), "rt_sigqueueinfo");
}

static void signalfd_step(void)
{
	struct signalfd_siginfo info = {0};

	if (who != 2)
		return;
	if (queue_signal(0, SIGRTMIN + 4, signalfd_sent + 1) == 0)
		signalfd_sent++;
	if (read(signal_fd, &info, sizeof info) != sizeof info ||
	    info.ssi_int != signalfd_received + 1)
		bad("signal number %d in place of %d", info.ssi_int, signalfd_received + 1);
	signalfd_received++;
	progress();
}

/* ---- sigaltstack: of the main thread of 1 ---- */

static char signal_stack[64 * 1024];

static void sigaltstack_begin(void)
{
	const stack_t stack = {.ss_sp = signal_stack, .ss_size = sizeof signal_stack};

	if (who == 1)
		need(!sigaltstack(&stack, NULL), "sigaltstack");
}

static void sigaltstack_check(void)
{
	stack_t stack;

	if (who == 1 && (sigaltstack(NULL, &stack) || stack.ss_sp != signal_stack ||
	                 stack.ss_size != sizeof signal_stack || stack.ss_flags))
		bad("is at %p, not %p", stack.ss_sp, (void *)signal_stack);
}

#define SIGNAL_FEATURES                                                    \
	{"signals_pending", NULL, signals_begin, NULL, signals_check},         \
	{"signalfd", NULL, signalfd_begin, signalfd_step, NULL},               \
	{"sigaltstack", NULL, sigaltstack_begin, NULL, sigaltstack_check}

#endif
