// Compiled once per instruction-set level, with that level's flags and ELASTIC_MOE_LEVEL set to
// its name: everything but the one table below has internal linkage, so levels cannot mix.
#include "levels.h"
#include "route.h"

#define ELASTIC_MOE_JOIN_(a, b) a##b
#define ELASTIC_MOE_JOIN(a, b) ELASTIC_MOE_JOIN_(a, b)
#define ELASTIC_MOE_STRING_(a) #a
#define ELASTIC_MOE_STRING(a) ELASTIC_MOE_STRING_(a)

namespace elastic_moe {

#if defined(_OPENMP)
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

extern const Kernels ELASTIC_MOE_JOIN(kernels_, ELASTIC_MOE_LEVEL) = {
    ELASTIC_MOE_STRING(ELASTIC_MOE_LEVEL), kLanes, kOpenMP, &::route};

}  // namespace elastic_moe
