// The training kernels on raw addresses, which come by name. Dtypes, shapes and strides are checked
// by training.py before they come here.
#include "train_module.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "room.h"

namespace nb = nanobind;

namespace elastic_moe {
namespace {

// A field of the arguments by its name.
class Fields {
  public:
    explicit Fields(const nb::dict& values) : values_(values) {}

    template <class T>
    void pointer(const char* name, T*& to) const {
        to = reinterpret_cast<T*>(nb::cast<uintptr_t>(values_[name]));
    }
    template <class T>
    void number(const char* name, T& to) const {
        to = nb::cast<T>(values_[name]);
    }

  private:
    const nb::dict& values_;
};

AttentionTraining read_attention(const nb::dict& values) {
    const Fields fields(values);
    AttentionTraining a{};
    fields.number("rows", a.rows);
    fields.number("length", a.length);
    fields.number("hidden", a.hidden);
    fields.number("heads", a.heads);
    fields.number("kv_heads", a.kv_heads);
    fields.number("head_dim", a.head_dim);
    fields.number("interleaved", a.interleaved);
    fields.number("eps", a.eps);
    fields.number("threads", a.threads);
    fields.pointer("x", a.x);
    fields.pointer("norm", a.norm);
    fields.pointer("q_norm", a.q_norm);
    fields.pointer("k_norm", a.k_norm);
    fields.pointer("q", a.q);
    fields.pointer("k", a.k);
    fields.pointer("v", a.v);
    fields.pointer("o", a.o);
    fields.pointer("cos", a.cos);
    fields.pointer("sin", a.sin);
    fields.pointer("norm_scale", a.norm_scale);
    fields.pointer("qkv", a.qkv);
    fields.pointer("head_scale", a.head_scale);
    fields.pointer("rotated", a.rotated);
    fields.pointer("attended", a.attended);
    fields.pointer("log_sums", a.log_sums);
    fields.pointer("out", a.out);
    fields.pointer("grad_out", a.grad_out);
    fields.pointer("grad_x", a.grad_x);
    fields.pointer("grad_norm", a.grad_norm);
    fields.pointer("grad_q_norm", a.grad_q_norm);
    fields.pointer("grad_k_norm", a.grad_k_norm);
    fields.pointer("grad_q", a.grad_q);
    fields.pointer("grad_k", a.grad_k);
    fields.pointer("grad_v", a.grad_v);
    fields.pointer("grad_o", a.grad_o);
    return a;
}

ExpertsTraining read_experts(const nb::dict& values) {
    const Fields fields(values);
    ExpertsTraining a{};
    fields.number("rows", a.rows);
    fields.number("hidden", a.hidden);
    fields.number("experts", a.experts);
    fields.number("channels", a.channels);
    fields.number("width", a.width);
    fields.number("slots", a.slots);
    fields.number("renormalize", a.renormalize);
    fields.number("eps", a.eps);
    fields.number("epsilon", a.epsilon);
    fields.number("threads", a.threads);
    fields.number("top_k", a.top_k);
    fields.number("min_experts", a.min_experts);
    fields.number("threshold", a.threshold);
    fields.number("grad_balance", a.grad_balance);
    fields.pointer("x", a.x);
    fields.pointer("norm", a.norm);
    fields.pointer("router", a.router);
    fields.pointer("gate", a.gate);
    fields.pointer("up", a.up);
    fields.pointer("down", a.down);
    fields.pointer("correction_bias", a.correction_bias);
    fields.pointer("pool", a.pool);
    fields.pointer("norm_scale", a.norm_scale);
    fields.pointer("normed", a.normed);
    fields.pointer("router_logits", a.router_logits);
    fields.pointer("topk_ids", a.topk_ids);
    fields.pointer("topk_weights", a.topk_weights);
    fields.pointer("place", a.place);
    fields.pointer("token", a.token);
    fields.pointer("weight", a.weight);
    fields.pointer("ends", a.ends);
    fields.pointer("gate_up", a.gate_up);
    fields.pointer("out", a.out);
    fields.pointer("balance", a.balance);
    fields.pointer("grad_out", a.grad_out);
    fields.pointer("grad_x", a.grad_x);
    fields.pointer("grad_norm", a.grad_norm);
    fields.pointer("grad_router", a.grad_router);
    fields.pointer("grad_gate", a.grad_gate);
    fields.pointer("grad_up", a.grad_up);
    fields.pointer("grad_down", a.grad_down);
    return a;
}

int64_t blocks_of(int64_t rows) { return (rows + 63) / 64; }

void run_attention_training(const Kernels* kernels, const nb::dict& values, bool backward) {
    AttentionTraining a = read_attention(values);
    nb::gil_scoped_release release;
    static thread_local Room room;
    const int64_t all = static_cast<int64_t>(a.heads + 2 * a.kv_heads) * a.head_dim;
    a.scratch_size = kernels->attention_scratch(a);
    room.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) room.hand_out();
        a.weights = room.take<float>(kernels->attention_weights(a));
        a.scratch = room.take<float>(a.threads * a.scratch_size);
        if (!backward) continue;
        a.normed = room.take<float>(a.rows * a.hidden);
        a.grad_qkv = room.take<float>(a.rows * all);
        a.grad_heads = room.take<float>(a.rows * a.heads * a.head_dim);
        a.partial = room.take<float>(blocks_of(a.rows) * (a.hidden + 2 * a.head_dim));
    }
    (backward ? kernels->attention_backward : kernels->attention_forward)(a);
}

