#include "attention_impl.h"
#include "neon.h"

namespace msq {
namespace {

// Two rows of inputs times two outputs, 8 inputs each, in one instruction. Panels are those of
// NEON with dot products, which one row of inputs still takes.
struct NeonI8mm : NeonDot {
  static constexpr int V = kVectors;

  // The words of inputs 0 to 3 and 4 to 7 of a few outputs, the latter `next` bytes on if apart.
  struct Words {
    I first, second;
  };
  template <int BITS>
  static Words words(const uint8_t* at, int64_t next) {
    const I here = iload(at);
    if (BITS == 4) return {low_halves(here), high_halves(here)};
    return {here, iload(at + next)};
  }

  // Two words of two rows.
  static Inputs two_rows(const int32_t* first, const int32_t* second) {
    return vreinterpretq_s8_s32(vcombine_s32(vld1_s32(first), vld1_s32(second)));
  }

  // From squares of two rows and two outputs to one row of outputs.
  static I row_of(I left, I right, bool second) {
    const int64x2_t a = vreinterpretq_s64_s32(left), b = vreinterpretq_s64_s32(right);
    return vreinterpretq_s32_s64(second ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
  }

  // As Panel::tile.
  template <int M, int BITS>
  __attribute__((always_inline)) static void tile(const uint8_t* panel, const int32_t* in,
                                                  int64_t begin, int64_t end, const int32_t* before,
                                                  I (&total)[M][V]) {
    constexpr int64_t kBytes = kWidth * V * 4, kEach = BITS == 8 ? 1 : 2, kSteps = 2 / kEach;
    constexpr int kPairs = (M + 1) / 2;
    I sums[kPairs][2 * V];
    each<kPairs>([&](auto p) __attribute__((always_inline)) {
      each<2 * V>([&](auto v) __attribute__((always_inline)) { sums[p][v] = izero(); });
    });
    for (int64_t step = begin; step < end; step += kSteps) {
      const uint8_t* at = panel + step * kBytes;
      const int64_t next = step + 1 < end ? kBytes : 0;  // after the last one inputs are zeros
      const int32_t* x = in + step * kEach / kWords * kWords * M + step * kEach % kWords;
      for (int64_t line = 0; line < kSteps * kBytes; line += 64)
        prefetch(at + (M <= 2 ? kAhead : kHeld) + line);
      Inputs rows[kPairs];
      each<kPairs>([&](auto p) __attribute__((always_inline)) {
        constexpr int first = 2 * p, second = first + 1 < M ? first + 1 : first;
        rows[p] = two_rows(x + first * kWords, x + second * kWords);
      });
      each<V>([&](auto v) __attribute__((always_inline)) {
        const Words w = words<BITS>(at + v * kWidth * 4, next);
        const Codes left = codes(vzip1q_s32(w.first, w.second));
        const Codes right = codes(vzip2q_s32(w.first, w.second));
        each<kPairs>([&](auto p) __attribute__((always_inline)) {
          sums[p][2 * v] = vmmlaq_s32(sums[p][2 * v], rows[p], left);
          sums[p][2 * v + 1] = vmmlaq_s32(sums[p][2 * v + 1], rows[p], right);
        });
        __asm__ volatile("" ::: "memory");  // else GCC loads all first and has no registers left
      });
    }
    each<M>([&](auto m) __attribute__((always_inline)) {
      each<V>([&](auto v) __attribute__((always_inline)) {
        const I sum = row_of(sums[m / 2][2 * v], sums[m / 2][2 * v + 1], m % 2);
        total[m][v] = before ? iadd(sum, iload(before + (m * V + v) * kWidth)) : sum;
      });
    });
  }
};

}  // namespace

const Kernels* kernels_neon_i8mm() { return all_kernels<NeonI8mm>(); }

}  // namespace msq
