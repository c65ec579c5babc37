// Every kernel of the CUDA library once, on a batch of B x D: `races B D order resident seed [no-fences|no-barriers]`.
// ThreadSanitizer reports the races; a checksum of all results tells whether orders differ.
#include <cuda_runtime.h>

#include <cmath>
#include <string>

#include "../../csrc/api.h"

using namespace dae;

namespace {

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size, T value = T{}) : memory_(size + 16, value), size(size) {}
  T* begin() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 15) / 16 * 16); }
  T* end() { return begin() + size; }

 private:
  std::vector<T> memory_;

 public:
  const size_t size;
};

uint64_t g_checksum = 0;
const float g_one = 1;

template <class... Buffers>
void take(Buffers&... buffers) {
  const auto each = [](auto& buffer) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(buffer.begin());
    for (size_t i = 0; i < buffer.size * sizeof(*buffer.begin()); ++i) g_checksum = g_checksum * 0x9E3779B97F4A7C15ull + bytes[i];
  };
  (each(buffers), ...);
}

void check(const char* error) {
  if (!error) return;
  std::fprintf(stderr, "races: %s\n", error);
  std::exit(2);
}

// The kernels of one element type; T: as wide as it.
template <class T>
void run(Dtype dtype, int64_t B, int64_t D) {
  const Api& api = *dae_cuda_api();
  const Queue queue{0, nullptr};
  const Batch batch{B, D, 0, nullptr, dtype};
  const size_t n = B * D;
  Buffer<T> pred(n), y(n), z(n), grad(n), out(n), out2(n);
  Buffer<uint8_t> mask(n + 16);
  std::mt19937 random(7);
  const auto number = [&] {  // in [0.5, 2), in either type
    return sizeof(T) == 4 ? static_cast<T>(0x3f000000u + random() % 0x01000000u) : static_cast<T>(0x3f00u + random() % 0x100u);
  };
  for (size_t i = 0; i < n; ++i) pred.begin()[i] = number(), y.begin()[i] = number(), z.begin()[i] = number();
  for (uint8_t& kept : mask) kept = random() % 2;
  Buffer<float> columns(B * 6);
  for (float& c : columns) c = 0.3f + static_cast<float>(random() % 1000) / 1000;
  Buffer<double> sums(scratch_doubles(B, D, 3)), kept(B), dots(3 * B);
  Buffer<uint32_t> counter(1);
  Buffer<float> means(B), loss(1), also(2), kl(B);
  const Scratch scratch{sums.begin(), counter.begin()};
  const Table table{columns.begin(), B, 6, nullptr, false, {}};
  Noise noise;
  noise.present = true, noise.key = {123, 456};
  Choice drawn;
  drawn.noise = noise, drawn.constants[0] = 1 << 29, drawn.constants[1] = int64_t(1) << 31;

  for (const bool fresh : {false, true}) {
    MaskArgs m{batch, {fresh ? nullptr : mask.begin()}, fresh ? drawn : Choice{}};
    check(api.mask_count(m, kept.begin(), scratch, queue));
    take(kept);
    m.upstream = &g_one;
    check(api.mask_count(m, kept.begin(), scratch, queue));
    take(kept);
  }
  // Of squares: fresh or read, with or without y, with or without a mask. Then the general kernel.
  for (int kind = 0; kind < 10; ++kind) {
    ResidualArgs r{};
    r.batch = batch, r.pred = {pred.begin()}, r.grad = {grad.begin()}, r.table = table;
    r.columns[0] = 0, r.columns[1] = 1, r.columns[2] = kAbsent;
    const bool general = kind >= 8, fresh = general || kind & 1, masked = kind & 2, both = kind & 4;
    if (fresh) r.noise = noise;
    if (!fresh || both) r.y = {y.begin()};
    if (!fresh && both) r.z = {z.begin()};
    if (masked && !general) r.mask = {mask.begin()};
    if (general) r.penalty = Penalty::huber, r.columns[2] = 2;
    if (kind == 9) r.choice = drawn;
    LossArgs l{};
    l.reduction = Reduction::mean, l.per_sample = means.begin(), l.loss = loss.begin(), l.also = also.begin();
    l.weight_column = 3, l.also_columns[0] = 4, l.also_columns[1] = 5;
    if (r.mask.data || r.choice.noise.present) l.kept = kept.begin();
    check(api.residual(r, l, scratch, queue));
    take(grad, means, loss, also);
    if (*counter.begin()) check("the counter is not back at 0");
  }
  for (const bool fresh : {false, true}) {
    check(api.row_dots({batch, {pred.begin()}, {y.begin()}, {}, {z.begin()}, fresh ? noise : Noise{}}, dots.begin(), scratch, queue));
    take(dots);
    GaussianArgs g{batch, {pred.begin()}, {y.begin()}, {fresh ? nullptr : z.begin()}, {out.begin()}, fresh ? noise : Noise{}};
    check(api.gaussian(g, kl.begin(), scratch, queue));
    take(out, kl);
  }
  check(api.gaussian_grad(
      {batch, {pred.begin()}, {y.begin()}, {}, {z.begin()}, {out.begin()}, {out2.begin()}, noise, kl.begin()}, queue));
  take(out, out2);
  // One to four tensors, fresh or read; then two outputs around a clamp.
  for (int kind = 0; kind < 8; ++kind) {
    AffineArgs a{};
    const int tensors = kind / 2 + 1;
    a.batch = batch, a.x = {pred.begin()}, a.out = {out.begin()}, a.table = table;
    std::fill(a.columns, a.columns + 8, kAbsent);
    a.columns[0] = 0;
    if (kind % 2) a.noise = noise, a.columns[2] = 2;
    if (tensors > 1) a.y = {y.begin()}, a.columns[1] = 1;
    if (tensors > 2) a.z = {z.begin()}, a.columns[2] = 2;
    if (tensors > 3) a.w = {grad.begin()}, a.columns[3] = 3;
    check(api.affine(a, queue));
    take(out);
    if (kind < 7) continue;
    a.out2 = {out2.begin()}, a.clamped = true, a.lo = -1, a.hi = 1, a.columns[4] = 4;
    std::fill(a.inner, a.inner + 3, 1);
    check(api.affine(a, queue));
    take(out, out2);
    a.out = a.x;  // in place
    check(api.affine(a, queue));
    take(pred);
  }
  // Noise alone; two tensors around a clamp.
  for (const bool fresh : {true, false}) {
    AffineArgs a{};
    a.batch = batch, a.out = {out.begin()}, a.table = table, a.clamped = !fresh, a.lo = -1, a.hi = 1;
    std::fill(a.columns, a.columns + 8, kAbsent);
    std::fill(a.inner, a.inner + 3, fresh ? kAbsent : 1);
    a.columns[2] = fresh ? 2 : kAbsent;
    if (fresh) a.noise = noise;
    if (!fresh) a.x = {pred.begin()}, a.y = {y.begin()}, a.columns[0] = 0, a.columns[1] = 1, a.inner[2] = kAbsent;
    check(api.affine(a, queue));
    take(out);
  }
  check(api.corrupt({batch, {y.begin()}, {out.begin()}, drawn, -1, 2}, queue));
  take(out);
  Buffer<int64_t> words(n);
  check(api.bits({batch, noise, words.begin(), 1'000'003}, queue));
  Buffer<Key> key(1);
  check(api.fold_in(noise, 5, nullptr, key.begin(), queue));
  take(words, key);
}

