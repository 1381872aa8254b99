// The contract between the Python binding and the kernels, which are compiled once per
// instruction-set level. Functions here and in the kernels are static, and templates
// of the standard library are not used: of an inline function or a template instance the linker
// keeps one copy, and that could be the one compiled for a level that this machine lacks.
#pragma once

#include <cstdint>

#include "ops/args.h"
#include "step/args.h"
#include "training/args.h"

namespace elastic_moe {

// What one level offers.
struct Kernels {
    const char* level;
    void (*route)(RouteArgs&);
    void (*linear)(LinearArgs&);
    void (*experts)(ExpertsArgs&);
    void (*attention)(AttentionArgs&);
    void (*rms_norm)(NormArgs&);
    void (*sample)(SampleArgs&);
    void (*token_logprobs)(LogprobArgs&);
    void (*divergence)(DivergenceArgs&);
    void (*step)(StepArgs&);
    int read_patterns;
    void (*probe_read)(const char* data, int64_t bytes, int pattern, int threads);
    int64_t (*probe_multiply)(bool bf16, int64_t turns, int threads);

    // Training. The sizes are numbers of floats: scratch of one thread, packed weights.
    int64_t (*attention_scratch)(const AttentionTraining&);
    int64_t (*attention_weights)(const AttentionTraining&);
    void (*attention_forward)(AttentionTraining&);
    void (*attention_backward)(AttentionTraining&);
    int64_t (*expert_scratch)(const ExpertsTraining&);
    int64_t (*expert_weights)(const ExpertsTraining&);
    void (*experts_forward)(ExpertsTraining&);
    void (*experts_backward)(ExpertsTraining&);
    int head_parts;
    int64_t (*head_scratch)(const HeadLossArgs&);
    int64_t (*head_weights)(const HeadLossArgs&);
    void (*head_loss)(HeadLossArgs&);
    int64_t (*muon_scratch)(const MuonArgs&);
    void (*muon)(MuonArgs&);
};

}  // namespace elastic_moe
