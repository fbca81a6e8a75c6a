// Fast Walsh-Hadamard transforms in float64. Stages go from the farthest pairs to the nearest, as
// in numerics/rotation.py: the same sums in the same order have the same bits.

#include <string.h>

#include "kernels.h"
#include "vectors.h"

namespace msq {
namespace {

typedef double Four __attribute__((vector_size(32)));
typedef double Eight __attribute__((vector_size(64)));

// The stages of N parts of each block, T by T.
template <int N, class T>
void stages_of(double* x, int64_t size, int64_t part) {
  for (double* block = x; block < x + size; block += N * part)
    for (double* at = block; at < block + part; at += sizeof(T) / sizeof(double)) {
      T v[N];
      each<N>([&](auto k)
                  __attribute__((always_inline)) { memcpy(&v[k], at + k * part, sizeof(T)); });
      each<3>([&](auto stage) __attribute__((always_inline)) {
        each<N>([&](auto k) __attribute__((always_inline)) {
          constexpr int half = N >> (stage + 1);
          if constexpr (half && !(k & half)) {
            const T low = v[k], high = v[k + half];
            v[k] = low + high;
            v[k + half] = low - high;
          }
        });
      });
      each<N>([&](auto k)
                  __attribute__((always_inline)) { memcpy(at + k * part, &v[k], sizeof(T)); });
    }
}

// The last three stages of parts of one number.
void stages_of_neighbours(double* x, int64_t size) {
  for (double* at = x; at < x + size; at += 8) {
    Eight v;
    memcpy(&v, at, sizeof v);
    v = Eight{v[4], v[5], v[6], v[7], v[0], v[1], v[2], v[3]} +
        Eight{1, 1, 1, 1, -1, -1, -1, -1} * v;
    v = Eight{v[2], v[3], v[0], v[1], v[6], v[7], v[4], v[5]} +
        Eight{1, 1, -1, -1, 1, 1, -1, -1} * v;
    v = Eight{v[1], v[0], v[3], v[2], v[5], v[4], v[7], v[6]} +
        Eight{1, -1, 1, -1, 1, -1, 1, -1} * v;
    memcpy(at, &v, sizeof v);
  }
}

template <int N>
void stages(double* x, int64_t size, int64_t part) {
  if (N == 8 && part == 1) return stages_of_neighbours(x, size);
  part % 4 ? stages_of<N, double>(x, size, part) : stages_of<N, Four>(x, size, part);
}

void transform(double* x, int64_t order, int64_t width) {
  const int64_t size = order * width;
  for (int64_t left = order; left > 1;) {  // by 2 or 4 first, so that 8 neighbours come last
    int power = 0;
    while (left >> power > 1) ++power;
    if (power % 3 == 1) {
      stages<2>(x, size, (left /= 2) * width);
    } else if (power % 3 == 2) {
      stages<4>(x, size, (left /= 4) * width);
    } else {
      stages<8>(x, size, (left /= 8) * width);
    }
  }
}

}  // namespace
}  // namespace msq

int32_t msq_hadamard(double* x, int64_t rows, int64_t order, int64_t width, double divisor) {
  if (rows < 0 || order < 1 || (order & (order - 1)) || width < 1) return MSQ_BAD_ARGUMENT;
  for (int64_t row = 0; row < rows; ++row, x += order * width) {
    msq::transform(x, order, width);
    for (int64_t i = 0; i < order * width; ++i) x[i] /= divisor;
  }
  return MSQ_OK;
}
