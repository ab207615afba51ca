#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stddef.h>
#include <ucontext.h>
/* answers "ud2" (which stands where "cpuid" stood) as a processor with AVX2, without AVX-512 and VNNI, would */
static void answer(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)r[REG_RIP];
    if (at[0] != 0x0f || at[1] != 0x0b) { signal(number, SIG_DFL); return; }
    unsigned leaf = r[REG_RAX], sub = r[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, sub, a, b, c, d);
    if (leaf == 7 && sub == 0) {
        b &= ~(1u<<16 | 1u<<17 | 1u<<21 | 1u<<26 | 1u<<27 | 1u<<28 | 1u<<30 | 1u<<31);
        c &= ~(1u<<1 | 1u<<6 | 1u<<11 | 1u<<12 | 1u<<14);
        d &= ~(1u<<2 | 1u<<3 | 1u<<8 | 1u<<22 | 1u<<23 | 1u<<24 | 1u<<25);
    }
    if (leaf == 7 && sub == 1) { a &= ~(1u<<4 | 1u<<5 | 1u<<21 | 1u<<22); d &= ~(1u<<4 | 1u<<5 | 1u<<8 | 1u<<10 | 1u<<19); }
    if (leaf == 0x24) { b = 0; }
    r[REG_RAX] = a; r[REG_RBX] = b; r[REG_RCX] = c; r[REG_RDX] = d;
    r[REG_RIP] += 2;
}
__attribute__((constructor)) static void arm(void) {
    struct sigaction action = {0};
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, NULL);
}
