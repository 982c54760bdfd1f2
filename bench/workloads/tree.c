/*
 * tree: eight processes of four threads each that use most of what a checkpoint must carry over,
 * and notice what it did not.
 *
 *     tree PORT [--dir DIRECTORY] [--no-forks] [--stopped] [--user] [--beyond-criu]
 *
 * --dir: where files are made (/tmp). --no-forks: no children of a short life. --stopped: one more
 * process, which is stopped. --user: process 5 runs as user 1000; CRIU can dump that only with
 * CAP_SYS_RESOURCE (prlimit(2) of another user's process). --beyond-criu: two features more, which
 * CRIU neither carries over nor refuses (tree_time.h, tree_events.h).
 *
 * What is used is a table of features, below; each is a few functions in one of the tree_*.h,
 * whose contract is told in tree_core.h.
 *
 * Lines (see line_server.h):
 *     <sequence>   ->  <sequence> <count>
 *     CHECK        ->  {"pipe": "ok", "timerfd": "BAD: process 3: …", …}  all features, now
 *     COUNTERS     ->  {"beats": [[4 threads] × 8], "progress": {"pipe": 4711, …}}; all but the
 *                      features that do nothing between two checks go on growing
 *     CORRUPT      ->  CORRUPT ok     process 0 falsifies a byte of its memory: CHECK must see it
 *     QUIT         ->  QUIT ok        ends all processes, removes the System V objects
 *
 * The port opens when every process is in full swing. The processes end with their parents.
 */
#include "tree_core.h"

#include "tree_channels.h"
#include "tree_events.h"
#include "tree_files.h"
#include "tree_memory.h"
#include "tree_signals.h"
#include "tree_tasks.h"
#include "tree_time.h"

#include <getopt.h>

enum {
	SWING_BEATS = 20,
	CHECK_MS = 10000, /* a process that does not answer so long hangs */
	WAIT_NS = 1000000,
};

static const struct feature features[] = {
        MEMORY_FEATURES, CHANNEL_FEATURES, FILE_FEATURES, TIME_FEATURES,
        EVENT_FEATURES,  SIGNAL_FEATURES,  TASK_FEATURES,
};
#define FEATURES (sizeof features / sizeof *features)
_Static_assert(FEATURES <= FEATURES_MAX, "the board is too small");

static int port;

static void wait_a_moment(void)
{
	nanosleep(&(struct timespec){.tv_nsec = WAIT_NS}, NULL);
}

/* ---- the life of a process ---- */

#define EACH_FEATURE(function)                                             \
	for (feature_index = 0; feature_index < FEATURES; feature_index++)     \
		if (features[feature_index].function)                              \
	features[feature_index].function()

/* Every process must have begun before the first one goes on: 7 looks at the locks of 1, 2, 3. */
static void wait_for_all(void)
{
	atomic_fetch_add(&board->begun, 1);
	while (atomic_load(&board->begun) < PROCESSES) {
		/* One that failed has said why; the others end with process 0. */
		if (who == 0 && waitpid(-1, NULL, WNOHANG) > 0)
			exit(1);
		wait_a_moment();
	}
}

static void *control_thread(void *unused);

__attribute__((noreturn)) static void live(void)
{
	const struct timespec pause = {.tv_nsec = BEAT_NS};
	pthread_t control;

	EACH_FEATURE(begin);
	threads_start();
	wait_for_all();
	if (who == 0)
		need(!pthread_create(&control, NULL, control_thread, NULL), "pthread_create");
	for (;; nanosleep(&pause, NULL)) {
		unsigned wanted = atomic_load(&board->check_wanted);

		beat++;
		EACH_FEATURE(step);
		if (wanted != atomic_load(&board->check_done[who])) {
			EACH_FEATURE(check);
			atomic_store(&board->check_done[who], wanted);
		}
		atomic_fetch_add(&board->beats[who][0], 1);
	}
}

