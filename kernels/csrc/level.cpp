// Compiled once per instruction-set level, with that level's flags and ELASTIC_MOE_LEVEL set to
// its name: everything but the one table below has internal linkage, so levels cannot mix.
#include "levels.h"
#include "ops/divergence.h"
#include "ops/probe.h"
#include "ops/sample.h"
#include "step/step.h"
#include "training/attention.h"
#include "training/experts.h"
#include "training/head.h"
#include "training/muon.h"

#define ELASTIC_MOE_JOIN_(a, b) a##b
#define ELASTIC_MOE_JOIN(a, b) ELASTIC_MOE_JOIN_(a, b)
#define ELASTIC_MOE_STRING_(a) #a
#define ELASTIC_MOE_STRING(a) ELASTIC_MOE_STRING_(a)

namespace {

using elastic_moe::DivergenceArgs;
using elastic_moe::ExpertsArgs;
using elastic_moe::LinearArgs;
using elastic_moe::LogprobArgs;
using elastic_moe::NormArgs;
using elastic_moe::SampleArgs;

template <class Kind>
void linear_as(Member& member, const LinearArgs& args) {
    multiply_rows<Kind>(
        member, args.matrix, args.rows,
        [&](int row) {
            return static_cast<const typename Kind::Value*>(args.inputs) + args.input_stride * row;
        },
        [&](int row, int column, int count, const float* sums) {
            store_panel(args.out + static_cast<int64_t>(row) * args.matrix.outputs + column, sums,
                        count);
        });
}

void linear(LinearArgs& args) {
    run_team(args.threads, args, [](Member& member, LinearArgs& a) {
        if (a.bf16) linear_as<Bf16>(member, a);
        else linear_as<Float32>(member, a);
    });
}

template <class Kind>
void experts_as(Member& member, ExpertsArgs& args) {
    member.alone([&] {
        plan_experts<Kind>(args.plan, args.ffn, args.topk_ids, args.topk_weights, args.channels,
                           args.rows, args.slots);
        count_plan<Kind>(args.plan, args.weight_bytes, args.flops);
    });
    run_gate_up<Kind>(member, args.plan, [&](int row) {
        return static_cast<const typename Kind::Value*>(args.inputs) + args.input_stride * row;
    });
    run_down<Kind>(member, args.plan, args.rows, args.ffn.hidden,
                   args.sums + static_cast<int64_t>(member.id) * args.rows * kDownColumns,
                   [&](int row) { return args.out + static_cast<int64_t>(row) * args.ffn.hidden; });
}

void experts(ExpertsArgs& args) {
    run_team(args.threads, args, [](Member& member, ExpertsArgs& a) {
        if (a.bf16) experts_as<Bf16>(member, a);
        else experts_as<Float32>(member, a);
    });
}

void attention(AttentionArgs& args) {
    run_team(args.threads, args, [](Member& member, AttentionArgs& a) {
        if (a.bf16) run_attention<Bf16>(member, a, [](const Span&, int) {});
        else run_attention<Float32>(member, a, [](const Span&, int) {});
    });
}

void rms_norm_rows(NormArgs& args) {
    // Alone, a norm is over before a sleeping thread is awake.
    const int threads = args.rows * args.columns <= 32 * kAlone ? 1 : args.threads;
    run_team(threads, args, [](Member& member, NormArgs& a) {
        member.share(a.rows, 16, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                rms_norm(a.x + i * a.columns, a.gain, a.columns, a.eps, a.out + i * a.columns);
        });
    });
}

void sample(SampleArgs& args) {
    // Below this a second thread, which has to fetch logits and code first, made a step longer.
    const int threads = args.count * args.vocab <= 16 * kAlone ? 1 : args.threads;
    run_team(threads, args, [](Member& member, SampleArgs& a) { sample_rows(member, a); });
}

void token_logprobs_of_rows(LogprobArgs& args) {
    const int threads = args.count * args.vocab <= 16 * kAlone ? 1 : args.threads;
    run_team(threads, args, [](Member& member, LogprobArgs& a) { token_logprobs(member, a); });
}

void divergence(DivergenceArgs& args) {
    const int threads = args.rows * args.vocab <= 32 * kAlone ? 1 : args.threads;
    run_team(threads, args, [](Member& member, DivergenceArgs& a) {
        member.share(a.rows, 4, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) diverge(a, i);
        });
    });
}

}  // namespace

namespace elastic_moe {

extern const Kernels ELASTIC_MOE_JOIN(kernels_, ELASTIC_MOE_LEVEL) = {
    ELASTIC_MOE_STRING(ELASTIC_MOE_LEVEL),
    &::route,
    &::linear,
    &::experts,
    &::attention,
    &::rms_norm_rows,
    &::sample,
    &::token_logprobs_of_rows,
    &::divergence,
    &::step,
    ::kReadPatternCount,
    &::probe_read,
    &::probe_multiply,
    &::attention_scratch,
    &::attention_weights,
    &::attention_forward,
    &::attention_backward,
    &::expert_scratch,
    &::expert_weights,
    &::experts_forward,
    &::experts_backward,
    ::kHeadParts,
    &::head_scratch,
    &::head_weights,
    &::head_loss,
    &::muon_scratch,
    &::muon,
};

}  // namespace elastic_moe
