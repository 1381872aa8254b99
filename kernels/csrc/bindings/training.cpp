// The training kernels. Their arguments come by name: many arrays, each checked for dtype, order,
// device and how many numbers it has; an unknown name is refused.
#include <nanobind/stl/vector.h>

#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "core/workspace.h"

namespace nb = nanobind;

namespace elastic_moe {
namespace {

// Fields of a call by name.
class Fields {
  public:
    explicit Fields(const nb::kwargs& values) : values_(values) {}

    template <class T>
    void number(const char* name, T& to) {
        to = nb::cast<T>(take(name));
    }

    // `size` numbers.
    template <class T>
    void array(const char* name, T*& to, int64_t size) {
        to = read<T>(name, take(name), size);
    }

    // Or None.
    template <class T>
    void optional(const char* name, T*& to, int64_t size) {
        const nb::object value = take(name);
        to = value.is_none() ? nullptr : read<T>(name, value, size);
    }

    // After the last field: every name that was given is known.
    void finish() const {
        require(used_ == values_.size(), "got " + std::to_string(values_.size()) +
                                             " fields, of which " + std::to_string(used_) +
                                             " are known.");
    }

  private:
    nb::object take(const char* name) {
        require(values_.contains(name), std::string(name) + " is missing.");
        ++used_;
        return values_[name];
    }

    template <class T>
    static T* read(const char* name, const nb::object& value, int64_t size) {
        nb::ndarray<T, nb::c_contig, nb::device::cpu> array;
        require(nb::try_cast(value, array, false),
                std::string(name) + " must be a contiguous array of the right dtype on the CPU.");
        require(static_cast<int64_t>(array.size()) == size,
                std::string(name) + " must have " + std::to_string(size) + " numbers, got " +
                    std::to_string(array.size()) + ".");
        return array.data();
    }

