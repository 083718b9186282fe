// The forward pass where every path has a partner that is its reverse, for one state a channel and bfloat16 inputs.
// A block has K warps, one a path, over the same 32 channels of an image. The two warps of a pair meet in the middle:
//   first, each walks the first half of its path and keeps the state at the start of every chunk;
//   then, each goes on over the second half, whose tokens are those of the other path's first half. There it also
//   computes the other path's chunk from the kept state, and has the sum of both.
// Only a path's own warp has its W. In the second half, it computes the step sizes of two chunks of its path, and gives
// those of one to the other warp through shared memory.
// With one pair, the sum is the output. With two, the pair that comes to a token first leaves its sum in y [L, 32], a
// scratch of the block, and the other one adds its own and writes the output. Because a + b = b + a, the output has the
// same bits whichever comes first. Which does is known: second halves go in steps of a chunk, and in the same step, the
// first pair comes first. The pairs take turns.
//
// PAIRS has four bits a warp: the path that the warp walks. `length` is a multiple of 2 · T, 4 · T or more; E is one of
// 32. States at the start of chunks: with KEEP, `starts` [B, K, tiles, chunks, 32], all of them, for the backward pass;
// else a scratch [blocks, K, chunks / 2, 32].

#define PATH(warp) (PAIRS >> 4 * (warp) & 15)
#define DT_WORDS ALIGN4(DT_BLOCK)
#define TABLES 4                    // chunks whose table is at hand, of which three are needed
#define W_HERE (KS <= 2)            // W is in registers
#define WARP_WORDS (TABLES * TABLE + 2 * (DT_WORDS + BC_BLOCK) + X_BLOCK + 2 * 32 * ROW + (W_HERE ? 0 : W_BLOCK * 4))

// A barrier of two pairs: one waits for the other, which only says that it has come. Barrier 0 is __syncthreads, 1 and
// 2 are those of pairs, and 3 + warp, of two warps, says that the step sizes for that warp are there.
__device__ __forceinline__ void await_pair(int one) { asm volatile("bar.sync %0, 128;" :: "r"(one) : "memory"); }
__device__ __forceinline__ void release_pair(int one) { asm volatile("bar.arrive %0, 128;" :: "r"(one) : "memory"); }

// As `load_if` and `store_if`, for four floats, which stay as they are where nothing is loaded.
__device__ __forceinline__ void load4_into(float4& to, u32 condition, const float* at) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %4, 0; @p ld.global.v4.f32 {%0, %1, %2, %3}, [%5]; }"
                 : "+f"(to.x), "+f"(to.y), "+f"(to.z), "+f"(to.w) : "r"(condition), "l"(at) : "memory");
}
__device__ __forceinline__ void store4_if(u32 condition, float* at, float4 v) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v4.f32 [%1], {%2, %3, %4, %5}; }"
                 :: "r"(condition), "l"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void narrow4_if(u32 condition, u16* at, float4 v) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v2.u32 [%1], {%2, %3}; }"
                 :: "r"(condition), "l"(at), "r"(pack(v.x, v.y)), "r"(pack(v.z, v.w)) : "memory");
}

// As `copy`, from and to the lane's first four words.
template <int words> __device__ __forceinline__ void copy_by_lane(u32* to, const u32* from, int lane) {
    #pragma unroll
    for (int i = 0; i < words; i += 128)
        if (i + 128 <= words || lane < (words - i) / 4) copy16(to + i, from + i);
}

// Where row r of W's fragments, of eight, has its channel: four rows that store at once then meet no bank twice.
__device__ __forceinline__ int spread(int row) { return 2 * (row % 4) + row / 4; }

