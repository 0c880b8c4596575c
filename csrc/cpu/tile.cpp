#include "tile.h"

#include <unistd.h>

namespace atlas::cpu {

bool outgrows_cache(int64_t bytes) {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  static const int64_t reported = 0;
#endif
  constexpr int64_t kTypical = int64_t(32) << 20;
  return bytes > (reported > 0 ? reported : kTypical) / 2;
}

}  // namespace atlas::cpu
