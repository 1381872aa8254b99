// SwiGLU experts for rows that each chose their own: down(silu(gate x) * (up x)), weighted, summed.
//
// Rows are sorted by expert and, inside an expert, by how many of its channels they run, widest
// first: whatever runs is a run of rows, nothing is padded to the widest, and weights that no row
// uses are not read. A row that every token passes through (a dense layer, the shared experts)
// is one more such job, after the routed ones.
//
// Packed: gate and up panels alternate, [ceil(F/16)][gate, up], followed by down's panels.
#pragma once

#include "ops/args.h"
#include "ops/linear.h"

namespace {

using elastic_moe::ExpertJob;
using elastic_moe::ExpertPlan;
using elastic_moe::Ffn;
using elastic_moe::kDownColumns;
using elastic_moe::kDownPanels;

static inline int groups_of(int channels) { return (channels + kPanel - 1) / kPanel; }

// Values of one expert's gate and up together.
template <class Kind>
static inline int64_t gate_up_values(const Ffn& ffn) {
    return static_cast<int64_t>(2) * groups_of(ffn.channels) * steps_of<Kind>(ffn.hidden) * kPanel *
           Kind::kDepth;
}

template <class Kind>
static inline int64_t down_values(const Ffn& ffn) {
    return static_cast<int64_t>(groups_of(ffn.hidden)) * steps_of<Kind>(ffn.channels) * kPanel *
           Kind::kDepth;
}

template <class Kind>
static inline int64_t expert_values(const Ffn& ffn) {
    return gate_up_values<Kind>(ffn) + down_values<Kind>(ffn);
}

// The order in which rows are visited so that wider ones come first; stable. Counting sort over
// channels, with `tally` of at least max + 2 zeros.
static inline void order_by_channels(const int32_t* channels, int rows, int most, int32_t* tally,
                                     int32_t* order) {
    for (int c = 0; c <= most + 1; ++c) tally[c] = 0;
    for (int i = 0; i < rows; ++i) ++tally[most - channels[i] + 1];
    for (int c = 1; c <= most; ++c) tally[c] += tally[c - 1];
    for (int i = 0; i < rows; ++i) order[tally[most - channels[i]]++] = i;
}

// Fill the plan from the routing of `rows` rows with `slots` slots each; ids are in [0, E) or -1.
// Jobs come in ascending order of experts.
template <class Kind>
static void plan_experts(ExpertPlan& plan, const Ffn& ffn, const int32_t* topk_ids,
                         const float* topk_weights, const int32_t* channels, int rows, int slots) {
    int32_t* const count = plan.count;
    for (int e = 0; e < ffn.experts; ++e) count[e] = 0;
    const int64_t all = static_cast<int64_t>(rows) * slots;
    for (int64_t i = 0; i < all; ++i)
        if (topk_ids[i] >= 0) ++count[topk_ids[i]];

    const int64_t size = expert_values<Kind>(ffn);
    plan.jobs_used = 0;
    int32_t begin = plan.slots_used = 0;
    for (int e = 0; e < ffn.experts; ++e) {
        const int32_t here = count[e];
        count[e] = begin;  // from here on, where the next of e's rows goes
        if (!here) continue;
        ExpertJob& job = plan.jobs[plan.jobs_used++];
        const typename Kind::Value* data =
            static_cast<const typename Kind::Value*>(ffn.data) + size * e;
        job.gate_up = data;
        job.down = data + gate_up_values<Kind>(ffn);
        job.begin = begin;
        job.end = begin += here;
        job.ffn = &ffn;
    }
    plan.slots_used = begin;

    bool mixed = false;
    int32_t most = 0;
    for (int i = 0; i < rows; ++i) {
        mixed |= channels[i] != channels[0];
        if (channels[i] > most) most = channels[i];
    }
    if (mixed) order_by_channels(channels, rows, most, plan.tally, plan.order);
    for (int i = 0; i < rows; ++i) {
        const int row = mixed ? plan.order[i] : i;
        for (int64_t j = static_cast<int64_t>(row) * slots;
             j < static_cast<int64_t>(row + 1) * slots; ++j) {
            if (topk_ids[j] < 0) continue;
            const int32_t slot = count[topk_ids[j]]++;
            plan.row[slot] = row;
            plan.weight[slot] = topk_weights[j];
            plan.channels[slot] = channels[row];
        }
    }
}

// One more job, of all rows.
template <class Kind>
static void plan_everyone(ExpertPlan& plan, const Ffn& ffn, int rows) {
    ExpertJob& job = plan.jobs[plan.jobs_used++];
    job.gate_up = ffn.data;
    job.down = static_cast<const typename Kind::Value*>(ffn.data) + gate_up_values<Kind>(ffn);
    job.begin = plan.slots_used;
    job.end = plan.slots_used += rows;
    job.ffn = &ffn;
    for (int i = 0; i < rows; ++i) {
        const int32_t slot = job.begin + i;
        plan.row[slot] = i;
        plan.weight[slot] = 1.0f;
        plan.channels[slot] = ffn.channels;
    }
}

// Bytes of weights that the plan reads, each once, and the arithmetic of its rows at their own
// widths.
template <class Kind>
static void count_plan(const ExpertPlan& plan, int64_t& bytes, int64_t& flops) {
    for (int j = 0; j < plan.jobs_used; ++j) {
        const ExpertJob& job = plan.jobs[j];
        const int widest = plan.channels[job.begin];
        const int64_t gate_up =
            static_cast<int64_t>(2) * groups_of(widest) * steps_of<Kind>(job.ffn->hidden);
        const int64_t down =
            static_cast<int64_t>(groups_of(job.ffn->hidden)) * steps_of<Kind>(widest);
        bytes += (gate_up + down) * kStepBytes;
        for (int32_t s = job.begin; s < job.end; ++s)
            flops += static_cast<int64_t>(6) * plan.channels[s] * job.ffn->hidden;
    }
}

// Rows of a job, a prefix of them, that run any channel from `channel` on.
static inline int rows_beyond(const ExpertPlan& plan, const ExpertJob& job, int channel) {
    int32_t low = job.begin, high = job.end;
    if (plan.channels[high - 1] > channel) return high - low;
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (plan.channels[middle] > channel) low = middle + 1;
        else high = middle;
    }
    return low - job.begin;
}

