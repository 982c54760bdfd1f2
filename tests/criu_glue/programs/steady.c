/* Proves that its registers, restartable sequences and signals are left alone.
 *
 *   steady registers     every general and some vector registers hold values that a loop changes
 *                        together; a difference is fatal (exit 1)
 *   steady rseq          runs restartable sequences (rseq(2)); the kernel forgetting one that is
 *                        not finished is fatal (exit 1)
 *   steady signals       counts queued real-time signals and timer ticks
 *
 * A byte on stdin ends it; then it prints what it has counted and exits 0. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/rseq.h>
#include <sys/time.h>
#include <unistd.h>

static int ended(void)
{
	char byte;
	return read(0, &byte, 1) > 0;
}

/* A million turns; 0 when all registers still agree. */
static uint64_t turns(void)
{
	uint64_t difference;
	asm volatile("push %%rbp\n\t"
		     "xor %%eax, %%eax\n\t"
		     "mov %%rax, %%rbx\n\tmov %%rax, %%rcx\n\tmov %%rax, %%rdx\n\t"
		     "mov %%rax, %%rsi\n\tmov %%rax, %%rdi\n\tmov %%rax, %%rbp\n\t"
		     "mov %%rax, %%r8\n\tmov %%rax, %%r9\n\tmov %%rax, %%r10\n\t"
		     "mov %%rax, %%r11\n\tmov %%rax, %%r12\n\tmov %%rax, %%r13\n\t"
		     "mov %%rax, %%r14\n\tmov %%rax, %%r15\n\t"
		     "pxor %%xmm0, %%xmm0\n\tpxor %%xmm7, %%xmm7\n\tpcmpeqd %%xmm15, %%xmm15\n\t"
		     "1:\n\t"
		     "inc %%rax\n\tinc %%rbx\n\tinc %%rcx\n\tinc %%rdx\n\tinc %%rsi\n\t"
		     "inc %%rdi\n\tinc %%rbp\n\tinc %%r8\n\tinc %%r9\n\tinc %%r10\n\t"
		     "inc %%r11\n\tinc %%r12\n\tinc %%r13\n\tinc %%r14\n\tinc %%r15\n\t"
		     "psubq %%xmm15, %%xmm0\n\tpsubq %%xmm15, %%xmm7\n\t"
		     "cmp $1000000, %%rax\n\t"
		     "jne 1b\n\t"
		     "xor %%rax, %%rbx\n\txor %%rax, %%rcx\n\txor %%rax, %%rdx\n\t"
		     "xor %%rax, %%rsi\n\txor %%rax, %%rdi\n\txor %%rax, %%rbp\n\t"
		     "xor %%rax, %%r8\n\txor %%rax, %%r9\n\txor %%rax, %%r10\n\t"
		     "xor %%rax, %%r11\n\txor %%rax, %%r12\n\txor %%rax, %%r13\n\t"
		     "xor %%rax, %%r14\n\txor %%rax, %%r15\n\t"
		     "or %%rcx, %%rbx\n\tor %%rdx, %%rbx\n\tor %%rsi, %%rbx\n\t"
		     "or %%rdi, %%rbx\n\tor %%rbp, %%rbx\n\tor %%r8, %%rbx\n\t"
		     "or %%r9, %%rbx\n\tor %%r10, %%rbx\n\tor %%r11, %%rbx\n\t"
		     "or %%r12, %%rbx\n\tor %%r13, %%rbx\n\tor %%r14, %%rbx\n\t"
		     "or %%r15, %%rbx\n\t"
		     "movq %%xmm0, %%rcx\n\txor %%rax, %%rcx\n\tor %%rcx, %%rbx\n\t"
		     "movq %%xmm7, %%rcx\n\txor %%rax, %%rcx\n\tor %%rcx, %%rbx\n\t"
		     "mov %%rbx, %%rax\n\t"
		     "pop %%rbp\n\t"
		     : "=a"(difference)
		     :
		     : "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
		       "r14", "r15", "xmm0", "xmm7", "xmm15", "cc", "memory");
	return difference;
}

static void registers(void)
{
	long rounds = 0;
	while (!ended()) {
		if (turns())
			exit(1);
		rounds++;
	}
	printf("%ld\n", rounds);
}

/* One restartable sequence of many instructions. 0: aborted, as it should be when interrupted.
 * 1: came to its end with the kernel still knowing of it. 2: came to its end forgotten. */
static int sequence(struct rseq *rseq)
{
	uint64_t kept;
	asm volatile(".pushsection __rseq_cs, \"aw\"\n\t"
		     ".balign 32\n\t"
		     "3:\n\t"
		     ".long 0, 0\n\t"
		     ".quad 1f, 2f - 1f, 4f\n\t"
		     ".popsection\n\t"
		     ".pushsection __rseq_failure, \"ax\"\n\t"
		     ".byte 0x0f, 0xb9, 0x3d\n\t"
		     ".long 0x53053053\n\t"
		     "4: jmp 5f\n\t"
		     ".popsection\n\t"
		     "lea 3b(%%rip), %%rax\n\t"
		     "mov %%rax, %[cs]\n\t"
		     "1:\n\t"
		     "mov $200000, %%ecx\n\t"
		     "6: dec %%ecx\n\t"
		     "jnz 6b\n\t"
		     "mov %[cs], %%rax\n\t"
		     "2:\n\t"
		     "jmp 7f\n\t"
		     "5: mov $1, %%eax\n\t"
		     "7:\n\t"
		     : "=&a"(kept), [cs] "+m"(rseq->rseq_cs)
		     :
		     : "rcx", "cc", "memory");
	if (kept == 1)
		return 0;
	return kept ? 1 : 2;
}

static void sequences(void)
{
	struct rseq *rseq = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	long aborted = 0, finished = 0;
	while (!ended())
		for (int i = 0; i < 100; i++)
			switch (sequence(rseq)) {
			case 0:
				aborted++;
				break;
			case 1:
				finished++;
				break;
			default:
				exit(1);
			}
	printf("%ld %ld\n", aborted, finished);
}

static volatile long signals_seen, ticks;

static void count_signal(int number)
{
	(void)number;
	signals_seen++;
}

static void count_tick(int number)
{
	(void)number;
	ticks++;
}

static void signals(void)
{
	struct sigaction action = { .sa_handler = count_signal, .sa_flags = SA_RESTART };
	sigaction(SIGRTMIN, &action, NULL);
	action.sa_handler = count_tick;
	sigaction(SIGALRM, &action, NULL);
	sigaction(SIGTRAP, &action, NULL);
	struct itimerval every = { { 0, 2000 }, { 0, 2000 } };
	setitimer(ITIMER_REAL, &every, NULL);
	puts("ready");
	fflush(stdout);
	/* both ways: in user space, and then blocked in a system call that restarts */
	for (volatile long turn = 0; turn < 200000000; turn++)
		;
	fcntl(0, F_SETFL, 0);
	while (!ended())
		;
	memset(&every, 0, sizeof(every));
	setitimer(ITIMER_REAL, &every, NULL);
	printf("%ld %ld\n", signals_seen, ticks);
}

int main(int argc, char **argv)
{
	(void)argc;
	fcntl(0, F_SETFL, O_NONBLOCK);
	if (!strcmp(argv[1], "registers"))
		registers();
	else if (!strcmp(argv[1], "rseq"))
		sequences();
	else
		signals();
	return 0;
}
