// One instruction set for the process, and threads for its kernels.
#pragma once

#include "units.h"

namespace dae::cpu {

struct Isa {
  const char* name;
  const Kernels* kernels;
};

// The one in use: the best that this processor and this build have, until another is chosen.
const Isa& isa();
// False when the name is unknown, not in this build, or not in this processor.
bool has_isa(const char* name);
bool use_isa(const char* name);
// How many threads a call may use now: torch.set_num_threads governs it; 1 without OpenMP.
int max_threads();
// Another share of the last cache than the machine's (cache_share), for tests; returns the former.
double use_cache_share(double bytes);

// Says that `out` will be written whole. The allocator maps anew what is larger than 32 MiB, and each new page of 4 KiB
// costs as much as many arithmetic passes: Linux is asked for pages of 2 MiB.
void expect_writes(const Batch& batch, const Operand& out);

// Over the rows of a batch; the same for every number of threads.
void column_sums(const ColumnSumsArgs& a);
void contraction(const ContractionArgs& a);
void contraction_grad(const ContractionGradArgs& a);
void bound(const BoundArgs& a);
void bound_grad(const BoundGradArgs& a);

void parallel_run(int64_t units, double work, void (*run)(const void*, int64_t, int64_t), const void* body);

// Splits [0, units) over threads; each runs body(begin, end). `work` is the cost of the whole in
// nanoseconds of one core, roughly: short work stays on the calling thread.
template <class Body>
void parallel_for(int64_t units, double work, const Body& body) {
  parallel_run(
      units, work,
      [](const void* self, int64_t begin, int64_t end) { (*static_cast<const Body*>(self))(begin, end); }, &body);
}

}  // namespace dae::cpu
