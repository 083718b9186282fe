// Puts what the scans read along their paths into the order and the shape in which they read it. Sizes of K·L·(R + 2N).

// Grid (K · chunks, B), any block.
// dt, b, c: [B, L, K, R or N] with strides; order, inverse: [K, L].
// table u32 [K, chunks, TABLE]; dt_blocks [B, K, chunks, DT_BLOCK], bc_blocks [B, K, chunks, BC_BLOCK].
// Where PAIRS names the paths of two pairs, word T + 2 of a chunk's table is for scan_forward_pairs.cu, a bit a token.
// In the low half: the path's pair comes to it first. In the high half: the other pair comes first, but may still be
// there when this pair starts its step.
extern "C" __global__ void prepare_tokens(
    const value* dt, const value* b, const value* c, const long long* order, const long long* inverse,
    u32* table, u32* dt_blocks, float* bc_blocks,
    long long dt_b, long long dt_l, long long dt_k, long long b_b, long long b_l, long long b_k,
    long long c_b, long long c_l, long long c_k, int length, int chunks) {
    int k = blockIdx.x / chunks, chunk = blockIdx.x % chunks, image = blockIdx.y;
    long long at = ((long long)image * K + k) * chunks + chunk;
    const long long* tokens = order + (long long)k * length + chunk * T;
    int steps = min(T, length - chunk * T);
    if (image == 0 && threadIdx.x < 32) {
        u32 flags[3] = {0u, 0u, 0u};
        int t = threadIdx.x;
        long long token = t < steps ? tokens[t] : 0;
        if (t < steps) {
            flags[0] = FIRST(t) | LAST(t);
            for (int other = 0; other < K; other++) {
                if (other == k) continue;
                int theirs = (int)(inverse[(long long)other * length + token] / T);
                bool before = theirs < chunk || (theirs == chunk && other < k);
                flags[0] &= before ? ~FIRST(t) : ~LAST(t);
                if (before && (theirs == chunk || (theirs == chunk - 1 && other > k))) flags[1] |= LATE(t);
            }
#ifdef PAIRS
            int pair = (PAIRS & 15) != k && (PAIRS >> 4 & 15) != k, other = PAIRS >> (pair ? 0 : 8) & 15;
            int theirs = (int)(inverse[(long long)other * length + token] / T) - chunks / 2, step = chunk - chunks / 2;
            if (theirs < 0) theirs = -1 - theirs;           // steps go from the middle, both ways
            if (step < 0) step = -1 - step;
            bool before = theirs < step || (theirs == step && pair);
            if (!before) flags[2] |= 1u << t;
            else if (theirs == step || (theirs == step - 1 && !pair)) flags[2] |= 0x10000u << t;
#endif
        } else if (t < T) flags[1] = PAD(t);
        u32* row = table + (k * chunks + chunk) * TABLE;
        if (t < T) row[t] = (u32)token;
        for (int i = 0; i < 3; i++) {
            for (int lanes = 16; lanes; lanes /= 2) flags[i] |= __shfl_xor_sync(~0u, flags[i], lanes);
            if (t == i) row[T + i] = flags[i];
        }
        if (t == 0) row[T + 3] = 0;
    }
    u32* dt_block = dt_blocks + at * ALIGN4(DT_BLOCK);
    const value* row = dt + image * dt_b + k * dt_k;
    for (int i = threadIdx.x; i < DT_BLOCK; i += blockDim.x) {
#if EXACT
        int step = i / R, j = i % R;
        dt_block[i] = step < steps ? __float_as_uint(row[tokens[step] * dt_l + j]) : 0u;
#else
        int step = i / DTW, j = 2 * (i % DTW);
        u32 word = 0;
        if (step < steps && j < R) word = row[tokens[step] * dt_l + j];
        if (step < steps && j + 1 < R) word |= (u32)row[tokens[step] * dt_l + j + 1] << 16;
        dt_block[i] = word;
#endif
    }
    float* bc_block = bc_blocks + at * BC_BLOCK;
    for (int i = threadIdx.x; i < BC_BLOCK; i += blockDim.x) {
        int step = i % T, n = i / T % N, is_c = i / (N * T);
        float v = 0.f;
        if (step < steps)
            v = is_c ? widen(c[image * c_b + tokens[step] * c_l + k * c_k + n])
                     : LN2 * widen(b[image * b_b + tokens[step] * b_l + k * b_k + n]);
        bc_block[(n * 2 + is_c) * T + step] = v;
    }
}

// Grid (K, tiles of 32 channels). weight float32 [K, E, R] -> fragments uint4 [K, tiles, W_BLOCK], of its two
// bfloat16 parts; transposed: fragments of Wᵀ, rows j, columns channels, [K, tiles, 2 k-steps, KS halves of R, 2, 32].
extern "C" __global__ void prepare_weights(const float* weight, uint4* fragments, uint4* transposed) {
    int k = blockIdx.x, tile = blockIdx.y;
    const float* rows = weight + (long long)k * E * R;
    long long at = ((long long)k * gridDim.y + tile) * W_BLOCK;
    for (int i = threadIdx.x; i < W_BLOCK; i += blockDim.x) {
        int lane = i % 32, part = i / 32 % 2, m = i / 64 % 2, j = i / 128;
        int row = lane / 4, column = 2 * (lane % 4);
        u32 words[4], turned[4];
        for (int word = 0; word < 4; word++) {
            float v[2], w[2];
            for (int s = 0; s < 2; s++) {
                int low = row + 8 * (word % 2), high = column + 8 * (word / 2) + s;
                int channel = tile * 32 + 16 * m + low, rank = 16 * j + high;
                v[s] = channel < E && rank < R ? LOG2E * rows[(long long)channel * R + rank] : 0.f;
                channel = tile * 32 + 16 * m + high, rank = 16 * j + low;
                w[s] = channel < E && rank < R ? LOG2E * rows[(long long)channel * R + rank] : 0.f;
            }
            words[word] = pack(v[0], v[1]);
            turned[word] = pack(w[0], w[1]);
            if (part) {
                words[word] = pack(v[0] - widen((u16)words[word]), v[1] - widen((u16)(words[word] >> 16)));
                turned[word] = pack(w[0] - widen((u16)turned[word]), w[1] - widen((u16)(turned[word] >> 16)));
            }
        }
        fragments[at + i] = make_uint4(words[0], words[1], words[2], words[3]);
        if (transposed) transposed[at + i] = make_uint4(turned[0], turned[1], turned[2], turned[3]);
    }
}
