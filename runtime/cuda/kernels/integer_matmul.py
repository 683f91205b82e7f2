"""Products of integer matrices, which cuBLAS lacks: modulo the dtype's range, as NumPy's."""

from __future__ import annotations

from meshtape.runtime.cuda.source import source

TILE = 16
TYPES = {"bool": "bool", "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long",
         "uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned int",
         "uint64": "unsigned long long"}

# c (batches, m, n) = a (batches, m, k) b (batches, k, n), in C order; a stride of 0 repeats a matrix. Blocks
# of 16 x 16 threads go through the tiles of c. Sums modulo 2^64 have the right low bits for all types.
INTEGER_MATMUL = source("integer_matmul", r"""
#define TILE 16
extern "C" __global__ void integer_matmul(
        const T* a, const T* b, T* c, long long batches, long long m, long long n, long long k,
        long long stride_a, long long stride_b) {
    __shared__ T left[TILE][TILE + 1];
    __shared__ T right[TILE][TILE + 1];
    const int x = threadIdx.x, y = threadIdx.y;
    const long long across = (n + TILE - 1) / TILE, down = (m + TILE - 1) / TILE;
    for (long long tile = blockIdx.x; tile < batches * down * across; tile += gridDim.x) {
        const long long at = tile / across / down;
        const long long row = tile / across % down * TILE + y, col = tile % across * TILE + x;
        unsigned long long sum = 0;
        for (long long first = 0; first < k; first += TILE) {
            left[y][x] = row < m && first + x < k ? a[at * stride_a + row * k + first + x] : (T)0;
            right[y][x] = col < n && first + y < k ? b[at * stride_b + (first + y) * n + col] : (T)0;
            __syncthreads();
            for (int i = 0; i < TILE; i++)
                sum += (unsigned long long)left[y][i] * (unsigned long long)right[i][x];
            __syncthreads();
        }
        if (row < m && col < n) c[(at * m + row) * n + col] = (T)sum;
    }
}
""", ("integer_matmul",), tuple({"T": name} for name in TYPES.values()))
