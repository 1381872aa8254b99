// What Python sees of the training kernels.
#pragma once

#include <nanobind/nanobind.h>

#include "levels.h"

namespace elastic_moe {

void define_training(nanobind::module_& m, const Kernels* (*kernels_of)(int level));

}  // namespace elastic_moe
