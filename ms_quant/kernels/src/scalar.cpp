#include <math.h>

#include "attention_impl.h"

namespace msq {
namespace {

struct Scalar {
  static constexpr int kWidth = 4, kVectors = 2, kRows = 2, kFloatRows = 4;
  static constexpr int32_t kBias = 0;
  static constexpr bool kByteSplit = false;
  struct F {
    float at[kWidth];
  };
  struct I {
    int32_t at[kWidth];
  };
  using Codes = I;
  using Inputs = I;

  template <class Function>
  static F floats(Function function) {
    F made;
    for (int i = 0; i < kWidth; ++i) made.at[i] = function(i);
    return made;
  }
  template <class Function>
  static I ints(Function function) {
    I made;
    for (int i = 0; i < kWidth; ++i) made.at[i] = function(i);
    return made;
  }

  static F load(const float* p) {
    return floats([&](int i) { return p[i]; });
  }
  static F load_bfloat16(const uint16_t* p) {
    return floats([&](int i) { return of_bfloat16(p[i]); });
  }
  static void store(float* p, F v) { memcpy(p, v.at, sizeof v); }
  static F set1(float x) {
    return floats([&](int) { return x; });
  }
  static F add(F a, F b) {
    return floats([&](int i) { return a.at[i] + b.at[i]; });
  }
  static F sub(F a, F b) {
    return floats([&](int i) { return a.at[i] - b.at[i]; });
  }
  static F mul(F a, F b) {
    return floats([&](int i) { return a.at[i] * b.at[i]; });
  }
  static F div(F a, F b) {
    return floats([&](int i) { return a.at[i] / b.at[i]; });
  }
  static F fma(F a, F b, F c) { return add(mul(a, b), c); }
  static F max(F a, F b) {
    return floats([&](int i) { return fmaxf(a.at[i], b.at[i]); });
  }
  static F min(F a, F b) {
    return floats([&](int i) { return fminf(a.at[i], b.at[i]); });
  }
  static F at_least(F a, float limit) {
    return floats([&](int i) { return a.at[i] < limit ? limit : a.at[i]; });
  }
  static F abs(F a) {
    return floats([&](int i) { return fabsf(a.at[i]); });
  }
  static F round(F a) {
    return floats([&](int i) { return nearbyintf(a.at[i]); });
  }
  static bool any_nan(F a) {
    return a.at[0] != a.at[0] || a.at[1] != a.at[1] || a.at[2] != a.at[2] || a.at[3] != a.at[3];
  }
  static F ldexp(F a, F n) {
    return floats([&](int i) { return ldexpf(a.at[i], static_cast<int>(n.at[i])); });
  }
  static F zero_below(F a, F x, float limit) {
    return floats([&](int i) { return x.at[i] < limit ? 0.0f : a.at[i]; });
  }
  static float highest(F a) { return fmaxf(fmaxf(a.at[0], a.at[1]), fmaxf(a.at[2], a.at[3])); }
  static bool near_half(F part) { return highest(abs(part)) > 0.4998f; }

  static I iload(const void* p) {
    I made;
    memcpy(&made, p, sizeof made);
    return made;
  }
  static void istore(void* p, I v) { memcpy(p, v.at, sizeof v); }
  static I izero() { return iset1(0); }
  static I iset1(int32_t x) {
    return ints([&](int) { return x; });
  }
  static int32_t word(uint32_t x) { return static_cast<int32_t>(x); }
  static uint32_t bits(int32_t x) { return static_cast<uint32_t>(x); }
  static I iadd(I a, I b) {
    return ints([&](int i) { return word(bits(a.at[i]) + bits(b.at[i])); });
  }
  static I isub(I a, I b) {
    return ints([&](int i) { return word(bits(a.at[i]) - bits(b.at[i])); });
  }
  static I ixor(I a, I b) {
    return ints([&](int i) { return a.at[i] ^ b.at[i]; });
  }
  static F to_float(I a) {
    return floats([&](int i) { return static_cast<float>(a.at[i]); });
  }
  static int32_t total(I a) {
    return word(bits(a.at[0]) + bits(a.at[1]) + bits(a.at[2]) + bits(a.at[3]));
  }
  static void store_codes(int8_t* p, const F (&v)[16]) {
    for (const F& part : v)
      for (float x : part.at) *p++ = static_cast<int8_t>(x < -128 ? -128 : x > 127 ? 127 : x);
  }

  static I low_halves(I a) {
    return ints([&](int i) { return a.at[i] & 0x0f0f0f0f; });
  }
  static I high_halves(I a) {
    return ints([&](int i) { return word(bits(a.at[i]) >> 4) & 0x0f0f0f0f; });
  }
  static F byte(I a, int k) {
    return floats(
        [&](int i) { return static_cast<float>(static_cast<int8_t>(bits(a.at[i]) >> 8 * k)); });
  }
  static F half(I a, int k) {
    const int by = k < 4 ? 8 * k : 8 * (k - 4) + 4;
    return floats(
        [&](int i) { return static_cast<float>(static_cast<int>(bits(a.at[i]) >> by & 15) - 8); });
  }

  static Codes codes(I words) { return words; }
  static Inputs inputs(const int32_t* p) { return iset1(*p); }
  static Inputs four_each(I words) { return words; }
  static void dot(I& sum, Codes c, Inputs x) {
    for (int i = 0; i < kWidth; ++i) {
      int32_t total = 0;
      for (int k = 0; k < 32; k += 8)
        total += static_cast<int8_t>(bits(c.at[i]) >> k) * static_cast<int8_t>(bits(x.at[i]) >> k);
      sum.at[i] = word(bits(sum.at[i]) + bits(total));
    }
  }
  static void prefetch(const void*) {}
};

}  // namespace

const Kernels* kernels_scalar() { return all_kernels<Scalar>(); }

}  // namespace msq
