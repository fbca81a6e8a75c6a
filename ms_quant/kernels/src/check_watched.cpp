// Watched pages, and linears whose arrays lie in them, for check_kernels. The sanitizers let the
// handler of pages.cpp have the faults that it asks for, so all of this runs under them too.

#include "check_watched.h"

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <thread>

#include "check_problem.h"

namespace check {
namespace {

void expect(bool right, const char* what) {
  if (right) return;
  printf("watched: %s\n", what);
  exit(1);
}

struct Pages {
  int64_t bytes;
  MsqPages* pages;

  explicit Pages(int64_t count) : bytes(count), pages(msq_pages_new(count)) {
    expect(pages, "no memory");
  }
  ~Pages() { msq_pages_free(pages); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  uint8_t* start() const { return msq_pages_start(pages); }
  bool changed() const { return msq_pages_changed(pages); }
};

// A number as a type with so many bits of fraction holds it, by way of float64.
float rounded(float x, int fraction, int smallest_exponent, double largest) {
  if (x == 0 || isinf(x)) return x;
  const int exponent = std::max(ilogb(x), smallest_exponent);
  const double y = ldexp(nearbyint(ldexp(double{x}, fraction - exponent)), exponent - fraction);
  return fabs(y) > largest ? copysignf(INFINITY, x) : static_cast<float>(y);
}

float held(float x, int type) {
  if (type == MSQ_BFLOAT16) return rounded(x, 7, -126, 3.4e38);
  return type == MSQ_FLOAT16 ? rounded(x, 10, -14, 65504) : x;
}

// One array of a linear: where the problem has it, and where it lies in the pages.
struct Array {
  void* own;
  int64_t bytes, offset;
  const char* dtype;
};

// A random linear, and the same one in watched pages.
class WatchedProblem {
 public:
  explicit WatchedProblem(int isa) : isa_(isa), x_(p_.x), cell_() {
    add_arrays();
    int64_t bytes = 0;
    for (Array& array : arrays_) {
      array.offset = bytes;
      bytes += (array.bytes + 63) / 64 * 64;
    }
    pages_ = std::make_unique<Pages>(bytes);
    for (const Array& array : arrays_) write(array, 0, array.bytes);
    fill_cell();
  }

  // Checks that the pages say `changed`, and that a call computes what the problem says. If the
  // arrays have `moved`, an operator is given those of the problem in place of the pages.
  void check(bool changed, bool moved = false) {
    expect(pages_->changed() == changed, changed ? "a write was missed" : "no write, but a change");
    const int phase = static_cast<int>(below(2));
    std::vector<float> y(static_cast<size_t>(p_.rows * p_.outputs), NAN);
    expect(run(phase, y, moved) == MSQ_OK, "a call failed");
    expect(!pages_->changed(), "packed, but changed");
    if (p_.linear.input_factor) make_factors();
    const float* bias = p_.linear.bias;
    if (phase) p_.linear.bias = nullptr;
    const std::vector<float> expected = p_.run(isa_, 1);
    p_.linear.bias = bias;
    for (size_t i = 0; i < y.size(); ++i)
      expect(!memcmp(&y[i], &expected[i], 4), "a result differs");
  }

  // Changes something in an array: of the problem, and unless they have `moved` in the pages.
  void change(bool moved) {
    const Array& array = arrays_[static_cast<size_t>(below(static_cast<int64_t>(arrays_.size())))];
    const int64_t item = !strcmp(array.dtype, "int8") ? 1 : 4;
    const int64_t from = item * below(array.bytes / item), to = item * below(array.bytes / item);
    uint8_t* bytes = static_cast<uint8_t*>(array.own);
    if (array.own == offset_.data())
      memset(bytes, static_cast<int>(below(256)), static_cast<size_t>(array.bytes));
    else if (array.own == clip_.data())
      clip_[0] = 0.5f + static_cast<float>(below(50)) / 100;
    else
      memcpy(bytes + to, bytes + from, static_cast<size_t>(item));
    p_.linear.offset = offset_.empty() ? 0.0f : static_cast<float>(offset_[0]);
    p_.linear.clip = clip_[0];
    if (moved) return;
    if (array.own == offset_.data())
      write(array, 0, array.bytes);
    else
      write(array, to, item);
  }

  // What cannot be packed is an error until it is mended. Whether there is such a thing.
  bool spoil() {
    if (p_.bits == 4) refuse(p_.codes, 9, MSQ_NOT_INT4);
    const bool offsets = offset_.size() > 1;
    if (offsets) refuse(offset_, static_cast<int8_t>(offset_[0] ^ 1), MSQ_OFFSETS_DIFFER);
    return p_.bits == 4 || offsets;
  }

