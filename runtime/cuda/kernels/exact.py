"""Arithmetic whose every operation is rounded, as NumPy's is.

Otherwise CUDA's compiler makes one operation of a product and a sum, and the last bit is another.
"""

EXACT = r"""
__device__ inline float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ inline double mul_rn(double a, double b) { return __dmul_rn(a, b); }

template <class A> struct exact {
  A v;
  exact() = default;
  __device__ exact(A v) : v(v) {}
  __device__ exact operator-() const { return -v; }
  friend __device__ exact operator+(exact a, exact b) { return add_rn(a.v, b.v); }
  friend __device__ exact operator-(exact a, exact b) { return add_rn(a.v, -b.v); }
  friend __device__ exact operator*(exact a, exact b) { return mul_rn(a.v, b.v); }
  friend __device__ exact operator/(exact a, exact b) { return a.v / b.v; }
};
__device__ inline exact<float> root(exact<float> x) { return sqrtf(x.v); }
__device__ inline exact<double> root(exact<double> x) { return sqrt(x.v); }
"""
