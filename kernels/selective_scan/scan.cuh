// What the kernels of the scan share. Compiled at run time (NVRTC), once for each set of these constants:
//   K paths, N states, R rank of the step sizes, E channels, EXACT (1: float32 inputs, 0: bfloat16).
// A warp owns 32 channels of one image and one path; a thread owns a channel. Time goes in chunks of T = 16 steps.
// The step sizes are kept in units of ln 2: delta = ln 2 · log2(1 + 2^w), w = log2 e · (W dt + bias).

typedef unsigned int u32;
typedef unsigned short u16;
#define T 16
#define ROW 20                      // floats a channel's 16 step sizes take in shared memory: no bank conflicts
#define KS ((R + 15) / 16)          // k-steps of the matrix units for the product W dt
#define DTW (KS * 8 + 4)            // 32-bit words of a padded row of dt
#define LN2 0.6931471805599453f
#define LOG2E 1.4426950408889634f
// A chunk of a path's table: T tokens, then two words of flags, a bit a step in the low and in the high half.
#define TABLE (T + 4)
#define FIRST(t) (1u << (t))        // word T: the first path to visit the token,
#define LAST(t) (0x10000u << (t))   // the last one,
#define LATE(t) (1u << (t))         // word T + 1: the one before may still be there when this path starts its chunk,
#define PAD(t) (0x10000u << (t))    // no token: the length is not a multiple of T
#if EXACT
typedef float value;
#define DT_BLOCK (T * R)            // words of a chunk's dt: float32 [T, R]
#else
typedef u16 value;
#define DT_BLOCK (T * DTW)          // bfloat16 [T, 2 · DTW], zeros beyond R
#endif
#define BC_BLOCK (N * 2 * T)        // floats of a chunk's b (times ln 2) and c: [N, 2, T]
#define ALIGN4(n) (((n) + 3) / 4 * 4)

__device__ __forceinline__ float ex2(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(u16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r;
}
__device__ __forceinline__ void four(u32* to, const u32* from) {
    uint4 v = *(const uint4*)from;
    to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
}
__device__ __forceinline__ void four(float* to, const float* from) {
    float4 v = *(const float4*)from;
    to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
}

// log2(1 + 2^w) = max(w, 0) + log2(1 + e), e = 2^-|w|; the latter is e times a polynomial for 0 < e <= 1 (9e-6 off, relative).
__device__ __forceinline__ float softplus2(float w) {
#if EXACT
    return w > 60.f ? w : LOG2E * log1pf(exp2f(w));
#else
    float e = ex2(-fabsf(w)), q = -0.0344303399f;
    q = fmaf(q, e, 0.146020994f);
    q = fmaf(q, e, -0.303028792f);
    q = fmaf(q, e, 0.469173461f);
    q = fmaf(q, e, -0.720426619f);
    q = fmaf(q, e, 1.44268298f);
    return fmaf(e, q, fmaxf(w, 0.f));
#endif
}

// Its derivative, from its value.
__device__ __forceinline__ float sigmoid_of(float sp2) {
#if EXACT
    return -expm1f(-LN2 * sp2);
#else
    float s = LN2 * sp2;
    return s < 0.012f ? s * (1.f - 0.5f * s) : 1.f - ex2(-sp2);
#endif
}

// Keeps the compiler from taking an address apart: base + constant · index is then one instruction.
template <class P> __device__ __forceinline__ P* opaque(P* p) { asm volatile("" : "+l"(p)); return p; }

// Loads from and stores to global memory under a condition (not 0), without a branch.
__device__ __forceinline__ float load_if(u32 condition, const float* at) {
    float v = 0.f;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p ld.global.f32 %0, [%2]; }" : "+f"(v) : "r"(condition), "l"(at));
    return v;
}
__device__ __forceinline__ void store_if(u32 condition, float* at, float v) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.f32 [%1], %2; }"
                 :: "r"(condition), "l"(at), "f"(v) : "memory");
}
__device__ __forceinline__ void store_if(u32 condition, float* at, float2 v) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v2.f32 [%1], {%2, %3}; }"
                 :: "r"(condition), "l"(at), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void store_if(u32 condition, float* at, float4 v) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v4.f32 [%1], {%2, %3, %4, %5}; }"
                 :: "r"(condition), "l"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void narrow_if(u32 condition, float v, float* at) { store_if(condition, at, v); }
__device__ __forceinline__ void narrow_if(u32 condition, float v, u16* at) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.u16 [%1], %2; }"
                 :: "r"(condition), "l"(at), "h"((u16)pack(v, 0.f)) : "memory");
}

