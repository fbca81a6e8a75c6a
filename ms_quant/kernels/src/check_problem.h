// Random linears for check_kernels.

#ifndef MS_QUANT_CHECK_PROBLEM_H_
#define MS_QUANT_CHECK_PROBLEM_H_

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels.h"

namespace check {

inline std::mt19937_64 generator;

inline int64_t below(int64_t n) {
  return static_cast<int64_t>(generator() % static_cast<uint64_t>(n));
}

inline float normal(float spread = 1) {
  return std::normal_distribution<float>(0, spread)(generator);
}

inline std::vector<float> normals(int64_t count, float spread = 1) {
  std::vector<float> made(static_cast<size_t>(count));
  for (float& x : made) x = normal(spread);
  return made;
}

inline std::vector<float> positive(int64_t count) {
  std::vector<float> made = normals(count);
  for (float& x : made) x = expf(x);
  return made;
}

// Blobs lie where malloc puts them.
using Bytes = std::vector<uint8_t>;

struct Problem {
  int64_t rows, outputs, inputs, group;
  int bits;
  MsqLinear linear;
  std::vector<int8_t> codes, zeros;
  std::vector<int32_t> int_bias;
  std::vector<float> x, mul, input_scale, scale, row_scale, bias;
  bool exact;

  Problem() {
    static const int64_t sizes[] = {1, 2, 3, 7, 16, 31, 33, 64, 65, 100, 257};
    rows = below(3) ? 1 + below(40) : below(4);
    outputs = sizes[below(11)];
    inputs = below(16) ? sizes[below(11)] : 2000 + below(3000);  // more than lie in the cache
    bits = below(2) ? 8 : 4;
    linear = MsqLinear();
    linear.input = static_cast<int32_t>(below(3));
    const bool grouped = linear.input != MSQ_STATIC && below(2);
    group = grouped ? 8 * (1 + below(16)) : inputs;
    if (grouped) inputs = group * (1 + below(4));
    exact = linear.input != MSQ_FLOAT && !grouped;
    codes.resize(static_cast<size_t>(outputs * inputs));
    for (int8_t& code : codes) code = static_cast<int8_t>(below(1 << bits) - (1 << (bits - 1)));
    x = normals(rows * inputs, expf(normal(3)));
    scale = positive(outputs * (inputs / group));
    fill(linear.scale, scale);
    if (below(2)) fill(linear.bias, bias = normals(outputs));
    if (below(3) == 0) fill(linear.mul, mul = positive(inputs));
    if (grouped && linear.input == MSQ_PER_TOKEN)
      fill(linear.row_scale, row_scale = positive(outputs));
    if (linear.input == MSQ_STATIC) {
      fill(below(2) ? linear.input_scale : linear.input_factor, input_scale = positive(inputs));
      int_bias.resize(static_cast<size_t>(outputs));
      for (int32_t& b : int_bias) b = static_cast<int32_t>(below(1 << 20) - (1 << 19));
      linear.int_bias = int_bias.data();
      linear.offset = static_cast<float>(below(256) - 128);
    }
    if (linear.input == MSQ_FLOAT && below(2)) {
      zeros.resize(scale.size());
      for (int8_t& z : zeros) z = static_cast<int8_t>(below(1 << bits) - (1 << (bits - 1)));
      linear.zero_point = zeros.data();
    }
    linear.outputs = outputs;
    linear.inputs = inputs;
    linear.group = group;
    const bool four = linear.input == MSQ_PER_TOKEN && below(2);
    linear.smallest = four ? -8 : -128;
    linear.largest = four ? 7 : 127;
    linear.clip = below(2) ? 1.0f : 0.8f;
  }

  static void fill(const float*& pointer, const std::vector<float>& from) { pointer = from.data(); }

  std::vector<float> run(int isa, int threads) const {
    const int64_t size = msq_weights_bytes(isa, outputs, inputs, bits);
    Bytes weights(static_cast<size_t>(size)),
        params(static_cast<size_t>(msq_params_bytes(&linear)));
    std::vector<float> y(static_cast<size_t>(rows * outputs), NAN);
    int status = msq_pack_weights(isa, codes.data(), outputs, inputs, bits, weights.data());
    status |= msq_pack_params(&linear, params.data());
    status |= msq_linear(weights.data(), size, params.data(), static_cast<int64_t>(params.size()),
                         x.data(), rows, y.data(), threads);
    if (status) {
      printf("status %d\n", status);
      exit(1);
    }
    return y;
  }

  // The sum of all magnitudes that go into one output.
  double magnitude(int64_t row, int64_t output) const {
    double most = 0, sum = 0;
    for (int64_t k = 0; k < inputs; ++k) {
      const double v = fabs(x[static_cast<size_t>(row * inputs + k)]) *
                       (mul.empty() ? 1 : mul[static_cast<size_t>(k)]);
      most = std::max(most, v);
      const size_t at = static_cast<size_t>(output * (inputs / group) + k / group);
      const double zero = zeros.empty() ? 0 : 2 * fabs(static_cast<double>(zeros[at]));
      sum += v *
             (fabs(static_cast<double>(codes[static_cast<size_t>(output * inputs + k)])) + zero) *
             scale[at];
    }
    const double by = row_scale.empty() ? 1 : row_scale[static_cast<size_t>(output)];
    return sum * by + (bias.empty() ? 0 : fabs(bias[static_cast<size_t>(output)])) + most * 1e-6;
  }
};

}  // namespace check

#endif  // MS_QUANT_CHECK_PROBLEM_H_
