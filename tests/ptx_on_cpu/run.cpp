// Puts a kernel's PTX in its place in cuda_runtime.h's launch. TABLES: the tables that translate.py has made.
#include <dlfcn.h>

#include "machine.h"

#define TABLE(name) extern const ptx::Table name;
TABLES
#undef TABLE

// For the tests: how many launches were of PTX.
extern "C" {
unsigned ptx_launches = 0;
}

namespace {

const ptx::Kernel& kernel_of(const std::string& name) {
#define TABLE(table) \
  if (const auto found = table.find(name); found != table.end()) return found->second;
  TABLES
#undef TABLE
  std::fprintf(stderr, "ptx_on_cpu: no PTX of %s\n", name.c_str());
  std::abort();
}

std::function<void()> body_of(void* kernel, const std::vector<emulator::Argument>& arguments) {
  Dl_info info{};
  dladdr(kernel, &info);
  const ptx::Kernel& found = kernel_of(info.dli_sname ? info.dli_sname : "");
  std::vector<unsigned char> parameters(found.size + 64);
  unsigned char* const first = parameters.data() + (64 - reinterpret_cast<uintptr_t>(parameters.data()) % 64);
  bool fits = arguments.size() == found.arguments.size();
  for (size_t i = 0; fits && i < arguments.size(); ++i) {
    fits = arguments[i].size == found.arguments[i].second;
    if (fits) memcpy(first + found.arguments[i].first, arguments[i].at, arguments[i].size);
  }
  if (!fits) {
    std::fprintf(stderr, "ptx_on_cpu: %s has other parameters in PTX\n", info.dli_sname);
    std::abort();
  }
  ++ptx_launches;
  const std::ptrdiff_t offset = first - parameters.data();
  return [thread = found.thread, kept = std::make_shared<std::vector<unsigned char>>(std::move(parameters)), offset] {
    if (threadIdx.x == 0) memset(ptx::shared, 0xA5, 1 << 16);  // what nobody has written is no zero
    thread(kept->data() + offset);
  };
}

const bool g_installed = (emulator::other_body = body_of, true);

}  // namespace
