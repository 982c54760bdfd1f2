/*
 * A line server for the workloads: TCP over IPv4 and IPv6, one thread per client, one answer per
 * line, in order. Lines may be pipelined and may arrive in any pieces.
 *
 *     lines_serve(port, handler)     never returns; handler(line, reply) is called for every line
 *     reply_add(reply, "fmt", …)     adds to the answer; sent when the lines read so far are done
 *     reply_sequence(line, reply)    answers a line that is a number: what every workload does
 *     ticks_serve(port)              such lines in datagrams over IPv4, by a thread of its own
 *
 * The answer to "<number>" is "<number> <count>": how many of these the server has answered to all
 * clients. It grows strictly, so a server that was restarted or set back gives itself away.
 *
 * A header instead of a second object: every workload is compiled from one file to one static
 * binary. Threads instead of an event loop: a command that takes a second (VERIFY) must not delay
 * the answers of the other clients, whose gaps are what is being measured.
 */
#ifndef DOLLY_LINE_SERVER_H
#define DOLLY_LINE_SERVER_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
	LINE_BYTES_MAX = 256,        /* longer than every command; who sends more is cut off */
	REPLY_BYTES_MAX = 64 * 1024, /* one send() for a whole batch of pipelined answers */
	CLIENTS_MAX = 128,           /* threads; a further client is closed at once */
	CLIENT_STACK_BYTES = 256 * 1024,
	LISTEN_BACKLOG = 64,
	TICK_BYTES_MAX = 512, /* a datagram; its answer fits into REPLY_BYTES_MAX, one of a few lines
	                       * into a frame */
};

struct reply {
	int fd;
	size_t used;
	int broken; /* the client is gone: what is added is discarded */
	char bytes[REPLY_BYTES_MAX];
};

typedef void (*line_handler)(const char *line, struct reply *reply);

static atomic_int lines_clients;
static atomic_uint_fast64_t lines_answered;

struct line_client {
	int fd;
	line_handler handler;
	struct reply reply;
};

static inline void die(const char *what)
{
	perror(what);
	exit(1);
}

static inline void reply_flush(struct reply *reply)
{
	size_t sent = 0;

	while (sent < reply->used && !reply->broken) {
		/* MSG_NOSIGNAL: a client that went away must not kill the server by SIGPIPE. */
		ssize_t n = send(reply->fd, reply->bytes + sent, reply->used - sent, MSG_NOSIGNAL);
		if (n >= 0)
			sent += (size_t)n;
		else if (errno != EINTR)
			reply->broken = 1;
	}
	reply->used = 0;
}

__attribute__((format(printf, 2, 3))) static inline void
reply_add(struct reply *reply, const char *format, ...)
{
	for (int attempt = 0; attempt < 2; attempt++) {
		size_t room = sizeof reply->bytes - reply->used;
		va_list arguments;

		va_start(arguments, format);
		int n = vsnprintf(reply->bytes + reply->used, room, format, arguments);
		va_end(arguments);
		if (n >= 0 && (size_t)n < room) {
			reply->used += (size_t)n;
			return;
		}
		reply_flush(reply); /* no room: send what is there, then it fits */
	}
	reply->broken = 1;
}

/* Returns 0, and answers nothing, if the line is not a number. */
static inline int reply_sequence(const char *line, struct reply *reply)
{
	if (!*line || line[strspn(line, "0123456789")])
		return 0;
	reply_add(reply, "%s %llu\n", line,
	          (unsigned long long)atomic_fetch_add(&lines_answered, 1) + 1);
	return 1;
}

static inline void reply_tick(const char *line, struct reply *reply)
{
	reply_sequence(line, reply);
}

/* Calls the handler for every complete line; returns the bytes consumed, -1 for too long a line. */
static inline ssize_t lines_consume(struct line_client *client, char *bytes, size_t used)
{
	size_t start = 0;
	char *end;

	while ((end = memchr(bytes + start, '\n', used - start))) {
		*end = 0;
		client->handler(bytes + start, &client->reply);
		start = (size_t)(end - bytes) + 1;
	}
	return used - start > LINE_BYTES_MAX ? -1 : (ssize_t)start;
}

