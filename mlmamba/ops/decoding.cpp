// What a CPU does to tokens between products (products.h): the part of a Mamba-2 block between its projections, and
// sum with norm.
//
// compiled.py builds this for the processor that it runs on; step.py has the same in plain torch, which the tests
// compare it with. All arithmetic is float32 whatever the tensors are kept in. Shapes as in step.py:
// b rows, d = e + 2gn channels, e inner width (h heads of p), g groups, n state size, w taps.

#include "products.h"
#include "vectors.h"

namespace {

// 1 / sqrt of the mean square of a row, plus eps.
float inverse_rms(const float* x, int64_t count, double eps) {
  Vec sum(0.f);
  for (int64_t i = 0; i < count; i += W) {
    Vec v = load(x + i, count - i);
    sum = at::vec::fmadd(v, v, sum);
  }
  return 1.f / std::sqrt(total(sum) / count + static_cast<float>(eps));
}

struct Sizes {
  int64_t inner, channels, heads, head_dim, state, groups, taps;
};

// Convolution and SiLU of one token in some of the channels: new inputs x and the last ones (w-1), which move up by one.
// From one tap to the next it is `stride` numbers, in the taps and in the last inputs.
template <typename T>
void convolve(const T* x, T* past, const float* taps, const float* bias, float* out, int64_t channels, int64_t width,
              int64_t stride) {
  float buffer[W];
  for (int64_t c = 0; c < channels; c += W) {
    const int64_t count = std::min(W, channels - c);
    Vec sum = load(bias + c, count);
    for (int64_t j = 0; j < width; ++j) {
      const T* input = j + 1 < width ? past + j * stride + c : x + c;
      widen(input, buffer, count);
      sum = at::vec::fmadd(load(buffer, count), load(taps + j * stride + c, count), sum);
      if (j > 0) std::copy(input, input + count, past + (j - 1) * stride + c);
    }
    store(silu(sum), out + c, count);
  }
}

// One head's state (p, n), written over, and its outputs y (p).
void scan(float* state, const float* x, const float* B, const float* C, float decay, float dt, float D, float* y,
          const Sizes& s) {
  const Vec kept(decay);
  for (int64_t p = 0; p < s.head_dim; ++p, state += s.state) {
    const Vec added(dt * x[p]);
    Vec sum(0.f);
    for (int64_t n = 0; n < s.state; n += W) {
      const int64_t count = s.state - n;
      const Vec now = at::vec::fmadd(load(state + n, count), kept, added * load(B + n, count));
      store(now, state + n, count);
      sum = at::vec::fmadd(now, load(C + n, count), sum);
    }
    y[p] = total(sum) + D * x[p];
  }
}

// Tokens (b, l, width) of which the first lengths[r] of each row count, all where there are no lengths.
template <typename T>
void block_rows(const Tensor& zxBCdt, Tensor& conv, Tensor& ssm, const int64_t* lengths, const float* taps,
                const float* bias, const float* A, const float* dt_bias, const float* D, const float* weight,
                double eps, int64_t norm_groups, double low, double high, const Sizes& s, Tensor& out) {
  const int64_t b = zxBCdt.size(0), l = zxBCdt.size(1), width = zxBCdt.size(2), parts = s.inner / norm_groups;
  const T* given = zxBCdt.const_data_ptr<T>();
  T *past = conv.mutable_data_ptr<T>(), *result = out.mutable_data_ptr<T>();
  float* states = ssm.mutable_data_ptr<float>();
  const auto length = [&](int64_t r) { return lengths == nullptr ? l : std::min(l, lengths[r]); };
  std::vector<float> mixed(b * l * s.channels), y(b * l * s.inner, 0.f);
  constexpr int64_t CHANNELS = 256;  // of one piece of work
  const int64_t pieces = (s.channels + CHANNELS - 1) / CHANNELS;
  at::parallel_for(0, b * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / pieces, c = i % pieces * CHANNELS, count = std::min(CHANNELS, s.channels - c);
      for (int64_t t = 0; t < length(r); ++t)
        convolve(given + (r * l + t) * width + s.inner + c, past + r * (s.taps - 1) * s.channels + c, taps + c,
                 bias + c, mixed.data() + (r * l + t) * s.channels + c, count, s.taps, s.channels);
    }
  });
  at::parallel_for(0, b * s.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / s.heads, h = i % s.heads, shared = h / (s.heads / s.groups) * s.state;
      for (int64_t t = r * l; t < r * l + length(r); ++t) {
        const float raw = static_cast<float>(given[t * width + s.inner + s.channels + h]) + dt_bias[h];
        float dt = raw > 20.f ? raw : std::log1p(std::exp(raw));
        dt = std::min(std::max(dt, static_cast<float>(low)), static_cast<float>(high));
        const float *x = mixed.data() + t * s.channels, *B = x + s.inner + shared, *C = B + s.groups * s.state;
        scan(states + i * s.head_dim * s.state, x + h * s.head_dim, B, C, std::exp(dt * A[h]), dt, D[h],
             y.data() + t * s.inner + h * s.head_dim, s);
      }
    }
  });
  at::parallel_for(0, b * l * norm_groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> z(parts);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / norm_groups, first = i % norm_groups * parts;
      float* gated = y.data() + i * parts;
      widen(given + t * width + first, z.data(), parts);
      for (int64_t k = 0; k < parts; k += W)
        store(load(gated + k, parts - k) * silu(load(z.data() + k, parts - k)), gated + k, parts - k);
      const Vec scale(inverse_rms(gated, parts, eps));
      for (int64_t k = 0; k < parts; k += W)
        store(load(gated + k, parts - k) * scale * load(weight + first + k, parts - k), gated + k, parts - k);
      narrow(gated, result + i * parts, parts);
    }
  });
}