/* Forks the children of this process, which fork theirs, and lives. */
__attribute__((noreturn)) static void grow(void)
{
	board->pids[who] = getpid();
	for (int child = 1; child < PROCESSES; child++) {
		if (parent_of[child] != who)
			continue;
		pid_t pid = fork();
		need(pid >= 0, "fork");
		if (pid)
			continue;
		who = child;
		need(!prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl");
		if (who == 2)
			need(setsid() > 0, "setsid");
		if (who == 3 || who == 5)
			need(!setpgid(0, 0), "setpgid");
		grow();
	}
	live();
}

/* ---- the control port, in process 0 ---- */

static pthread_mutex_t check_mutex = PTHREAD_MUTEX_INITIALIZER;

static void add_reason(struct reply *reply, const char *reason)
{
	char clean[REASON_BYTES];
	size_t used = 0;

	/* What could end a JSON string early is of no use in a reason. */
	for (; reason[used] && used < sizeof clean - 1; used++)
		clean[used] = strchr("\"\\", reason[used]) || (unsigned char)reason[used] < ' '
		                      ? '?'
		                      : reason[used];
	clean[used] = 0;
	reply_add(reply, "%s", clean);
}

static void add_verdict(struct reply *reply, unsigned feature)
{
	reply_add(reply, ", \"%s\": \"", features[feature].name);
	for (int process = 0; process < PROCESSES; process++) {
		if (!*board->reasons[feature][process])
			continue;
		reply_add(reply, "BAD: process %d: ", process);
		add_reason(reply, board->reasons[feature][process]);
		reply_add(reply, "\"");
		return;
	}
	reply_add(reply, "ok\"");
}

/* Returns a process that did not check in time, or -1. */
static int await_checks(unsigned wanted)
{
	int64_t until_ns = monotonic_ns(CLOCK_MONOTONIC) + (int64_t)CHECK_MS * 1000000;

	for (int process = 0; process < PROCESSES; process++)
		while (atomic_load(&board->check_done[process]) != wanted) {
			if (monotonic_ns(CLOCK_MONOTONIC) > until_ns)
				return process;
			wait_a_moment();
		}
	return -1;
}

static void answer_check(struct reply *reply)
{
	pthread_mutex_lock(&check_mutex);
	int silent = await_checks(atomic_fetch_add(&board->check_wanted, 1) + 1);
	if (silent < 0)
		reply_add(reply, "{\"answers\": \"ok\"");
	else
		reply_add(reply, "{\"answers\": \"BAD: process %d does not answer\"", silent);
	for (unsigned feature = 0; feature < FEATURES; feature++)
		add_verdict(reply, feature);
	reply_add(reply, "}\n");
	pthread_mutex_unlock(&check_mutex);
}

static void answer_counters(struct reply *reply)
{
	const char *separator = "";

	reply_add(reply, "{\"beats\": [");
	for (int process = 0; process < PROCESSES; process++) {
		reply_add(reply, "%s[", process ? ", " : "");
		for (int thread = 0; thread < THREADS; thread++)
			reply_add(reply, "%s%llu", thread ? ", " : "",
			          (unsigned long long)atomic_load(&board->beats[process][thread]));
		reply_add(reply, "]");
	}
	reply_add(reply, "], \"progress\": {");
	for (unsigned feature = 0; feature < FEATURES; feature++) {
		if (!features[feature].step || !atomic_load(&board->progress[feature]))
			continue;
		reply_add(reply, "%s\"%s\": %llu", separator, features[feature].name,
		          (unsigned long long)atomic_load(&board->progress[feature]));
		separator = ", ";
	}
	reply_add(reply, "}}\n");
}

static void answer_quit(struct reply *reply)
{
	memory_remove();
	channels_remove();
	tasks_remove();
	reply_add(reply, "QUIT ok\n");
	reply_flush(reply);
	_exit(0);
}

static void answer_line(const char *line, struct reply *reply)
{
	if (reply_sequence(line, reply))
		return;
	if (!strcmp(line, "CHECK")) {
		answer_check(reply);
	} else if (!strcmp(line, "COUNTERS")) {
		answer_counters(reply);
	} else if (!strcmp(line, "CORRUPT")) {
		atomic_store(&board->corrupt, 1);
		while (atomic_load(&board->corrupt))
			wait_a_moment();
		reply_add(reply, "CORRUPT ok\n");
	} else if (!strcmp(line, "QUIT")) {
		answer_quit(reply);
	} else {
		reply_add(reply, "ERR unknown command\n");
	}
}

static void *control_thread(void *unused)
{
	for (int process = 0; process < PROCESSES; process++)
		while (atomic_load(&board->beats[process][0]) < SWING_BEATS)
			wait_a_moment();
	lines_serve(port, answer_line);
	return unused;
}

__attribute__((noreturn)) static void usage(void)
{
	fprintf(stderr, "usage: tree PORT [--dir DIRECTORY] [--no-forks] [--stopped] [--user] "
	                "[--beyond-criu]\n");
	exit(2);
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
	        {"dir", 1, NULL, 'd'},     {"no-forks", 0, NULL, 'f'},
	        {"stopped", 0, NULL, 's'}, {"user", 0, NULL, 'u'},
	        {"beyond-criu", 0, NULL, 'b'}, {0},
	};
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'd')
			directory = optarg;
		else if (option == 'f')
			forks_enabled = 0;
		else if (option == 's')
			stopped_enabled = 1;
		else if (option == 'u')
			other_user = 1;
		else if (option == 'b')
			beyond_criu = 1;
		else
			usage();
	}
	if (argc - optind != 1)
		usage();
	port = (int)number_argument("PORT", argv[optind], 1, 65535);
	signal(SIGPIPE, SIG_IGN);
	board = map_anonymous(sizeof *board, MAP_SHARED);
	EACH_FEATURE(setup);
	grow();
}
