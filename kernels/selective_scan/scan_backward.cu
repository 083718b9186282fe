// The backward pass: a block has WARPS warps, each with 32 channels of one image; together they walk one path after the
// other. A path is walked forwards once to leave the states at the start of every chunk in scratch (not if KEPT: then the
// forward pass has left them), then backwards: a chunk's states are computed again from there, for one state dimension at
// a time, in registers.
// Sums over channels (the gradients of dt, b, c) are taken by the matrix units within a warp, then over the block.
// A block takes its images one after the other under each path and adds up the gradients of its parameters.
// SEGMENTED, where few images would leave blocks without work: a launch is one path, a block a segment of it, `every`
// chunks long. The state at its start comes from the forward pass, the gradient of the state at its end from
// `scan_segments`, launched before.

#define COLUMNS (R + 2 * N)         // gradients of a token and path: dt, b, c
#define AHEAD 4
#define RANKS ((R + 7) / 8 * 8)
#define DW_ROW 12                   // words of a channel's 16 bfloat16 gradients in shared memory: no bank conflicts
#define DW_WORDS (EXACT ? 32 * 17 : 2 * 32 * DW_ROW)
#define ROOM (DW_WORDS > 32 * ROW ? DW_WORDS : 32 * ROW)
#define STAGE (ALIGN4(DT_BLOCK) + BC_BLOCK)
#define TABLES 4                    // chunks whose table is at hand
#define BLOCK_WORDS (2 * STAGE + TABLES * TABLE + 4)
#define SUMS_AT(t) ((t) * ALIGN4(COLUMNS) + (t) / 2 * 4)    // where the sums of a token start: few bank conflicts
#define SUMS (SUMS_AT(T - 1) + ALIGN4(COLUMNS))
#define WARP_WORDS (ROOM + 3 * X_BLOCK + 2 * N * 32 + 32 * RANKS + SUMS)
#define S (!EXACT && N % 2 == 0 && WARPS * BLOCKS_AN_SM <= 8 ? 2 : 1)      // states at a time, as registers allow
#define KEEP_X (N == 1 && WARPS * BLOCKS_AN_SM <= 8)        // registers have room for a chunk's x

__device__ __forceinline__ void matrices4(uint4& v, const u32* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"((u32)__cvta_generic_to_shared(at)));
}
__device__ __forceinline__ void matrices2(u32& v, u32& w, const u32* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(v), "=r"(w) : "r"((u32)__cvta_generic_to_shared(at)));
}

// The same for float32 sums [L, E] whatever the type of x.
__device__ __forceinline__ void fetch_sums(float* to, const float* image, int tile, const u32* table, int lane) {
#if E % 4 == 0
    const float* from[T / 4];
    int first = tile * 32 + lane % 8 * 4;
    #pragma unroll
    for (int i = 0; i < T / 4; i++) from[i] = image + (first < E ? first : 0) + (size_t)table[i * 4 + lane / 8] * E;
    to += lane / 8 * 32 + lane % 8 * 4;
    #pragma unroll
    for (int i = 0; i < T / 4; i++) copy16(to + i * 4 * 32, from[i]);
#else
    int channel = min(tile * 32 + lane, E - 1);
    for (int t = 0; t < T; t++) to[t * 32 + lane] = image[(size_t)table[t] * E + channel];
#endif
}

// A barrier at which a warp says that it has arrived, and waits for the others only later.
__device__ __forceinline__ void barrier_made(u32* at, int warps) {
    u32 where = (u32)__cvta_generic_to_shared(at);
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(where), "r"(warps) : "memory");
}
__device__ __forceinline__ void barrier_arrived(u32* at, int lane) {
    u32 where = (u32)__cvta_generic_to_shared(at);
    __syncwarp();
    if (lane == 0) asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" :: "r"(where) : "memory");
}
__device__ __forceinline__ void barrier_passed(u32* at, u32 parity) {
    u32 where = (u32)__cvta_generic_to_shared(at), done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(where), "r"(parity) : "memory");
}

// A chunk's values of x and of the gradient.
__device__ __forceinline__ void fetch_both(
    value* to, value* g_to, const value* image, const value* g_image, int tile, const u32* table, int lane) {
#if E % PIECE == 0
    size_t at[PIECES];
    u32 there = places(at, tile, table, lane);
    fetch_pieces(to, image, at, there, lane);
    fetch_pieces(g_to, g_image, at, there, lane);
#else
    fetch(to, image, tile, table, lane);
    fetch(g_to, g_image, tile, table, lane);
#endif
}