// h[0..15] = silu(gate) * up for the first `count` channels, 0 for the rest of them.
template <class Kind>
static inline void write_hidden(const float* gate, const float* up, int count,
                                typename Kind::Value* h) {
    if (count >= kPanel) {
        for (int i = 0; i < kPanel; i += kLanes)
            Kind::write(h + i, silu(load(gate + i)) * load(up + i));
        return;
    }
    for (int i = 0; i < kPanel; i += kLanes) {
        if (count <= i) {
            Kind::write(h + i, VFloat{});
        } else {
            const int left = count - i < kLanes ? count - i : kLanes;
            Kind::write(
                h + i, silu(load_partial(gate + i, left, 0.0f)) * load_partial(up + i, left, 0.0f));
        }
    }
}

// Some groups of one expert's channels; no job after the last piece.
struct GateUpPiece {
    const ExpertJob* job;
    int begin, end;
    int groups;  // of the whole job
};

// Numbers the pieces of all jobs. They are asked for in ascending order.
template <class Kind>
class GateUpPieces {
  public:
    GateUpPieces(const ExpertPlan& plan, int threads) : plan_(plan), threads_(threads) {
        for (int j = 0; j < plan.jobs_used; ++j)
            all_ += groups_of(plan.channels[plan.jobs[j].begin]);
    }

    int64_t count() const {
        int64_t pieces = 0;
        for (int j = 0; j < plan_.jobs_used; ++j) {
            const int each = grain(plan_.jobs[j]);
            pieces += (groups_of(plan_.channels[plan_.jobs[j].begin]) + each - 1) / each;
        }
        return pieces;
    }

