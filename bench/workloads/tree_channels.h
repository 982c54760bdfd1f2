/*
 * Features of tree.c: everything that carries messages from one process to another. Each channel
 * always has some messages under way, so a checkpoint finds data in its queue; the receiver checks
 * that every message is the next one.
 */
#ifndef DOLLY_TREE_CHANNELS_H
#define DOLLY_TREE_CHANNELS_H

#include <sys/msg.h>
#include <sys/un.h>

#include "tree_core.h"

enum {
	UNDER_WAY = 8, /* messages in a queue at most; a dgram socket takes 10 (max_dgram_qlen) */
	PER_STEP = 3,
};

struct message {
	uint64_t number, proof;
};

enum channel_kind { PIPE, FIFO, STREAM, DGRAM, SEQPACKET, NAMED, TCP, QUEUE, CHANNELS };

/* What both ends must know of each other, in memory that they share. */
struct channel_counts {
	atomic_uint_fast64_t sent, received;
};

static struct channel {
	int sender, receiver; /* processes */
	int sender_fd, receiver_fd;
	int listener;             /* NAMED, TCP: kept open, listening, in the receiver */
	unsigned partial;         /* bytes of a message that a stream has not brought whole */
	struct message message;
} channels[CHANNELS] = {
        [PIPE] = {.sender = 1, .receiver = 4},  [FIFO] = {.sender = 6, .receiver = 0},
        [STREAM] = {.sender = 0, .receiver = 7}, [DGRAM] = {.sender = 3, .receiver = 2},
        [SEQPACKET] = {.sender = 5, .receiver = 1}, [NAMED] = {.sender = 3, .receiver = 2},
        [TCP] = {.sender = 4, .receiver = 6},   [QUEUE] = {.sender = 7, .receiver = 3},
};
static struct channel_counts *channel_counts;
static struct sockaddr_un named_address = {.sun_family = AF_UNIX};
static struct sockaddr_in tcp_address = {.sin_family = AF_INET};

static void channel_pair(enum channel_kind kind, int socket_type)
{
	int ends[2];

	int failed = socket_type
	                     ? socketpair(AF_UNIX, socket_type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends)
	                     : pipe2(ends, O_NONBLOCK | O_CLOEXEC);

	need(!failed, "pipe or socketpair");
	channels[kind].receiver_fd = ends[0];
	channels[kind].sender_fd = ends[1];
}

static int listening(int family, void *address, socklen_t bytes)
{
	int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	need(fd >= 0 && !bind(fd, address, bytes) && !listen(fd, 4) &&
	             !getsockname(fd, address, &bytes),
	     "listening socket");
	return fd;
}

static void channels_setup(void)
{
	channel_counts = map_anonymous(CHANNELS * sizeof *channel_counts, MAP_SHARED);
	channel_pair(PIPE, 0);
	channel_pair(STREAM, SOCK_STREAM);
	channel_pair(DGRAM, SOCK_DGRAM);
	channel_pair(SEQPACKET, SOCK_SEQPACKET);

	unlink(path_of("fifo"));
	need(!mkfifo(path_of("fifo"), 0600), "mkfifo");
	/* Open for reading too: an end without a partner would not open. */
	int fifo = open(path_of("fifo"), O_RDWR | O_NONBLOCK | O_CLOEXEC);
	need(fifo >= 0, "fifo");
	channels[FIFO].sender_fd = channels[FIFO].receiver_fd = fifo;

	unlink(path_of("socket"));
	need(strlen(path_of("socket")) < sizeof named_address.sun_path, "DIRECTORY is too long");
	strcpy(named_address.sun_path, path_of("socket"));
	channels[NAMED].listener = listening(AF_UNIX, &named_address, sizeof named_address);
	tcp_address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	channels[TCP].listener = listening(AF_INET, &tcp_address, sizeof tcp_address);
	channels[NAMED].receiver_fd = channels[TCP].receiver_fd = -1; /* until it is accepted */

	int queue = msgget(IPC_PRIVATE, IPC_CREAT | 0600);
	need(queue >= 0, "msgget");
	channels[QUEUE].sender_fd = channels[QUEUE].receiver_fd = queue;
}

static int connected(int family, void *address, socklen_t bytes)
{
	int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	need(fd >= 0 && !connect(fd, address, bytes) && !fcntl(fd, F_SETFL, O_NONBLOCK), "connect");
	return fd;
}

static void named_begin(void)
{
	if (who == channels[NAMED].sender)
		channels[NAMED].sender_fd = connected(AF_UNIX, &named_address, sizeof named_address);
}

static void tcp_begin(void)
{
	if (who == channels[TCP].sender)
		channels[TCP].sender_fd = connected(AF_INET, &tcp_address, sizeof tcp_address);
}

/* A System V message carries its type in front. */
struct queued {
	long type;
	struct message message;
};

static ssize_t channel_write(enum channel_kind kind, const struct message *message)
{
	struct queued queued = {.type = 1, .message = *message};

	if (kind == QUEUE)
		return msgsnd(channels[kind].sender_fd, &queued, sizeof *message, IPC_NOWAIT)
		               ? -1
		               : (ssize_t)sizeof *message;
	return write(channels[kind].sender_fd, message, sizeof *message);
}