// `words` (a multiple of 4) from global to shared memory, by the whole block.
template <int words> __device__ __forceinline__ void copy_by_block(void* to, const void* from) {
    uint4* mine = (uint4*)to + threadIdx.x;
    const uint4* at = (const uint4*)from + threadIdx.x;
    #pragma unroll
    for (int i = 0; i < words / 4; i += 32 * WARPS)
        if (i + 32 * WARPS <= words / 4 || threadIdx.x < words / 4 - i) copy16(mine + i, at + i);
}
// What a chunk needs of a path but for its table, by the whole block.
__device__ __forceinline__ void stage(u32* to, const u32* dt, const float* bc, int chunk) {
    copy_by_block<ALIGN4(DT_BLOCK)>(to, dt + chunk * ALIGN4(DT_BLOCK));
    copy_by_block<BC_BLOCK>(to + ALIGN4(DT_BLOCK), bc + chunk * BC_BLOCK);
}
__device__ __forceinline__ void stage_table(u32* to, const u32* tables, int chunk) {
    if (threadIdx.x < TABLE / 4) copy16(to + chunk % TABLES * TABLE + 4 * threadIdx.x, tables + chunk * TABLE + 4 * threadIdx.x);
}

#if !EXACT
// Sums over the 32 lanes of two kinds of 16 values each, packed two and two. The matrix units add up four lanes at once
// (of lane (row, column) those of its row) and put values 4 · column to 4 · column + 3 of both kinds there, which go, as
// bfloat16, to `bucket` [32, 8], its lines in an order without bank conflicts.
__device__ __forceinline__ void give(u32* bucket, const u32* first, const u32* second, const u32* pick, int lane) {
    float d[4] = {0.f, 0.f, 0.f, 0.f}, e[4] = {0.f, 0.f, 0.f, 0.f};
    mma(d, make_uint4(first[0], first[1], first[2], first[3]), pick[0], pick[1]);
    mma(e, make_uint4(second[0], second[1], second[2], second[3]), pick[0], pick[1]);
    mma(d, make_uint4(first[4], first[5], first[6], first[7]), pick[2], pick[3]);
    mma(e, make_uint4(second[4], second[5], second[6], second[7]), pick[2], pick[3]);
    int line = lane % 4 * 8 + (lane / 4 ^ 2 * (lane % 4));
    *(uint4*)(bucket + 4 * line) = make_uint4(pack(d[0], d[1]), pack(d[2], d[3]), pack(e[0], e[1]), pack(e[2], e[3]));
}
// Their sums over the rows: lane (row, column) returns that of value row % 4 + 8 · (column % 2) + 4 · (column / 2), of the
// first kind where row < 4.
__device__ __forceinline__ float taken(const u32* bucket, int lane) {
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    uint4 v;
    matrices4(v, bucket + 4 * (lane / 8 * 8 + (lane % 8 ^ lane / 8 * 2)));
    mma(d, v, lane & 8 ? 0u : 0x3f803f80u, lane & 8 ? 0x3f803f80u : 0u);
    return lane & 2 ? d[2] : d[0];
}
#endif

// Adds up what the warps have for a chunk's tokens and stores it, by the whole block: ACROSS threads a token, each with four
// columns at a time. Threads without columns or without a token read those of another and store nothing.
#define QUADS (ALIGN4(COLUMNS) / 4)
#define ACROSS (QUADS > 16 ? 32 : QUADS > 8 ? 16 : QUADS > 4 ? 8 : 4)
__device__ __forceinline__ void add_tokens(float* to, const u32* memory, const u32* table) {
    const float* all = (const float*)(memory + BLOCK_WORDS) + WARP_WORDS - SUMS;
    u32 real = ~(table[T + 1] >> 16);
    #pragma unroll
    for (int first = 0; first < T; first += 32 * WARPS / ACROSS) {
        int t = first + threadIdx.x / ACROSS;
        if (first + 32 * WARPS / ACROSS > T && t >= T) real = 0, t = T - 1;
        float* row = to + (long long)table[t] * K * COLUMNS;
        #pragma unroll
        for (int i = 0; i < QUADS; i += ACROSS) {
            int quad = min(i + (int)threadIdx.x % ACROSS, QUADS - 1), column = 4 * quad;
            float sum[4];
            four(sum, all + SUMS_AT(t) + column);
            #pragma unroll
            for (int other = 1; other < WARPS; other++) {
                float more[4];
                four(more, all + other * WARP_WORDS + SUMS_AT(t) + column);
                #pragma unroll
                for (int j = 0; j < 4; j++) sum[j] += more[j];
            }
            #pragma unroll
            for (int j = 0; j < 4; j++)
                if (R % 4 || N % 4 ? (u32)(column + j - R) < N : (u32)(quad - R / 4) < N / 4) sum[j] *= LN2;
            u32 there = i + (int)threadIdx.x % ACROSS < QUADS ? real >> t & 1 : 0;
#if COLUMNS % 4 == 0
            store_if(there, row + column, make_float4(sum[0], sum[1], sum[2], sum[3]));
#elif COLUMNS % 2 == 0
            store_if(there, row + column, make_float2(sum[0], sum[1]));
            store_if(column + 2 < COLUMNS ? there : 0, row + column + 2, make_float2(sum[2], sum[3]));
#else
            #pragma unroll
            for (int j = 0; j < 4; j++) store_if(column + j < COLUMNS ? there : 0, row + column + j, sum[j]);
#endif
        }
    }
}

