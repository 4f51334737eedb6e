// Products of a model that only answers: inputs times the transposed of weights in float32, bfloat16 or int8.
//
// compiled.py builds this for the processor that it runs on; packed.py lays the weights out. Each number of a result is
// one sum, added up in an order that depends on nothing but the number of inputs: it has the same bits whatever rows
// stand beside its own, on however many threads. Shapes: m rows of k inputs, o outputs.

#pragma once

#include "vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MLMAMBA_VNNI
#endif

namespace {

constexpr int64_t PANEL = 64;              // outputs that lie side by side; packed.py has the same number
constexpr int64_t COLUMNS = 4;             // vectors of them that a tile takes
constexpr int64_t ROWS = W >= 16 ? 6 : 2;  // inputs that a tile takes: as many sums as there are registers for
constexpr int64_t BYTES = 1 << 18;         // of a piece of a panel, which stays in the second cache
constexpr int64_t SHARE = 16 * ROWS;       // rows of one piece of work

// Adds to sums (R, PANEL) what k inputs of R rows give: weights (k, PANEL).
template <int R>
void add_tile(const float* x, int64_t stride, const float* weight, int64_t k, float* sums) {
  for (int64_t first = 0; first < PANEL; first += COLUMNS * W) {
    Vec sum[R][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Vec::loadu(sums + r * PANEL + first + c * W);
    const float* w = weight + first;
    for (int64_t i = 0; i < k; ++i, w += PANEL) {
      Vec column[COLUMNS];
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) column[c] = Vec::loadu(w + c * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec input(x[r * stride + i]);
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = at::vec::fmadd(input, column[c], sum[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sum[r][c].store(sums + r * PANEL + first + c * W);
  }
}

// The same with bfloat16, two inputs at once: weights (k / 2, PANEL, 2).
template <int R>
void add_tile(const at::BFloat16* x, int64_t stride, const at::BFloat16* weight, int64_t k, float* sums) {
#if defined(__AVX512BF16__)
  __m512 sum[R][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) sum[r][c] = _mm512_loadu_ps(sums + r * PANEL + c * W);
  for (int64_t i = 0; i < k; i += 2, weight += 2 * PANEL) {
    __m512i column[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) column[c] = _mm512_loadu_si512(weight + 2 * c * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i pair = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x + r * stride + i));
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c)
        sum[r][c] = _mm512_dpbf16_ps(sum[r][c], (__m512bh)column[c], (__m512bh)pair);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) _mm512_storeu_ps(sums + r * PANEL + c * W, sum[r][c]);
#else
  float wide[2 * PANEL];
  for (int64_t i = 0; i < k; i += 2, weight += 2 * PANEL) {
    widen(weight, wide, 2 * PANEL);
    for (int r = 0; r < R; ++r) {
      const float one = static_cast<float>(x[r * stride + i]), two = static_cast<float>(x[r * stride + i + 1]);
      for (int64_t c = 0; c < PANEL; ++c)
        sums[r * PANEL + c] = std::fma(two, wide[2 * c + 1], std::fma(one, wide[2 * c], sums[r * PANEL + c]));
    }
  }
#endif
}

template <typename T>
void add_rows(const T* x, int64_t rows, int64_t stride, const T* weight, int64_t k, float* sums) {
  switch (rows) {
    case 1: return add_tile<1>(x, stride, weight, k, sums);
    case 2: return add_tile<2>(x, stride, weight, k, sums);
    case 3: return add_tile<std::min<int>(3, ROWS)>(x, stride, weight, k, sums);
    case 4: return add_tile<std::min<int>(4, ROWS)>(x, stride, weight, k, sums);
    case 5: return add_tile<std::min<int>(5, ROWS)>(x, stride, weight, k, sums);
    default: return add_tile<ROWS>(x, stride, weight, k, sums);
  }
}

// x (m, k) times the transposed of weights (o, k), which lie in panels (ceil(o / PANEL), k, PANEL) or, in bfloat16,
// (ceil(o / PANEL), k / 2, PANEL, 2): (m, o).
Tensor linear(const Tensor& x, const Tensor& panels, int64_t outs) {
  const int64_t m = x.size(0), k = x.size(1);
  TORCH_CHECK(is_known(x) && panels.scalar_type() == x.scalar_type(),
              "linear takes float32 or bfloat16 inputs and weights of one kind");
  TORCH_CHECK(x.is_contiguous() && panels.is_contiguous() && panels.numel() == panels.size(0) * k * PANEL &&
                  outs <= panels.size(0) * PANEL && outs > (panels.size(0) - 1) * PANEL &&
                  (x.scalar_type() == at::kFloat || k % 2 == 0),
              "linear: sizes do not go together");
  Tensor out = at::empty({m, outs}, x.options());
  const auto run = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const T *given = x.const_data_ptr<T>(), *weights = panels.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    constexpr int64_t piece = BYTES / (PANEL * sizeof(T));
    const int64_t shares = (m + SHARE - 1) / SHARE;
    at::parallel_for(0, panels.size(0) * shares, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(std::min(m, SHARE) * PANEL);
      for (int64_t job = begin; job < end; ++job) {
        const int64_t panel = job / shares, row = job % shares * SHARE, rows = std::min(SHARE, m - row);
        std::fill(sums.begin(), sums.end(), 0.f);
        for (int64_t i = 0; i < k; i += piece) {
          const T* weight = weights + (panel * k + i) * PANEL;
          for (int64_t r = 0; r < rows; r += ROWS) {
            const T* from = given + (row + r) * k + i;
            add_rows(from, std::min(ROWS, rows - r), k, weight, std::min(piece, k - i), sums.data() + r * PANEL);
          }
        }
        for (int64_t r = 0; r < rows; ++r)
          narrow(sums.data() + r * PANEL, result + (row + r) * outs + panel * PANEL,
                 std::min(PANEL, outs - panel * PANEL));
      }
    });
  };
  x.scalar_type() == at::kFloat ? run(static_cast<float*>(nullptr)) : run(static_cast<at::BFloat16*>(nullptr));
  return out;
}

constexpr int64_t STEP = 32;   // weights that an instruction takes; inputs are padded with zeros to a multiple of it
constexpr int64_t BLOCK = 16;  // rows of weights that all inputs meet while they are in the nearest cache

#ifdef MLMAMBA_VNNI
inline __m512i weights_at(const int8_t* weight, int64_t left) {
  const __mmask32 there = left >= STEP ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
  return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, weight));
}

