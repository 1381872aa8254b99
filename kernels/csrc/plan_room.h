// The room that an ExpertPlan needs.
#pragma once

#include "levels.h"
#include "room.h"

namespace elastic_moe {

static inline int64_t whole_vectors(int64_t count) { return (count + 31) / 32 * 32; }

// `slots`: most choices of all rows together; `channels`: most of any expert.
static inline void take_plan(Room& room, ExpertPlan& plan, int64_t rows, int64_t slots,
                             int64_t experts, int64_t channels, int64_t value_bytes) {
    plan.jobs = room.take<ExpertJob>(experts + 1);
    plan.row = room.take<int32_t>(slots);
    plan.weight = room.take<float>(slots);
    plan.channels = room.take<int32_t>(slots);
    plan.count = room.take<int32_t>(experts);
    plan.tally = room.take<int32_t>(channels + 2);
    plan.order = room.take<int32_t>(rows);
    plan.hidden_stride = whole_vectors(channels);
    plan.hidden = room.take_bytes(slots * plan.hidden_stride * value_bytes);
}

}  // namespace elastic_moe
