// Coverage-guided fuzzing of the decoder, built with sanitizers, which stop the run on any access
// out of bounds. The codec is compiled with -fsanitize-coverage=trace-pc, so each branch that it
// takes calls __sanitizer_cov_trace_pc below.
//
//   fuzz_unzip CORPUS [--seconds N] [--keep]
//
// Runs every file of CORPUS, then mutates what is there; an input that reaches something new joins
// the corpus, and with --keep also the directory.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "unzip.h"

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t kEdges = 1 << 16;
constexpr size_t kMostBytes = 4096;
constexpr size_t kRecord = 4;  // bytes of an input that describe a tile
uint8_t hits[kEdges];
uintptr_t previous = 0;

}  // namespace

extern "C" void __sanitizer_cov_trace_pc() {
  const uintptr_t here = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& hit = hits[(here ^ previous) % kEdges];
  if (hit < 255) ++hit;
  previous = here >> 1;
}

namespace {

// An input is the mode, the number of tiles, for each tile its size, stored size and offset, and
// then the weight; all of it may be nonsense.
int32_t Decode(const Bytes& input) {
  if (input.size() < 2) return UNZIP_OK;
  const int mode = input[0] & 1 ? 0xA8 : input[0] & 2 ? 0x88 : input[0];
  const size_t tiles = std::min<size_t>(input[1] % 4, (input.size() - 2) / kRecord);
  std::vector<int64_t> sizes, stored, offsets;
  Bytes coded;
  int64_t total = 0;
  for (size_t tile = 0; tile < tiles; ++tile) {
    const uint8_t* record = &input[2 + kRecord * tile];
    sizes.push_back(512 * (record[0] % 8 + (record[0] < 250)));
    stored.push_back(128 * record[1]);
    offsets.push_back(32 * static_cast<int64_t>(record[2]) - (record[3] & 2 ? 64 : 0));
    coded.push_back(record[3] & 1);
    total += sizes.back();
  }
  const Bytes weight(input.begin() + 2 + kRecord * tiles, input.end());
  Bytes out(total);
  unzip_failure failure{};
  return unzip_decode(weight.data(), weight.size(), offsets.data(), stored.data(), coded.data(),
                      sizes.data(), tiles, mode, 1, out.data(), total, &failure);
}

// The power of two that a count falls in, as one bit.
uint8_t Bucket(uint8_t count) {
  uint8_t bit = count ? 1 : 0;
  for (; count > 1; count >>= 1) bit = static_cast<uint8_t>(bit << 1);
  return bit;
}

// Runs an input; returns whether it reached something for the first time.
bool Explores(const Bytes& input, Bytes* seen) {
  std::memset(hits, 0, sizeof hits);
  previous = 0;
  Decode(input);
  bool fresh = false;
  for (size_t edge = 0; edge < kEdges; ++edge) {
    const uint8_t bucket = Bucket(hits[edge]);
    fresh |= (bucket & ~(*seen)[edge]) != 0;
    (*seen)[edge] |= bucket;
  }
  return fresh;
}

class Mutator {
 public:
  explicit Mutator(unsigned seed) : random_(seed) {}

  size_t Below(size_t limit) { return random_() % std::max<size_t>(limit, 1); }

  Bytes Mutate(const std::vector<Bytes>& corpus) {
    Bytes input = corpus[Below(corpus.size())];
    for (size_t changes = 1 + Below(4); changes > 0; --changes) {
      Change(corpus[Below(corpus.size())], &input);
    }
    input.resize(std::min(input.size(), kMostBytes));
    return input;
  }