  void check_operator() {
    Operator op(*this, 0, false);
    std::vector<float> y(static_cast<size_t>(p_.rows * p_.outputs));
    op.dtypes[0] = "float16";
    expect(op.call(y) == MSQ_BAD_ARGUMENT, "an operator took float16");
    op.dtypes[0] = "float32";
    ++op.shapes[0][1];
    expect(op.call(y) == MSQ_BAD_ARGUMENT, "an operator took another size");
    --op.shapes[0][1];
    ++cell_.process;
    expect(op.call(y) == MSQ_BAD_BLOB, "an operator took another process's linear");
    --cell_.process;
  }

 private:
  // A call as MindSpore makes it, with the arrays in the pages or, if they have `moved`, others.
  struct Operator {
    WatchedProblem& w;
    int32_t phase;
    std::vector<void*> params;
    std::vector<int> ndims;
    std::vector<std::vector<int64_t>> shapes;
    std::vector<const char*> dtypes;

    Operator(WatchedProblem& problem, int which, bool moved) : w(problem), phase(which) {
      add(w.x_.data(), "float32", {w.p_.rows, w.p_.inputs});
      add(&w.cell_, "uint8", {static_cast<int64_t>(sizeof w.cell_)});
      add(&phase, "int32", {});
      for (const Array& array : w.arrays_) {
        add(moved ? array.own : w.place(array), array.dtype,
            {array.bytes / (strcmp(array.dtype, "int8") ? 4 : 1)});
      }
    }

    void add(void* at, const char* dtype, std::vector<int64_t> shape) {
      params.push_back(at);
      dtypes.push_back(dtype);
      ndims.push_back(static_cast<int>(shape.size()));
      shapes.push_back(std::move(shape));
    }

    int call(std::vector<float>& y) {
      Operator all = *this;
      all.add(y.data(), "float32", {w.p_.rows, w.p_.outputs});
      std::vector<int64_t*> sizes;
      for (std::vector<int64_t>& shape : all.shapes) sizes.push_back(shape.data());
      return MsqWatchedOp(static_cast<int>(all.params.size()), all.params.data(), all.ndims.data(),
                          sizes.data(), all.dtypes.data(), nullptr, nullptr);
    }
  };

  void add_arrays() {
    MsqLinear& l = p_.linear;
    clip_ = {l.clip};
    if (l.input == MSQ_STATIC)
      offset_.assign(static_cast<size_t>(p_.inputs), static_cast<int8_t>(l.offset));
    if (l.input_factor) divisor_ = positive(p_.inputs);
    for (float& d : divisor_)  // half of them in the middle of two numbers of a narrower type
      if (below(2))
        d = static_cast<float>(below(2) ? 257 + 2 * below(127) : 2049 + 2 * below(1023));
    add(p_.codes, "int8");
    add(p_.mul, "float32");
    add(l.input_factor ? divisor_ : p_.input_scale, "float32");
    add(p_.scale, "float32");
    add(p_.row_scale, "float32");
    add(p_.bias, "float32");
    add(p_.int_bias, "int32");
    add(p_.zeros, "int8");
    add(offset_, "int8");
    add(clip_, "float32");
  }

  template <class T>
  void add(std::vector<T>& own, const char* dtype) {
    if (!own.empty())
      arrays_.push_back({own.data(), static_cast<int64_t>(own.size() * sizeof(T)), 0, dtype});
  }

  // Where an array of the problem lies in the pages; null if there is none.
  template <class T>
  const T* watched(const T* own) const {
    for (const Array& array : arrays_)
      if (array.own == own) return reinterpret_cast<const T*>(place(array));
    return nullptr;
  }

  uint8_t* place(const Array& array) const { return pages_->start() + array.offset; }

  void write(const Array& array, int64_t at, int64_t count) {
    memcpy(place(array) + at, static_cast<uint8_t*>(array.own) + at, static_cast<size_t>(count));
  }

