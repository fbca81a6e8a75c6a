// Linears of many rows with AMX. Few rows, and all else, are left to AVX-512 VNNI, whose panels
// these are: a step of bytes lies in them as the tiles take it.
//
// Four products of tiles take 64 cycles, and so does reading what they take from the second-level
// cache. Of a panel's weights as much as fits the first meets all rows, of the inputs as much as
// fits the second meets all panels; sums wait in memory for the next part of the inputs.

#include "amx_inputs.h"
#include "amx_tiles.h"
#include "linear_impl.h"

namespace msq {
namespace {

constexpr int64_t kFewRows = 8, kFewFloatRows = 4;  // up to which vectors are as fast
constexpr int64_t kHeldSteps = 8;                   // whose weights are held for all rows
constexpr int64_t kHeldInputs = 1 << 20;            // bytes of inputs that all panels meet
constexpr int64_t kHeldSums = 1 << 22;              // that wait for the next part of the inputs

using Vectors = IntegerLinear<Avx512Vnni>;
static_assert(Vectors::kColumns == kWide, "the panels of both");

struct TileCall : Call {
  int64_t row_bytes;            // of inputs
  bool* no_parts;               // of rows of floats
  int64_t last = 0;             // steps of all inputs
  int64_t group = 0;            // steps of a group; 0 if there is one scale for all inputs
  int64_t held = 0;             // steps whose weights are held
  int64_t begin = 0, end = 0;   // steps of this part of the inputs
  int64_t first = 0;            // panel of this part of the outputs
  int32_t* all_sums = nullptr;  // of its panels; null if all inputs are in one part

  int64_t sums_of_panel() const { return up_to(blocks(), 2) * tall * kWide; }
};

bool is_grouped(const Params& p) { return p.groups() > 1 || p.row_scale; }

template <int BITS, bool FLOAT>
struct Many {
  static constexpr int64_t kInputs = FLOAT ? kFloatStep : 64;  // of a step
  static constexpr int kParts = FLOAT ? kFloatParts : 1;
  static constexpr int64_t kPacked = kInputs * BITS / 32 * kPanelRow;  // bytes of a step

  // A group's sum, without what was added to codes or zero points.
  static __m512 group_sum(const Call& c, int64_t row, int64_t column, int64_t group,
                          const int32_t* sums) {
    const Params& p = c.p;
    const int64_t at = row * p.groups() + group;
    if constexpr (!FLOAT)
      return _mm512_cvtepi32_ps(
          _mm512_sub_epi32(_mm512_load_si512(sums), _mm512_set1_epi32(c.sums[at])));
    const __m512 sum = _mm512_load_ps(sums);
    if (!p.zero_scale) return sum;
    const __m512 zero = _mm512_loadu_ps(p.floats(p.zero_scale) + group * p.padded() + column);
    return _mm512_sub_ps(sum, _mm512_mul_ps(zero, _mm512_set1_ps(c.float_sums[at])));
  }

  static void add_group(const Call& c, int64_t row, int64_t count, int64_t column, int64_t group,
                        const int32_t* sums, float* held, bool first) {
    const float* scale = c.p.floats(c.p.scale) + group * c.p.padded() + column;
    const __m512 by[2] = {_mm512_loadu_ps(scale), _mm512_loadu_ps(scale + 16)};
    for (int64_t r = 0; r < count; ++r)
      for (int v = 0; v < 2; ++v, sums += 16, held += 16) {
        const __m512 sum = group_sum(c, row + r, column + 16 * v, group, sums);
        const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(held);
        _mm512_store_ps(held, _mm512_fmadd_ps(sum, by[v], before));
      }
  }

  // Outputs of one row and half of a panel.
  static void finish(const TileCall& t, int64_t row, int64_t column, const int32_t* sums) {
    const Params& p = t.p;
    const int64_t left = p.outputs - column;
    if (left <= 0) return;
    const __mmask16 there = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    const __m512 by = _mm512_loadu_ps(p.floats(p.scale) + column);
    __m512 y;
    if (t.group) {
      y = Vectors::of_groups(t, row, column, _mm512_load_ps(sums));
    } else if (FLOAT) {
      const __m512 sum = group_sum(t, row, column, 0, sums);
      y = Vectors::of_groups(t, row, column, _mm512_mul_ps(sum, by));
    } else {
      y = Vectors::of_sum(t, row, column, by, _mm512_load_si512(sums));
    }
    _mm512_mask_storeu_ps(t.y + row * p.outputs + column, there, y);
  }