static inline void *lines_client_thread(void *argument)
{
	struct line_client *client = argument;
	char bytes[4096];
	size_t used = 0;

	while (!client->reply.broken) {
		ssize_t n = recv(client->fd, bytes + used, sizeof bytes - used, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		used += (size_t)n;
		ssize_t done = lines_consume(client, bytes, used);
		if (done < 0)
			break;
		used -= (size_t)done;
		memmove(bytes, bytes + done, used);
		reply_flush(&client->reply);
	}
	close(client->fd);
	free(client);
	atomic_fetch_sub(&lines_clients, 1);
	return NULL;
}

/* A listening socket for one family, or -1: a network namespace may have no IPv6. */
static inline int lines_listen(int family, int port)
{
	int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
	int is_v6 = family == AF_INET6;

	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (is_v6)
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
	if (bind(fd, is_v6 ? (void *)&v6 : (void *)&v4, is_v6 ? sizeof v6 : sizeof v4) ||
	    listen(fd, LISTEN_BACKLOG)) {
		close(fd);
		return -1;
	}
	return fd;
}

static inline void lines_accept(int listener, line_handler handler)
{
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC), one = 1;
	struct line_client *client = NULL;
	pthread_attr_t attributes;
	pthread_t thread;

	if (fd < 0)
		return; /* the client gave up before it was accepted */
	if (atomic_fetch_add(&lines_clients, 1) >= CLIENTS_MAX || !(client = calloc(1, sizeof *client)))
		goto refuse;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	client->fd = client->reply.fd = fd;
	client->handler = handler;
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, CLIENT_STACK_BYTES);
	int failed = pthread_create(&thread, &attributes, lines_client_thread, client);
	pthread_attr_destroy(&attributes);
	if (!failed)
		return;
refuse:
	atomic_fetch_sub(&lines_clients, 1);
	free(client);
	close(fd);
}

__attribute__((noreturn)) static inline void lines_serve(int port, line_handler handler)
{
	/* Two sockets instead of one for both families: IPv4 then works without IPv6, and an IPv4
	 * connection is an AF_INET socket to CRIU, not a mapped IPv6 one. */
	struct pollfd listeners[2] = {
	        {.fd = lines_listen(AF_INET, port), .events = POLLIN},
	        {.fd = lines_listen(AF_INET6, port), .events = POLLIN},
	};

	if (listeners[0].fd < 0 && listeners[1].fd < 0)
		die("listen");
	for (;;) {
		if (poll(listeners, 2, -1) < 0 && errno != EINTR)
			die("poll");
		for (int i = 0; i < 2; i++)
			if (listeners[i].revents & POLLIN)
				lines_accept(listeners[i].fd, handler);
	}
}

/* Nothing here is sent again when it is lost: a client hears for how long nobody answered. */
static inline void *ticks_thread(void *argument)
{
	struct line_client server = {.fd = *(int *)argument, .handler = reply_tick};
	struct sockaddr_in from;
	char bytes[TICK_BYTES_MAX];

	for (;;) {
		socklen_t size = sizeof from;
		ssize_t n = recvfrom(server.fd, bytes, sizeof bytes, 0, (void *)&from, &size);
		if (n <= 0)
			continue; /* a signal, or an error of an earlier answer, which is the client's loss */
		server.reply.used = 0;
		lines_consume(&server, bytes, (size_t)n);
		sendto(server.fd, server.reply.bytes, server.reply.used, 0, (void *)&from, size);
	}
	return NULL;
}

static inline void ticks_serve(int port)
{
	static int fd; /* for as long as the thread lives */
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	pthread_t thread;

	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (void *)&here, sizeof here))
		die("bind");
	if (pthread_create(&thread, NULL, ticks_thread, &fd))
		die("pthread_create");
}

/* A number of the command line within its limits, or the end of the program with a message. */
static inline double number_argument(const char *name, const char *text, double low, double high)
{
	char *end;
	double value = strtod(text, &end);

	if (end == text || *end || value < low || value > high) {
		fprintf(stderr, "%s: %s is not a number from %g to %g\n", name, text, low, high);
		exit(2);
	}
	return value;
}

#endif
