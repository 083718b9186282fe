// CUDA C++ on a CPU, for tests: what the kernels' inline PTX does, and the threads of a block taking turns.
// Every thread is a fibre that runs until it has to wait for others; who comes next, and which warp falls behind, is
// drawn. A copy to shared memory lands as late as its wait allows, or as soon as it is issued: a kernel has to be right
// either way. Shared memory starts as NaN, and no block may write beyond what it asked for.

#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <vector>
#include <ucontext.h>

#pragma GCC visibility push(hidden)                 // each library has fibres of its own

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

typedef uint32_t u32;
typedef uint16_t u16;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct Index { unsigned x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline u32 __float_as_uint(float v) { u32 r; memcpy(&r, &v, 4); return r; }
inline float __uint_as_float(u32 v) { float r; memcpy(&r, &v, 4); return r; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

struct Copy { void* to; const void* from; };
struct Fibre {
    jmp_buf place;                                  // where it goes on
    std::vector<char> stack;
    bool begun, done;
    std::vector<Copy> issued;                       // since the last group
    std::deque<std::vector<Copy>> groups;           // on their way, the oldest first
};
struct Meeting { int come = 0, held = 0; };         // threads that have come, and how often all had
struct Warp { Meeting meeting; u32 words[32][6]; const void* rows[32]; };
struct Phases { int expected, pending; u32 passed; };

extern std::vector<Fibre> fibres;
extern std::vector<Warp> warps;
extern Meeting whole_block, named[16];
extern std::map<const void*, Phases> phases;
extern bool late, progress, askew;
extern int here;
extern Index threadIdx, blockIdx, blockDim, gridDim;
static const size_t SHARED_BYTES = 256 * 1024;
extern "C" { alignas(16) extern u32 memory[SHARED_BYTES / 4]; }

void pause();                                       // let others run
int launch(
    const std::function<void()>& kernel, int columns, int rows, int threads, int shared, bool copies_late,
    unsigned seed);
inline int lane_of() { return here % 32; }
inline Warp& warp_of() { return warps[here / 32]; }
inline void come(Meeting& meeting, int expected) {
    progress = true;
    if (++meeting.come == expected) { meeting.come = 0; meeting.held++; }
}
inline void meet(Meeting& meeting, int expected) {
    int before = meeting.held;
    come(meeting, expected);
    while (meeting.held == before) pause();
}
inline void __syncwarp() { meet(warp_of().meeting, 32); }
inline void __syncthreads() { meet(whole_block, blockDim.x); }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class V> V __shfl_xor_sync(u32, V v, int mask) {
    static_assert(sizeof(V) == 4, "32 bits");
    memcpy(&warp_of().words[lane_of()][0], &v, 4);
    __syncwarp();
    memcpy(&v, &warp_of().words[lane_of() ^ mask][0], 4);
    __syncwarp();
    return v;
}

// What is inline PTX in the kernels, under the same names.
inline u16 bfloat16(float v) {                      // to the nearest, ties to even
    u32 bits = __float_as_uint(v);
    return v != v ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float float32(u16 v) { return __uint_as_float((u32)v << 16); }
template <class V, class P> V* whole(P* at) {        // several numbers at once
    askew |= (uintptr_t)at % sizeof(V) != 0;
    return (V*)at;
}
inline u32 pack(float low, float high) { return bfloat16(low) | (u32)bfloat16(high) << 16; }
inline float ex2(float v) { return exp2f(v); }
template <class P> P* opaque(P* p) { return p; }
inline float load_if(u32 condition, const float* at) { return condition ? *at : 0.f; }
inline void store_if(u32 condition, float* at, float v) { if (condition) *at = v; }
template <class V> void store_if(u32 condition, float* at, V v) {
    if (!condition) return;
    if ((uintptr_t)at % sizeof v) abort();          // as the hardware faults
    memcpy(at, &v, sizeof v);
}
inline void narrow_if(u32 condition, float v, u16* at) { if (condition) *at = bfloat16(v); }
inline void load4_into(float4& to, u32 condition, const float* at) { if (condition) to = *whole<float4>(at); }
inline void store4_if(u32 condition, float* at, float4 v) { if (condition) *whole<float4>(at) = v; }
inline void narrow4_if(u32 condition, u16* at, float4 v) {
    if (condition) *whole<uint2>(at) = {pack(v.x, v.y), pack(v.z, v.w)};
}

alignas(16) static const uint4 ZEROS = {0, 0, 0, 0};
inline void copy16(void* to, const void* from) {
    askew |= ((uintptr_t)to | (uintptr_t)from) % 16 != 0;
    if (late) fibres[here].issued.push_back({to, from});
    else memcpy(to, from, 16);
}
inline void copy16_if(bool there, void* to, const void* from) { copy16(to, there ? from : &ZEROS); }
inline void copies_issued() {
    fibres[here].groups.push_back(fibres[here].issued);
    fibres[here].issued.clear();
}
template <int pending> void copies_done() {
    auto& groups = fibres[here].groups;
    for (; groups.size() > pending; groups.pop_front())
        for (Copy copy : groups.front()) memcpy(copy.to, copy.from, 16);
    __syncwarp();
}

// m16n8k16: of a, lane 4r + c has (r, 2c), (r + 8, 2c), (r, 2c + 8), (r + 8, 2c + 8), each with its right neighbour; of
// b, (2c, r) and (2c + 8, r), each with the one below; of d, (r, 2c), (r, 2c + 1) and the same 8 rows on.
inline void mma(float* d, const uint4& a, u32 b0, u32 b1) {
    u32 mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
    auto& words = warp_of().words;
    memcpy(words[lane_of()], mine, sizeof mine);
    __syncwarp();
    int r = lane_of() / 4, c = lane_of() % 4;
    for (int i = 0; i < 4; i++) {
        double sum = d[i];
        for (int k = 0; k < 16; k++) {
            int half = k / 8, column = k % 8 / 2, right = k % 2;
            u32 one = words[4 * r + column][2 * half + i / 2], other = words[4 * (2 * c + i % 2) + column][4 + half];
            sum += (double)float32((u16)(one >> 16 * right)) * float32((u16)(other >> 16 * right));
        }
        d[i] = (float)sum;
    }
    __syncwarp();
}

// ldmatrix: eight lanes give the rows of an 8 x 8 matrix; lane 4r + c gets (r, 2c) and (r, 2c + 1) of each.
inline void row_is_at(const u32* at) {
    if ((uintptr_t)at % 16) abort();                // as the hardware faults
    warp_of().rows[lane_of()] = at;
    __syncwarp();
}
inline void rows4(uint4& v, const u32* at) {
    row_is_at(at);
    auto word = [](int matrix) { return ((const u32*)warp_of().rows[8 * matrix + lane_of() / 4])[lane_of() % 4]; };
    v = {word(0), word(1), word(2), word(3)};
    __syncwarp();
}

// ldmatrix .trans: lane 4r + c gets (2c, r) and (2c + 1, r) of each.
inline u32 transposed(int matrix) {
    int r = lane_of() / 4, c = lane_of() % 4;
    const u16* first = (const u16*)warp_of().rows[8 * matrix + 2 * c];
    const u16* second = (const u16*)warp_of().rows[8 * matrix + 2 * c + 1];
    return first[r] | (u32)second[r] << 16;
}
inline void matrices4(uint4& v, const u32* at) {
    row_is_at(at);
    v = {transposed(0), transposed(1), transposed(2), transposed(3)};
    __syncwarp();
}
inline void matrices2(u32& v, u32& w, const u32* at) {
    row_is_at(at);
    v = transposed(0);
    w = transposed(1);
    __syncwarp();
}

inline void await_other(int barrier) { meet(named[barrier], 64); }
inline void release_other(int barrier) { come(named[barrier], 64); }
inline void await_pair(int barrier) { meet(named[barrier], 128); }
inline void release_pair(int barrier) { come(named[barrier], 128); }
inline void barrier_made(u32* at, int expected) { phases[at] = {expected, expected, 0}; }
inline void barrier_arrived(u32* at, int lane) {
    __syncwarp();
    if (lane) return;
    Phases& barrier = phases[at];
    progress = true;
    if (--barrier.pending == 0) { barrier.pending = barrier.expected; barrier.passed++; }
}
inline void barrier_passed(u32* at, u32 parity) { while ((phases[at].passed & 1) == parity) pause(); }

#pragma GCC visibility pop