__device__ __forceinline__ void mma(float* d, const uint4& a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit values: lanes 8i to 8i + 7 give the rows of the i-th, each 16 bytes long; lane 4r + c gets
// (r, 2c) and (r, 2c + 1) of each.
__device__ __forceinline__ void rows4(uint4& v, const u32* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"((u32)__cvta_generic_to_shared(at)));
}
__device__ __forceinline__ void copy16(void* to, const void* from) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
}
// Zeros if not `there`.
__device__ __forceinline__ void copy16_if(bool there, void* to, const void* from) {
    u32 at = (u32)__cvta_generic_to_shared(to), bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of the groups issued are on their way, for the whole warp.
template <int pending> __device__ __forceinline__ void copies_done() {
    asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory");
    __syncwarp();
}

// `words` (a multiple of 4) from global to shared memory, by one warp.
template <int words> __device__ __forceinline__ void copy(void* to, const void* from, int lane) {
    #pragma unroll
    for (int i = lane; i < words / 4; i += 32) copy16((uint4*)to + i, (const uint4*)from + i);
}

#define PIECE (EXACT ? 4 : 8)       // channels of a 16-byte copy
#define X_BLOCK (T * 32 * (EXACT ? 4 : 2) / 4)

#if E % PIECE == 0
#define PIECES (T / PIECE)          // that a lane copies of a chunk's values [T, 32]

// Where a lane's pieces of a chunk lie in some [L, E]; a bit for each that has a token and channels.
// Addresses come before the copies, because reads of shared memory between copies cost three empty instructions each.
__device__ __forceinline__ u32 places(size_t* at, int tile, const u32* table, int lane) {
    u32 none = table[T + 1] >> 16, all = 0;
    int first = tile * 32 + lane % (32 / PIECE) * PIECE;
    #pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int row = i * PIECE + lane / (32 / PIECE);
        at[i] = (first < E ? first : 0) + (size_t)table[row] * E;
        all |= (u32)(first < E && !(none >> row & 1)) << i;
    }
    return all;
}
__device__ __forceinline__ void fetch_pieces(value* to, const value* image, const size_t* at, u32 there, int lane) {
    to += lane / (32 / PIECE) * 32 + lane % (32 / PIECE) * PIECE;
    #pragma unroll
    for (int i = 0; i < PIECES; i++) copy16_if(there >> i & 1, to + i * PIECE * 32, image + at[i]);
}
#endif

// A chunk's values [T, 32] of some [L, E] into shared memory, by one warp; zeros beyond the last channel and for no token.
__device__ __forceinline__ void fetch(value* to, const value* image, int tile, const u32* table, int lane) {
#if E % PIECE == 0
    size_t at[PIECES];
    u32 there = places(at, tile, table, lane);
    fetch_pieces(to, image, at, there, lane);
#else
    u32 none = table[T + 1] >> 16;
    bool there = tile * 32 + lane < E;
    for (int t = 0; t < T; t++)
        to[t * 32 + lane] = there && !(none >> t & 1) ? image[(size_t)table[t] * E + tile * 32 + lane] : (value)0;
#endif
}

// Fragments of W (times log2 e) of a path and 32 channels: [KS, 2 halves of the channels, high and low part, 32 lanes].
#define W_BLOCK (KS * 2 * 2 * 32)

// Step sizes (in ln 2) of a chunk for the thread's channel, from staged dt. `room` is the warp's [32, ROW] floats.
// Fragments of the weight lie `STRIDE` apart: 1 where the thread holds them, 32 where the warp shares memory.
#if EXACT
template <int STRIDE>
__device__ __forceinline__ void step_sizes(float* d, const u32* dt, const float* weight, float bias, float*, int) {
    const float* rows = (const float*)dt;
    #pragma unroll
    for (int t = 0; t < T; t++) d[t] = bias;
    for (int j = 0; j < R; j++) {
        float w = weight[j];
        #pragma unroll
        for (int t = 0; t < T; t++) d[t] = fmaf(w, rows[t * R + j], d[t]);
    }
    #pragma unroll
    for (int t = 0; t < T; t++) d[t] = softplus2(LOG2E * d[t]);
}
#else
template <int STRIDE>
__device__ __forceinline__ void step_sizes(
    float* d, const u32* dt, const uint4* weight, const float* bias, float* room, int lane) {
    int row = lane / 4, column = lane % 4;
    float v[2][2][4];               // [steps 0-7, 8-15][channels 0-15, 16-31]
    #pragma unroll
    for (int s = 0; s < 2; s++)
        #pragma unroll
        for (int m = 0; m < 2; m++) {
            v[s][m][0] = v[s][m][1] = bias[2 * m];
            v[s][m][2] = v[s][m][3] = bias[2 * m + 1];
        }
    const u32* rows = dt + (lane / 16 * 8 + lane % 8) * DTW + lane / 8 % 2 * 4;
    #pragma unroll
    for (int j = 0; j < KS; j++) {
        uint4 here;                 // of 16 ranks: their halves for steps 0-7, then for 8-15
        rows4(here, rows + 8 * j);
        #pragma unroll
        for (int m = 0; m < 2; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 w = weight[((j * 2 + m) * 2 + half) * STRIDE];
                mma(v[0][m], w, here.x, here.y);
                mma(v[1][m], w, here.z, here.w);
            }
    }
    #pragma unroll
    for (int s = 0; s < 2; s++)
        #pragma unroll
        for (int m = 0; m < 2; m++)
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 pair = {softplus2(v[s][m][2 * i]), softplus2(v[s][m][2 * i + 1])};
                *(float2*)(room + (16 * m + 8 * i + row) * ROW + 8 * s + 2 * column) = pair;
            }
    __syncwarp();
    #pragma unroll
    for (int t = 0; t < T; t += 4) four(d + t, room + lane * ROW + t);
    __syncwarp();
}
#endif

// A barrier of two warps: one waits for the other, which only says that it has come.
__device__ __forceinline__ void await_other(int barrier) { asm volatile("bar.sync %0, 64;" :: "r"(barrier) : "memory"); }
__device__ __forceinline__ void release_other(int barrier) { asm volatile("bar.arrive %0, 64;" :: "r"(barrier) : "memory"); }

// The warps of a program add to the same tokens in turn: warp 0, 1, … for a chunk, then again for the next chunk.
// So every sum has one order, whatever the timing.
__device__ __forceinline__ void wait_turn(int warp, bool very_first) {
    if (K > 1 && !(warp == 0 && very_first)) await_other(warp);
}
__device__ __forceinline__ void pass_turn(int warp, bool very_last) {
    if (K > 1 && !(warp == K - 1 && very_last)) {
        __threadfence_block();
        release_other((warp + 1) % K);
    }
}
