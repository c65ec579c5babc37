// The first 2^24 normals of seed 0, sample 0, by the library's CPU kernels, to standard output: `make matrix` compares
// their hash with that of `python -m dae_fast hash`.

#include <cstdio>
#include <vector>

#include "../../csrc/api.h"

int main() {
  std::vector<float> out(1 << 24);
  dae::AffineArgs args{};
  args.batch.B = 1;
  args.batch.D = static_cast<int64_t>(out.size());
  args.batch.dtype = dae::Dtype::f32;
  args.out.data = out.data();
  args.noise.present = true;
  const float one = 1;
  args.table.data = &one;
  args.table.rows = args.table.columns = 1;
  for (int& column : args.columns) column = dae::kAbsent;
  args.columns[2] = 0;
  if (dae::cpu::kApi.affine(args, {})) return 1;
  return std::fwrite(out.data(), sizeof(float), out.size(), stdout) != out.size();
}
