/*
 * copied: a server that says how it was told that it is a copy, and the hook that tells it.
 *
 *     copied PORT …     lines (see line_server.h):
 *         <sequence>    ->  <sequence> <count>
 *         TOLD          ->  TOLD signals=N what the hook has written
 *     copied            writes into /data/told who, where and with which rights it is
 */
#define _GNU_SOURCE
#include <signal.h>

#include "line_server.h"

#define TOLD "/data/told"

static atomic_int signals;

static void count(int number)
{
	(void)number;
	atomic_fetch_add(&signals, 1);
}

static void answer(const char *line, struct reply *reply)
{
	char told[4096] = "";

	if (strcmp(line, "TOLD")) {
		reply_sequence(line, reply);
		return;
	}
	FILE *file = fopen(TOLD, "r");
	if (file && !fgets(told, sizeof told, file))
		told[0] = 0;
	if (file)
		fclose(file);
	reply_add(reply, "TOLD signals=%d %s\n", atomic_load(&signals), told);
}

static int tell(void)
{
	char host[256] = "", line[256];
	FILE *file = fopen(TOLD, "w"), *status = fopen("/proc/self/status", "r");

	if (!file || !status || gethostname(host, sizeof host))
		die(TOLD);
	fprintf(file, "copy=%s of=%s addresses=%s user=%d host=%s", getenv("MIGRATE_COPY"),
		getenv("MIGRATE_COPY_OF"), getenv("MIGRATE_COPY_ADDRESSES"), getuid(), host);
	while (fgets(line, sizeof line, status))
		if (!strncmp(line, "CapEff:", 7) || !strncmp(line, "NoNewPrivs:", 11) ||
		    !strncmp(line, "Seccomp:", 8)) {
			char *value = strchr(line, '\t') + 1;

			value[strcspn(value, "\n")] = 0;
			*strchr(line, ':') = 0;
			fprintf(file, " %s=%s", line, value);
		}
	return fclose(file) ? 1 : 0;
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return tell();
	signal(SIGUSR1, count);
	lines_serve(atoi(argv[1]), answer);
}