// What `Between` of step.py does to a token, for l tokens of each row one after the other, of which the first
// `lengths` (b,) count: (b, l, e + d + h) -> (b, l, e). The first b of the states are written over. Constants are
// float32. A row's result has the same bits whatever stands beside it and however its tokens are cut into calls.
Tensor block(const Tensor& zxBCdt, Tensor conv, Tensor ssm, const std::optional<Tensor>& lengths, const Tensor& taps,
             const Tensor& bias, const Tensor& A, const Tensor& dt_bias, const Tensor& D, const Tensor& weight,
             double eps, int64_t groups, int64_t norm_groups, double low, double high) {
  const Sizes s{weight.size(0), bias.size(0), A.size(0), ssm.size(2), ssm.size(3), groups, taps.size(0)};
  const int64_t b = zxBCdt.size(0);
  TORCH_CHECK(zxBCdt.scalar_type() == conv.scalar_type() && is_known(zxBCdt) && ssm.scalar_type() == at::kFloat,
              "block takes float32 or bfloat16 inputs of one kind, and float32 states");
  TORCH_CHECK(zxBCdt.is_contiguous() && conv.is_contiguous() && ssm.is_contiguous(), "block takes contiguous tensors");
  TORCH_CHECK(zxBCdt.dim() == 3 && zxBCdt.size(2) == s.inner + s.channels + s.heads &&
                  s.inner == s.heads * s.head_dim && s.channels == s.inner + 2 * groups * s.state &&
                  conv.size(0) >= b && conv.size(1) == s.taps - 1 && conv.size(2) == s.channels && ssm.size(0) >= b &&
                  ssm.size(1) == s.heads,
              "block: sizes do not go together");
  TORCH_CHECK(!lengths || (lengths->scalar_type() == at::kLong && lengths->is_contiguous() && lengths->size(0) == b),
              "block: lengths are one int64 a row");
  Tensor out = at::empty({b, zxBCdt.size(1), s.inner}, zxBCdt.options());
  const auto run = [&](auto* kind) {
    block_rows<std::remove_pointer_t<decltype(kind)>>(
        zxBCdt, conv, ssm, lengths ? lengths->const_data_ptr<int64_t>() : nullptr, taps.const_data_ptr<float>(),
        bias.const_data_ptr<float>(), A.const_data_ptr<float>(), dt_bias.const_data_ptr<float>(),
        D.const_data_ptr<float>(), weight.const_data_ptr<float>(), eps, norm_groups, low, high, s, out);
  };
  zxBCdt.scalar_type() == at::kFloat ? run(static_cast<float*>(nullptr)) : run(static_cast<at::BFloat16*>(nullptr));
  return out;
}