    GateUpPiece find(int64_t piece) {
        for (; index_ < plan_.jobs_used; ++index_) {
            const ExpertJob& job = plan_.jobs[index_];
            const int groups = groups_of(plan_.channels[job.begin]);
            const int each = grain(job);
            const int64_t pieces = (groups + each - 1) / each;
            if (piece < before_ + pieces) {
                const int begin = static_cast<int>(piece - before_) * each;
                return {&job, begin, begin + each < groups ? begin + each : groups, groups};
            }
            before_ += pieces;
        }
        return {nullptr, 0, 0, 0};
    }

  private:
    // Groups per piece. Where many rows share the weights there is more to do for each byte, and
    // longer pieces leave more of them to be fetched early.
    int grain(const ExpertJob& job) const {
        const int64_t bytes =
            static_cast<int64_t>(2) * steps_of<Kind>(job.ffn->hidden) * kStepBytes;
        int64_t most = (job.end - job.begin > kTileRows ? 4 : 1) * kPieceBytes / bytes;
        const int64_t even = all_ / (4 * threads_);
        if (most > even) most = even;
        return static_cast<int>(most < 2 ? 2 : most);
    }

    const ExpertPlan& plan_;
    const int threads_;
    int64_t all_ = 0;     // groups
    int index_ = 0;       // of the last job found
    int64_t before_ = 0;  // pieces of earlier jobs
};

// Phase one: hidden[slot] = silu(gate x) * (up x). `input(row)` gives a row's inputs. A piece of
// work is some groups of one expert's channels.
template <class Kind, class Input>
static void run_gate_up(Member& member, const ExpertPlan& plan, Input input) {
    typedef typename Kind::Value Value;
    const auto run = [&](const GateUpPiece& now, const GateUpPiece& next) {
        const ExpertJob& job = *now.job;
        const int steps = steps_of<Kind>(job.ffn->hidden);
        const int64_t stride = static_cast<int64_t>(steps) * kPanel * Kind::kDepth;
        const int per_tile = tile_panels(RowTiles(job.end - job.begin).widest()) / 2;
        const int width = per_tile < 1 ? 1 : per_tile;
        for (int group = now.begin; group < now.end; group += width) {
            const int taken = now.end - group < width ? now.end - group : width;
            const Value* w = panels_at<Kind>(job.gate_up, stride, 2 * group);
            const Value* then = w + 2 * taken * stride;
            if (group + taken >= now.end)
                then =
                    next.job ? panels_at<Kind>(next.job->gate_up, stride, 2 * next.begin) : nullptr;
            const RowTiles tiles(rows_beyond(plan, job, group * kPanel));
            for (int t = 0; t < tiles.tiles; ++t) {
                const int first = job.begin + tiles.begin(t);
                const int height = tiles.begin(t + 1) - tiles.begin(t);
                const Value* x[kTileRows];
                float sums[kTileSums];
                for (int r = 0; r < height; ++r) x[r] = input(plan.row[first + r]);
                multiply<Kind>(height, x, w, stride, steps, 2 * taken, sums,
                               fetch_ahead(then, stride, 2 * taken, t, tiles.tiles, steps));
                for (int r = 0; r < height; ++r)
                    for (int g = 0; g < taken; ++g) {
                        const int channel = (group + g) * kPanel;
                        const float* gate = sums + (r * taken + g) * 2 * kPanel;
                        Value* h = static_cast<Value*>(plan.hidden) +
                                   plan.hidden_stride * (first + r) + channel;
                        const int left = plan.channels[first + r] - channel;
                        write_hidden<Kind>(gate, gate + kPanel, left, h);
                        // Phase two reads a tile's rows as far as its widest.
                        if (left <= kPanel && channel + kPanel < now.groups * kPanel)
                            std::memset(h + kPanel, 0,
                                        sizeof(Value) * static_cast<size_t>(
                                                            (now.groups - 1) * kPanel - channel));
                    }
            }
        }
    };
    member.phase([&] { return GateUpPieces<Kind>(plan, member.threads).count(); },
                 [&] {
                     GateUpPieces<Kind> pieces(plan, member.threads);
                     GateUpPiece known = {};
                     int64_t known_number = -1;
                     return [=, &run](int64_t piece, int64_t next) mutable {
                         const GateUpPiece now = piece == known_number ? known : pieces.find(piece);
                         // Known one piece early, so that its weights can be fetched.
                         known = next < 0 ? GateUpPiece{} : pieces.find(next);
                         known_number = next;
                         run(now, known);
                     };
                 });
}

