// How often a multiprocessor starts a product of its matrix units: WARPS warps, each with CHAINS sums that do not
// depend on each other, LOOPS times. KIND is the place in `product_rate.KINDS`.
#if KIND == 0
#define PRODUCT "m16n8k8.row.col.f32.tf32.tf32.f32"
#define WIDE 1
#elif KIND == 1
#define PRODUCT "m16n8k4.row.col.f32.tf32.tf32.f32"
#define WIDE 0
#elif KIND == 2
#define PRODUCT "m16n8k16.row.col.f32.bf16.bf16.f32"
#define WIDE 1
#else
#define PRODUCT "m16n8k8.row.col.f32.bf16.bf16.f32"
#define WIDE 0
#endif

__device__ __forceinline__ void product(float (&sum)[4], unsigned a, unsigned b) {
#if WIDE
    asm volatile("mma.sync.aligned." PRODUCT " {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%5, %5}, {%0, %1, %2, %3};"
#else
    asm volatile("mma.sync.aligned." PRODUCT " {%0, %1, %2, %3}, {%4, %4}, {%5}, {%0, %1, %2, %3};"
#endif
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a), "r"(b));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) product_rate(long long *times, float *sums) {
    float sum[CHAINS][4] = {};
    const unsigned a = threadIdx.x, b = threadIdx.x + 1;  // tiny numbers in every format
    __syncthreads();
    const long long start = clock64();
#pragma unroll 1
    for (int loop = 0; loop < LOOPS; loop++) {
#pragma unroll
        for (int chain = 0; chain < CHAINS; chain++) product(sum[chain], a, b);
    }
    const long long end = clock64();
    if (threadIdx.x % 32 == 0) {
        long long *own = times + 2 * (blockIdx.x * WARPS + threadIdx.x / 32);
        own[0] = start, own[1] = end;
    }
    float total = 0;
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++) total += sum[chain][0] + sum[chain][1] + sum[chain][2] + sum[chain][3];
    sums[blockIdx.x * blockDim.x + threadIdx.x] = total;  // so that the products are not left out
}
