// What the algorithms ask of an instruction set's vectors. A struct `S` has
//
//   F, I                 kWidth floats, kWidth 32-bit integers
//   Codes, Inputs        what `dot` takes of a weight's word and of an input's, as prepared
//   dot(sum, codes, in)  sum + the four products in each word, exactly
//   kRows, kVectors      of sums that fit in its registers: rows of inputs, vectors of outputs
//   kFloatRows           the same rows where sums are of floats
//   at_least(a, limit)   the larger one, NaN for NaN
//   kBias                what is added to codes of 8 bits, as `dot` reads them without a sign
//   tile                 if it has one, sums of several rows in another way than by `dot`
//   kByteSplit           whether floats of a few rows are split into bytes for `dot`
//
// The files *_impl.h hold one algorithm each, a template over S. A file that includes them is
// compiled for one instruction set, so they call no function of the standard library that is not
// inlined away: the linker would keep one copy of it, compiled for any of them.

#ifndef MS_QUANT_VECTORS_H_
#define MS_QUANT_VECTORS_H_

#include <stdint.h>

namespace msq {
namespace {

// Calls f(0), ..., f(N - 1) with indices that are constants before anything is optimized. Arrays
// that are indexed so are kept in registers; in loops GCC 12 unrolls them too late for that.
template <int N>
struct Index {
  constexpr operator int() const { return N; }
};

template <int N, class Function>
__attribute__((always_inline)) inline void each(Function&& f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f(Index<N - 1>());
  }
}

inline float of_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up_to(int64_t a, int64_t step) { return (a + step - 1) / step * step; }

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_VECTORS_H_