    const nb::kwargs& values_;
    size_t used_ = 0;
};

AttentionTraining read_attention(const nb::kwargs& values, bool backward) {
    Fields fields(values);
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
    require(a.rows >= 0 && a.length >= 1 && a.rows % a.length == 0 && a.kv_heads >= 1 &&
                a.heads % a.kv_heads == 0 && a.head_dim >= 1 && a.hidden >= 1 &&
                a.head_dim % kTrainingMultiple == 0 && a.hidden % kTrainingMultiple == 0 &&
                a.threads >= 1,
            "sizes must be positive, rows whole sequences, and channels multiples of 16.");
    const int64_t T = a.rows, D = a.hidden, d = a.head_dim;
    const int64_t q = a.heads * d, kv = a.kv_heads * d, heads = a.heads + a.kv_heads;
    fields.array("x", a.x, T * D);
    fields.array("norm", a.norm, D);
    fields.optional("q_norm", a.q_norm, d);
    fields.optional("k_norm", a.k_norm, d);
    fields.array("q", a.q, q * D);
    fields.array("k", a.k, kv * D);
    fields.array("v", a.v, kv * D);
    fields.array("o", a.o, D * q);
    fields.array("cos", a.cos, a.length * (d / 2));
    fields.array("sin", a.sin, a.length * (d / 2));
    fields.array("norm_scale", a.norm_scale, T);
    fields.array("qkv", a.qkv, T * (q + 2 * kv));
    fields.array("head_scale", a.head_scale, T * heads);
    fields.array("rotated", a.rotated, T * heads * d);
    fields.array("attended", a.attended, T * q);
    fields.array("log_sums", a.log_sums, T * a.heads);
    if (backward) {
        fields.array("grad_out", a.grad_out, T * D);
        fields.array("grad_x", a.grad_x, T * D);
        fields.array("grad_norm", a.grad_norm, D);
        fields.optional("grad_q_norm", a.grad_q_norm, d);
        fields.optional("grad_k_norm", a.grad_k_norm, d);
        fields.array("grad_q", a.grad_q, q * D);
        fields.array("grad_k", a.grad_k, kv * D);
        fields.array("grad_v", a.grad_v, kv * D);
        fields.array("grad_o", a.grad_o, D * q);
    } else {
        fields.array("out", a.out, T * D);
    }
    fields.finish();
    return a;
}

ExpertsTraining read_experts(const nb::kwargs& values, bool backward) {
    Fields fields(values);
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
    require(a.rows >= 0 && a.hidden >= 1 && a.hidden % kTrainingMultiple == 0 && a.channels >= 1 &&
                a.channels % kTrainingMultiple == 0 && a.experts >= 1 && a.experts <= kMaxExperts &&
                a.width >= 1 && a.width <= a.channels && a.min_experts >= 1 &&
                a.min_experts <= a.top_k && a.top_k <= a.slots && a.threads >= 1,
            "sizes are out of range.");
    const int64_t T = a.rows, D = a.hidden, E = a.experts, K = a.slots;
    const int64_t matrices = E * a.channels * D;
    fields.array("x", a.x, T * D);
    fields.array("norm", a.norm, D);
    fields.array("router", a.router, E * D);
    fields.array("gate", a.gate, matrices);
    fields.array("up", a.up, matrices);
    fields.array("down", a.down, matrices);
    fields.optional("correction_bias", a.correction_bias, E);
    const bool* pool = nullptr;
    fields.array("pool", pool, E);
    a.pool = reinterpret_cast<const uint8_t*>(pool);
    fields.array("norm_scale", a.norm_scale, T);
    fields.array("normed", a.normed, T * D);
    fields.array("router_logits", a.router_logits, T * E);
    fields.array("topk_ids", a.topk_ids, T * K);
    fields.array("topk_weights", a.topk_weights, T * K);
    fields.array("place", a.place, T * K);
    fields.array("token", a.token, T * K);
    fields.array("weight", a.weight, T * K);
    fields.array("ends", a.ends, E);
    fields.array("gate_up", a.gate_up, T * K * 2 * round_up(a.width, kPanel));
    if (backward) {
        fields.number("grad_balance", a.grad_balance);
        fields.array("grad_out", a.grad_out, T * D);
        fields.array("grad_x", a.grad_x, T * D);
        fields.array("grad_norm", a.grad_norm, D);
        fields.array("grad_router", a.grad_router, E * D);
        fields.array("grad_gate", a.grad_gate, matrices);
        fields.array("grad_up", a.grad_up, matrices);
        fields.array("grad_down", a.grad_down, matrices);
    } else {
        fields.array("out", a.out, T * D);
        fields.array("balance", a.balance, 1);
    }
    fields.finish();
    return a;
}

int64_t blocks_of(int64_t rows) { return round_up(rows, kTrainingBlockRows) / kTrainingBlockRows; }

void run_attention_training(int level, bool backward, const nb::kwargs& values) {
    const Kernels* const kernels = kernels_of(level);
    AttentionTraining a = read_attention(values, backward);
    nb::gil_scoped_release release;
    static thread_local Workspace workspace;
    const int64_t all = static_cast<int64_t>(a.heads + 2 * a.kv_heads) * a.head_dim;
    a.scratch_size = kernels->attention_scratch(a);
    workspace.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) workspace.hand_out();
        a.weights = workspace.take<float>(kernels->attention_weights(a));
        a.scratch = workspace.take<float>(a.threads * a.scratch_size);
        if (!backward) continue;
        a.normed = workspace.take<float>(a.rows * a.hidden);
        a.grad_qkv = workspace.take<float>(a.rows * all);
        a.grad_heads = workspace.take<float>(a.rows * a.heads * a.head_dim);
        a.partial = workspace.take<float>(blocks_of(a.rows) * (a.hidden + 2 * a.head_dim));
    }
    (backward ? kernels->attention_backward : kernels->attention_forward)(a);
}

void run_experts_training(int level, bool backward, const nb::kwargs& values) {
    const Kernels* const kernels = kernels_of(level);
    ExpertsTraining a = read_experts(values, backward);
    nb::gil_scoped_release release;
    static thread_local Workspace workspace;
    a.scratch_size = kernels->expert_scratch(a);
    a.weights_size = kernels->expert_weights(a);
    workspace.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) workspace.hand_out();
        a.outputs = workspace.take<float>(a.rows * a.slots * a.hidden);
        a.weights = workspace.take<float>(a.threads * a.weights_size);
        a.scratch = workspace.take<float>(a.threads * a.scratch_size);
        a.partial = workspace.take<float>(blocks_of(a.rows) * (a.hidden + a.experts));
        if (!backward) continue;
        a.grad_weight = workspace.take<float>(a.rows * a.slots);
        a.grad_logits = workspace.take<float>(a.rows * a.experts);
    }
    (backward ? kernels->experts_backward : kernels->experts_forward)(a);
}

