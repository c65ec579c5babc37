// Ranges in the NVTX domain dae_fast: what Nsight Systems shows of us.
//
// NVTX 3 is headers alone. A build that does not find them works the same; nobody ever listens to it.
#pragma once

#include <cstdint>

#if defined(__has_include)
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define DAE_NVTX 1
#endif
#endif

namespace dae::nvtx {

#ifdef DAE_NVTX
constexpr bool kBuilt = true;

// A tool attaches when the process makes its first NVTX call, or never: then there is no domain.
inline nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t made = nvtxDomainCreateA("dae_fast");
  return made;
}

inline bool listens() { return domain() != nullptr; }

inline void push(const char* name, uint64_t bytes) {
  nvtxEventAttributes_t event{};
  event.version = NVTX_VERSION;
  event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  event.messageType = NVTX_MESSAGE_TYPE_ASCII;
  event.message.ascii = name;
  event.payloadType = NVTX_PAYLOAD_TYPE_UNSIGNED_INT64;
  event.payload.ullValue = bytes;
  nvtxDomainRangePushEx(domain(), &event);
}

inline void pop() { nvtxDomainRangePop(domain()); }
#else
constexpr bool kBuilt = false;
inline bool listens() { return false; }
inline void push(const char*, uint64_t) {}
inline void pop() {}
#endif

}  // namespace dae::nvtx
