/*
 * Features of tree.c: descriptors that wait for events.
 */
#ifndef DOLLY_TREE_EVENTS_H
#define DOLLY_TREE_EVENTS_H

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "tree_core.h"
#include "tree_time.h"

/* ---- epoll: in 3, a set of the timer, an eventfd and a pipe with data ---- */

enum { COOKIE_TIMER = 0x71, COOKIE_EVENT, COOKIE_PIPE, EPOLL_EVENTS = 8 };

static int epoll_fd, epoll_event_fd, epoll_pipe[2];

static void epoll_watch(int fd, uint64_t cookie, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.u64 = cookie};

	need(!epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

static void epoll_begin(void)
{
	if (who != 3)
		return;
	epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	epoll_event_fd = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
	need(!pipe2(epoll_pipe, O_NONBLOCK | O_CLOEXEC), "pipe2");
	need(write(epoll_pipe[1], "data", 4) == 4, "pipe");
	epoll_watch(timer_fd, COOKIE_TIMER, EPOLLIN);
	epoll_watch(epoll_event_fd, COOKIE_EVENT, EPOLLIN | EPOLLET);
	epoll_watch(epoll_pipe[0], COOKIE_PIPE, EPOLLIN);
}

/* Returns a bit for each cookie that is ready. */
static unsigned epoll_ready(void)
{
	struct epoll_event events[EPOLL_EVENTS];
	unsigned ready = 0;
	int n = epoll_wait(epoll_fd, events, EPOLL_EVENTS, 0);

	for (int i = 0; i < n; i++) {
		if (events[i].data.u64 < COOKIE_TIMER || events[i].data.u64 > COOKIE_PIPE)
			bad("an event with the cookie %#llx", (unsigned long long)events[i].data.u64);
		else
			ready |= 1u << (events[i].data.u64 - COOKIE_TIMER);
	}
	return ready;
}

static void epoll_step(void)
{
	if (who != 3)
		return;
	if (!(epoll_ready() & 1u << (COOKIE_PIPE - COOKIE_TIMER)))
		bad("the pipe with data is not reported");
	progress();
}

static void epoll_check(void)
{
	uint64_t one = 1;

	if (who != 3)
		return;
	/* Edge-triggered: a new event must be reported once more. */
	if (write(epoll_event_fd, &one, sizeof one) != sizeof one ||
	    !(epoll_ready() & 1u << (COOKIE_EVENT - COOKIE_TIMER)))
		bad("the eventfd is not reported");
}

/* ---- eventfd: 2 keeps a number in one ---- */

static int counting_fd;
static uint64_t counting_value;

static void eventfd_begin(void)
{
	if (who != 2)
		return;
	counting_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	need(counting_fd >= 0, "eventfd");
}

static void eventfd_step(void)
{
	uint64_t add = beat % 7 + 1;

	if (who != 2)
		return;
	if (write(counting_fd, &add, sizeof add) == sizeof add)
		counting_value += add;
	progress();
}

static void eventfd_check(void)
{
	uint64_t value = 0;

	if (who != 2)
		return;
	if (read(counting_fd, &value, sizeof value) != sizeof value || value != counting_value)
		bad("holds %llu, not %llu", (unsigned long long)value, (unsigned long long)counting_value);
	counting_value = 0; /* there is a step before the next check */
}

/*
 * ---- eventfd_semaphore: in 2, only with --beyond-criu ----
 *
 * CRIU 4.2.1 loses the mode without a word: criu/eventfd.c creates every eventfd without it.
 */

enum { SEMAPHORE_UNITS = 5 };

static int semaphore_fd;

static void semaphore_begin(void)
{
	if (who != 2 || !beyond_criu)
		return;
	semaphore_fd = eventfd(SEMAPHORE_UNITS, EFD_NONBLOCK | EFD_CLOEXEC | EFD_SEMAPHORE);
	need(semaphore_fd >= 0, "eventfd");
}

static void semaphore_check(void)
{
	uint64_t one, units = 0;

	if (who != 2 || !beyond_criu)
		return;
	while (units <= SEMAPHORE_UNITS && read(semaphore_fd, &one, sizeof one) == sizeof one)
		units++;
	if (units != SEMAPHORE_UNITS)
		bad("took %llu times, not %d", (unsigned long long)units, SEMAPHORE_UNITS);
	units = SEMAPHORE_UNITS;
	need(write(semaphore_fd, &units, sizeof units) == sizeof units, "eventfd");
}

#define EVENT_FEATURES                                                     \
	{"epoll", NULL, epoll_begin, epoll_step, epoll_check},                 \
	{"eventfd", NULL, eventfd_begin, eventfd_step, eventfd_check},         \
	{"eventfd_semaphore", NULL, semaphore_begin, NULL, semaphore_check}

#endif
