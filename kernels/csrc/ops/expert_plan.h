// The memory that an ExpertPlan needs.
#pragma once

#include "core/workspace.h"
#include "ops/args.h"

namespace elastic_moe {

static inline int64_t whole_vectors(int64_t count) { return round_up(count, kVectorValues); }

// `slots`: most choices of all rows together; `channels`: most of any expert.
static inline void take_plan(Workspace& workspace, ExpertPlan& plan, int64_t rows, int64_t slots,
                             int64_t experts, int64_t channels, int64_t value_bytes) {
    plan.jobs = workspace.take<ExpertJob>(experts + 1);
    plan.row = workspace.take<int32_t>(slots);
    plan.weight = workspace.take<float>(slots);
    plan.channels = workspace.take<int32_t>(slots);
    plan.count = workspace.take<int32_t>(experts);
    plan.tally = workspace.take<int32_t>(channels + 2);
    plan.order = workspace.take<int32_t>(rows);
    plan.hidden_stride = whole_vectors(channels);
    plan.hidden = workspace.take_bytes(slots * plan.hidden_stride * value_bytes);
}

}  // namespace elastic_moe
