// The threads of a block taking turns, for all kernels of cuda_on_cpu.h, which says what this is.

#include "cuda_on_cpu.h"

std::vector<Fibre> fibres;
std::vector<Warp> warps;
Meeting whole_block, named[16];
std::map<const void*, Phases> phases;
bool late, progress, askew;
int here;
Index threadIdx, blockIdx, blockDim, gridDim;
extern "C" { alignas(16) u32 memory[SHARED_BYTES / 4]; }

static jmp_buf scheduler;
static const std::function<void()>* body;

// _setjmp and _longjmp, because swapcontext makes a system call.
void pause() {
    if (!_setjmp(fibres[here].place)) _longjmp(scheduler, 1);
}

static void fibre() {
    (*body)();
    fibres[here].done = progress = true;
    _longjmp(scheduler, 1);
}

// Runs the thread `here` until it pauses or ends.
static void resume() {
    Fibre& one = fibres[here];
    if (_setjmp(scheduler)) return;
    if (one.begun) _longjmp(one.place, 1);
    one.begun = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = one.stack.data();
    start.uc_stack.ss_size = one.stack.size();
    start.uc_link = nullptr;
    makecontext(&start, fibre, 0);
    setcontext(&start);
}

// Runs a grid, block after block; 1 where the threads of a block wait for each other in vain, 2 where they write beyond
// their `shared` bytes, 3 where they move several numbers at once to or from an address that is not a multiple of their
// size.
int launch(
    const std::function<void()>& kernel, int columns, int rows, int threads, int shared, bool copies_late,
    unsigned seed) {
    std::mt19937 random(seed);
    body = &kernel;
    late = copies_late;
    askew = false;
    gridDim = {(unsigned)columns, (unsigned)rows, 1};
    blockDim = {(unsigned)threads, 1, 1};
    std::vector<int> order(threads);
    for (int i = 0; i < threads; i++) order[i] = i;
    for (int block = 0; block < columns * rows; block++) {
        blockIdx = {(unsigned)(block % columns), (unsigned)(block / columns), 0};
        memset(memory, 0xff, SHARED_BYTES);         // NaN
        fibres.assign(threads, Fibre());
        warps.assign((threads + 31) / 32, Warp());
        whole_block = Meeting();
        for (Meeting& meeting : named) meeting = Meeting();
        phases.clear();
        for (Fibre& one : fibres) {
            one.stack.resize(64 * 1024);
        }
        int resting = -1, rounds = 0;               // a warp that falls behind, and for how long
        for (int left = threads; left;) {
            if (rounds-- == 0) {
                resting = random() % (warps.size() + 1);
                rounds = random() % 64;
            }
            progress = false;
            std::shuffle(order.begin(), order.end(), random);
            for (int thread : order) {
                if (fibres[thread].done || thread / 32 == resting) continue;
                here = thread;
                threadIdx = {(unsigned)thread, 0, 0};
                resume();
                left -= fibres[thread].done;
            }
            if (left && !progress) {
                if (resting < 0) return 1;
                resting = -1;                       // the others wait for it
            }
        }
        const u32* beyond = memory + (shared + 3) / 4, * end = memory + SHARED_BYTES / 4;
        if (std::any_of(beyond, end, [](u32 word) { return word != ~0u; })) return 2;
        if (askew) return 3;
    }
    return 0;
}