// Grid (groups of WARPS · 32 channels, parts of the batch times segments, here `parts` both). Results in float32:
// grad_x [B, L, E] (x's type in `out` after the last path), grad_tokens [groups, B, L, K, COLUMNS],
// grad_weight [parts, K, E, R], grad_rows [parts, K, E, N + 2]: of a, then of the bias, then of the skip.
// a comes as [K, N, E], so that a warp reads it in one piece.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_AN_SM) scan_backward(
    const value* __restrict__ grad, const value* __restrict__ x, const u32* __restrict__ dt_blocks,
    const float* __restrict__ bc_blocks, const void* __restrict__ weight, const uint4* __restrict__ turned,
    const float* __restrict__ bias, const float* __restrict__ a, const float* __restrict__ skip,
    const u32* __restrict__ table, float* starts, float* grad_x, value* out, float* grad_tokens, float* grad_weight,
    float* grad_rows, int length, int chunks, int batch, const float* __restrict__ entered,
    const float* __restrict__ returned, int every, int segments, int path) {
    extern __shared__ u32 memory[];
#if SEGMENTED
    int segment = blockIdx.y % segments;
    unsigned part = blockIdx.y / segments, parts = gridDim.y / segments;
    int low = segment * every, high = min(chunks, low + every);
#define PATHS_HERE int k = path; k == path; k++
#else
    const unsigned part = blockIdx.y, parts = gridDim.y;
    const int low = 0, high = chunks;
#define PATHS_HERE int k = 0; k < K; k++
#endif
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = (E + 31) / 32;
    int tile = blockIdx.x * WARPS + warp;
    int fetched = tile;             // may be beyond the last: then all is zero
    bool there = tile * 32 + lane < E;
    int channel = min(tile * 32 + lane, E - 1);
    tile = min(tile, tiles - 1);
    u32* staged = memory, * near = memory + 2 * STAGE;      // tables of some chunks
    float* room = (float*)(memory + BLOCK_WORDS + warp * WARP_WORDS);
    value* x_here = (value*)(room + ROOM), * gs = (value*)(room + ROOM + 2 * X_BLOCK);         // of two chunks, of one
    float* carried = room + ROOM + 3 * X_BLOCK + lane;      // [N][32]: states, then their gradients
    float* rate_sums = carried + N * 32;                    // [N][32]: gradients of a
    float* weight_sums = rate_sums + N * 32 - lane;         // [32][RANKS]
    float* token_sums = weight_sums + 32 * RANKS;           // [T] rows at SUMS_AT
#if !EXACT
    u32* bucket = (u32*)room + T * 32;                      // [S][32, 4 words], beyond what fetch_sums brings
    int summed = lane / 4 % 4 + 8 * (lane % 2) + 4 * (lane / 2 % 2);
    float* state_sums = token_sums + SUMS_AT(summed) + R + (lane < 16 ? 0 : N);
#endif
#if !KEPT
    float* begun = starts + ((long long)(blockIdx.y * gridDim.x + blockIdx.x) * WARPS + warp) * (SEGMENTED ? every : chunks) * N * 32 + lane;
#endif
    u32* barrier = near + TABLES * TABLE, parity = 0;
    if (threadIdx.x == 0) barrier_made(barrier, WARPS);
    int first = (int)((long long)part * batch / parts), last = (int)((long long)(part + 1) * batch / parts);
#if !EXACT
    int row = lane / 4, column = lane % 4;
    u32 pick[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) pick[i] = row == 2 * i ? 0x3f80u : row == 2 * i + 1 ? 0x3f800000u : 0u;
#endif

    for (PATHS_HERE) {
        float jump = skip[k * E + channel], bias_sum = 0.f, skip_sum = 0.f;
        const float* rates = a + (long long)k * N * E + channel;
        const u32* tables = table + k * chunks * TABLE;
#if EXACT
        const float* w = (const float*)weight + ((long long)k * E + channel) * R;
        float offset = bias[k * E + channel];
#else
        const uint4* w = (const uint4*)weight + ((long long)k * tiles + tile) * W_BLOCK + lane;
        const uint4* w_turned = turned + ((long long)k * tiles + tile) * W_BLOCK + lane;
        float offset[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) offset[i] = LOG2E * bias[k * E + min(tile * 32 + 8 * i + lane / 4, E - 1)];
#endif
        for (int n = 0; n < N; n++) rate_sums[n * 32] = 0.f;
        for (int i = lane; i < 32 * RANKS; i += 32) weight_sums[i] = 0.f;
        for (int image = first; image < last; image++) {
            const u32* dt_image = dt_blocks + ((long long)image * K + k) * chunks * ALIGN4(DT_BLOCK);
            const float* bc_image = bc_blocks + ((long long)image * K + k) * chunks * BC_BLOCK;
            const value* x_image = opaque(x + (long long)image * length * E);
            const value* g_image = opaque(grad + (long long)image * length * E);
            const float* gx_image = opaque(grad_x + (long long)image * length * E);
            float* gx_channel = opaque(grad_x + (long long)image * length * E + channel);
            value* out_image = opaque(out + (long long)image * length * E + channel);
#if KEPT
            const float* begun = starts + ((((long long)image * K + k) * tiles + tile) * chunks + low) * N * 32 + lane;
#else
#if SEGMENTED
            const float* from = entered + ((((long long)image * K + k) * tiles + tile) * segments + segment) * N * 32 + lane;
            for (int n = 0; n < N; n++) carried[n * 32] = from[n * 32];
#else
            for (int n = 0; n < N; n++) carried[n * 32] = 0.f;
#endif
            __syncthreads();
            int walked = high - 1;              // not the last, for only the state at its start is needed
            if (walked != low) {
                stage_table(near, tables, low);
                stage_table(near, tables, low + 1);
                stage(staged + low % 2 * STAGE, dt_image, bc_image, low);
                copies_issued();
                copies_done<0>();
                __syncthreads();
                fetch(x_here + low % 2 * T * 32, x_image, fetched, near + low % TABLES * TABLE, lane);
                copies_issued();
            }
            float next = rates[0];
            for (int chunk = low; chunk < walked; chunk++) {
                copies_done<0>();
                __syncthreads();
                const u32* dt = staged + chunk % 2 * STAGE;
                const float* bc = (const float*)(dt + ALIGN4(DT_BLOCK));
                const value* xs = x_here + chunk % 2 * T * 32;
                if (chunk + 1 < walked) {
                    fetch(x_here + (chunk + 1) % 2 * T * 32, x_image, fetched, near + (chunk + 1) % TABLES * TABLE, lane);
                    stage(staged + (chunk + 1) % 2 * STAGE, dt_image, bc_image, chunk + 1);
                    if (chunk + 2 < walked) stage_table(near, tables, chunk + 2);
                }
                copies_issued();
                float d[T], u[T];
                step_sizes<32>(d, dt, w, offset, room, lane);
                #pragma unroll
                for (int t = 0; t < T; t++) u[t] = d[t] * widen(xs[t * 32 + lane]);
                float* from = begun + (long long)(chunk - low) * N * 32;
                #pragma unroll 4
                for (int n = 0; n < N; n++) {
                    float rate = next, state = carried[n * 32];
                    next = rates[(n + 1 < N ? n + 1 : 0) * E];
                    from[n * 32] = state;
                    #pragma unroll
                    for (int t = 0; t < T; t += 4) {
                        float4 b = *(const float4*)(bc + n * 2 * T + t);
                        state = fmaf(ex2(d[t] * rate), state, u[t] * b.x);
                        state = fmaf(ex2(d[t + 1] * rate), state, u[t + 1] * b.y);
                        state = fmaf(ex2(d[t + 2] * rate), state, u[t + 2] * b.z);
                        state = fmaf(ex2(d[t + 3] * rate), state, u[t + 3] * b.w);
                    }
                    carried[n * 32] = state;
                }
            }
            for (int n = 0; n < N; n++) begun[((long long)(walked - low) * N + n) * 32] = carried[n * 32];
#endif
            for (int n = 0; n < N; n++) carried[n * 32] = 0.f;
#if SEGMENTED
            // A warp without channels must not have a gradient: it would add to those of dt.
            for (int later = segments - 1; later > segment && fetched < tiles; later--) {
                const float* from = returned + ((((long long)image * K + k) * tiles + tile) * segments + later) * 2 * N * 32 + lane;
                for (int n = 0; n < N; n++) carried[n * 32] = fmaf(from[(N + n) * 32], carried[n * 32], from[n * 32]);
            }
#endif
            __threadfence();            // sums that the path before has stored are read below by other lanes
            __syncthreads();
            stage_table(near, tables, high - 1);
            if (high - low > 1) stage_table(near, tables, high - 2);
            stage(staged + (high - 1) % 2 * STAGE, dt_image, bc_image, high - 1);
            copies_issued();
            copies_done<0>();
            __syncthreads();
            fetch_both(x_here + (high - 1) % 2 * T * 32, gs, x_image, g_image, fetched,
                       near + (high - 1) % TABLES * TABLE, lane);
            copies_issued();
            float coming[AHEAD], rate[S];
            #pragma unroll
            for (int s = 0; s < S; s++) rate[s] = rates[s * E];
            #pragma unroll
            for (int i = 0; i < AHEAD; i++)
                coming[i] = i < (high - low) * N ? begun[((high - low - 1 - i / N) * N + i % N) * 32] : 0.f;
            for (int chunk = high - 1; chunk >= low; chunk--) {
                copies_done<0>();
                __syncthreads();
                const u32* dt = staged + chunk % 2 * STAGE, * tokens = near + chunk % TABLES * TABLE;
                const float* bc = (const float*)(dt + ALIGN4(DT_BLOCK));
                const value* xs = x_here + chunk % 2 * T * 32;
                if (chunk + 1 < high) {         // what the chunk before has left
                    add_tokens(grad_tokens + (((long long)blockIdx.x * batch + image) * length * K + k) * COLUMNS, memory,
                               near + (chunk + 1) % TABLES * TABLE);
                    barrier_arrived(barrier, lane);
                }
                float d[T], u[T], g[T], by_u[T], by_d[T], x_t[T];
                step_sizes<32>(d, dt, w, offset, room, lane);
                #pragma unroll
                for (int t = 0; t < T; t++) {
                    x_t[t] = widen(xs[t * 32 + lane]);
                    u[t] = d[t] * x_t[t];
                    g[t] = widen(gs[t * 32 + lane]);
                    by_u[t] = by_d[t] = 0.f;
                }
                // What the paths before have given for x, needed at the end; then the next chunk.
                u32 none = tokens[T + 1] >> 16;
                __syncwarp();                   // every lane has read the gradient: its place is free
                if (k) fetch_sums(room, gx_image, fetched, tokens, lane);
                copies_issued();
                if (chunk > low) {
                    fetch_both(x_here + (chunk - 1) % 2 * T * 32, gs, x_image, g_image, fetched,
                               near + (chunk - 1) % TABLES * TABLE, lane);
                    stage(staged + (chunk - 1) % 2 * STAGE, dt_image, bc_image, chunk - 1);
                    if (chunk > low + 1) stage_table(near, tables, chunk - 2);
                }
                copies_issued();
                if (chunk + 1 < high) {         // every warp has read it
                    barrier_passed(barrier, parity);
                    parity ^= 1;
                }
                #pragma unroll 1
                for (int n = 0; n < N; n += S) {
                    // States are read AHEAD before their use, across chunks.
                    float h[S][T], decay[S][T], bs[S][T], before[S], state[S], now[S], back[S], rate_sum[S];
                    int further = (high - 1 - chunk) * N + n + AHEAD;
                    #pragma unroll
                    for (int s = 0; s < S; s++) {
                        state[s] = before[s] = coming[s];
                        now[s] = rate[s];
                        back[s] = carried[(n + s) * 32];
                        rate_sum[s] = 0.f;
                    }
                    #pragma unroll
                    for (int i = 0; i + S < AHEAD; i++) coming[i] = coming[i + S];
                    if (further < (high - low) * N) {
                        const float* from = begun + ((high - low - 1 - further / N) * N + further % N) * 32;
                        #pragma unroll
                        for (int s = 0; s < S; s++) coming[AHEAD - S + s] = from[s * 32];
                    }
                    int next = n + S < N ? n + S : 0;
                    #pragma unroll
                    for (int s = 0; s < S; s++) rate[s] = rates[(next + s) * E];
                    const float* b = bc + n * 2 * T;
#if !EXACT
                    #pragma unroll
                    for (int s = 0; s < S; s++) {   // of the states before
                        float sum = taken(bucket + s * 128, lane);
                        if (n) state_sums[n - S + s] = sum;
                    }
                    __syncwarp();
                    u32 first_kind[S][T / 2], second_kind[S][T / 2];
#endif
                    #pragma unroll
                    for (int t = 0; t < T; t += 4) {
                        #pragma unroll
                        for (int s = 0; s < S; s++) four(bs[s] + t, b + s * 2 * T + t);
                        #pragma unroll
                        for (int i = t; i < t + 4; i++)
                            #pragma unroll
                            for (int s = 0; s < S; s++) {
                                decay[s][i] = ex2(d[i] * now[s]);
                                h[s][i] = state[s] = fmaf(decay[s][i], state[s], u[i] * bs[s][i]);
                            }
                    }
                    #pragma unroll
                    for (int t = T - 4; t >= 0; t -= 4) {
                        float cs[S][4], for_b[S][4], for_c[S][4];
                        #pragma unroll
                        for (int s = 0; s < S; s++) four(cs[s], b + (s * 2 + 1) * T + t);
                        #pragma unroll
                        for (int i = t + 3; i >= t; i--)
                            #pragma unroll
                            for (int s = 0; s < S; s++) {
                                float by_h = fmaf(cs[s][i - t], g[i], back[s]), w_here;
                                for_b[s][i - t] = by_h * u[i];
                                for_c[s][i - t] = g[i] * h[s][i];
                                by_u[i] = fmaf(by_h, bs[s][i], by_u[i]);
                                back[s] = by_h * decay[s][i];
                                w_here = back[s] * (i ? h[s][(i + T - 1) % T] : before[s]);
                                by_d[i] = fmaf(w_here, now[s], by_d[i]);
                                rate_sum[s] = fmaf(w_here, d[i], rate_sum[s]);
                            }
                        #pragma unroll
                        for (int s = 0; s < S; s++) {
#if EXACT
                            #pragma unroll
                            for (int i = 0; i < 4; i++) {
                                for (int lanes = 16; lanes; lanes /= 2) {
                                    for_b[s][i] += __shfl_xor_sync(~0u, for_b[s][i], lanes);
                                    for_c[s][i] += __shfl_xor_sync(~0u, for_c[s][i], lanes);
                                }
                                if (lane == 0) {
                                    token_sums[SUMS_AT(t + i) + R + n + s] = for_b[s][i];
                                    token_sums[SUMS_AT(t + i) + R + N + n + s] = for_c[s][i];
                                }
                            }
#else
                            first_kind[s][t / 2] = pack(for_b[s][0], for_b[s][1]);
                            first_kind[s][t / 2 + 1] = pack(for_b[s][2], for_b[s][3]);
                            second_kind[s][t / 2] = pack(for_c[s][0], for_c[s][1]);
                            second_kind[s][t / 2 + 1] = pack(for_c[s][2], for_c[s][3]);
#endif
                        }
                    }
                    #pragma unroll
                    for (int s = 0; s < S; s++) {
#if !EXACT
                        give(bucket + s * 128, first_kind[s], second_kind[s], pick, lane);
#endif
                        carried[(n + s) * 32] = back[s];
                        rate_sums[(n + s) * 32] += LN2 * rate_sum[s];
                    }
                    __syncwarp();
                }
#if !EXACT
                #pragma unroll
                for (int s = 0; s < S; s++) state_sums[N - S + s] = taken(bucket + s * 128, lane);
#endif
                // The gradients of x, and of w = log2 e · (W dt + bias).
                float w_grad[T];
                #pragma unroll
                for (int t = 0; t < T; t++) {
                    if (!KEEP_X) x_t[t] = widen(xs[t * 32 + lane]);
                    w_grad[t] = fmaf(x_t[t], by_u[t], LN2 * by_d[t]) * sigmoid_of(d[t]);
                    bias_sum += w_grad[t];
                    skip_sum = fmaf(x_t[t], g[t], skip_sum);
                    by_u[t] = fmaf(d[t], by_u[t], jump * g[t]);
                }
                copies_done<1>();
                #pragma unroll
                for (int t = 0; t < T; t++)
                    if (k) by_u[t] += room[t * 32 + lane];
                u32 real = there ? ~none : 0u;
                if (k + 1 < K) {
                    #pragma unroll
                    for (int t = 0; t < T; t += 4) {
                        u32 token[4];
                        four(token, tokens + t);
                        #pragma unroll
                        for (int s = 0; s < 4; s++) store_if(real & (1u << (t + s)), gx_channel + (size_t)token[s] * E, by_u[t + s]);
                    }
                } else {
                    #pragma unroll
                    for (int t = 0; t < T; t += 4) {
                        u32 token[4];
                        four(token, tokens + t);
                        #pragma unroll
                        for (int s = 0; s < 4; s++) narrow_if(real & (1u << (t + s)), by_u[t + s], out_image + (size_t)token[s] * E);
                    }
                }
                // Its products with dt and with W: sums over time for the weight, over channels for dt.
                __syncwarp();
#if EXACT
                #pragma unroll
                for (int t = 0; t < T; t++) room[lane * 17 + t] = w_grad[t];
                __syncwarp();
                for (int j = 0; j < R; j++) {
                    float sum = 0.f;
                    #pragma unroll
                    for (int t = 0; t < T; t++) sum = fmaf(w_grad[t], __uint_as_float(dt[t * R + j]), sum);
                    weight_sums[lane * RANKS + j] += sum;
                }
                for (int i = lane; i < T * R; i += 32) {
                    const float* rows = (const float*)weight + (long long)k * E * R + i % R;
                    float sum = 0.f;
                    for (int other = 0; other < 32; other++)
                        sum = fmaf(room[other * 17 + i / R], rows[(long long)min(tile * 32 + other, E - 1) * R], sum);
                    token_sums[SUMS_AT(i / R) + i % R] = LOG2E * sum;
                }
#else
                u32* tile_high = (u32*)room, * tile_low = tile_high + 32 * DW_ROW;
                #pragma unroll
                for (int t = 0; t < T; t += 8) {
                    u32 high[4], low[4];
                    #pragma unroll
                    for (int s = 0; s < 4; s++) {
                        high[s] = pack(w_grad[t + 2 * s], w_grad[t + 2 * s + 1]);
                        low[s] = pack(w_grad[t + 2 * s] - widen((u16)high[s]), w_grad[t + 2 * s + 1] - widen((u16)(high[s] >> 16)));
                    }
                    *(uint4*)(tile_high + lane * DW_ROW + t / 2) = make_uint4(high[0], high[1], high[2], high[3]);
                    *(uint4*)(tile_low + lane * DW_ROW + t / 2) = make_uint4(low[0], low[1], low[2], low[3]);
                }
                __syncwarp();
                uint4 rows_high[2], rows_low[2], columns_high[2];
                #pragma unroll
                for (int m = 0; m < 2; m++) {
                    int place = (16 * m + lane % 16) * DW_ROW + lane / 16 * 4;
                    rows4(rows_high[m], tile_high + place);
                    rows4(rows_low[m], tile_low + place);
                    matrices4(columns_high[m], tile_high + (16 * m + lane % 8 + lane / 16 * 8) * DW_ROW + lane / 8 % 2 * 4);
                }
                #pragma unroll
                for (int j = 0; j < RANKS / 8; j++) {
                    u32 b0, b1;
                    matrices2(b0, b1, dt + lane % 16 * DTW + 4 * j);
                    float by_dt[4] = {0.f, 0.f, 0.f, 0.f};
                    #pragma unroll
                    for (int m = 0; m < 2; m++) {
                        float* at = weight_sums + (16 * m + row) * RANKS + 8 * j + 2 * column;
                        float2 low = *(float2*)at, high = *(float2*)(at + 8 * RANKS);
                        float sum[4] = {low.x, low.y, high.x, high.y};
                        mma(sum, rows_high[m], b0, b1);
                        mma(sum, rows_low[m], b0, b1);
                        *(float2*)at = make_float2(sum[0], sum[1]);
                        *(float2*)(at + 8 * RANKS) = make_float2(sum[2], sum[3]);
                        #pragma unroll
                        for (int part = 0; part < 2; part++) {
                            uint4 v = w_turned[((j / 2 * 2 + m) * 2 + part) * 32];
                            mma(by_dt, columns_high[m], j % 2 ? v.y : v.x, j % 2 ? v.w : v.z);
                        }
                    }
                    #pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int rank = 8 * j + 2 * column;
                        float* at = token_sums + SUMS_AT(row + 8 * i) + rank;
                        if (rank + 1 < R) *(float2*)at = make_float2(by_dt[2 * i], by_dt[2 * i + 1]);
                        else if (rank < R) *at = by_dt[2 * i];
                    }
                }
#endif
            }
            __syncthreads();
            add_tokens(grad_tokens + (((long long)blockIdx.x * batch + image) * length * K + k) * COLUMNS, memory,
                       near + low % TABLES * TABLE);
        }
        __syncwarp();
        if (there) {
            long long at = ((long long)blockIdx.y * K + k) * E + channel;
            for (int n = 0; n < N; n++) grad_rows[at * (N + 2) + n] = rate_sums[n * 32];
            grad_rows[at * (N + 2) + N] = LOG2E * bias_sum;
            grad_rows[at * (N + 2) + N + 1] = skip_sum;
        }
        for (int i = lane; i < 32 * R; i += 32) {
            int other = blockIdx.x * WARPS * 32 + warp * 32 + i / R;
            if (other < E) grad_weight[(((long long)blockIdx.y * K + k) * E + other) * R + i % R] = LOG2E * weight_sums[i / R * RANKS + i % R];
        }
        __syncwarp();
    }
}