// Sums of 16 vectors, one in each place.
inline __m512 sums_of(const __m512i* parts) {
  __m512 a[16], b[8], c[4];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_cvtepi32_ps(parts[i]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                                                   _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // each lane of four has the sums of four vectors now
    c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
  const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x44), _mm512_shuffle_f32x4(c[0], c[1], 0xee));
  const __m512 e = _mm512_add_ps(_mm512_shuffle_f32x4(c[2], c[3], 0x44), _mm512_shuffle_f32x4(c[2], c[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(d, e, 0x88), _mm512_shuffle_f32x4(d, e, 0xdd));
}

// 16 rows of weights (16, k) with one of inputs: (16,).
void products_of_one(const int8_t* weight, int64_t k, const int16_t* x, float* sums) {
  __m512i rows[16];
  for (int r = 0; r < 16; ++r, weight += k) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * STEP <= k; i += 4 * STEP) {
      a = _mm512_dpwssd_epi32(a, weights_at(weight + i, STEP), _mm512_loadu_si512(x + i));
      b = _mm512_dpwssd_epi32(b, weights_at(weight + i + STEP, STEP), _mm512_loadu_si512(x + i + STEP));
      c = _mm512_dpwssd_epi32(c, weights_at(weight + i + 2 * STEP, STEP), _mm512_loadu_si512(x + i + 2 * STEP));
      d = _mm512_dpwssd_epi32(d, weights_at(weight + i + 3 * STEP, STEP), _mm512_loadu_si512(x + i + 3 * STEP));
    }
    for (; i < k; i += STEP) a = _mm512_dpwssd_epi32(a, weights_at(weight + i, k - i), _mm512_loadu_si512(x + i));
    rows[r] = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
  }
  _mm512_storeu_ps(sums, sums_of(rows));
}

// 4 rows of weights (4, k) with 4 of inputs: (4 of weights, 4 of inputs). `ahead`: the weights of the next block are
// asked for meanwhile, which the processor does not foresee by itself where four rows are read in turns.
template <bool ahead>
void products_of_four(const int8_t* weight, int64_t k, const int16_t* x, int64_t padded, float* sums) {
  __m512i acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += STEP) {
    __m512i inputs[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) inputs[m] = _mm512_loadu_si512(x + m * padded + i);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if (ahead) _mm_prefetch(reinterpret_cast<const char*>(weight) + (BLOCK + r) * k + i, _MM_HINT_T1);
      const __m512i w = weights_at(weight + r * k + i, k - i);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) acc[4 * r + m] = _mm512_dpwssd_epi32(acc[4 * r + m], w, inputs[m]);
    }
  }
  _mm512_storeu_ps(sums, sums_of(acc));
}
#endif