  void fill_cell() {
    MsqLinear& l = cell_.phases[0] = p_.linear;
    for (const float** own : {&l.mul, &l.input_scale, &l.scale, &l.row_scale, &l.bias})
      *own = watched(*own);
    l.zero_point = watched(l.zero_point);
    l.int_bias = watched(l.int_bias);
    if (l.input_factor) {
      factor_.resize(static_cast<size_t>(p_.inputs));
      l.input_factor = cell_.factor = factor_.data();
      cell_.divisor = watched(divisor_.data());
      cell_.held_in = static_cast<int32_t>(below(3));
    }
    cell_.phases[1] = l;
    cell_.phases[1].bias = nullptr;
    cell_.process = msq_process();
    cell_.pages = pages_->pages;
    cell_.offset = offset_.empty() ? nullptr : watched(offset_.data());
    cell_.clip = watched(clip_.data());
    cell_.codes = watched(p_.codes.data());
    cell_.isa = isa_;
    cell_.bits = p_.bits;
    cell_.weights_bytes = msq_weights_bytes(isa_, p_.outputs, p_.inputs, p_.bits);
    weights_.resize(static_cast<size_t>(cell_.weights_bytes));
    cell_.weights = weights_.data();
    for (int i = 0; i < 2; ++i) {
      cell_.params_bytes[i] = msq_params_bytes(&cell_.phases[i]);
      params_[i].resize(static_cast<size_t>(cell_.params_bytes[i]));
      cell_.params[i] = params_[i].data();
    }
    cell_.arrays = static_cast<int64_t>(arrays_.size());
    for (size_t i = 0; i < arrays_.size(); ++i) cell_.offsets[i] = arrays_[i].offset;
  }

  void make_factors() {
    for (size_t i = 0; i < divisor_.size(); ++i) {
      p_.input_scale[i] = held(1.0f / held(divisor_[i], cell_.held_in), cell_.held_in);
      expect(factor_[i] == p_.input_scale[i], "a factor is rounded to another number");
    }
  }

  int run(int phase, std::vector<float>& y, bool moved) {
    if (moved || below(2)) return Operator(*this, phase, moved).call(y);
    return msq_watched_linear(&cell_, phase, x_.data(), p_.rows, y.data(),
                              1 + static_cast<int>(below(3)));
  }

  void refuse(std::vector<int8_t>& own, int8_t wrong, int status) {
    int8_t* at = const_cast<int8_t*>(watched(own.data())) + own.size() - 1;
    *at = wrong;
    std::vector<float> y(static_cast<size_t>(p_.rows * p_.outputs));
    for (int time = 0; time < 2; ++time)
      expect(run(0, y, false) == status && pages_->changed(), "what cannot be packed was packed");
    *at = own.back();
  }

  Problem p_;
  int isa_;
  std::vector<float> x_, divisor_, clip_, factor_;
  std::vector<int8_t> offset_;
  std::vector<Array> arrays_;
  std::unique_ptr<Pages> pages_;
  Bytes weights_, params_[2];
  MsqWatchedLinear cell_;
};

void at_fault(int) { _exit(42); }

}  // namespace

void check_pages() {
  std::vector<std::unique_ptr<Pages>> all;
  for (int64_t count = 1 + below(4); count; --count)
    all.push_back(std::make_unique<Pages>(1 + below(20000)));
  for (const auto& one : all) {
    expect(one->changed(), "new pages count as changed");
    msq_pages_watch(one->pages);
    uint8_t sum = 0;
    for (int64_t i = 0; i < one->bytes; ++i) sum |= one->start()[i];
    expect(!sum && !one->changed(), "new pages are zeros, and reading is no change");
  }
  const size_t left = static_cast<size_t>(below(static_cast<int64_t>(all.size())));
  const auto write = [&](int64_t first, int64_t step) {
    for (size_t i = 0; i < all.size(); ++i)
      for (int64_t at = first; i != left && at < all[i]->bytes; at += step)
        all[i]->start()[at] = static_cast<uint8_t>(at + 1);
  };
  std::thread other(write, 0, 2);
  write(1, 2);
  other.join();
  for (size_t i = 0; i < all.size(); ++i) {
    expect(all[i]->changed() == (i != left), "those that were written to have changed");
    for (int64_t at = 0; i != left && at < all[i]->bytes; ++at)
      expect(all[i]->start()[at] == static_cast<uint8_t>(at + 1), "a write was lost");
  }
}

void check_other_faults() {
  const Pages pages(1);
  const pid_t child = fork();
  if (!child) {
    struct sigaction other = {};
    other.sa_handler = at_fault;
    sigaction(SIGSEGV, &other, nullptr);
    msq_pages_watch(pages.pages);
    pages.start()[0] = 1;
    if (!pages.changed()) _exit(1);
    void* none = mmap(nullptr, 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *static_cast<volatile uint8_t*>(none) = 1;
    _exit(2);
  }
  int status = 0;
  expect(child > 0 && waitpid(child, &status, 0) == child, "no child");
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 42, "a fault did not reach its handler");
}

void check_watched(int isa) {
  WatchedProblem problem(isa);
  problem.check(true);
  problem.check(false);
  for (int round = 0; round < 3; ++round) {
    const bool moved = below(2);
    problem.change(moved);
    problem.check(!moved, moved);
  }
  problem.check_operator();
  problem.check(problem.spoil());
}

}  // namespace check
