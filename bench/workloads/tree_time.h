/*
 * Features of tree.c: clocks and timers.
 */
#ifndef DOLLY_TREE_TIME_H
#define DOLLY_TREE_TIME_H

#include <sys/time.h>
#include <sys/timerfd.h>

#include "tree_core.h"

enum {
	TIMER_NS = 10 * 1000 * 1000,
	ITIMER_US = 20 * 1000,
	FAR_S = 100000, /* a timer that must not fire, whatever happens to the clocks */
};

static const struct timespec TIMER_PERIOD = {0, TIMER_NS}, NEVER;

static int is_period(struct timespec interval)
{
	return interval.tv_sec == 0 && interval.tv_nsec == TIMER_NS;
}

static int is_far(struct timespec left)
{
	return left.tv_sec > FAR_S / 2 && left.tv_sec <= FAR_S;
}

static void on_signal(int number, void (*handler)(int))
{
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};

	need(!sigaction(number, &action, NULL), "sigaction");
}

/* ---- clocks: never go back ---- */

static int64_t monotonic_last, boottime_last;

static void clock_step(void)
{
	int64_t monotonic = monotonic_ns(CLOCK_MONOTONIC), boottime = monotonic_ns(CLOCK_BOOTTIME);

	if (monotonic < monotonic_last || boottime < boottime_last)
		bad("a clock went back: monotonic by %lld ns, boottime by %lld ns",
		    (long long)(monotonic_last - monotonic), (long long)(boottime_last - boottime));
	monotonic_last = monotonic;
	boottime_last = boottime;
	progress();
}

/* ---- timer_create: in 6, periodic by a real-time signal, and one far away ---- */

static timer_t posix_timer, posix_timer_far;
static atomic_uint_fast64_t posix_timer_fired;

static void posix_timer_handler(int number)
{
	(void)number;
	atomic_fetch_add(&posix_timer_fired, 1);
}

static void posix_timer_begin(void)
{
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1};
	const struct itimerspec period = {{0, TIMER_NS}, {0, TIMER_NS}}, far = {{0, 0}, {FAR_S, 0}};

	if (who != 6)
		return;
	on_signal(SIGRTMIN + 1, posix_timer_handler);
	need(!timer_create(CLOCK_MONOTONIC, &event, &posix_timer) &&
	             !timer_create(CLOCK_REALTIME, &event, &posix_timer_far) &&
	             !timer_settime(posix_timer, 0, &period, NULL) &&
	             !timer_settime(posix_timer_far, 0, &far, NULL),
	     "timer_create");
}

static void posix_timer_step(void)
{
	if (who == 6)
		atomic_store(&board->progress[feature_index], atomic_load(&posix_timer_fired));
}

static void posix_timer_check(void)
{
	struct itimerspec setting;

	if (who != 6)
		return;
	if (timer_gettime(posix_timer, &setting) || !is_period(setting.it_interval))
		bad("the periodic timer lost its interval");
	if (timer_gettime(posix_timer_far, &setting) || !is_far(setting.it_value))
		bad("the far timer has %lld s left", (long long)setting.it_value.tv_sec);
}

/* ---- setitimer: in 7 ---- */

static atomic_uint_fast64_t itimer_fired;

static void itimer_handler(int number)
{
	(void)number;
	atomic_fetch_add(&itimer_fired, 1);
}

static void itimer_begin(void)
{
	const struct itimerval period = {{0, ITIMER_US}, {0, ITIMER_US}};

	if (who != 7)
		return;
	on_signal(SIGALRM, itimer_handler);
	need(!setitimer(ITIMER_REAL, &period, NULL), "setitimer");
}

static void itimer_step(void)
{
	if (who == 7)
		atomic_store(&board->progress[feature_index], atomic_load(&itimer_fired));
}

static void itimer_check(void)
{
	struct itimerval setting;

	if (who == 7 && (getitimer(ITIMER_REAL, &setting) || setting.it_interval.tv_usec != ITIMER_US))
		bad("lost its interval");
}

/* ---- timerfd: in 3, one that is armed again whenever it expired, and one far away ---- */

static int timer_fd, timer_far_fd;

static void timer_arm(int fd, struct timespec first, struct timespec interval)
{
	const struct itimerspec setting = {interval, first};

	if (timerfd_settime(fd, 0, &setting, NULL))
		bad("timerfd_settime: %s", strerror(errno));
}

static void timerfd_begin(void)
{
	if (who != 3)
		return;
	timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	timer_far_fd = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK | TFD_CLOEXEC);
	need(timer_fd >= 0 && timer_far_fd >= 0, "timerfd");
	timer_arm(timer_fd, TIMER_PERIOD, NEVER);
	timer_arm(timer_far_fd, (struct timespec){FAR_S, 0}, NEVER);
}

static void timerfd_step(void)
{
	uint64_t expired;

	if (who != 3 || read(timer_fd, &expired, sizeof expired) != sizeof expired)
		return;
	timer_arm(timer_fd, TIMER_PERIOD, NEVER);
	progress();
}

static void timerfd_check(void)
{
	struct itimerspec setting;

	if (who == 3 && (timerfd_gettime(timer_far_fd, &setting) || !is_far(setting.it_value)))
		bad("the far timer has %lld s left", (long long)setting.it_value.tv_sec);
}

/*
 * ---- timerfd_periodic: in 3, only with --beyond-criu ----
 *
 * CRIU 4.2.1 loses it without a word: of a periodic timerfd that expired and was not read the
 * kernel tells 0 as the time left (fs/timerfd.c), CRIU restores that, and 0 disarms
 * (criu/timerfd.c). In a freeze longer than its period that is every periodic timerfd.
 */

enum { PERIODIC_LOOKS = 100 };

static int periodic_fd;

static void periodic_begin(void)
{
	if (who != 3 || !beyond_criu)
		return;
	periodic_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	need(periodic_fd >= 0, "timerfd");
	timer_arm(periodic_fd, TIMER_PERIOD, TIMER_PERIOD);
}

static void periodic_step(void)
{
	uint64_t expired;

	if (who == 3 && beyond_criu && read(periodic_fd, &expired, sizeof expired) == sizeof expired)
		progress();
}

/* One that expires in this very moment has 0 left too, and then a period again. */
static int periodic_runs(void)
{
	struct itimerspec setting;

	for (int attempt = 0; attempt < PERIODIC_LOOKS; attempt++) {
		if (timerfd_gettime(periodic_fd, &setting) || !is_period(setting.it_interval))
			return 0;
		if (setting.it_value.tv_sec || setting.it_value.tv_nsec)
			return 1;
		usleep(1000);
	}
	return 0;
}

static void periodic_check(void)
{
	if (who == 3 && beyond_criu && !periodic_runs())
		bad("does not run any more");
}

#define TIME_FEATURES                                                                 \
	{"clocks", NULL, NULL, clock_step, NULL},                                         \
	{"timer_posix", NULL, posix_timer_begin, posix_timer_step, posix_timer_check},    \
	{"timer_itimer", NULL, itimer_begin, itimer_step, itimer_check},                  \
	{"timerfd", NULL, timerfd_begin, timerfd_step, timerfd_check},                    \
	{"timerfd_periodic", NULL, periodic_begin, periodic_step, periodic_check}

#endif