  // Outputs are written half a panel at a time, far from each other.
  static void ask_for_outputs(const TileCall& t, int64_t row, int64_t count, int64_t column) {
    const char* at = reinterpret_cast<const char*>(t.y + row * t.p.outputs + column);
    for (int64_t r = 0; r < count; ++r, at += t.p.outputs * 4) {
      __builtin_prefetch(at, 1);
      __builtin_prefetch(at + 64, 1);
    }
  }

  // Steps [begin, end) of one or two blocks of rows; `held` are the sums of steps before.
  template <bool TWO>
  static void rows(const TileCall& t, int64_t block, const uint8_t* weights, int64_t column,
                   int64_t begin, int64_t end, int32_t* held) {
    const uint8_t* inputs =
        reinterpret_cast<const uint8_t*>(t.codes) + block * t.tall * t.row_bytes;
    const int64_t high = t.rows_of(block), low = TWO ? t.rows_of(block + 1) : 0,
                  row = block * t.tall;
    const int64_t first_bytes = high * kTileRow, second_bytes = low * kTileRow;
    const auto add = [&](int64_t from, int64_t to) {
      add_products<FLOAT, kParts, TWO>(inputs + from * kParts * first_bytes, first_bytes,
                                       inputs + t.tall * t.row_bytes + from * kParts * second_bytes,
                                       second_bytes, weights + (from - begin) * kStepBytes,
                                       to - from);
    };
    held += row * kWide;
    if (end == t.last) ask_for_outputs(t, row, high + low, column);
    if (!t.group) {
      if (begin > 0)
        load_sums<TWO>(held, t.tall);
      else
        zero_sums<TWO>();
      add(begin, end);
      store_sums<TWO>(held, t.tall);
    }
    alignas(64) int32_t sums[kPairSums];
    for (int64_t step = begin; t.group && step < end; step += t.group) {
      zero_sums<TWO>();
      add(step, step + t.group);
      store_sums<TWO>(sums, t.tall);
      add_group(t, row, high + low, column, step / t.group, sums, reinterpret_cast<float*>(held),
                step == 0);
    }
    if (end < t.last) return;
    for (int64_t r = 0; r < high + low; ++r)
      for (int v = 0; v < 2; ++v) finish(t, row + r, column + 16 * v, held + r * kWide + 16 * v);
  }

  // Asks for one of `parts` parts of some bytes.
  static void ask_for(const uint8_t* from, int64_t bytes, int64_t part, int64_t parts) {
    const int64_t end = bytes * (part + 1) / parts;
    for (int64_t at = bytes * part / parts / 64 * 64; at < end; at += 64)
      _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T1);
  }

  static void panel(void* job, int64_t index) {
    TileCall& t = *static_cast<TileCall*>(job);
    const Params& p = t.p;
    int32_t* held = t.all_sums ? t.all_sums + index * t.sums_of_panel()
                               : static_cast<int32_t*>(scratch(3, t.sums_of_panel() * 4));
    index += t.first;
    const int64_t column = index * kWide, blocks = t.blocks();
    const int64_t rows_of_panel = steps_of(p.inputs, BITS), bytes = rows_of_panel * kPanelRow;
    const uint8_t* codes = t.w.words() + index * bytes;
    uint8_t* spread = static_cast<uint8_t*>(scratch(4, t.held * kStepBytes));
    if (!held || !spread) {
      t.failed = true;
      return;
    }
    const bool more = (index + 1) * kWide < p.outputs;
    const Tiles tiles(t.tall);
    for (int64_t begin = t.begin; begin < t.end; begin += t.held) {
      const int64_t end = at_most(t.end, begin + t.held);
      const uint8_t* weights = weights_of<BITS, FLOAT>(codes, rows_of_panel, begin, end, spread);
      for (int64_t block = 0; block < blocks; block += 2) {
        if (more)
          ask_for(codes + bytes + begin * kPacked, (end - begin) * kPacked, block / 2,
                  (blocks + 1) / 2);
        if (block + 1 < blocks)
          rows<true>(t, block, weights, column, begin, end, held);
        else
          rows<false>(t, block, weights, column, begin, end, held);
      }
    }
  }

  static void prepare(void* job, int64_t row) {
    TileCall& t = *static_cast<TileCall*>(job);
    t.no_parts[row] = !split_row(t, row);
    if (t.p.zero_scale) sum_groups(t, row);
  }