// A double well, one component and several, of the longest rows that a chain may have at most.
void run_chains(int64_t B, int64_t D) {
  const int64_t length = std::min<int64_t>(D, kOfLane * kMaxChainLanes), width = kOfLane * chain_lanes(length);
  for (const int components : {0, 1, 3}) {
    Buffer<float> x(B * length, 0.5f), out(B * length), means(components * width, 0.25f);
    Buffer<float> precisions(components * width, 2.0f), weights(components, 0.1f);
    Noise noise;
    noise.present = true, noise.key = {7, 8};
    check(dae_cuda_api()->chain({B, length, x.begin(), out.begin(), components, means.begin(), precisions.begin(),
                                 weights.begin(), -4.0f, 1.0f, 0.1f, 0.4f, 5, noise},
                                Queue{0, nullptr}));
    take(out);
  }
}

}  // namespace

int main(int count, char** words) {
  if (count < 6) return 2;
  const int64_t B = std::atoll(words[1]), D = std::atoll(words[2]);
  emulator::order = static_cast<emulator::Order>(std::atoi(words[3]));
  emulator::resident = std::atoi(words[4]), emulator::seed = std::atoi(words[5]);
  const std::string without = count > 6 ? words[6] : "";
  emulator::fences = without != "no-fences", emulator::barriers = without != "no-barriers";
  run<uint32_t>(Dtype::f32, B, D);
  run<uint16_t>(Dtype::bf16, B, D);
  run_chains(B, D);
  std::printf("%016lx\n", static_cast<unsigned long>(g_checksum));
}