// The mean loss; gradients are written.
float head_loss(int level, const Array<const float, 2>& x, const Array<const float, 2>& weight,
                const Array<const int64_t, 1>& targets, const Array<float, 2>& grad_x,
                const Array<float, 2>& grad_weight, int threads) {
    const Kernels* const kernels = kernels_of(level);
    HeadLossArgs a{};
    a.rows = static_cast<int64_t>(x.shape(0));
    a.hidden = static_cast<int>(x.shape(1));
    a.vocab = static_cast<int>(weight.shape(0));
    a.threads = threads;
    require(weight.shape(1) == x.shape(1) && targets.shape(0) == x.shape(0) &&
                grad_x.size() == x.size() && grad_weight.size() == weight.size() &&
                a.hidden % kTrainingMultiple == 0,
            "weight must be (V, D), targets (N,), and gradients like x (N, D) and weight.");
    a.x = x.data();
    a.weight = weight.data();
    a.targets = targets.data();
    a.grad_x = grad_x.data();
    a.grad_weight = grad_weight.data();
    nb::gil_scoped_release release;
    static thread_local Workspace workspace;
    float loss = 0.0f;
    a.loss = &loss;
    a.scratch_size = kernels->head_scratch(a);
    workspace.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) workspace.hand_out();
        a.weights = workspace.take<float>(kernels->head_weights(a));
        a.partial =
            workspace.take<float>(static_cast<int64_t>(kernels->head_parts) * a.vocab * a.hidden);
        a.scratch = workspace.take<float>(a.threads * a.scratch_size);
    }
    kernels->head_loss(a);
    return loss;
}

// (..., rows, columns): one matrix, or a stack of them.
typedef nb::ndarray<float, nb::c_contig, nb::device::cpu> Matrices;

void muon(int level, const std::vector<Matrices>& params, const std::vector<Matrices>& momenta,
          const std::vector<Matrices>& grads, float lr, float beta, float weight_decay, int steps,
          int threads) {
    const Kernels* const kernels = kernels_of(level);
    require(momenta.size() == params.size() && grads.size() == params.size(),
            "params, momenta and grads must be lists of one length.");
    std::vector<MuonMatrices> list;
    for (size_t i = 0; i < params.size(); ++i) {
        const Matrices& p = params[i];
        require(p.ndim() >= 2 && momenta[i].size() == p.size() && grads[i].size() == p.size(),
                "params must be matrices, and momenta and grads like them.");
        const int64_t rows = static_cast<int64_t>(p.shape(p.ndim() - 2));
        const int64_t columns = static_cast<int64_t>(p.shape(p.ndim() - 1));
        require(rows >= 1 && columns >= 1 && rows % kTrainingMultiple == 0 &&
                    columns % kTrainingMultiple == 0,
                "matrices must have sides of multiples of 16.");
        list.push_back({p.data(), momenta[i].data(), grads[i].data(),
                        static_cast<int64_t>(p.size()) / (rows * columns), rows, columns});
    }
    nb::gil_scoped_release release;
    static thread_local Workspace workspace;
    MuonArgs args{list.data(),
                  static_cast<int>(list.size()),
                  steps,
                  threads,
                  lr,
                  beta,
                  weight_decay,
                  nullptr,
                  0};
    args.scratch_size = kernels->muon_scratch(args);
    workspace.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) workspace.hand_out();
        args.scratch = workspace.take<float>(threads * args.scratch_size);
    }
    kernels->muon(args);
}

}  // namespace

void define_training(nb::module_& m) {
    using nb::arg;
    m.def("attention_training", &run_attention_training, arg("level"), arg("backward"),
          arg("fields"));
    m.def("experts_training", &run_experts_training, arg("level"), arg("backward"), arg("fields"));
    m.def("head_loss", &head_loss, arg("level"), nb::kw_only(), arg("x").noconvert(),
          arg("weight").noconvert(), arg("targets").noconvert(), arg("grad_x").noconvert(),
          arg("grad_weight").noconvert(), arg("threads"));
    m.def("muon", &muon, arg("level"), nb::kw_only(), arg("params").noconvert(),
          arg("momenta").noconvert(), arg("grads").noconvert(), arg("lr"), arg("beta"),
          arg("weight_decay"), arg("steps"), arg("threads"));
}

}  // namespace elastic_moe