// One row of weights with one of inputs, on any processor.
float product(const int8_t* weight, int64_t k, const int16_t* x) {
  float sum = 0.f;
  for (int64_t i = 0; i < k; i += 512) {  // so many products of 2^7 and 2^15 are within 32 bits
    int32_t part = 0;
    for (int64_t j = i; j < std::min(k, i + 512); ++j) part += int32_t(weight[j]) * x[j];
    sum += static_cast<float>(part);
  }
  return sum;
}

// Rows of weights (outs <= 16, k) with all of inputs (m, padded): (m, 16).
void tile(const int8_t* weight, int64_t outs, int64_t k, const int16_t* x, int64_t m, int64_t padded, float* sums) {
  int64_t r = 0;
#ifdef MLMAMBA_VNNI
  if (outs == BLOCK) {
    float four[16];
    for (; r + 4 <= m; r += 4)
      for (int64_t q = 0; q < BLOCK; q += 4) {
        (r == 0 ? products_of_four<true> : products_of_four<false>)(weight + q * k, k, x + r * padded, padded, four);
        for (int i = 0; i < 16; ++i) sums[(r + i % 4) * BLOCK + q + i / 4] = four[i];
      }
    for (; r < m; ++r) products_of_one(weight, k, x + r * padded, sums + r * BLOCK);
  }
#endif
  for (; r < m; ++r)
    for (int64_t q = 0; q < outs; ++q) sums[r * BLOCK + q] = product(weight + q * k, k, x + r * padded);
}

// x (m, k) times the transposed of weight (o, k) in int8 with a scale for each of its rows: (m, o).
// Inputs are rounded to 16 bits by row, which is finer than bfloat16 where they are largest.
Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  const int64_t m = x.size(0), k = x.size(1), o = weight.size(0), padded = (k + STEP - 1) / STEP * STEP;
  TORCH_CHECK(is_known(x) && weight.scalar_type() == at::kChar && scale.scalar_type() == at::kFloat,
              "int8_linear takes float32 or bfloat16 inputs, int8 weights and float32 scales");
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && scale.is_contiguous() && weight.size(1) == k &&
                  scale.size(0) == o,
              "int8_linear: sizes do not go together");
  Tensor out = at::empty({m, o}, x.options());
  std::vector<int16_t> whole(m * padded, 0);
  std::vector<float> unit(m);
  // Each of 16 places sums two products an instruction, which must stay within 32 bits.
  const float most = std::min(32767.f, 2147483392.f / (127.f * 2.f * (padded / STEP)));
  const auto run = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const T* given = x.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    for (int64_t r = 0; r < m; ++r) {
      float largest = 0.f;
      for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::abs(static_cast<float>(given[r * k + i])));
      unit[r] = largest / most;
      const float inverse = largest > 0.f ? most / largest : 0.f;
      for (int64_t i = 0; i < k; ++i)
        whole[r * padded + i] = static_cast<int16_t>(std::nearbyint(static_cast<float>(given[r * k + i]) * inverse));
    }
    const int8_t* weights = weight.const_data_ptr<int8_t>();
    const float* scales = scale.const_data_ptr<float>();
    at::parallel_for(0, (o + BLOCK - 1) / BLOCK, 4, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(m * BLOCK);
      for (int64_t first = begin * BLOCK; first < std::min(end * BLOCK, o); first += BLOCK) {
        const int64_t outs = std::min(BLOCK, o - first);
        tile(weights + first * k, outs, k, whole.data(), m, padded, sums.data());
        for (int64_t r = 0; r < m; ++r)
          for (int64_t q = 0; q < outs; ++q)
            result[r * o + first + q] = static_cast<T>(sums[r * BLOCK + q] * unit[r] * scales[first + q]);
      }
    });
  };
  x.scalar_type() == at::kFloat ? run(static_cast<float*>(nullptr)) : run(static_cast<at::BFloat16*>(nullptr));
  return out;
}

}  // namespace
