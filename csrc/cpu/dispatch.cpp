#include "dispatch.h"

#include <dlfcn.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

namespace dae::cpu {

namespace {

#if defined(__x86_64__)
// Asked of the processor: clang 14's __builtin_cpu_supports does not know the name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool processor_has(const char* name) {
  if (!std::strcmp(name, "baseline")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", &kernels_avx512},
    {"avx2", &kernels_avx2},
#endif
    {"baseline", &kernels_baseline},
};

const Isa* find_isa(const char* name) {
  for (const Isa& isa : kIsas)
    if (!std::strcmp(isa.name, name) && processor_has(name)) return &isa;
  return nullptr;
}

const Isa& best_isa() {
  for (const Isa& isa : kIsas)
    if (processor_has(isa.name)) return isa;
  return kIsas[sizeof(kIsas) / sizeof(kIsas[0]) - 1];
}

const Isa* g_isa = &best_isa();

// Linux says it by itself; what the processor says of it is wrong in many virtual machines.
double found_cache_share() {
  std::ifstream size("/sys/devices/system/cpu/cpu0/cache/index3/size");
  std::ifstream sharers("/sys/devices/system/cpu/cpu0/cache/index3/shared_cpu_map");
  double kib = 0;
  int processors = 0;
  if (!(size >> kib)) return HUGE_VAL;
  for (char digit; sharers >> digit;)
    if (std::isxdigit(digit)) processors += __builtin_popcount(std::stoi(std::string(1, digit), nullptr, 16));
  return 1024 * kib / (processors ? processors : 1);
}

double g_cache_share = found_cache_share();

// torch brings its own OpenMP runtime. A second copy would mean a second thread pool that
// torch.set_num_threads does not govern, so nothing is linked: the one already loaded is looked up.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*max_threads)();
  int (*num_threads)();
  int (*thread_num)();
  OpenMP() {
    find(parallel, "GOMP_parallel");
    find(max_threads, "omp_get_max_threads");
    find(num_threads, "omp_get_num_threads");
    find(thread_num, "omp_get_thread_num");
    // A thread that Python starts later has OpenMP's own number until torch's function hands it torch's.
    if (void* torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD)) {
      if (auto torch_threads = reinterpret_cast<int (*)()>(dlsym(torch, "_ZN2at15get_num_threadsEv")))
        max_threads = torch_threads;
      dlclose(torch);
    }
  }
  bool present() const { return parallel && max_threads && num_threads && thread_num; }
  template <class F>
  static void find(F& f, const char* name) {
    f = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
  }
};

const OpenMP& openmp() {
  static const OpenMP runtime;
  return runtime;
}

// Waking a thread costs several microseconds; less work than this for each is not shared.
constexpr double kMinWorkPerThread = 15000;

// Where other processes have the cores, a team's barrier waits for its last thread to be given one: a scheduler's slice or
// two. A call that took so much longer than its work says so; for a while, twice as long each time, what one thread does
// within some slices is then left to it. Results do not depend on the number of threads.
class Crowd {
 public:
  using Clock = std::chrono::steady_clock;
  bool here(double work) const { return work < kSlices && Clock::now().time_since_epoch().count() < until_; }

  // elements: of which each may cost a part of a new page, many times its arithmetic.
  void judge(Clock::time_point began, double work, double elements) {
    const Clock::time_point now = Clock::now();
    const double took = std::chrono::duration<double, std::nano>(now - began).count();
    const int64_t patience = patience_;
    if (took < kLate + 4 * work + kNsOfNewPage * elements) {
      if (patience > kShortest) patience_ = patience / 2;
      return;
    }
    until_ = (now + std::chrono::nanoseconds(patience)).time_since_epoch().count();
    if (patience < kLongest) patience_ = 2 * patience;
  }

 private:
  static constexpr double kSlices = 20e6, kLate = 2e6, kNsOfNewPage = 5;     // nanoseconds
  static constexpr int64_t kShortest = 50'000'000, kLongest = 1'600'000'000;  // the same
  std::atomic<int64_t> until_{0}, patience_{kShortest};  // several threads of Python's: what they lose of it is no harm
} g_crowd;

}  // namespace

const Isa& isa() { return *g_isa; }

bool has_isa(const char* name) { return find_isa(name) != nullptr; }

double cache_share() { return g_cache_share; }

double use_cache_share(double bytes) { return std::exchange(g_cache_share, bytes); }

bool use_isa(const char* name) {
  const Isa* found = find_isa(name);
  if (found) g_isa = found;
  return found != nullptr;
}

void expect_writes(const Batch& batch, const Operand& out) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20, kMapped = uintptr_t{32} << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(batch.B) * batch.D * bytes_of(batch.dtype);
  if (!out.data || bytes <= kMapped) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(out.data), begin = (data + kPage - 1) / kPage * kPage;
  // Advice alone: what comes of it is the system's affair.
  madvise(reinterpret_cast<void*>(begin), (data + bytes - begin) / kPage * kPage, MADV_HUGEPAGE);
#else
  (void)batch, (void)out;
#endif
}

int max_threads() { return openmp().present() ? openmp().max_threads() : 1; }

void parallel_run(int64_t units, double work, void (*run)(const void*, int64_t, int64_t), const void* body) {
  int64_t threads = max_threads();
  const int64_t worth = static_cast<int64_t>(work / kMinWorkPerThread);
  if (threads > worth) threads = worth;
  if (threads > units) threads = units;
  if (threads <= 1 || g_crowd.here(work)) return run(body, 0, units);
  const Crowd::Clock::time_point began = Crowd::Clock::now();
  struct Team {
    int64_t units;
    void (*run)(const void*, int64_t, int64_t);
    const void* body;
  } team = {units, run, body};
  openmp().parallel(
      [](void* data) {
        const Team& t = *static_cast<const Team*>(data);
        const int64_t n = openmp().num_threads(), i = openmp().thread_num();
        t.run(t.body, t.units * i / n, t.units * (i + 1) / n);
      },
      &team, static_cast<unsigned>(threads), 0);
  g_crowd.judge(began, work, static_cast<double>(units) * kSegment);
}

}  // namespace dae::cpu
