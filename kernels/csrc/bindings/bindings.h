// What each file adds to the Python module; `kernels_of` raises unless the level is compiled.
#pragma once

#include <nanobind/nanobind.h>

#include "levels.h"

namespace elastic_moe {

const Kernels* kernels_of(int level);

void define_ops(nanobind::module_& m);
void define_sampling(nanobind::module_& m);
void define_model(nanobind::module_& m);
void define_training(nanobind::module_& m);

}  // namespace elastic_moe