// Phase two: target(row)[d] += sum over the row's experts, ascending, of weight * (down h)[d]. A
// piece of work is some panels of outputs, for all experts: no other piece adds to them. `sums` is
// this thread's, rows x kDownColumns floats.
template <class Kind, class Target>
static void run_down(Member& member, const ExpertPlan& plan, int rows, int hidden, float* sums,
                     Target target) {
    typedef typename Kind::Value Value;
    const int panels = groups_of(hidden);
    const int64_t even = panels / (4 * member.threads);
    const int grain = even < 1 ? 1 : even > kDownPanels ? kDownPanels : static_cast<int>(even);
    const auto run = [&](int64_t piece, int64_t next) {
        const int begin = static_cast<int>(piece) * grain;
        const int count = panels - begin < grain ? panels - begin : grain;
        const int width = count * kPanel;
        std::memset(sums, 0,
                    sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(width));
        for (int j = 0; j < plan.jobs_used; ++j) {
            const ExpertJob& job = plan.jobs[j];
            const int64_t stride =
                static_cast<int64_t>(steps_of<Kind>(job.ffn->channels)) * kPanel * Kind::kDepth;
            const RowTiles tiles(job.end - job.begin);
            const int per_tile = tile_panels(tiles.widest());
            for (int panel = 0; panel < count; panel += per_tile) {
                const int taken = count - panel < per_tile ? count - panel : per_tile;
                const Value* w = panels_at<Kind>(job.down, stride, begin + panel);
                const Value* then = w + taken * stride;
                if (panel + taken >= count) {  // the next expert's, or the first of the next piece
                    const bool more = j + 1 < plan.jobs_used;
                    const int64_t column = more ? begin : next * grain;
                    then = column < 0 ? nullptr
                                      : panels_at<Kind>(plan.jobs[more ? j + 1 : 0].down, stride,
                                                        static_cast<int>(column));
                }
                for (int t = 0; t < tiles.tiles; ++t) {
                    const int first = job.begin + tiles.begin(t);
                    const int height = tiles.begin(t + 1) - tiles.begin(t);
                    // The first is the widest; the others' hidden values are 0 beyond their own.
                    const int steps = steps_of<Kind>(plan.channels[first]);
                    const Value* h[kTileRows];
                    float out[kTileSums];
                    for (int r = 0; r < height; ++r)
                        h[r] = static_cast<const Value*>(plan.hidden) +
                               plan.hidden_stride * (first + r);
                    multiply<Kind>(height, h, w, stride, steps, taken, out,
                                   fetch_ahead(then, stride, taken, t, tiles.tiles, steps));
                    for (int r = 0; r < height; ++r) {
                        const VFloat weight = broadcast(plan.weight[first + r]);
                        float* to = sums + static_cast<int64_t>(plan.row[first + r]) * width +
                                    panel * kPanel;
                        const float* from = out + r * taken * kPanel;
                        for (int i = 0; i < taken * kPanel; i += kLanes)
                            store(to + i, fma(weight, load(from + i), load(to + i)));
                    }
                }
            }
        }
        const int column = begin * kPanel;
        const int wanted = hidden - column < width ? hidden - column : width;
        for (int row = 0; row < rows; ++row) {
            float* const to = target(row) + column;
            const float* const from = sums + static_cast<int64_t>(row) * width;
            for (int i = 0; i < wanted; i += kPanel)
                add_panel(to + i, from + i, wanted - i < kPanel ? wanted - i : kPanel);
        }
    };
    member.phase([&] { return (panels + grain - 1) / grain; }, [&] { return run; });
}

}  // namespace
