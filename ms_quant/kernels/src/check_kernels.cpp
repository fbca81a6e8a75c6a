// Every instruction set of this machine against the portable one, on random linears: integers bit
// for bit, floats within the bound of docs/kernels.md. tests/kernels proves the portable one. Built
// for another processor it runs under an emulator; built with sanitizers it looks for what they
// see.
//
//     check_kernels [seconds] [seed]

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

const char* const kNames[MSQ_ISAS] = {"scalar",   "avx2",      "avx_vnni", "avx512_vnni",
                                      "neon_dot", "neon_i8mm", "amx"};
std::mt19937_64 generator;

int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }

float normal(float spread = 1) { return std::normal_distribution<float>(0, spread)(generator); }

std::vector<float> normals(int64_t count, float spread = 1) {
  std::vector<float> made(static_cast<size_t>(count));
  for (float& x : made) x = normal(spread);
  return made;
}

std::vector<float> positive(int64_t count) {
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

[[noreturn]] void fail(const char* what, int isa, const Problem& p, int64_t at, float found,
                       float expected) {
  printf(
      "%s, %s: rows %ld, outputs %ld, inputs %ld, group %ld, bits %d, input %d: [%ld] is %.9g, "
      "expected %.9g\n",
      kNames[isa], what, static_cast<long>(p.rows), static_cast<long>(p.outputs),
      static_cast<long>(p.inputs), static_cast<long>(p.group), p.bits, p.linear.input,
      static_cast<long>(at), found, expected);
  exit(1);
}

void check_linear(int isa) {
  const Problem p;
  const std::vector<float> expected = p.run(MSQ_SCALAR, 1),
                           found = p.run(isa, 1 + static_cast<int>(below(3)));
  for (int64_t i = 0; i < p.rows * p.outputs; ++i) {
    const float a = found[static_cast<size_t>(i)], b = expected[static_cast<size_t>(i)];
    if (p.exact ? memcmp(&a, &b, 4) != 0
                : !(fabs(a - b) <=
                    2 * (p.inputs + 8) * 6e-8 * p.magnitude(i / p.outputs, i % p.outputs)))
      fail("linear", isa, p, i, a, b);
  }
}

void check_rows(int isa) {
  const int64_t rows = below(5), columns = below(200);
  const std::vector<float> x = normals(rows * columns, expf(normal(3)));
  std::vector<int8_t> codes[2];
  std::vector<float> scales[2];
  const int isas[2] = {MSQ_SCALAR, isa};
  for (int i = 0; i < 2; ++i) {
    codes[i].resize(static_cast<size_t>(rows * columns));
    scales[i].resize(static_cast<size_t>(rows));
    msq_quantize_rows(isas[i], x.data(), rows, columns, -128, 127, 0.9f, codes[i].data(),
                      scales[i].data(), 2);
  }
  if (codes[0] != codes[1] || scales[0] != scales[1]) {
    printf("%s, quantize_rows: differs for %ld x %ld\n", kNames[isa], static_cast<long>(rows),
           static_cast<long>(columns));
    exit(1);
  }
}

void check_close(const char* what, int isa, const std::vector<float>& found,
                 const std::vector<float>& expected) {
  for (size_t i = 0; i < found.size(); ++i)
    if (!(fabsf(found[i] - expected[i]) <= 2e-5f * fabsf(expected[i]) + 1e-30f)) {
      printf("%s, %s: [%zu] is %.9g, expected %.9g\n", kNames[isa], what, i, found[i], expected[i]);
      exit(1);
    }
}

void check_block(int isa) {
  const int64_t heads = 1 + below(3), length = 1 + below(6), size = 2 * (1 + below(40)),
                rows = heads * length;
  const std::vector<float> x = normals(rows * size), other = normals(rows * size),
                           weight = normals(size);
  const std::vector<float> cos = normals(length * size), sin = normals(length * size),
                           mask = normals(length * size);
  const int isas[2] = {MSQ_SCALAR, isa};
  std::vector<float> norm[2], gate[2], rope[2], softmax[2];
  for (int i = 0; i < 2; ++i) {
    norm[i] = gate[i] = rope[i] = softmax[i] = x;
    msq_rms_norm(isas[i], x.data(), weight.data(), rows, size, 1e-6f, norm[i].data(), 2);
    msq_swiglu(isas[i], x.data(), other.data(), rows * size, gate[i].data(), 2);
    msq_rope(isas[i], x.data(), cos.data(), sin.data(), 1, length, heads, size, rope[i].data(), 2);
    msq_softmax(isas[i], softmax[i].data(), mask.data(), rows, size, length, rows, 0.5f, 2);
  }
  std::vector<uint16_t> table(static_cast<size_t>(rows * size));
  for (uint16_t& half : table) half = static_cast<uint16_t>(0x3f80 + below(256));
  const std::vector<float> by(weight.size(), 0.5f);
  std::vector<float> product[2];
  for (int i = 0; i < 2; ++i) {
    product[i].resize(static_cast<size_t>(rows));
    msq_gemv(isas[i], table.data(), rows, size, by.data(), product[i].data(), 2);
  }
  check_close("gemv", isa, product[1], product[0]);
  check_close("rms_norm", isa, norm[1], norm[0]);
  check_close("swiglu", isa, gate[1], gate[0]);
  check_close("rope", isa, rope[1], rope[0]);
  check_close("softmax", isa, softmax[1], softmax[0]);
}

// Odd sizes, and queries that see all, some or no keys.
void check_attention(int isa) {
  const int64_t batch = 1 + below(2), kv = 1 + below(2), heads = kv * (1 + below(3)),
                length = 1 + below(60), total = length + below(40), size = 1 + below(70),
                masks = below(2) ? batch : 1;
  const std::vector<float> q = normals(batch * heads * length * size),
                           k = normals(batch * kv * total * size),
                           v = normals(batch * kv * total * size);
  std::vector<float> mask = normals(masks * length * total);
  const int64_t hides = below(4);
  for (int64_t i = 0; i < masks * length * total; ++i)
    if (hides && (i % total > i / total % length || below(hides) > 1))
      mask[static_cast<size_t>(i)] = -1e30f;
  const int isas[2] = {MSQ_SCALAR, isa};
  std::vector<float> found[2];
  for (int i = 0; i < 2; ++i) {
    found[i].resize(q.size());
    msq_attention(isas[i], q.data(), k.data(), v.data(), mask.data(), batch, heads, kv, length,
                  total, size, masks, 0.2f, found[i].data(), 2);
  }
  for (size_t i = 0; i < q.size(); ++i)
    if (!(fabsf(found[1][i] - found[0][i]) <= 1e-4f)) {
      printf("%s, attention: [%zu] is %.9g, expected %.9g\n", kNames[isa], i, found[1][i],
             found[0][i]);
      exit(1);
    }
}

// Against sums of one pair after the other, bit for bit.
void check_hadamard() {
  const int64_t rows = below(4), order = int64_t{1} << below(9), width = 1 + below(13);
  std::vector<double> found(static_cast<size_t>(rows * order * width));
  for (double& x : found) x = normal();
  std::vector<double> expected = found;
  const auto part = [&](int64_t index) { return expected.data() + index * width; };
  for (int64_t half = order / 2; half; half /= 2)
    for (int64_t i = 0; i < rows * order; ++i)
      for (int64_t k = 0; k < width && !(i & half); ++k) {
        double &low = part(i)[k], &high = part(i + half)[k];
        const double sum = low + high;
        high = low - high;
        low = sum;
      }
  for (double& x : expected) x /= 3;
  if (msq_hadamard(found.data(), rows, order, width, 3) ||
      (rows && memcmp(found.data(), expected.data(), found.size() * 8))) {
    printf("hadamard: differs for %ld x %ld x %ld\n", static_cast<long>(rows),
           static_cast<long>(order), static_cast<long>(width));
    exit(1);
  }
}

void check_columns(int isa) {
  const int64_t rows = below(20), columns = 1 + below(600);
  const std::vector<float> x = normals(rows * columns, expf(normal(3)));
  std::vector<float> low[2], high[2];
  std::vector<double> squares[2], sizes[2];
  const int isas[2] = {MSQ_SCALAR, isa};
  for (int i = 0; i < 2; ++i) {
    low[i] = high[i] = std::vector<float>(static_cast<size_t>(columns));
    squares[i] = sizes[i] = std::vector<double>(static_cast<size_t>(columns));
    const int status =
        msq_column_stats(isas[i], x.data(), rows, columns, low[i].data(), high[i].data(),
                         squares[i].data(), sizes[i].data(), 1 + static_cast<int>(below(3)));
    if (status) exit(printf("column_stats: status %d\n", status));
  }
  if (low[0] != low[1] || high[0] != high[1] || squares[0] != squares[1] || sizes[0] != sizes[1]) {
    printf("%s, column_stats: differs for %ld x %ld\n", kNames[isa], static_cast<long>(rows),
           static_cast<long>(columns));
    exit(1);
  }
}

void check_sum(const char* what, float found, double exact, double size, int64_t terms) {
  if (fabs(found - exact) <= static_cast<double>(terms + 8) * 6e-8 * size) return;
  printf("%s: %.9g, expected %.9g\n", what, found, exact);
  exit(1);
}

// Products on AMX, where it is, against float64.
void check_products() {
  const int64_t rows = 1 + below(300), outputs = 1 + below(100), inputs = 1 + below(700);
  const int threads = 1 + static_cast<int>(below(3));
  const std::vector<float> x = normals(rows * inputs), w = normals(outputs * inputs),
                           bias = normals(outputs);
  std::vector<float> y(static_cast<size_t>(rows * outputs));
  if (msq_product(x.data(), rows, w.data(), outputs, inputs, bias.data(), y.data(), threads))
    return;
  for (int trial = 0; trial < 100; ++trial) {
    const int64_t row = below(rows), output = below(outputs);
    double exact = bias[static_cast<size_t>(output)], size = fabs(exact);
    for (int64_t k = 0; k < inputs; ++k) {
      const double term = double{x[static_cast<size_t>(row * inputs + k)]} *
                          w[static_cast<size_t>(output * inputs + k)];
      exact += term;
      size += fabs(term);
    }
    check_sum("product", y[static_cast<size_t>(row * outputs + output)], exact, size, inputs);
  }
  std::vector<float> products(static_cast<size_t>(inputs * inputs));
  if (msq_syrk(x.data(), rows, inputs, products.data(), threads)) exit(printf("syrk\n"));
  for (int trial = 0; trial < 100; ++trial) {
    const int64_t a = below(inputs), b = below(a + 1);
    double exact = 0, size = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const double term =
          double{x[static_cast<size_t>(r * inputs + a)]} * x[static_cast<size_t>(r * inputs + b)];
      exact += term;
      size += fabs(term);
    }
    check_sum("syrk", products[static_cast<size_t>(a * inputs + b)], exact, size, rows);
  }
}

}  // namespace

int main(int count, char** words) {
  const double seconds = count > 1 ? atof(words[1]) : 10;
  generator.seed(count > 2 ? strtoull(words[2], nullptr, 10) : 0);
  const auto started = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  };
  std::vector<int> isas;
  for (int isa = 0; isa < MSQ_ISAS; ++isa)
    if (msq_has_isa(isa)) isas.push_back(isa);
  long cases = 0;
  for (; elapsed() < seconds || cases < 100; ++cases) {
    check_hadamard();
    if (cases % 10 == 0) check_products();
    for (const int isa : isas) {
      check_linear(isa);
      check_rows(isa);
      check_block(isa);
      check_attention(isa);
      check_columns(isa);
    }
  }
  printf("%ld random cases are right on", cases);
  for (const int isa : isas) printf(" %s", kNames[isa]);
  printf("\n");
  return 0;
}
