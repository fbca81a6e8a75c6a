// The tiles of AMX: registers of 16 rows of 64 bytes. A product takes 16 rows of inputs and 16 of
// the weight's, a step, in which 4 bytes (2 of bfloat16) of each of 16 columns lie together.
//
//   0 to 3   sums: of one block of rows and both halves of a panel's columns, then of another
//   4, 5     inputs of the two blocks of rows
//   6, 7     weights of the halves
//
// The intrinsics of GCC 12 do not say what memory they read.

#ifndef MS_QUANT_AMX_TILES_H_
#define MS_QUANT_AMX_TILES_H_

#include <stdint.h>

namespace msq {
namespace {

constexpr int64_t kTall = 16;         // rows of a tile at most
constexpr int64_t kWide = 32;         // columns of a panel: two tiles
constexpr int64_t kTileRow = 64;      // bytes
constexpr int64_t kPanelRow = 128;    // bytes of a step's rows, and of a row of sums
constexpr int64_t kStepBytes = 2048;  // of two tiles of weights
constexpr int64_t kPairSums = 2 * kTall * kWide;

struct TileShapes {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64, "what ldtilecfg reads");

// While it lives this thread has tiles, those of inputs and sums `tall` rows high.
class Tiles {
 public:
  explicit Tiles(int64_t tall) {
    TileShapes shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shapes.row_bytes[i] = static_cast<uint16_t>(kTileRow);
      shapes.rows[i] = static_cast<uint8_t>(i < 6 ? tall : kTall);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~Tiles() { __asm__ volatile("tilerelease" : : : "memory"); }
};

template <int TILE>
inline void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(from), "r"(stride), "i"(TILE)
                   : "memory");
}

template <int TILE>
inline void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

// sums += inputs * weights: signed bytes times unsigned ones, or pairs of bfloat16.
template <bool FLOAT, int SUMS, int INPUTS, int WEIGHTS>
inline void multiply() {
  if constexpr (FLOAT)
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(SUMS), "i"(INPUTS), "i"(WEIGHTS));
  else
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(SUMS), "i"(INPUTS), "i"(WEIGHTS));
}

template <bool TWO>
inline void zero_sums() {
  zero_tile<0>();
  zero_tile<1>();
  if constexpr (TWO) {
    zero_tile<2>();
    zero_tile<3>();
  }
}

// Sums lie as [row of both blocks][column].
template <bool TWO>
inline void load_sums(const int32_t* from, int64_t tall) {
  load_tile<0>(from, kPanelRow);
  load_tile<1>(from + kWide / 2, kPanelRow);
  if constexpr (TWO) {
    load_tile<2>(from + tall * kWide, kPanelRow);
    load_tile<3>(from + tall * kWide + kWide / 2, kPanelRow);
  }
}

template <bool TWO>
inline void store_sums(int32_t* to, int64_t tall) {
  store_tile<0>(to, kPanelRow);
  store_tile<1>(to + kWide / 2, kPanelRow);
  if constexpr (TWO) {
    store_tile<2>(to + tall * kWide, kPanelRow);
    store_tile<3>(to + tall * kWide + kWide / 2, kPanelRow);
  }
}

// Adds the products of `steps` steps, the inputs of each in PARTS that have the same weights.
// first_bytes, second_bytes: of a part of a step of a block of rows.
template <bool FLOAT, int PARTS, bool TWO>
inline void add_products(const uint8_t* first, int64_t first_bytes, const uint8_t* second,
                         int64_t second_bytes, const uint8_t* weights, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step, weights += kStepBytes) {
    load_tile<6>(weights, kPanelRow);
    load_tile<7>(weights + kPanelRow / 2, kPanelRow);
    for (int part = 0; part < PARTS; ++part) {
      load_tile<4>(first, kTileRow);
      multiply<FLOAT, 0, 4, 6>();
      multiply<FLOAT, 1, 4, 7>();
      first += first_bytes;
      if constexpr (TWO) {
        load_tile<5>(second, kTileRow);
        multiply<FLOAT, 2, 5, 6>();
        multiply<FLOAT, 3, 5, 7>();
        second += second_bytes;
      }
    }
  }
}

}  // namespace
}  // namespace msq

#endif  // MS_QUANT_AMX_TILES_H_