// What a segment, but for the first of a path, gives to those before it, as if nothing came after it: the gradient of the
// state at its start; and how much of that at its end arrives there. [B, K, tiles, segments, 2, N, 32].
// Grid (groups of WARPS · 32 channels, B · K · (segments - 1)).
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_AN_SM) scan_segments(
    const value* __restrict__ grad, const u32* __restrict__ dt_blocks, const float* __restrict__ bc_blocks,
    const void* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ a,
    const u32* __restrict__ table, float* __restrict__ returned, int length, int chunks, int every, int segments) {
    extern __shared__ u32 memory[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = (E + 31) / 32;
    int fetched = blockIdx.x * WARPS + warp, tile = min(fetched, tiles - 1), channel = min(fetched * 32 + lane, E - 1);
    int segment = 1 + blockIdx.y % (segments - 1), path = blockIdx.y / (segments - 1);      // image · K + k
    int k = path % K, image = path / K, low = segment * every, high = min(chunks, low + every);
    u32* staged = memory, * near = memory + 2 * STAGE;
    float* room = (float*)(memory + BLOCK_WORDS + warp * WARP_WORDS), * carried = room + ROOM + 3 * X_BLOCK + lane;
    value* gs = (value*)(room + ROOM);                      // of two chunks
    const value* g_image = grad + (long long)image * length * E;
    const u32* tables = table + k * chunks * TABLE, * dt_image = dt_blocks + (long long)path * chunks * ALIGN4(DT_BLOCK);
    const float* bc_image = bc_blocks + (long long)path * chunks * BC_BLOCK, * rates = a + (long long)k * N * E + channel;
#if EXACT
    const float* w = (const float*)weight + ((long long)k * E + channel) * R;
    float offset = bias[k * E + channel];
#else
    const uint4* w = (const uint4*)weight + ((long long)k * tiles + tile) * W_BLOCK + lane;
    float offset[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) offset[i] = LOG2E * bias[k * E + min(tile * 32 + 8 * i + lane / 4, E - 1)];
#endif
    for (int n = 0; n < N; n++) carried[n * 32] = 0.f;
    stage_table(near, tables, high - 1);
    if (high - low > 1) stage_table(near, tables, high - 2);
    stage(staged + (high - 1) % 2 * STAGE, dt_image, bc_image, high - 1);
    copies_issued();
    copies_done<0>();
    __syncthreads();
    fetch(gs + (high - 1) % 2 * T * 32, g_image, fetched, near + (high - 1) % TABLES * TABLE, lane);
    copies_issued();
    float passed = 0.f;
    for (int chunk = high - 1; chunk >= low; chunk--) {
        copies_done<0>();
        __syncthreads();
        const u32* dt = staged + chunk % 2 * STAGE;
        const float* bc = (const float*)(dt + ALIGN4(DT_BLOCK));
        if (chunk > low) {
            fetch(gs + (chunk - 1) % 2 * T * 32, g_image, fetched, near + (chunk - 1) % TABLES * TABLE, lane);
            stage(staged + (chunk - 1) % 2 * STAGE, dt_image, bc_image, chunk - 1);
            if (chunk > low + 1) stage_table(near, tables, chunk - 2);
        }
        copies_issued();
        float d[T], g[T];
        step_sizes<32>(d, dt, w, offset, room, lane);
        #pragma unroll
        for (int t = 0; t < T; t++) {
            g[t] = widen(gs[chunk % 2 * T * 32 + t * 32 + lane]);
            passed += d[t];
        }
        #pragma unroll 4
        for (int n = 0; n < N; n++) {
            float rate = rates[n * E], back = carried[n * 32];
            #pragma unroll
            for (int t = T - 4; t >= 0; t -= 4) {
                float c[4];
                four(c, bc + (n * 2 + 1) * T + t);
                #pragma unroll
                for (int i = 3; i >= 0; i--) back = fmaf(c[i], g[t + i], back) * ex2(d[t + i] * rate);
            }
            carried[n * 32] = back;
        }
    }
    float* to = returned + (((long long)path * tiles + tile) * segments + segment) * 2 * N * 32 + lane;
    if (fetched < tiles)
        for (int n = 0; n < N; n++) {
            to[n * 32] = carried[n * 32];
            to[(N + n) * 32] = ex2(passed * rates[n * E]);
        }
}
