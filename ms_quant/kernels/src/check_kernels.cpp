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

#include <chrono>
#include <vector>

#include "check_problem.h"
#include "check_sparse_attention.h"
#include "check_watched.h"
#include "kernels.h"

using namespace check;

namespace {

const char* const kNames[MSQ_ISAS] = {"scalar",   "avx2",      "avx_vnni", "avx512_vnni",
                                      "neon_dot", "neon_i8mm", "amx"};
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
    msq_quantize_rows(isas[i], x.data(), rows, columns, -128, 127, 0.9f, 16, codes[i].data(),
                      scales[i].data(), 2);
  }
  if (codes[0] != codes[1] || scales[0] != scales[1]) {
    printf("%s, quantize_rows: differs for %ld x %ld\n", kNames[isa], static_cast<long>(rows),
           static_cast<long>(columns));
    exit(1);
  }
}

// Of E4M3 with a scale for each run, or of bfloat16; NaN among them is seen by all alike.
void check_stored(int isa) {
  const int64_t rows = below(5), columns = below(200), width = 1 + below(150),
                runs = (columns + width - 1) / width;
  const bool float8 = below(2) != 0;
  std::vector<uint8_t> stored(static_cast<size_t>(rows * columns * (float8 ? 1 : 2)));
  for (uint8_t& byte : stored) {
    byte = static_cast<uint8_t>(below(0x100));
    if ((byte & 0x7f) == 0x7f && below(40)) byte = 0x80;
  }
  std::vector<float> block_scales(static_cast<size_t>(rows * runs));
  for (float& scale : block_scales) scale = expf(normal(20));
  std::vector<int8_t> codes[2];
  std::vector<float> scales[2];
  int32_t status[2];
  const int isas[2] = {MSQ_SCALAR, isa};
  const float none = 1;
  for (int i = 0; i < 2; ++i) {
    codes[i].resize(static_cast<size_t>(rows * columns));
    scales[i].resize(static_cast<size_t>(rows));
    const float* given = block_scales.empty() ? &none : block_scales.data();
    status[i] = msq_quantize_stored(isas[i], stored.data(), float8 ? given : nullptr, width, rows,
                                    columns, -8, 7, 16, codes[i].data(), scales[i].data(), 2);
  }
  if (status[0] != status[1] ||
      (status[0] == MSQ_OK && (codes[0] != codes[1] || scales[0] != scales[1]))) {
    printf("%s, quantize_stored: differs for %ld x %ld\n", kNames[isa], static_cast<long>(rows),
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

// Sums of positive numbers, and their order does not matter much.
void check_step(int isa) {
  const int64_t outputs = 1 + below(40), inputs = 1 + below(200), rows = below(7);
  std::vector<uint16_t> table(static_cast<size_t>(outputs * inputs));
  for (uint16_t& half : table) half = static_cast<uint16_t>(0x3f80 + below(256));
  const std::vector<float> by(static_cast<size_t>(rows * inputs), 0.5f),
      wide(static_cast<size_t>(outputs * inputs), 0.25f);
  const int64_t kv_heads = 1 + below(3), heads = kv_heads * (1 + below(3)), size = 1 + below(70),
                value_size = 1 + below(140), lengths[2] = {1 + below(9), 1 + below(90)};
  const std::vector<float> q = normals(2 * heads * size), k = normals(kv_heads * 90 * size),
                           v(static_cast<size_t>(kv_heads * 90 * value_size), 0.75f);
  const float *keys[2] = {k.data(), k.data()}, *values[2] = {v.data(), v.data()};
  const int64_t key_strides[2] = {90 * size, lengths[1] * size},
                value_strides[2] = {90 * value_size, lengths[1] * value_size};
  const int isas[2] = {MSQ_SCALAR, isa};
  std::vector<float> narrow[2], product[2], read[2];
  for (int i = 0; i < 2; ++i) {
    narrow[i].resize(static_cast<size_t>(rows * outputs));
    product[i] = narrow[i];
    read[i].resize(static_cast<size_t>(2 * heads * value_size));
    msq_row_products(isas[i], table.data(), 1, outputs, inputs, nullptr, by.data(), rows,
                     narrow[i].data(), 2);
    msq_row_products(isas[i], wide.data(), 0, outputs, inputs, wide.data(), by.data(), rows,
                     product[i].data(), 2);
    MsqStepAttention step = {
        2,      heads,   kv_heads,    size,          value_size, q.data(),       keys,
        values, lengths, key_strides, value_strides, 0.3f,       read[i].data(), 0};
    msq_step_attention(isas[i], &step, 2);
  }
  check_close("row_products of bfloat16", isa, narrow[1], narrow[0]);
  check_close("row_products", isa, product[1], product[0]);
  check_close("step_attention", isa, read[1], read[0]);
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
    check_pages();
    check_block_means();
    check_quantize_heads();
    if (cases % 100 == 0) check_other_faults();
    if (cases % 10 == 0) check_products();
    for (const int isa : isas) {
      check_linear(isa);
      check_rows(isa);
      check_stored(isa);
      check_block(isa);
      check_step(isa);
      check_attention(isa);
      check_sparse_attention(isa);
      check_columns(isa);
      check_watched(isa);
    }
  }
  printf("%ld random cases are right on", cases);
  for (const int isa : isas) printf(" %s", kNames[isa]);
  printf("\n");
  return 0;
}
