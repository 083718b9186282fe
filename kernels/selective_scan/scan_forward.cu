// The forward pass: a block has K warps, one a path, over the same 32 channels of an image. Each walks its path with the
// states in registers (in shared memory where N > 4), and adds its outputs to y [L, 32], a scratch of the block that the
// L2 cache may hold. Blocks stay for several images: the weights are loaded once.
// With KEEP 1, the states at the start of every chunk are left in `starts` [B, K, tiles, chunks, N, 32]; with KEEP 2, of
// every `every`th chunk, [B, K, tiles, segments, N, 32].

#define STAGE (ALIGN4(DT_BLOCK) + BC_BLOCK + X_BLOCK)
#define TABLES 3                    // chunks whose table is at hand: this one's, the next one's, and the one under way
#define STATES_HERE (N <= 4)        // the states are in registers
#define W_SHARED (!EXACT && !W_REGISTERS)
#define WARP_WORDS (TABLES * TABLE + STAGE + 32 * ROW + (STATES_HERE ? 0 : N * 64) + (W_SHARED ? W_BLOCK * 4 : 0))

extern "C" __global__ void __launch_bounds__(32 * K, BLOCKS_AN_SM) scan_forward(
    const value* __restrict__ x, const u32* __restrict__ dt_blocks, const float* __restrict__ bc_blocks,
    const void* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ a,
    const float* __restrict__ skip, const u32* __restrict__ table, float* scratch, value* __restrict__ out,
    float* __restrict__ starts, int length, int chunks, int batch, int items, int every) {
    extern __shared__ u32 memory[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k = warp, tiles = (E + 31) / 32;
    u32* entries = memory + warp * WARP_WORDS;
    u32* dt_here = entries + TABLES * TABLE;
    float* bc = (float*)(dt_here + ALIGN4(DT_BLOCK));
    value* x_here = (value*)(bc + BC_BLOCK);
    float* room = (float*)(dt_here + STAGE);
#if !STATES_HERE
    float* kept = room + 32 * ROW + lane, * rates = kept + N * 32;
#endif
    float* y = opaque(scratch + (long long)blockIdx.x * length * 32 + lane);
    table += k * chunks * TABLE;
    int begin = (int)((long long)blockIdx.x * items / gridDim.x);
    int end = (int)((long long)(blockIdx.x + 1) * items / gridDim.x);
    if (begin == end) return;

    int image = begin % batch, tile = begin / batch, loaded = -1;
    bool live = tile * 32 + lane < E;
    int channel = min(tile * 32 + lane, E - 1);
    long long block = ((long long)image * K + k) * chunks;
    int slot = 0;                   // of this chunk's table
    if (lane < 10) copy16(entries + lane * 4, table + (lane < 5 || chunks > 1 ? lane : lane - 5) * 4);
    copies_issued();
    copies_done<0>();
    const value* source = opaque(x + (long long)image * length * E);
    fetch(x_here, source, tile, entries, lane);
    copy<ALIGN4(DT_BLOCK)>(dt_here, dt_blocks + block * ALIGN4(DT_BLOCK), lane);
    copies_issued();
    copy<BC_BLOCK>(bc, bc_blocks + block * BC_BLOCK, lane);
    copies_issued();
#if EXACT
    const float* w = 0;
    float offset = 0.f;
#else
    float offset[4];
#if W_REGISTERS
    uint4 w[KS * 4];
#else
    uint4* w = (uint4*)(dt_here + STAGE + 32 * ROW + (STATES_HERE ? 0 : N * 64)) + lane;
#endif
#endif
    float decay[STATES_HERE ? N : 1], h[STATES_HERE ? N : 1], jump = 0.f;

    for (int item = begin; item < end; item++) {
        if (tile != loaded) {
            loaded = tile;
            jump = skip[k * E + channel];
#if STATES_HERE
            #pragma unroll
            for (int n = 0; n < N; n++) decay[n] = a[((long long)k * E + channel) * N + n];
#else
            for (int n = 0; n < N; n++) rates[n * 32] = a[((long long)k * E + channel) * N + n];
#endif
#if EXACT
            w = (const float*)weight + ((long long)k * E + channel) * R;
            offset = bias[k * E + channel];
#else
            const uint4* from = (const uint4*)weight + ((long long)k * tiles + tile) * W_BLOCK + lane;
            #pragma unroll
            for (int i = 0; i < KS * 4; i++) {
#if W_REGISTERS
                w[i] = from[i * 32];
#else
                w[i * 32] = from[i * 32];
#endif
            }
            #pragma unroll
            for (int i = 0; i < 4; i++) offset[i] = LOG2E * bias[k * E + min(tile * 32 + 8 * i + lane / 4, E - 1)];
#endif
        }
#if STATES_HERE
        #pragma unroll
        for (int n = 0; n < N; n++) h[n] = 0.f;
#else
        for (int n = 0; n < N; n++) kept[n * 32] = 0.f;
#endif
#if KEEP == 1
        float* start = starts + (((long long)image * K + k) * tiles + tile) * chunks * N * 32 + lane;
#elif KEEP == 2
        float* start = starts + (((long long)image * K + k) * tiles + tile) * ((chunks + every - 1) / every) * N * 32 + lane;
        int until = 0;              // so many chunks to the next start of a segment
#endif
        int this_image = image, this_channel = channel;
        bool this_live = live;
        for (int chunk = 0; chunk < chunks; chunk++) {
            float u[T], d[T], out_here[T], sums[T];
            // What other paths have added so far, but for the tokens where they may not have finished: needed at the end.
            const u32* tokens = entries + slot * TABLE;
            u32 visits = tokens[T], exceptions = tokens[T + 1], later = visits | exceptions | exceptions >> 16;
            #pragma unroll
            for (int t = 0; t < T; t += 4) {
                u32 token[4];
                four(token, tokens + t);
                #pragma unroll
                for (int s = 0; s < 4; s++) {
                    sums[t + s] = load_if(~later & (1u << (t + s)), y + (size_t)token[s] * 32);
                }
            }
            copies_done<1>();           // x and dt
            #pragma unroll
            for (int t = 0; t < T; t++) u[t] = widen(x_here[t * 32 + lane]);
            step_sizes<W_REGISTERS ? 1 : 32>(d, dt_here, w, offset, room, lane);
            // Start on the next chunk, which may be the next item's first.
            bool more = chunk + 1 < chunks || item + 1 < end;
            int coming = chunk + 1, next_slot = slot + 1 == TABLES ? 0 : slot + 1;
            if (coming == chunks) {
                coming = 0;
                if (++image == batch) {
                    image = 0;
                    tile++;
                    live = tile * 32 + lane < E;
                    channel = min(tile * 32 + lane, E - 1);
                }
                source = opaque(x + (long long)image * length * E);
            }
            block = ((long long)image * K + k) * chunks + coming;
            __syncwarp();
            if (more) {
                fetch(x_here, source, tile, entries + next_slot * TABLE, lane);
                copy<ALIGN4(DT_BLOCK)>(dt_here, dt_blocks + block * ALIGN4(DT_BLOCK), lane);
                int after = coming + 1 == chunks ? 0 : coming + 1, free_slot = next_slot + 1 == TABLES ? 0 : next_slot + 1;
                copy<TABLE>(entries + free_slot * TABLE, table + after * TABLE, lane);
            }
            copies_issued();
            #pragma unroll
            for (int t = 0; t < T; t++) {
                out_here[t] = jump * u[t];
                u[t] *= d[t];
            }
            copies_done<1>();           // b and c
#if STATES_HERE
            #pragma unroll
#else
            #pragma unroll 8
#endif
            for (int n = 0; n < N; n++) {
#if STATES_HERE
                float rate = decay[n], state = h[n];
#else
                float rate = rates[n * 32], state = kept[n * 32];
#endif
#if KEEP == 1
                start[(chunk * N + n) * 32] = state;
#elif KEEP == 2
                if (until == 0) start[n * 32] = state;
#endif
                #pragma unroll
                for (int t = 0; t < T; t += 4) {
                    float4 b = *(const float4*)(bc + n * 2 * T + t), c = *(const float4*)(bc + n * 2 * T + T + t);
                    state = fmaf(ex2(d[t] * rate), state, u[t] * b.x);
                    out_here[t] = fmaf(c.x, state, out_here[t]);
                    state = fmaf(ex2(d[t + 1] * rate), state, u[t + 1] * b.y);
                    out_here[t + 1] = fmaf(c.y, state, out_here[t + 1]);
                    state = fmaf(ex2(d[t + 2] * rate), state, u[t + 2] * b.z);
                    out_here[t + 2] = fmaf(c.z, state, out_here[t + 2]);
                    state = fmaf(ex2(d[t + 3] * rate), state, u[t + 3] * b.w);
                    out_here[t + 3] = fmaf(c.w, state, out_here[t + 3]);
                }
#if STATES_HERE
                h[n] = state;
#else
                kept[n * 32] = state;
#endif
            }
#if KEEP == 2
            if (until == 0) {
                start += N * 32;
                until = every;
            }
            until--;
#endif
            __syncwarp();
            if (more) copy<BC_BLOCK>(bc, bc_blocks + block * BC_BLOCK, lane);
            copies_issued();
            #pragma unroll
            for (int t = 0; t < T; t++) out_here[t] += sums[t];
            wait_turn(warp, item == begin && chunk == 0);
            if (exceptions & 0xffffu) {
                #pragma unroll
                for (int t = 0; t < T; t++)
                    if (exceptions & LATE(t)) out_here[t] += y[(size_t)tokens[t] * 32];
            }
            u32 elsewhere = (visits >> 16) | (exceptions >> 16);
            #pragma unroll
            for (int t = 0; t < T; t += 4) {
                u32 token[4];
                four(token, tokens + t);
                #pragma unroll
                for (int s = 0; s < 4; s++) store_if(~elsewhere & (1u << (t + s)), y + (size_t)token[s] * 32, out_here[t + s]);
            }
            pass_turn(warp, item + 1 == end && chunk + 1 == chunks);
            if (this_live && (visits & 0xffff0000u)) {
                value* to = opaque(out + (long long)this_image * length * E + this_channel);
                #pragma unroll
                for (int t = 0; t < T; t++) narrow_if(visits & LAST(t), out_here[t], to + (size_t)tokens[t] * E);
            }
            slot = next_slot;
        }
    }
}
