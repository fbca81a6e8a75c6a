// Corrupts good weights at random and decodes them; built with sanitizers, which stop the run on
// any access out of bounds. The same round number gives the same inputs.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "unzip.h"

namespace {

using Random = std::mt19937;

struct Case {
  int mode;
  std::vector<int64_t> sizes, stored, offsets;
  std::vector<uint8_t> stream, weight, coded;
};

Case MakeCase(Random& random) {
  Case made;
  made.mode = random() % 2 ? 0xA8 : 0x88;
  int64_t total = 0;
  for (unsigned tile = 0, tiles = 1 + random() % 3; tile < tiles; ++tile) {
    made.sizes.push_back(512 * (1 + random() % 64));
    total += made.sizes.back();
  }
  const unsigned zeros = random() % 256, spread = 1 + random() % 128;
  made.stream.resize(total);
  for (uint8_t& byte : made.stream) byte = random() % 256 < zeros ? 0 : random() % spread;
  uint8_t dictionary[36];
  for (int rank = 0; rank < 36; ++rank) dictionary[rank] = static_cast<uint8_t>(rank);
  made.weight.resize(total);
  made.stored.resize(made.sizes.size());
  made.coded.resize(made.sizes.size());
  unzip_encode(made.stream.data(), total, made.sizes.data(), made.sizes.size(), made.mode,
               dictionary, 1, made.weight.data(), made.stored.data(), made.coded.data());
  int64_t end = 0;
  for (int64_t stored : made.stored) {
    made.offsets.push_back(end);
    end += stored;
  }
  made.weight.resize(end);
  return made;
}

int32_t DecodeCase(const Case& made, std::vector<uint8_t>* out) {
  unzip_failure failure{};
  out->resize(made.stream.size());
  return unzip_decode(made.weight.data(), made.weight.size(), made.offsets.data(),
                      made.stored.data(), made.coded.data(), made.sizes.data(), made.sizes.size(),
                      made.mode, 2, out->data(), out->size(), &failure);
}

void Corrupt(Random& random, Case* made) {
  for (unsigned flips = 1 + random() % 4; flips > 0; --flips) {
    made->weight[random() % made->weight.size()] ^= static_cast<uint8_t>(1u << random() % 8);
  }
  const size_t tile = random() % made->sizes.size();
  switch (random() % 8) {
    case 0:
      made->offsets[tile] += static_cast<int64_t>(random()) - (int64_t{1} << 31);
      break;
    case 1:
      made->stored[tile] = 128 * static_cast<int64_t>(random() % 512);
      break;
    case 2:
      made->coded[tile] ^= 1;
      break;
    case 3:
      made->weight.resize(random() % made->weight.size());
      break;
    case 4:
      for (uint8_t& byte : made->weight) byte = static_cast<uint8_t>(random());
      break;
    default:
      break;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned rounds = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 2000;
  unsigned refused = 0;
  for (unsigned round = 0; round < rounds; ++round) {
    Random random(round);
    Case made = MakeCase(random);
    std::vector<uint8_t> out;
    if (DecodeCase(made, &out) != UNZIP_OK || out != made.stream) {
      std::fprintf(stderr, "round %u: a good weight does not decode\n", round);
      return 1;
    }
    Corrupt(random, &made);
    refused += DecodeCase(made, &out) != UNZIP_OK;
  }
  std::printf("%u rounds, %u refused\n", rounds, refused);
  return 0;
}