  // Steps of inputs that all panels meet: as many as fit, and in all parts about as many.
  static int64_t part_of_inputs(const TileCall& t) {
    const int64_t fit = kHeldInputs / (t.rows * kParts * kTileRow) / t.held * t.held;
    const int64_t most = fit > t.held ? fit : t.held, parts = (t.last + most - 1) / most;
    return up_to((t.last + parts - 1) / parts, t.held);
  }

  static void run(TileCall& t, int threads) {
    t.last = (t.p.inputs + kInputs - 1) / kInputs;
    t.group = is_grouped(t.p) ? t.p.group / kInputs : 0;
    t.held = t.group ? up_to(kHeldSteps, t.group) : kHeldSteps;
    if (FLOAT)
      share_out(t.rows, threads, prepare, &t);
    else
      share_out(t.rows, threads, Quantize<Avx512Vnni>::quantize, static_cast<Call*>(&t));
    const int64_t panels = (t.p.outputs + kWide - 1) / kWide, part = part_of_inputs(t);
    int64_t at_once = panels;
    if (part < t.last) {
      at_once = at_most(panels, kHeldSums / t.sums_of_panel() + threads);
      t.all_sums = static_cast<int32_t*>(scratch(3, at_once * t.sums_of_panel() * 4));
      t.failed = !t.all_sums;
    }
    for (t.first = 0; t.first < panels && !t.failed; t.first += at_once)
      for (t.begin = 0; t.begin < t.last; t.begin = t.end) {
        t.end = at_most(t.last, t.begin + part);
        const int64_t count = at_most(at_once, panels - t.first);
        share_out(count, threads, panel, &t);
      }
  }
};

bool fits(const Params& p) {
  if (!is_grouped(p)) return true;
  return p.group % (p.input == MSQ_FLOAT ? Many<8, true>::kInputs : Many<8, false>::kInputs) == 0;
}

// Rows without exact parts are computed with vectors.
void without_parts(const TileCall& t, int threads, bool* out_of_memory) {
  for (int64_t row = 0, end = 0; row < t.rows; row = end + 1) {
    for (end = row; end < t.rows && t.no_parts[end];) ++end;
    if (end > row)
      kernels_avx512_vnni()->linear(t.w, t.p, t.x + row * t.p.inputs, end - row,
                                    t.y + row * t.p.outputs, threads, out_of_memory);
  }
}

void many_rows(const Weights& w, const Params& p, const float* x, int64_t rows, float* y,
               int threads, bool* out_of_memory) {
  const bool integer = p.input != MSQ_FLOAT;
  const int64_t tiles = (rows + kTall - 1) / kTall, tall = (rows + tiles - 1) / tiles;
  const int64_t row_bytes = up_to(p.inputs, kBlock) * (integer ? 1 : 2 * kFloatParts);
  void* inputs = scratch(0, rows * row_bytes + kTall * kTileRow);  // tiles are read whole
  void* scales = scratch(1, rows * 4);
  void* sums = scratch(2, rows * p.groups() * 4);
  bool* no_parts = static_cast<bool*>(scratch(5, rows));
  if (!inputs || !scales || !sums || !no_parts) {
    *out_of_memory = true;
    return;
  }
  TileCall t = {{w, p, x, rows, y, tall, row_bytes / 4, static_cast<int32_t*>(inputs),
                 static_cast<float*>(inputs), static_cast<float*>(scales),
                 static_cast<int32_t*>(sums), static_cast<float*>(sums), false},
                row_bytes,
                no_parts};
  if (integer)
    w.bits == 8 ? Many<8, false>::run(t, threads) : Many<4, false>::run(t, threads);
  else
    w.bits == 8 ? Many<8, true>::run(t, threads) : Many<4, true>::run(t, threads);
  *out_of_memory |= t.failed;
  if (p.input == MSQ_STATIC) Linear<Avx512Vnni>::keep_nan(t);
  if (!integer) without_parts(t, threads, out_of_memory);
}

void linear(const Weights& w, const Params& p, const float* x, int64_t rows, float* y, int threads,
            bool* out_of_memory) {
  for (int64_t first = 0; first < rows; first += kChunk) {
    const int64_t count = at_most(kChunk, rows - first);
    const bool many = count > (p.input == MSQ_FLOAT ? kFewFloatRows : kFewRows) && fits(p);
    const auto some = many ? many_rows : kernels_avx512_vnni()->linear;
    some(w, p, x + first * p.inputs, count, y + first * p.outputs, threads, out_of_memory);
  }
}

}  // namespace

const Kernels* kernels_amx() {
  static const Kernels found = [] {
    Kernels made = *kernels_avx512_vnni();
    made.linear = linear;
    return made;
  }();
  return &found;
}

}  // namespace msq
