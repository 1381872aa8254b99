// Drawing tokens, and their log-probabilities.
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "core/workspace.h"

namespace nb = nanobind;

namespace elastic_moe {
namespace {

typedef Array<const int32_t, 1> Ids;
typedef Array<const uint8_t, 2> Records;  // rows of a numpy array with fields, as bytes

enum Refusal { kFine = 0, kBadLogitsRow = 1, kBadValue = 2, kBadChange = 3, kBadMask = 4, kBadId };

// (a Refusal, the row that it is about, the value found there). Nothing is written unless the
// first is kFine.
typedef std::tuple<int, int64_t, int64_t> Answer;

template <class Record>
const Record* records(const char* name, const Records& array) {
    if (!array.is_valid()) return nullptr;
    require(array.shape(1) == sizeof(Record) &&
                reinterpret_cast<uintptr_t>(array.data()) % alignof(Record) == 0,
            std::string(name) + " must have rows of " + std::to_string(sizeof(Record)) +
                " bytes, aligned.");
    return reinterpret_cast<const Record*>(array.data());
}

// Memory for each thread, kept from call to call.
const SampleWork* take_work(int vocab, int threads, bool changes) {
    static thread_local Workspace workspace;
    static thread_local std::vector<SampleWork> work;
    const int64_t padded = round_up(vocab, kSampleBlock), blocks = padded / kSampleBlock;
    work.resize(static_cast<size_t>(threads));
    workspace.measure();
    for (int pass = 0; pass < 2; ++pass) {
        if (pass) workspace.hand_out();
        for (SampleWork& one : work) {
            one.weights = workspace.take<float>(padded);
            one.sums = workspace.take<uint64_t>(blocks);
            one.logits = changes ? workspace.take<float>(padded) : nullptr;
            one.largest = workspace.take<float>(blocks);
            one.above = workspace.take<uint64_t>(1);
        }
    }
    return work.data();
}

bool is_bad(const SamplingRow& row) {
    const bool good = row.temperature >= 0 && std::isfinite(row.temperature) && row.top_p > 0 &&
                      row.top_p <= 1 && row.min_p >= 0 && row.min_p <= 1 &&
                      row.repetition_penalty > 0 && std::isfinite(row.repetition_penalty) &&
                      std::isfinite(row.frequency_penalty) && std::isfinite(row.presence_penalty) &&
                      row.top_k >= 0;
    return !good;
}

Answer check(const SampleArgs& a, int64_t rows, int64_t masks) {
    for (int64_t r = 0, change = 0; r < a.count; ++r) {
        if (a.logits_rows[r] < 0 || a.logits_rows[r] >= rows)
            return {kBadLogitsRow, r, a.logits_rows[r]};
        if (is_bad(a.rows[r])) return {kBadValue, r, 0};
        if (a.mask_rows && (a.mask_rows[r] < -1 || a.mask_rows[r] >= masks))
            return {kBadMask, r, a.mask_rows[r]};
        if (a.changes)
            for (; change < a.change_ends[r]; ++change) {
                const LogitChange& c = a.changes[change];
                if (c.token < 0 || c.token >= a.vocab || !std::isfinite(c.bias))
                    return {kBadChange, r, c.token};
            }
    }
    return {kFine, 0, 0};
}

Answer sample(int level, const Array<const float, 2>& logits, const Ids& logits_rows,
              const Records& rows, const Records& changes, const Array<const int64_t, 1>& ends,
              const Array<const uint32_t, 2>& masks, const Ids& mask_rows,
              const Array<int32_t, 1>& token_ids, int threads) {
    SampleArgs a{};
    a.logits = logits.data();
    a.vocab = static_cast<int>(logits.shape(1));
    a.count = static_cast<int64_t>(rows.shape(0));
    a.logits_rows = logits_rows.data();
    a.rows = records<SamplingRow>("rows", rows);
    a.changes = records<LogitChange>("changes", changes);
    a.change_ends = data_or_null(ends);
    a.masks = data_or_null(masks);
    a.mask_words = masks.is_valid() ? static_cast<int64_t>(masks.shape(1)) : 0;
    a.mask_rows = data_or_null(mask_rows);
    a.token_ids = token_ids.data();
    a.threads = threads;
    const size_t count = rows.shape(0);
    require(a.vocab > 0 && logits.shape(1) < (1u << 30) && threads > 0,
            "logits must have columns, and at least one thread works.");
    require(logits_rows.shape(0) == count && token_ids.shape(0) == count,
            "logits_rows and token_ids must have one entry for each row.");
    require(!a.changes == !a.change_ends && !a.masks == !a.mask_rows,
            "changes come with change_ends, and masks with mask_rows.");
    if (a.changes) {
        int64_t last = 0;
        require(ends.shape(0) == count, "change_ends must have one entry for each row.");
        for (size_t r = 0; r < count; last = a.change_ends[r++])
            require(a.change_ends[r] >= last, "change_ends must ascend.");
        require(last == static_cast<int64_t>(changes.shape(0)), "change_ends must end them.");
    }
    if (a.masks)
        require(mask_rows.shape(0) == count && a.mask_words * 32 >= a.vocab,
                "mask_rows must have one entry for each row, and masks a bit for each column.");
    nb::gil_scoped_release release;
    const Answer answer = check(a, static_cast<int64_t>(logits.shape(0)),
                                masks.is_valid() ? static_cast<int64_t>(masks.shape(0)) : 0);
    if (std::get<0>(answer)) return answer;
    a.work = take_work(a.vocab, threads, a.changes || a.masks);
    kernels_of(level)->sample(a);
    return answer;
}

Answer token_logprobs(int level, const Array<const float, 2>& logits, const Ids& logits_rows,
                      const Ids& token_ids, const Array<double, 1>& logprobs,
                      const Array<int32_t, 2>& top_ids, const Array<double, 2>& top_logprobs,
                      int threads) {
    LogprobArgs a{};
    a.logits = logits.data();
    a.vocab = static_cast<int>(logits.shape(1));
    a.count = static_cast<int64_t>(token_ids.shape(0));
    a.logits_rows = logits_rows.data();
    a.token_ids = token_ids.data();
    a.top = static_cast<int>(top_ids.shape(1));
    a.logprobs = logprobs.data();
    a.top_ids = top_ids.data();
    a.top_logprobs = top_logprobs.data();
    a.threads = threads;
    const size_t count = token_ids.shape(0);
    require(a.vocab > 0 && logits.shape(1) < (1u << 30) && threads > 0 && a.top <= a.vocab,
            "logits must have columns, at least as many as top_ids, and a thread must work.");
    require(logits_rows.shape(0) == count && logprobs.shape(0) == count &&
                top_ids.shape(0) == count && top_logprobs.shape(0) == count &&
                top_logprobs.shape(1) == top_ids.shape(1),
            "logits_rows and outputs must have one row for each of token_ids.");
    nb::gil_scoped_release release;
    for (int64_t r = 0; r < a.count; ++r) {
        if (a.logits_rows[r] < 0 || a.logits_rows[r] >= static_cast<int64_t>(logits.shape(0)))
            return {kBadLogitsRow, r, a.logits_rows[r]};
        if (a.token_ids[r] < 0 || a.token_ids[r] >= a.vocab) return {kBadId, r, a.token_ids[r]};
    }
    a.work = take_work(a.vocab, threads, false);
    kernels_of(level)->token_logprobs(a);
    return {kFine, 0, 0};
}

}  // namespace

void define_sampling(nb::module_& m) {
    using nb::arg;
    m.def("sample", &sample, arg("level"), nb::kw_only(), arg("logits").noconvert(),
          arg("logits_rows").noconvert(), arg("rows").noconvert(),
          arg("changes").noconvert().none(), arg("change_ends").noconvert().none(),
          arg("masks").noconvert().none(), arg("mask_rows").noconvert().none(),
          arg("token_ids").noconvert(), arg("threads"));
    m.def("token_logprobs", &token_logprobs, arg("level"), nb::kw_only(), arg("logits").noconvert(),
          arg("logits_rows").noconvert(), arg("token_ids").noconvert(), arg("logprobs").noconvert(),
          arg("top_ids").noconvert(), arg("top_logprobs").noconvert(), arg("threads"));
}

}  // namespace elastic_moe
