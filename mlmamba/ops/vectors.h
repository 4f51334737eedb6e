// What decoding.cpp and products.h share: vectors of floats as wide as the processor's.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();

// The same number of floats, or fewer at the end of a row; what is missing is 0.
inline Vec load(const float* p, int64_t count) { return count >= W ? Vec::loadu(p) : Vec::loadu(p, count); }
inline void store(Vec v, float* p, int64_t count) { count >= W ? v.store(p) : v.store(p, count); }
inline float total(Vec v) { return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, v); }
inline Vec silu(Vec v) { return v / (Vec(1.f) + v.neg().exp()); }

template <typename T>
void widen(const T* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

template <typename T>
void narrow(const float* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

inline bool is_known(const Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16; }

}  // namespace