 private:
  void Change(const Bytes& other, Bytes* input) {
    const size_t at = Below(input->size());
    const auto byte = static_cast<uint8_t>(random_());
    switch (input->empty() ? 0 : Below(6)) {
      case 0:
        input->insert(input->begin() + static_cast<std::ptrdiff_t>(at), byte);
        break;
      case 1:
        (*input)[at] = byte;
        break;
      case 2:
        (*input)[at] ^= static_cast<uint8_t>(1u << byte % 8);
        break;
      case 3:
        input->resize(at);
        break;
      case 4:  // some words of the other input, in their place
        for (size_t i = at; i < std::min({input->size(), other.size(), at + 8 * (1 + byte % 8)});
             ++i) {
          (*input)[i] = other[i];
        }
        break;
      default:
        std::fill_n(input->begin() + static_cast<std::ptrdiff_t>(at),
                    std::min<size_t>(input->size() - at, 1 + byte % 16), byte & 1 ? 0xFF : 0);
    }
  }

  std::mt19937 random_;
};

// A good weight of one tile as an input.
Bytes Seed(int mode, unsigned seed) {
  std::mt19937 random(seed);
  const size_t size = 512 * (1 + seed % 4);
  Bytes raw(size), weight(size), input;
  for (uint8_t& byte : raw) byte = random() % 8 < seed % 8 ? 0 : random() % (1u << seed % 9);
  uint8_t dictionary[36];
  for (int rank = 0; rank < 36; ++rank) dictionary[rank] = static_cast<uint8_t>(rank);
  const auto bytes = static_cast<int64_t>(size);
  int64_t stored = 0;
  uint8_t coded = 0;
  unzip_encode(raw.data(), bytes, &bytes, 1, mode, dictionary, 1, weight.data(), &stored, &coded);
  input = {static_cast<uint8_t>(mode == 0xA8 ? 1 : 2), 1, static_cast<uint8_t>(seed % 4),
           static_cast<uint8_t>(stored / 128),         0, coded};
  input.insert(input.end(), weight.begin(), weight.begin() + stored);
  if (Decode(input) != UNZIP_OK) {
    std::fprintf(stderr, "seed %u of mode %#x: a good weight does not decode\n", seed, mode);
    std::exit(1);
  }
  return input;
}

Bytes ReadFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

void WriteFile(const std::filesystem::path& directory, const Bytes& content) {
  uint64_t name = 14695981039346656037u;  // FNV-1a
  for (uint8_t byte : content) name = (name ^ byte) * 1099511628211u;
  char text[24];
  std::snprintf(text, sizeof text, "%016llx.bin", static_cast<unsigned long long>(name));
  std::ofstream(directory / text, std::ios::binary)
      .write(reinterpret_cast<const char*>(content.data()),
             static_cast<std::streamsize>(content.size()));
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 20;
  bool keep = false;
  for (int i = 2; i < argc; ++i) {
    if (std::string(argv[i]) == "--keep") keep = true;
    if (std::string(argv[i]) == "--seconds" && i + 1 < argc) seconds = std::atof(argv[i + 1]);
  }
  if (argc < 2) return std::fprintf(stderr, "usage: fuzz_unzip CORPUS [--seconds N] [--keep]\n"), 2;
  const std::filesystem::path directory = argv[1];
  Bytes seen(kEdges);
  std::vector<Bytes> corpus;
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) files.push_back(entry);
  std::sort(files.begin(), files.end());
  for (const auto& file : files) {
    corpus.push_back(ReadFile(file));
    Explores(corpus.back(), &seen);
  }
  const size_t before = corpus.size();
  const auto add = [&](const Bytes& input) {
    if (!Explores(input, &seen)) return;
    corpus.push_back(input);
    if (keep) WriteFile(directory, input);
  };
  for (unsigned seed = 0; seed < 64; ++seed) add(Seed(seed % 2 ? 0xA8 : 0x88, seed));
  Mutator mutator(static_cast<unsigned>(before));
  size_t runs = 0;
  const auto started = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count() <
         seconds) {
    add(mutator.Mutate(corpus));
    ++runs;
  }
  const auto reached = kEdges - std::count(seen.begin(), seen.end(), 0);
  std::printf("%zu of the corpus and %zu mutated inputs, %zu new, %zu edges\n", before, runs,
              corpus.size() - before, static_cast<size_t>(reached));
  return 0;
}