template <typename T, typename S>
void add_norm_rows(const Tensor& y, const S* residual, const T* weight, double eps, Tensor& normed, float* wide,
                   T* same) {
  const int64_t d = y.size(-1), b = y.numel() / std::max<int64_t>(d, 1);
  const T* given = y.const_data_ptr<T>();
  T* out = normed.mutable_data_ptr<T>();
  at::parallel_for(0, b, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(d), other(d);
    for (int64_t r = begin; r < end; ++r) {
      widen(given + r * d, sum.data(), d);
      if (residual != nullptr) {
        widen(residual + r * d, other.data(), d);
        for (int64_t i = 0; i < d; ++i) sum[i] += other[i];
      }
      if (wide != nullptr)
        std::copy(sum.begin(), sum.end(), wide + r * d);
      else {  // the stream is rounded, and so is what is normed
        narrow(sum.data(), same + r * d, d);
        widen(same + r * d, sum.data(), d);
      }
      const float scale = inverse_rms(sum.data(), d, eps);
      for (int64_t i = 0; i < d; ++i) out[r * d + i] = static_cast<T>(sum[i] * scale * static_cast<float>(weight[i]));
    }
  });
}

// As `add_norm` of step.py, for tensors of any shape (..., d).
std::tuple<Tensor, Tensor> add_norm(const Tensor& given, const std::optional<Tensor>& before, const Tensor& weight,
                                    double eps, bool wide) {
  const Tensor y = given.contiguous();
  const std::optional<Tensor> residual = before ? std::optional<Tensor>(before->contiguous()) : std::nullopt;
  TORCH_CHECK(is_known(y) && weight.scalar_type() == y.scalar_type() && weight.is_contiguous(),
              "add_norm takes float32 or bfloat16 tensors of one kind");
  TORCH_CHECK(y.dim() > 0 && weight.size(0) == y.size(-1) && (!residual || (is_known(*residual) && residual->sizes() == y.sizes())),
              "add_norm: sizes do not go together");
  Tensor normed = at::empty_like(y);
  Tensor stream = at::empty(y.sizes(), wide ? y.options().dtype(at::kFloat) : y.options());
  const auto run = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    float* out = wide ? stream.mutable_data_ptr<float>() : nullptr;
    T* same = wide ? nullptr : stream.mutable_data_ptr<T>();
    const T* scale = weight.const_data_ptr<T>();
    if (residual && residual->scalar_type() == at::kFloat)
      add_norm_rows<T, float>(y, residual->const_data_ptr<float>(), scale, eps, normed, out, same);
    else
      add_norm_rows<T, at::BFloat16>(y, residual ? residual->const_data_ptr<at::BFloat16>() : nullptr, scale, eps,
                                     normed, out, same);
  };
  y.scalar_type() == at::kFloat ? run(static_cast<float*>(nullptr)) : run(static_cast<at::BFloat16*>(nullptr));
  return {normed, stream};
}

}  // namespace

TORCH_LIBRARY(mlmamba, m) {
  m.def(
      "block(Tensor zxBCdt, Tensor(a!) conv, Tensor(b!) ssm, Tensor? lengths, Tensor taps, Tensor bias, Tensor A, "
      "Tensor dt_bias, Tensor D, Tensor weight, float eps, int groups, int norm_groups, float low, float high) -> "
      "Tensor");
  m.def("add_norm(Tensor y, Tensor? residual, Tensor weight, float eps, bool wide) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor panels, int outs) -> Tensor");
  m.def("int8_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(mlmamba, CPU, m) {
  m.impl("block", block);
  m.impl("add_norm", add_norm);
  m.impl("linear", linear);
  m.impl("int8_linear", int8_linear);
}
