// The Python module: which levels exist and run here, the constants that Python compares with its
// own, and the kernels. Python checks arguments first, with messages for users; bindings check
// again whatever an address depends on.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "compiled_levels.h"
#include "core/threads.h"

namespace nb = nanobind;
using namespace elastic_moe;

#define ELASTIC_MOE_DECLARE(name, runs) extern const Kernels kernels_##name;
namespace elastic_moe {
ELASTIC_MOE_LEVELS(ELASTIC_MOE_DECLARE)
}

namespace {

struct Level {
    const Kernels* kernels;
    bool runs;
};

// Weakest first.
const std::vector<Level>& compiled() {
#define ELASTIC_MOE_LIST(name, runs) {&kernels_##name, runs},
    static const std::vector<Level> levels = {ELASTIC_MOE_LEVELS(ELASTIC_MOE_LIST)};
    return levels;
}

// (name, runs on this machine), weakest first.
std::vector<std::tuple<std::string, bool>> levels() {
    std::vector<std::tuple<std::string, bool>> out;
    for (const Level& level : compiled()) out.emplace_back(level.kernels->level, level.runs);
    return out;
}

}  // namespace

const Kernels* elastic_moe::kernels_of(int level) {
    return compiled().at(static_cast<size_t>(level)).kernels;
}

NB_MODULE(_native, m) {
    // A model that lives as long as the process is no leak.
    nb::set_leak_warnings(false);
    nb::dict constants;
    for (const SharedConstant& shared : kShared) constants[shared.name] = shared.value;
    m.attr("CONSTANTS") = constants;
    m.def("levels", &levels);
    m.def("helper_count", &helper_count);
    m.def("assume_free_cores", &assume_free_cores, nb::arg("cores"));
    m.def("stop_threads", &stop_threads, nb::call_guard<nb::gil_scoped_release>());
    define_ops(m);
    define_sampling(m);
    define_model(m);
    define_training(m);
}