// The step sizes (in ln 2) of COUNT chunks of the warp's path, from staged dt, each into a room of [32 channels, ROW].
// Fragments of W, whose rows are `spread`, lie STRIDE apart.
template <int COUNT, int STRIDE>
__device__ __forceinline__ void sizes(
    float* const* rooms, const u32* const* dt, const uint4* weight, const float* bias, int lane) {
    int row = lane / 4, column = lane % 4;
    float v[COUNT][2][2][4];        // [chunk][steps 0-7, 8-15][channels 0-15, 16-31]
    #pragma unroll
    for (int i = 0; i < COUNT * 2; i++)
        #pragma unroll
        for (int m = 0; m < 2; m++) {
            v[i / 2][i % 2][m][0] = v[i / 2][i % 2][m][1] = bias[2 * m];
            v[i / 2][i % 2][m][2] = v[i / 2][i % 2][m][3] = bias[2 * m + 1];
        }
    #pragma unroll
    for (int j = 0; j < KS; j++)
        #pragma unroll
        for (int m = 0; m < 2; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 w = weight[((j * 2 + m) * 2 + half) * STRIDE];
                #pragma unroll
                for (int i = 0; i < COUNT * 2; i++) {
                    const u32* at = dt[i / 2] + (8 * (i % 2) + row) * DTW + 8 * j + column;
                    mma(v[i / 2][i % 2][m], w, at[0], at[4]);
                }
            }
    #pragma unroll
    for (int i = 0; i < COUNT * 2; i++)
        #pragma unroll
        for (int m = 0; m < 2; m++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const float* two = v[i / 2][i % 2][m] + 2 * half;
                *(float2*)(rooms[i / 2] + (16 * m + 8 * half + spread(row)) * ROW + 8 * (i % 2) + 2 * column)
                    = {softplus2(two[0]), softplus2(two[1])};
            }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(32 * K, BLOCKS_AN_SM) scan_forward_pairs(
    const value* __restrict__ x, const u32* __restrict__ dt_blocks, const u32* __restrict__ bc_blocks,
    const uint4* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ a,
    const float* __restrict__ skip, const u32* __restrict__ table, float* scratch, value* __restrict__ out,
    float* starts, int length, int chunks, int batch, int items) {
    extern __shared__ u32 memory[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = warp / 2, tiles = E / 32, middle = chunks / 2;
    int mine = PATH(warp), theirs = PATH(warp ^ 1);         // the warp's path, and the reversed one
    u32* entries = memory + warp * WARP_WORDS;
    u32* dt_here = entries + TABLES * TABLE, * dt_back = dt_here + DT_WORDS;
    u32* bc_mine = dt_back + DT_WORDS, * bc_theirs = bc_mine + BC_BLOCK;
    value* x_here = (value*)(bc_theirs + BC_BLOCK);
    float* room = (float*)(x_here + T * 32);                // step sizes of the warp's path, then outputs,
    float* given = room + 32 * ROW;                         // step sizes of the other path, from the other warp,
    float* gift = given + ((warp ^ 1) - warp) * WARP_WORDS; // and where the other warp awaits its own
#if W_HERE
    uint4 w[KS * 4];
#else
    uint4* w = (uint4*)(given + 32 * ROW) + lane;
#endif
    int begin = (int)((long long)blockIdx.x * items / gridDim.x);
    int end = (int)((long long)(blockIdx.x + 1) * items / gridDim.x);
    if (begin == end) return;

    // Outputs go through shared memory, so that a lane has four channels of a token: of the tokens 4 i + row.
    int row = lane / 8, quad = lane % 8 * 4;
    float* y = opaque(scratch + (long long)blockIdx.x * length * 32 + quad);
    const u32* my_table = opaque(table + mine * chunks * TABLE + lane * 4);
    int image = begin % batch, tile = begin / batch, loaded = -1;
    u32 count = 0;                  // chunks so far: this one's table is number count % TABLES
    const value* x_from;            // of the image whose chunks are fetched, where the lane's copies begin
    const u32* dt_from, * bc_from;
    auto choose = [&]() {
        long long block = ((long long)image * K + mine) * chunks;
        x_from = opaque(x + (long long)image * length * E + tile * 32 + lane % 4 * 8);
        dt_from = opaque(dt_blocks + block * DT_WORDS + lane * 4);
        bc_from = opaque(bc_blocks + block * BC_BLOCK + lane * 4);
    };
    // x of a chunk, and the table of the chunk `after` it.
    auto fetch_x = [&](u32 number, u32 after) {
        const u32* tokens = entries + number % TABLES * TABLE + lane / 4;
        u32 one = tokens[0], other = tokens[8];
        copy16(x_here + lane * 8, x_from + (size_t)one * E);
        copy16(x_here + (32 + lane) * 8, x_from + (size_t)other * E);
        copy_by_lane<TABLE>(entries + (number + 1) % TABLES * TABLE + lane * 4, my_table + after * TABLE, lane);
        copies_issued();
    };
    // Its dt; in the second half, also that of the chunk that the other warp is to compute.
    auto fetch_dt = [&](int chunk) {
        copy_by_lane<DT_WORDS>(dt_here + lane * 4, dt_from + chunk * DT_WORDS, lane);
        int other = chunks - 1 - chunk;
        if (chunk >= middle) copy_by_lane<DT_WORDS>(dt_back + lane * 4, dt_from + other * DT_WORDS, lane);
        copies_issued();
    };
    // Its b and c; in the second half, also those of the other path.
    auto fetch_rest = [&](int chunk) {
        copy_by_lane<BC_BLOCK>(bc_mine + lane * 4, bc_from + (u32)(chunk * BC_BLOCK), lane);
        if (chunk >= middle) {
            int other = (theirs - mine) * chunks + chunks - 1 - chunk;
            copy_by_lane<BC_BLOCK>(bc_theirs + lane * 4, bc_from + other * BC_BLOCK, lane);
        }
        copies_issued();
    };
    choose();
    copy_by_lane<TABLE>(entries + lane * 4, my_table, lane);
    copies_issued();
    copies_done<0>();
    fetch_x(0, 1);
    fetch_dt(0);
    fetch_rest(0);
#if K > 2
    if (pair == 1) release_pair(1);         // the first pair may begin
#endif
    float offset[4], rate_mine = 0.f, rate_theirs = 0.f, jump = 0.f;

    for (int item = begin; item < end; item++) {
        if (tile != loaded) {
            loaded = tile;
            int channel = spread(lane / 4);
            const uint4* from = weight + ((long long)mine * tiles + tile) * W_BLOCK + channel * 4 + lane % 4;
            #pragma unroll
            for (int i = 0; i < KS * 4; i++) w[i * (W_HERE ? 1 : 32)] = from[i * 32];
            #pragma unroll
            for (int i = 0; i < 4; i++) offset[i] = LOG2E * bias[mine * E + tile * 32 + 8 * i + channel];
            rate_mine = a[mine * E + tile * 32 + lane];
            rate_theirs = a[theirs * E + tile * 32 + lane];
            jump = skip[mine * E + tile * 32 + lane] + skip[theirs * E + tile * 32 + lane];
        }
#if KEEP
        long long states = ((long long)image * K * tiles + tile) * chunks * 32 + lane;
        int stride = tiles * chunks * 32;
#else
        long long states = (long long)blockIdx.x * K * middle * 32 + lane;
        int stride = middle * 32;
#endif
        float* kept_mine = opaque(starts + states + mine * stride);
        const float* kept_theirs = opaque(starts + states + theirs * stride);
        value* to = opaque(out + (long long)image * length * E + tile * 32 + quad);
        float h = 0.f;

#if W_HERE
        uint4* w_now = w;
#else
        uint4 w_now[KS * 4];
        #pragma unroll
        for (int i = 0; i < KS * 4; i++) w_now[i] = w[i * 32];
#endif
        #pragma unroll 1
        for (int chunk = 0; chunk < middle; chunk++, count++) {
            float u[T], d[T];
            copies_done<1>();           // x and dt
            #pragma unroll
            for (int t = 0; t < T; t++) u[t] = widen(x_here[t * 32 + lane]);
            __syncwarp();
            fetch_x(count + 1, chunk + 2);
            sizes<1, 1>(&room, (const u32**)&dt_here, w_now, offset, lane);
            fetch_dt(chunk + 1);
            #pragma unroll
            for (int t = 0; t < T; t += 4) four(d + t, room + lane * ROW + t);
            copies_done<2>();           // b
            store_if(1, kept_mine + (u32)(chunk * 32), h);
            #pragma unroll
            for (int t = 0; t < T; t += 4) {
                float b[4];
                four(b, (const float*)bc_mine + t);
                #pragma unroll
                for (int s = 0; s < 4; s++) h = fmaf(ex2(d[t + s] * rate_mine), h, u[t + s] * d[t + s] * b[s]);
            }
            __syncwarp();
            fetch_rest(chunk + 1);
        }
        __syncthreads();                // the other warp's states are there

        #pragma unroll 1
        for (int chunk = middle; chunk < chunks; chunk++, count++) {
            float x_[T], o[T], d[T];
            float h_theirs = load_if(1, kept_theirs + (u32)((chunks - 1 - chunk) * 32));
            copies_done<1>();           // x and dt
            #pragma unroll
            for (int t = 0; t < T; t++) x_[t] = widen(x_here[t * 32 + lane]);
            __syncwarp();
            int coming = chunk + 1;
            if (coming == chunks) {     // the next item's first; after the last item, one that nobody reads
                coming = 0;
                if (item + 1 < end) {
                    if (++image == batch) {
                        image = 0;
                        tile++;
                    }
                    choose();
                }
            }
            fetch_x(count + 1, coming + 1 == chunks ? 0 : coming + 1);
            float* rooms[2] = {room, gift};
            const u32* dts[2] = {dt_here, dt_back};
            sizes<2, W_HERE ? 1 : 32>(rooms, dts, w, offset, lane);
            release_other(3 + (warp ^ 1));
            fetch_dt(coming);
            #pragma unroll
            for (int t = 0; t < T; t += 4) four(d + t, room + lane * ROW + t);
            copies_done<2>();           // b and c of both
#if KEEP
            store_if(1, kept_mine + (u32)(chunk * 32), h);
#endif
            #pragma unroll
            for (int t = 0; t < T; t += 4) {
                float b[4], c[4];
                four(b, (const float*)bc_mine + t);
                four(c, (const float*)bc_mine + T + t);
                #pragma unroll
                for (int s = 0; s < 4; s++) {
                    h = fmaf(ex2(d[t + s] * rate_mine), h, x_[t + s] * d[t + s] * b[s]);
                    o[t + s] = fmaf(c[s], h, jump * x_[t + s]);
                }
            }
            await_other(3 + warp);      // the other warp has left its path's step sizes in `given`
            #pragma unroll
            for (int t = 0; t < T; t += 4) four(d + t, given + lane * ROW + t);
            const u32* tokens = entries + count % TABLES * TABLE;
            u32 token[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) token[i] = tokens[4 * i + row];
#if K > 2
            // What the other pair has left, but for the tokens where it may not have finished: needed at the end.
            u32 flags = tokens[T + 2], late = flags >> 16;
            flags >>= row;
            float4 sums[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[i] = {0.f, 0.f, 0.f, 0.f};
                load4_into(sums[i], ~(flags | flags >> 16) & 1u << 4 * i, y + (size_t)token[i] * 32);
            }
#endif
            #pragma unroll
            for (int t = 0; t < T; t += 4) {
                float b[4], c[4];
                four(b, (const float*)bc_theirs + t);
                four(c, (const float*)bc_theirs + T + t);
                #pragma unroll
                for (int s = 0; s < 4; s++) {
                    int back = T - 1 - t - s;
                    h_theirs = fmaf(ex2(d[t + s] * rate_theirs), h_theirs, x_[back] * d[t + s] * b[s]);
                    o[back] = fmaf(c[s], h_theirs, o[back]);
                }
            }
            #pragma unroll
            for (int t = 0; t < T; t++) room[t * 32 + lane] = o[t];
            __syncwarp();
            fetch_rest(coming);
            float4 v[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) v[i] = *(const float4*)(room + (4 * i + row) * 32 + quad);
#if K > 2
            await_pair(1 + pair);       // both warps of the pair have come, so that `given` may change
            if (late) {
                #pragma unroll
                for (int i = 0; i < 4; i++) load4_into(sums[i], flags >> 16 & 1u << 4 * i, y + (size_t)token[i] * 32);
            }
            #pragma unroll
            for (int i = 0; i < 4; i++) store4_if(flags & 1u << 4 * i, y + (size_t)token[i] * 32, v[i]);
            if (pair == 0 || item + 1 < end || chunk + 1 < chunks) {
                __threadfence_block();
                release_pair(2 - pair);
            }
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float4 sum = {v[i].x + sums[i].x, v[i].y + sums[i].y, v[i].z + sums[i].z, v[i].w + sums[i].w};
                narrow4_if(~flags & 1u << 4 * i, to + (size_t)token[i] * E, sum);
            }
#else
            __syncthreads();            // `given` may change
            #pragma unroll
            for (int i = 0; i < 4; i++) narrow4_if(1, to + (size_t)token[i] * E, v[i]);
#endif
        }
    }
    copies_done<0>();
}