void run_experts_training(const Kernels* kernels, const nb::dict& values, bool backward) {
    ExpertsTraining a = read_experts(values);
    nb::gil_scoped_release release;
    static thread_local Room room;
    a.scratch_size = kernels->expert_scratch(a);
    a.weights_size = kernels->expert_weights(a);
    room.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) room.hand_out();
        a.outputs = room.take<float>(a.rows * a.slots * a.hidden);
        a.weights = room.take<float>(a.threads * a.weights_size);
        a.scratch = room.take<float>(a.threads * a.scratch_size);
        a.partial = room.take<float>(blocks_of(a.rows) * (a.hidden + a.experts));
        if (!backward) continue;
        a.grad_weight = room.take<float>(a.rows * a.slots);
        a.grad_logits = room.take<float>(a.rows * a.experts);
    }
    (backward ? kernels->experts_backward : kernels->experts_forward)(a);
}

float head_loss(const Kernels* kernels, const nb::dict& values) {
    const Fields fields(values);
    HeadLossArgs a{};
    fields.number("rows", a.rows);
    fields.number("hidden", a.hidden);
    fields.number("vocab", a.vocab);
    fields.number("threads", a.threads);
    fields.pointer("x", a.x);
    fields.pointer("weight", a.weight);
    fields.pointer("targets", a.targets);
    fields.pointer("grad_x", a.grad_x);
    fields.pointer("grad_weight", a.grad_weight);
    nb::gil_scoped_release release;
    static thread_local Room room;
    float loss = 0.0f;
    a.loss = &loss;
    a.scratch_size = kernels->head_scratch(a);
    room.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) room.hand_out();
        a.weights = room.take<float>(kernels->head_weights(a));
        a.partial = room.take<float>(static_cast<int64_t>(kernels->head_parts) * a.vocab * a.hidden);
        a.scratch = room.take<float>(a.threads * a.scratch_size);
    }
    kernels->head_loss(a);
    return loss;
}

// (p, momentum, grad, matrices, rows, columns) of each parameter.
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t> MuonEntry;

void muon(const Kernels* kernels, const std::vector<MuonEntry>& entries, float lr, float beta,
          float weight_decay, int steps, int threads) {
    nb::gil_scoped_release release;
    static thread_local Room room;
    std::vector<MuonMatrices> list;
    for (const auto& [p, momentum, grad, matrices, rows, columns] : entries)
        list.push_back({reinterpret_cast<float*>(p), reinterpret_cast<float*>(momentum),
                        reinterpret_cast<const float*>(grad), matrices, rows, columns});
    MuonArgs args{list.data(), static_cast<int>(list.size()), steps, threads, lr, beta, weight_decay,
                  nullptr, 0};
    args.scratch_size = kernels->muon_scratch(args);
    room.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) room.hand_out();
        args.scratch = room.take<float>(threads * args.scratch_size);
    }
    kernels->muon(args);
}

}  // namespace

void define_training(nb::module_& m, const Kernels* (*kernels_of)(int level)) {
    m.def("attention_training", [kernels_of](int level, const nb::dict& values, bool backward) {
        run_attention_training(kernels_of(level), values, backward);
    });
    m.def("experts_training", [kernels_of](int level, const nb::dict& values, bool backward) {
        run_experts_training(kernels_of(level), values, backward);
    });
    m.def("head_loss", [kernels_of](int level, const nb::dict& values) {
        return head_loss(kernels_of(level), values);
    });
    m.def("muon", [kernels_of](int level, const std::vector<MuonEntry>& entries, float lr,
                               float beta, float weight_decay, int steps, int threads) {
        muon(kernels_of(level), entries, lr, beta, weight_decay, steps, threads);
    });
}

}  // namespace elastic_moe
