#include "expert_tests.h"

#include "../upstream/stand_in_gpu.h"
#include "checks.h"

#include "base/error.h"
#include "generate/evaluation.h"
#include "generate/generation.h"
#include "model/model.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

using namespace overspill;

namespace {

constexpr uint64_t memory_bytes = 64 << 20;

std::shared_ptr<Model> loaded(const std::string & path, size_t cache_bytes) {
    ModelOptions options;
    options.n_ctx = 128;
    options.n_threads = 2;
    if (cache_bytes > 0) {
        options.experts.pools = {{"GPU0", cache_bytes}};
        options.experts.most_insertions = 64;
        options.experts.is_trusted = true;
    }
    return std::make_shared<Model>(path, options);
}

// The logits after each of some tokens; before each, other experts are resident if they are shuffled.
std::vector<std::vector<float>> rows(Model & model, Evaluation & evaluation, bool shuffled) {
    std::vector<std::vector<float>> found;
    evaluation.reset();
    for (int32_t token = 1; token <= 24; ++token) {
        if (const auto cache = shuffled ? model.expert_cache() : nullptr) {
            cache->shuffle(static_cast<uint64_t>(token));
        }
        const LogitsView view = evaluation.eval({token}, false, {});
        found.emplace_back(view.logits, view.logits + model.n_vocab());
    }
    return found;
}

}  // namespace

void test_cached_experts(const std::string & path) {
    StandInOptions gpu = {};
    gpu.memory_bytes = memory_bytes;
    gpu.n_threads = 1;
    gpu.computes_as_host = 1;
    stand_in_gpu("GPU0", &gpu);
    check_throws<OutOfMemoryError>([&] { loaded(path, 2 * memory_bytes); }, "GPU0 refused",
                                   "a cache that is too large");

    const auto plain = loaded(path, 0);
    Evaluation without(plain);
    const auto expected = rows(*plain, without, false);
    for (const size_t cache_bytes : {size_t{1} << 20, size_t{2} << 20, size_t{16} << 20}) {
        const auto model = loaded(path, cache_bytes);
        Evaluation with(model);
        check(rows(*model, with, false) == expected, "logits with some experts on another device");
        check(rows(*model, with, true) == expected, "logits with other experts there before each token");
        const ExpertCounts counts = model->expert_cache()->counts();
        check(counts.n_hits > 0 || counts.n_slots == 0, "some experts are found");
        check(counts.n_resident <= counts.n_slots, "not more than there is room for");
    }

    const auto shared = loaded(path, 2 << 20);
    std::atomic<bool> over{false};
    std::thread reader([&] {
        while (!over) {
            const ExpertCounts counts = shared->expert_cache()->counts();
            check(counts.n_hits <= counts.n_requests, "counts belong together");
            std::this_thread::yield();
        }
    });
    std::vector<std::thread> callers;
    for (int i = 0; i < 2; ++i) {
        callers.emplace_back([&] {
            GenerationOptions options;
            options.max_tokens = 16;
            const auto generation = Generation::start(shared, {1, 2, 3}, options);
            while (generation->next({})) {
            }
        });
    }
    for (std::thread & one : callers) {
        one.join();
    }
    over = true;
    reader.join();
    const auto open = Generation::start(shared, {1, 2, 3}, {});
    open->next({});
    shared->close();
    check(shared->expert_cache() == nullptr, "a closed model has no cache");
}