static ssize_t channel_read(enum channel_kind kind)
{
	struct channel *channel = &channels[kind];
	struct queued queued;

	if (kind == QUEUE) {
		ssize_t n = msgrcv(channel->receiver_fd, &queued, sizeof queued.message, 0, IPC_NOWAIT);
		channel->message = queued.message;
		return n;
	}
	return read(channel->receiver_fd, (char *)&channel->message + channel->partial,
	            sizeof channel->message - channel->partial);
}

static uint64_t proof_of(enum channel_kind kind, uint64_t number)
{
	return mix(number << 8 ^ (uint64_t)kind);
}

static void channel_send(enum channel_kind kind)
{
	struct channel_counts *counts = &channel_counts[kind];

	for (int i = 0; i < PER_STEP; i++) {
		uint64_t number = atomic_load(&counts->sent) + 1;
		struct message message = {number, proof_of(kind, number)};

		if (number > atomic_load(&counts->received) + UNDER_WAY)
			return;
		ssize_t n = channel_write(kind, &message);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n != sizeof message) {
			bad("message %llu: %zd bytes sent: %s", (unsigned long long)number, n, strerror(errno));
			return;
		}
		atomic_store(&counts->sent, number);
	}
}

static void channel_receive(enum channel_kind kind)
{
	struct channel *channel = &channels[kind];
	struct channel_counts *counts = &channel_counts[kind];

	for (int i = 0; i < PER_STEP; i++) {
		uint64_t number = atomic_load(&counts->received) + 1;

		/* Half of them stay in the queue. */
		if (number + UNDER_WAY / 2 > atomic_load(&counts->sent))
			return;
		ssize_t n = channel_read(kind);
		if (n < 0 && (errno == EAGAIN || errno == EINTR))
			return;
		if (n <= 0) {
			bad("message %llu: %zd bytes received: %s", (unsigned long long)number, n,
			    n ? strerror(errno) : "end of file");
			return;
		}
		channel->partial += (unsigned)n;
		if (channel->partial < sizeof channel->message)
			continue;
		channel->partial = 0;
		if (channel->message.number != number || channel->message.proof != proof_of(kind, number))
			bad("message %llu came in place of %llu", (unsigned long long)channel->message.number,
			    (unsigned long long)number);
		atomic_store(&counts->received, number);
		progress();
	}
}

static void channel_step(enum channel_kind kind)
{
	struct channel *channel = &channels[kind];

	if (who == channel->sender)
		channel_send(kind);
	if (who != channel->receiver)
		return;
	if (channel->receiver_fd < 0) {
		int fd = accept4(channel->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (fd < 0)
			return;
		channel->receiver_fd = fd;
	}
	channel_receive(kind);
}

/* The rest is checked at every message. Here: the listener listens, the queue is not empty. */
static void channel_check(enum channel_kind kind)
{
	int value = 0;
	socklen_t bytes = sizeof value;

	if (who != channels[kind].receiver)
		return;
	if (channels[kind].listener && (getsockopt(channels[kind].listener, SOL_SOCKET, SO_ACCEPTCONN,
	                                           &value, &bytes) || !value))
		bad("the listening socket does not listen");
	if (atomic_load(&channel_counts[kind].received) == atomic_load(&channel_counts[kind].sent))
		bad("nothing is under way");
}

static void pipe_step(void) { channel_step(PIPE); }
static void fifo_step(void) { channel_step(FIFO); }
static void stream_step(void) { channel_step(STREAM); }
static void dgram_step(void) { channel_step(DGRAM); }
static void seqpacket_step(void) { channel_step(SEQPACKET); }
static void named_step(void) { channel_step(NAMED); }
static void tcp_step(void) { channel_step(TCP); }
static void queue_step(void) { channel_step(QUEUE); }
static void pipe_check(void) { channel_check(PIPE); }
static void fifo_check(void) { channel_check(FIFO); }
static void stream_check(void) { channel_check(STREAM); }
static void dgram_check(void) { channel_check(DGRAM); }
static void seqpacket_check(void) { channel_check(SEQPACKET); }
static void named_check(void) { channel_check(NAMED); }
static void tcp_check(void) { channel_check(TCP); }
static void queue_check(void) { channel_check(QUEUE); }

#define CHANNEL_FEATURES                                                        \
	{"pipe", channels_setup, NULL, pipe_step, pipe_check},                      \
	{"fifo", NULL, NULL, fifo_step, fifo_check},                                \
	{"unix_stream", NULL, NULL, stream_step, stream_check},                     \
	{"unix_dgram", NULL, NULL, dgram_step, dgram_check},                        \
	{"unix_seqpacket", NULL, NULL, seqpacket_step, seqpacket_check},            \
	{"unix_named", NULL, named_begin, named_step, named_check},                 \
	{"tcp_loopback", NULL, tcp_begin, tcp_step, tcp_check},                     \
	{"sysv_messages", NULL, NULL, queue_step, queue_check}

static void channels_remove(void)
{
	msgctl(channels[QUEUE].sender_fd, IPC_RMID, NULL);
}

#endif
