// The core without Python, for the sanitizers. Usage: overspill_core_tests [MODEL.gguf FOLDER]
// MODEL is any small model that generates text; damaged copies of it are written to FOLDER. Without them, only what
// needs no model is tested.

#include "checks.h"
#include "expert_tests.h"
#include "product_tests.h"
#include "thread_tests.h"

#include "base/error.h"
#include "base/log.h"
#include "base/utf8_buffer.h"
#include "device/device_meter.h"
#include "device/pinned_weights.h"
#include "generate/batch_sizes.h"
#include "generate/evaluation.h"
#include "generate/generation.h"
#include "gguf/gguf_file.h"
#include "model/model.h"
#include "model/vocabulary.h"
#include "product/expert_recorder.h"
#include "product/expert_replays.h"
#include "sample/kernels.h"
#include "sample/sampler.h"
#include "text/stop_strings.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

using namespace overspill;

#ifdef __SANITIZE_THREAD__
// llama.cpp is not instrumented: what its threads do, and how they wait for each other, is not looked at.
extern "C" const char * __tsan_default_options();
extern "C" const char * __tsan_default_options() {
    return "ignore_noninstrumented_modules=1";
}
#endif

namespace {

std::string decoded(const std::string & bytes, size_t piece) {
    Utf8Buffer buffer;
    std::string text;
    for (size_t i = 0; i < bytes.size(); i += piece) {
        buffer.push(std::string_view(bytes).substr(i, piece), text);
    }
    buffer.flush(text);
    return text;
}

void test_utf8_buffer() {
    const std::string bad = "\xEF\xBF\xBD";
    // Unicode 16, table 3-8 to 3-11: the expected replacements.
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41", bad + bad + bad + bad + bad + bad + bad + bad + "A"},
        {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41", bad + bad + bad + bad + bad + bad + bad + bad + "A"},
        {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", bad + bad + bad + bad + bad + "A" + bad + bad + "B"},
        {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", bad + bad + bad + bad + "A"},
        {"\xF0\x9F\x98", bad},
    };
    for (const auto & [bytes, expected] : cases) {
        for (size_t piece = 1; piece <= bytes.size(); ++piece) {
            check(decoded(bytes, piece) == expected, "a table of the Unicode standard");
        }
    }
    std::string all;
    for (uint32_t point = 1; point <= 0x10FFFF; ++point) {
        const auto byte = [&](uint32_t mark, uint32_t shift, uint32_t bits) {
            all.push_back(static_cast<char>(mark | ((point >> shift) & ((1U << bits) - 1))));
        };
        if (point >= 0xD800 && point <= 0xDFFF) {
            continue;
        }
        if (point < 0x80) {
            byte(0, 0, 7);
        } else if (point < 0x800) {
            byte(0xC0, 6, 5), byte(0x80, 0, 6);
        } else if (point < 0x10000) {
            byte(0xE0, 12, 4), byte(0x80, 6, 6), byte(0x80, 0, 6);
        } else {
            byte(0xF0, 18, 3), byte(0x80, 12, 6), byte(0x80, 6, 6), byte(0x80, 0, 6);
        }
    }
    check(decoded(all, 7) == all, "every code point comes through");
}

void test_stop_strings() {
    const std::string text = "aabaabcabcaabb";
    for (const std::string & stop : {std::string("aabc"), std::string("caab"), std::string("bb"), std::string("x")}) {
        for (size_t piece = 1; piece <= text.size(); ++piece) {
            StopStrings stops({stop, "never"});
            std::string out;
            bool found = false;
            for (size_t i = 0; i < text.size() && !found; i += piece) {
                out += stops.push(text.substr(i, piece), found);
            }
            if (!found) {
                out += stops.flush();
            }
            check(out == text.substr(0, text.find(stop)), "text up to the stop string " + stop);
            check(found == (text.find(stop) != std::string::npos), "the stop string is noticed: " + stop);
        }
    }
    check_throws<std::invalid_argument>([] { StopStrings({""}); }, "stop", "an empty stop string");
}

std::vector<float> random_row(std::mt19937 & random, size_t n, bool ties) {
    std::normal_distribution<float> normal(0.0F, 4.0F);
    std::vector<float> row(n);
    for (auto & logit : row) {
        logit = ties ? std::round(normal(random)) : normal(random);
    }
    row[random() % n] = -std::numeric_limits<float>::infinity();
    return row;
}

// Every pass, for sizes around blocks and registers, with the bits that the scalar build gives.
void test_kernels() {
    std::mt19937 random(7);
    const auto available = available_kernels();
    check(std::string(available.front()->name) == "scalar", "every build has scalar kernels");
    for (const size_t n : {1, 2, 15, 16, 17, 255, 256, 257, 1000, 5001}) {
        // On the heap to the byte, so that a read beyond the end is noticed.
        const std::vector<float> row = random_row(random, n, n % 2 == 0);
        std::vector<uint32_t> bits((n + 31) / 32);
        std::generate(bits.begin(), bits.end(), std::ref(random));
        for (const TokenBits allowed : {static_cast<TokenBits>(nullptr), static_cast<TokenBits>(bits.data())}) {
            std::vector<std::vector<float>> answers;
            for (const Kernels * kernels : available) {
                const size_t n_blocks = block_count(n);
                std::vector<float> answer(n_blocks * 8 + n);
                float * out = answer.data();
                std::vector<float> maxima(n_blocks);
                check(kernels->block_maxima(row.data(), n, allowed, maxima.data()),
                      "no NaN is seen where there is none");
                std::copy(maxima.begin(), maxima.end(), out);
                const float largest = *std::max_element(row.begin(), row.end());
                const ExpSumOptions options{largest, 0.7F, -20.0F, 1.0F};
                kernels->exp_sums(row.data(), n, allowed, maxima.data(), options, out + n_blocks);
                kernels->exp_sums_split(row.data(), n, allowed, maxima.data(), options, out + 2 * n_blocks,
                                        out + 3 * n_blocks);
                kernels->exp_sums_weighted(row.data(), n, allowed, maxima.data(), options, out + 4 * n_blocks,
                                           out + 5 * n_blocks);
                answer.push_back(static_cast<float>(
                    kernels->moments(row.data(), n, allowed, largest, out + 6 * n_blocks, out + 7 * n_blocks)));
                kernels->exps(row.data(), n, largest, 0.7F, answer.data() + 8 * n_blocks);
                std::vector<int32_t> ids(n);
                ids.resize(kernels->find(row.data(), n, allowed, maxima.data(), -1.0F, 5.0F, ids.data()));
                for (const int32_t id : ids) {
                    const float logit = row[static_cast<size_t>(id)];
                    check(logit >= -1.0F && logit < 5.0F, "what is found lies between the bounds");
                    answer.push_back(static_cast<float>(id));
                }
                std::vector<float> broken = row;
                broken[n / 2] = std::numeric_limits<float>::quiet_NaN();
                check(!kernels->block_maxima(broken.data(), n, allowed, maxima.data()), "NaN is seen");
                answers.push_back(std::move(answer));
            }
            for (size_t i = 0; i < answers.size(); ++i) {
                const bool same = answers[i].size() == answers[0].size() &&
                                  std::memcmp(answers[i].data(), answers[0].data(), answers[0].size() * 4) == 0;
                check(same, std::string(available[i]->name) + " gives the bits of scalar");
            }
            double sum = 0;
            double expected = 0;
            for (size_t i = 0; i < n; ++i) {
                const bool counts = allowed == nullptr || ((bits[i / 32] >> (i % 32)) & 1U) != 0;
                const double largest = *std::max_element(row.begin(), row.end());
                expected += counts && row[i] >= -20.0F ? std::exp((row[i] - largest) * static_cast<double>(0.7F)) : 0.0;
            }
            for (size_t i = 0; i < block_count(n); ++i) {
                sum += static_cast<double>(answers[0][block_count(n) + i]);
            }
            check(std::abs(sum - expected) <= 1e-6 * (expected + 1e-6), "the sum is right");
        }
    }
}

// Every option on rows of every kind: nothing is read or written out of bounds, and what is
// drawn is a token that the distribution has.
void test_sampler() {
    std::mt19937 random(9);
    const auto chance = [&random](double p) { return std::uniform_real_distribution<>(0, 1)(random) < p; };
    for (int repeat = 0; repeat < 300; ++repeat) {
        SamplingOptions options;
        options.seed = random() % 1000;
        options.temperature = chance(0.2) ? 0.0F : chance(0.5) ? 1.0F : 0.6F;
        options.top_k = chance(0.5) ? 0 : static_cast<int32_t>(random() % 300);
        options.top_p = chance(0.3) ? 1.0F : 0.9F;
        options.min_p = chance(0.5) ? 0.0F : 0.02F;
        options.typical_p = chance(0.8) ? 1.0F : 0.7F;
        options.top_n_sigma = chance(0.8) ? 0.0F : 1.0F;
        options.xtc_probability = chance(0.8) ? 0.0F : 0.5F;
        options.dynamic_temperature_range = chance(0.8) ? 0.0F : 0.4F;
        options.mirostat = chance(0.9) ? 0 : 2;
        options.repeat_penalty = chance(0.5) ? 1.0F : 1.2F;
        options.dry_multiplier = chance(0.7) ? 0.0F : 0.8F;
        options.dry_breakers = {{3}, {1, 2}};
        options.logit_bias = {{0, 1.0F}, {4, -1.0F}};
        Sampler sampler(options);
        const size_t n = std::vector<size_t>{5, 17, 300, 5000, 9001}[static_cast<size_t>(random()) % 5];
        const std::vector<float> row = random_row(random, n, repeat % 3 == 0);
        std::vector<uint32_t> bits((n + 31) / 32, 0xAAAAAAAAU);
        const TokenBits allowed = chance(0.3) ? bits.data() : nullptr;
        Logprobs logprobs;
        logprobs.top.resize(random() % 4);
        for (int draw = 0; draw < 20; ++draw) {
            const auto left = sampler.distribution({row.data(), n}, allowed, bits.size());
            const int32_t token = sampler.sample({row.data(), n}, allowed, bits.size(), &logprobs);
            const bool known = std::any_of(left.begin(), left.end(),
                                           [token](const TokenProbability & one) { return one.id == token; });
            check(known, "a draw is one of the distribution's");
            check(logprobs.chosen <= 1e-5F, "a probability is at most one");
            sampler.accept(draw % 4 == 0 ? static_cast<int32_t>(random() % 5) : token);
        }
    }
    SamplingOptions greedy;
    greedy.temperature = 0;
    const std::vector<float> row = {0.5F, 2.0F, -1.0F, 2.0F, 0.0F};
    check(Sampler(greedy).sample({row.data(), 5}) == 1, "greedy takes the first of the largest");
    greedy.presence_penalty = 5;
    Sampler penalised(greedy);
    penalised.accept(1);
    check(penalised.sample({row.data(), 5}) == 3, "a penalty moves greedy to the next");
}

// Three threads, each new for its part, and slow.
class NewThreads : public RowThreads {
  public:
    int n_passes() const { return n_passes_; }

  private:
    void run(const Pass & pass) override {
        ++n_passes_;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // so that they are of no use
        std::vector<std::thread> threads;
        for (size_t i = 0; i < 3; ++i) {
            threads.emplace_back([&pass, i] { pass(i, 3); });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
    }

    int n_passes_ = 0;
};

// Threads that help change no draw, whatever the options; and where a pass takes longer with them, they are no longer
// asked after the trial.
void test_row_threads() {
    std::mt19937 random(13);
    std::vector<SamplingOptions> all(8);
    all[0].temperature = 0;
    all[1].top_p = 0.9F;
    all[2].top_n_sigma = 1;
    all[3].mirostat = 2;
    all[4].dynamic_temperature_range = 0.4F;
    all[5].typical_p = 0.7F;
    all[6].logit_bias = {{0, 1.0F}, {4, -1.0F}};
    all[7].top_k = 40;
    for (SamplingOptions & options : all) {
        options.seed = 5;
        Sampler alone(options);
        Sampler helped(options);
        NewThreads threads;
        std::vector<uint32_t> bits(1300, 0xAAAAAAAAU);
        for (int draw = 0; draw < 40; ++draw) {
            const size_t n = 40000 + random() % 1000;
            const std::vector<float> row = random_row(random, n, draw / 4 % 2 == 0);
            const TokenBits allowed = draw % 3 == 0 ? bits.data() : nullptr;
            Logprobs with_help, without;
            with_help.top.resize(3);
            without.top.resize(3);
            const int32_t token = helped.sample({row.data(), n, &threads}, allowed, bits.size(), &with_help);
            check(token == alone.sample({row.data(), n}, allowed, bits.size(), &without), "help changes no draw");
            check(with_help.chosen == without.chosen && with_help.top == without.top, "help changes no probability");
        }
        const int n_passes = threads.n_passes();
        check(n_passes > 0, "threads are tried");
        const std::vector<float> row = random_row(random, 40000, false);
        for (int draw = 0; draw < 100; ++draw) {
            helped.sample({row.data(), row.size(), &threads});
        }
        check(threads.n_passes() == n_passes, "slow threads are not asked after the trial");
        const std::vector<float> short_row = random_row(random, 1000, false);
        NewThreads unused;
        for (int draw = 0; draw < 40; ++draw) {
            helped.sample({short_row.data(), short_row.size(), &unused});
        }
        check(unused.n_passes() == 0, "short rows are done alone");
    }
}

// Two threads of llama.cpp's, which would only wait for each other on a single core.
int32_t n_threads() {
#ifdef __linux__
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) == 0 && CPU_COUNT(&cores) == 1 ? 1 : 2;
#else
    return 2;
#endif
}

// A million times a view is taken, written to, dropped, or overwritten by a decode.
void test_views(const std::string & path) {
    ModelOptions options;
    options.n_ctx = 64;
    options.n_batch = 8;
    const auto model = std::make_shared<Model>(path, options);
    const auto n_vocab = static_cast<size_t>(model->n_vocab());
    std::mt19937 random(3);
    auto evaluation = std::make_unique<Evaluation>(model);
    std::vector<LogitsView> views;
    size_t n_tokens = 0;
    size_t n_refused = 0;
    float seen = 0;
    for (int step = 0; step < 1'000'000; ++step) {
        const auto what = random() % 1000;
        if (what < 20) {
            if (n_tokens > 50) {
                evaluation->reset();
                n_tokens = 0;
            }
            const std::vector<int32_t> tokens(1 + random() % 4, static_cast<int32_t>(random() % n_vocab));
            try {
                views.push_back(evaluation->eval(tokens, what < 10, {}));
                n_tokens += tokens.size();
            } catch (const ViewsInUseError &) {
                ++n_refused;
                views.clear();
            }
        } else if (what == 20) {
            evaluation = std::make_unique<Evaluation>(model);
            n_tokens = 0;
        } else if (what < 400 && !views.empty()) {
            views.push_back(views[random() % views.size()]);
        } else if (what < 700 && !views.empty()) {
            const LogitsView & view = views[random() % views.size()];
            float & logit = view.logits[random() % (n_vocab * view.n_rows)];
            seen += logit;
            logit = 1.0F;
        } else if (!views.empty()) {
            std::swap(views[random() % views.size()], views.back());
            views.pop_back();
        }
    }
    model->close();
    for (const LogitsView & view : views) {
        seen += view.logits[n_vocab * view.n_rows - 1];
    }
    check(n_refused > 0, "a buffer in use is not pulled away");
    check(seen == seen, "what was read are numbers");
}

std::string text_of(const std::shared_ptr<Model> & model, int64_t max_tokens,
                    std::chrono::microseconds pause = std::chrono::microseconds(0)) {
    GenerationOptions options;
    SamplingOptions greedy;
    greedy.temperature = 0;
    options.sampler = std::make_shared<Sampler>(greedy);
    options.max_tokens = max_tokens;
    const auto generation = Generation::start(model, {1, 2, 3}, options);
    std::string text;
    while (const auto token = generation->next({})) {
        text += std::to_string(token->id) + " ";
        std::this_thread::sleep_for(pause);
    }
    return text;
}

// What is kept of the stream before, what is dropped for room, and several at once: nothing is read that is not there.
void test_reuse(const std::shared_ptr<Model> & model) {
    SamplingOptions greedy;
    greedy.temperature = 0;
    const auto options = [&](int64_t max_tokens) {
        GenerationOptions result;
        result.sampler = std::make_shared<Sampler>(greedy);
        result.max_tokens = max_tokens;
        return result;
    };
    std::vector<int32_t> prompt(90);
    std::iota(prompt.begin(), prompt.end(), 1);
    for (const size_t n : {90U, 90U, 40U, 60U, 3U, 1U, 80U}) {
        GenerationOptions reusing = options(20);
        reusing.reuse = true;
        const auto generation =
            Generation::start(model, {prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(n)}, reusing);
        while (generation->next({})) {
        }
        const GenerationStats stats = generation->stats();
        check(stats.n_cached_tokens < n, "at least one token of a prompt is decoded");
    }
    GenerationOptions dropping = options(100);
    dropping.form.droppable = {{0, 20}, {20, 50}};
    const auto generation = Generation::start(model, prompt, dropping);
    int64_t n_tokens = 0;
    while (generation->next({})) {
        ++n_tokens;
    }
    check(generation->stats().n_dropped_tokens == 50 || n_tokens < 59, "old tokens are dropped for new ones");

    // Several at a time, each of which is asked in turn.
    for (const bool eager : {false, true}) {
        std::vector<std::shared_ptr<Generation>> open;
        for (size_t i = 1; i <= 7; ++i) {
            GenerationOptions one = options(static_cast<int64_t>(i));
            one.eager = eager;
            const auto end = prompt.begin() + static_cast<std::ptrdiff_t>(10 * i);
            open.push_back(Generation::start(model, {prompt.begin(), end}, one));
        }
        for (int round = 0; round < 8; ++round) {
            for (const auto & one : open) {
                one->next({});
            }
        }
        for (size_t i = 1; i <= 7; ++i) {
            const GenerationStats stats = open[i - 1]->stats();
            check(stats.stop_reason == StopReason::max_tokens || stats.stop_reason == StopReason::eos,
                  "each reply has its own end");
            check(stats.n_tokens <= static_cast<int64_t>(i), "each reply has its own length");
        }
    }
    // One whose caller says stop, beside others.
    const auto first = Generation::start(model, prompt, options(20));
    const auto interrupted = Generation::start(model, prompt, options(20));
    check(first->next({}).has_value(), "a stream goes on");
    check_throws<CancelledError>([&] { interrupted->next([] { return true; }); }, "", "a stream whose poll says stop");
    check(!interrupted->next({}), "an ended stream stays ended");
    check(first->next({}).has_value(), "the other goes on");
}

// Streams of every kind come and go in many threads, some are closed and some fail; each has what it has alone.
void test_crowd(const std::string & path, uint32_t n_parallel) {
    ModelOptions options;
    options.n_ctx = 128;
    options.n_batch = 16;
    options.n_parallel = n_parallel;
    const auto model = std::make_shared<Model>(path, options);
    std::atomic<size_t> n_wrong{0};  // checks count for one thread only
    const auto reply = [&](int32_t seed, int what) {
        GenerationOptions one;
        SamplingOptions greedy;
        greedy.temperature = 0;
        one.sampler = std::make_shared<Sampler>(greedy);
        one.max_tokens = 1 + seed % 9;
        one.reuse = seed % 3 == 0;
        if (what == 1) {
            one.choose = [n = 0](const ChooserView & view) mutable -> std::optional<int32_t> {
                if (++n > 3) {
                    throw std::runtime_error("enough");
                }
                return view.tokens->back();
            };
        }
        one.keep_logits = what == 2;
        std::vector<int32_t> prompt(static_cast<size_t>(1 + seed * 7 % 60), 1 + seed % 40);
        const auto generation = Generation::start(model, prompt, one);
        std::vector<int32_t> ids;
        try {
            while (const auto token = generation->next({})) {
                ids.push_back(token->id);
                n_wrong += what != 2 || token->n_rows->load() == token->n_rows_then ? 0 : 1;  // the logits are its own
                if (what == 3 && ids.size() == 2) {
                    generation->close(StopReason::closed);
                }
            }
        } catch (const std::runtime_error & error) {
            n_wrong += what == 1 && std::string(error.what()) == "enough" ? 0 : 1;
        }
        return ids;
    };
    std::vector<std::thread> threads;
    for (int32_t i = 0; i < 8; ++i) {
        threads.emplace_back([&, i] {
            for (int32_t j = 0; j < 12; ++j) {
                const int32_t seed = 8 * j + i;
                const int what = (i + j) % 4;
                const size_t n = reply(seed, what).size();
                const auto n_most = static_cast<size_t>(1 + seed % 9);
                n_wrong += n > n_most || (what == 1 && n > 3) || (what == 3 && n > 2) ? 1 : 0;
            }
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    check(n_wrong == 0, "each has its own length, its own logits and its own error");
    model->close();
}

// The number with the most tokens per second is found, whether that is all streams or few.
void test_batch_sizes() {
    for (const uint32_t n : {1U, 2U, 3U, 7U, 16U, 64U, 200U}) {
        for (const double growth : {0.02, 0.5, 0.98, 1.0, 1.3}) {  // of the time, with each further stream
            GroupSize size;
            const auto seconds = [&](uint32_t together) { return 0.01 * (1 + growth * (together - 1)); };
            double took_s = 0, least_s = 0;
            std::vector<double> best{0};  // tokens per second, of at most so many streams
            for (uint32_t together = 1; together <= n; ++together) {
                best.push_back(std::max(best.back(), together / seconds(together)));
            }
            for (int i = 0; i < 3000; ++i) {
                // Those that are on their way back are not ready.
                const uint32_t n_ready = std::max(n - static_cast<uint32_t>(i % 3 == 0    ? n / 3
                                                                            : i % 17 == 0 ? n - 1
                                                                                          : 0),
                                                  1U);
                const uint32_t together = size.of(n_ready);
                check(together >= 1 && together <= n_ready, "a group of those that are ready");
                size.took(together, seconds(together));
                if (i >= 300) {
                    took_s += seconds(together);
                    least_s += together / best[n_ready];
                }
            }
            check(least_s > 0.9 * took_s, "nearly the most tokens per second");
        }
    }
    for (const double per_token_s : {1e-5, 1e-3, 0.1}) {
        for (const double overhead_s : {0.0, 0.01, 1.0}) {
            PieceSize size;
            const auto seconds = [&](uint32_t n) { return overhead_s + per_token_s * n; };
            for (int i = 0; i < 50; ++i) {
                const uint32_t n = size.within(0.5, 512);
                check(n >= 1 && n <= 512, "a piece of a batch");
                check(i == 0 || seconds(n) <= 0.5 || n == 1 || seconds(1) > 0.5 || i < 6,
                      "within the limit, if that can be");
                size.took(n, seconds(n));
            }
            const uint32_t last = size.within(0.5, 512);
            check(last == 512 || seconds(4 * last) > 0.5 * 0.7 || seconds(last) > 0.35, "and not much less than it");
        }
    }
}

void test_model(const std::string & path) {
    ModelOptions options;
    options.n_ctx = 128;
    options.n_batch = 16;
    options.n_threads = n_threads();
    float last_share = 0;
    options.progress = [&](float share) {
        check(share >= last_share, "progress never goes back");
        last_share = share;
        return true;
    };
    const auto model = std::make_shared<Model>(path, options);
    check(last_share == 1.0F, "progress ends at 1");
    options.progress = {};
    const std::string alone = text_of(model, 20);
    check(!alone.empty(), "a model generates tokens");

    check(text_of(model, 20, std::chrono::microseconds(500)) == alone, "looking ahead gives the same text");

    std::string first;
    std::string second;
    std::thread thread([&] { first = text_of(model, 20); });
    second = text_of(model, 20);
    thread.join();
    check(first == alone && second == alone, "two threads get what one gets alone");

    for (int i = 0; i < 20; ++i) {
        const auto abandoned = Generation::start(model, {1, 2, 3}, {});
        for (int n = 0; n < i % 4; ++n) {
            abandoned->next({});
            std::this_thread::sleep_for(std::chrono::microseconds(200));  // so that it looks ahead
        }
        if (i % 3 == 0) {
            abandoned->close(StopReason::closed);
        }
    }
    const auto interrupted = Generation::start(model, std::vector<int32_t>(100, 1), {});
    check_throws<CancelledError>([&] { interrupted->next([] { return true; }); }, "", "a poll that says stop");
    check(interrupted->stats().stop_reason == StopReason::interrupted, "the reason is kept");
    check(!interrupted->next({}), "an ended generation stays ended");
    check(text_of(model, 20) == alone, "an interrupted stream leaves nothing behind");

    // Until the context is full, while another thread reads the figures.
    const auto full = Generation::start(model, {1, 2, 3}, {});
    std::atomic<bool> done{false};
    std::thread reader([&] {
        while (!done) {
            full->stats();
        }
    });
    while (full->next({})) {
    }
    done = true;
    reader.join();
    check(full->stats().stop_reason == StopReason::context_full || full->stats().stop_reason == StopReason::eos,
          "a stream ends with the context");

    test_reuse(model);
    check(text_of(model, 20) == alone, "what was kept and dropped leaves nothing behind");

    check_throws<ContextFullError>([&] { Generation::start(model, std::vector<int32_t>(129, 1), {}); }, "129",
                                   "a prompt that is too long");
    check_throws<std::invalid_argument>([&] { Generation::start(model, {}, {}); }, "prompt", "an empty prompt");
    check_throws<std::invalid_argument>([&] { Generation::start(model, {1, -1}, {}); }, "prompt[1]", "a bad token");

    auto closed = std::make_shared<Model>(path, options);
    const auto open = Generation::start(closed, {1, 2, 3}, {});
    open->next({});
    std::thread closer([&] { closed->close(); });
    while (open->next({})) {
    }
    closer.join();
    check_throws<ClosedError>([&] { closed->tokenizer(); }, "closed", "use after close");
    closed.reset();
    check(!open->next({}), "a stream outlives its model");
}

// Streams and an evaluation of one model, each in a thread, while others look at it, and close it at last: no
// race for ThreadSanitizer to see, and each stream says what it says alone.
void test_threads(const std::string & path) {
    ModelOptions options;
    options.n_ctx = 128;
    options.n_batch = 16;
    const auto model = std::make_shared<Model>(path, options);
    const std::string alone = text_of(model, 12);
    std::atomic<bool> over{false};
    std::atomic<int> n_different{0};
    const auto until_closed = [](auto && work) {
        try {
            work();
        } catch (const Error &) {  // the model was closed
        }
    };
    std::vector<std::thread> threads;
    for (const auto pause : {std::chrono::microseconds(0), std::chrono::microseconds(200)}) {
        threads.emplace_back([&, pause] {
            for (int i = 0; i < 8; ++i) {
                n_different += text_of(model, 12, pause) == alone ? 0 : 1;
            }
        });
    }
    threads.emplace_back([&] {
        Evaluation evaluation(model);
        for (int i = 0; i < 30; ++i) {
            const LogitsView view = evaluation.eval({1, 2}, false, {});
            n_different += view.logits[0] == view.logits[0] ? 0 : 1;
            evaluation.reset();
        }
    });
    const auto shared = Generation::start(model, {1, 2, 3}, {});
    std::thread watcher([&] {
        while (!over) {
            shared->stats();
            model->pinned();
            model->closed();
            until_closed([&] { model->tokenizer(); });
            std::this_thread::yield();
        }
    });
    // Two threads that take turns with the tokens of one stream.
    for (int i = 0; i < 2; ++i) {
        threads.emplace_back([&] {
            for (int n = 0; n < 20 && shared->next({}); ++n) {
            }
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    check(n_different == 0, "threads that share a model have what one has alone");
    threads.clear();
    for (int i = 0; i < 3; ++i) {
        threads.emplace_back([&] {
            until_closed([&] {
                while (true) {
                    text_of(model, 5);
                }
            });
        });
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    model->close();
    for (std::thread & thread : threads) {
        thread.join();
    }
    over = true;
    watcher.join();
    check(model->closed(), "a model can be closed under its streams");
}

// Under a sanitizer no figure is right; nothing is to be read or written out of bounds, and nothing left.
void test_expert_replays() {
    constexpr size_t n_tokens = 300, n_layers = 3, n_used = 4, n_experts = 12;
    std::mt19937 random(1);
    std::vector<uint16_t> ids;
    std::vector<uint16_t> experts(n_experts);
    std::iota(experts.begin(), experts.end(), uint16_t{0});
    for (size_t i = 0; i < n_tokens * n_layers; ++i) {
        // One expert after the other makes way, so that most stay.
        std::swap(experts[random() % n_used], experts[random() % n_experts]);
        ids.insert(ids.end(), experts.begin(), experts.begin() + n_used);
    }
    ids[17] = unknown_expert;
    const ExpertRoutes routes = {ids.data(), n_tokens, n_layers, n_used, n_experts};
    const auto hits = [&](CachePolicy policy, size_t capacity) {
        const ReplayCounts counts = replay(routes, policy, capacity);
        return std::accumulate(counts.n_hits.begin(), counts.n_hits.end(), int64_t{0});
    };
    const std::vector<int64_t> distances = reuse_distances(routes);
    check(std::accumulate(distances.begin(), distances.end(), int64_t{0}) == static_cast<int64_t>(ids.size()) - 1,
          "reuse distances count all requests whose expert is known");
    int64_t of_lru = 0;
    for (size_t capacity = 1; capacity <= n_experts; ++capacity) {
        of_lru += distances[capacity - 1];
        const std::string what = "with " + std::to_string(capacity) + " experts resident ";
        check(hits(CachePolicy::lru, capacity) == of_lru, what + "LRU hits what is near enough");
        for (const CachePolicy policy :
             {CachePolicy::lru, CachePolicy::lru_one_insertion, CachePolicy::second_touch, CachePolicy::lfu}) {
            check(hits(policy, capacity) <= hits(CachePolicy::belady, capacity), what + "none beats Belady");
        }
        hits(CachePolicy::fixed, capacity);
        hits(CachePolicy::lru_shared, capacity);
    }
    check(replay({nullptr, 0, n_layers, n_used, n_experts}, CachePolicy::belady, 1).n_requests ==
              std::vector<int64_t>(n_layers, 0),
          "no token, no request");
    check_throws<std::invalid_argument>([&] { replay(routes, CachePolicy::lru, 0); }, "capacity", "no place");
    ids[0] = n_experts;
    check_throws<std::invalid_argument>([&] { reuse_distances(routes); }, "under n_experts", "an expert too many");
}

// One thread reads while another decodes.
void test_expert_recorder(const std::string & path) {
    ModelOptions options;
    options.n_ctx = 128;
    const auto model = std::make_shared<Model>(path, options);
    constexpr size_t n_layers = 4, n_used = 2;
    constexpr int64_t n_reply = 40;
    const auto recorder = std::make_shared<ExpertRecorder>(n_layers, n_used, 8);
    GenerationOptions generating;
    generating.max_tokens = n_reply;
    generating.look_ahead = false;
    generating.recorder = recorder;
    std::atomic<bool> over{false};
    size_t n_read = 0;
    std::thread reader([&] {
        std::vector<uint16_t> ids;
        for (bool last = false; !last;) {
            last = over;
            const size_t n = recorder->n_readable();
            ids.resize(n * n_layers * n_used);
            recorder->read(ids.data(), n);
            n_read += n;
            std::this_thread::yield();
        }
    });
    size_t n_decoded = 2;  // all but the last token of prompt and reply
    const auto generation = Generation::start(model, {1, 2, 3}, generating);
    while (generation->next({})) {
        ++n_decoded;
    }
    over = true;
    reader.join();
    check(n_read + recorder->n_lost() == n_decoded, "each token's experts are read or counted as lost");
    check(recorder->n_readable() == 0, "nothing is left to read");
}

void test_measurement() {
    MeterOptions options;
    options.n_threads = n_threads();
    options.working_set_bytes = 4 << 20;
    options.budget_s = 0;
    DeviceMeter meter("CPU", options);
    for (const char * type : {"f32", "f16", "q8_0", "q4_K", "mxfp4"}) {
        for (const int64_t n_out : {1, 64, 96, 100'000}) {
            check(meter.weight_rate(type, 512, n_out, 0, 0).bytes_per_s > 0, "a rate of weights");
            check(meter.weight_rate(type, 512, n_out, 5, 2).bytes_per_s > 0, "a rate of experts");
        }
    }
    for (const ProductSet * set : available_product_sets()) {
        meter.use_products(set->name, false);
        for (const int64_t n_tokens : {1, 3, 130}) {
            check(meter.weight_rate("mxfp4", 512, 96, 0, 0, n_tokens).kernels == set->name, "products of a set");
            check(meter.weight_rate("mxfp4", 512, 96, 5, 2, n_tokens).kernels == set->name, "and with experts");
        }
    }
    meter.use_products("llama.cpp", true);
    check(meter.weight_rate("mxfp4", 512, 96, 0, 0, 3).kernels == "llama.cpp", "products of llama.cpp");
    check_throws<std::invalid_argument>([&] { meter.use_products("mmx", {}); }, "llama.cpp", "products of no set");
    meter.use_products("auto", {});
    check(meter.attention_bytes_per_s("f16", 8, 2, 64, 256) > 0, "a rate of a KV cache");
    check(meter.operation_s(2880) >= 0, "the cost of an operation");
    check(meter.visit_s(2880) == 0, "the CPU is where one is anyway");
    for (const char * type : {"f32", "q8_0", "mxfp4"}) {
        check(meter.batch_flops(type, 512, 100, 0, 0, 17) > 0, "a rate of batches");
        check(meter.batch_flops(type, 512, 96, 5, 2, 33) > 0, "a rate of batches with experts");
    }
    check(meter.attention_flops("f16", 8, 2, 64, 50) > 0, "a rate of a batch's attention");
    check(std::isinf(meter.link_rates(1 << 20, false).to_device_bytes_per_s),
          "nothing lies between the CPU and its memory");
    check_throws<std::invalid_argument>([&] { meter.weight_rate("i32", 64, 64, 0, 0); }, "i32", "weights of integers");
    check_throws<Error>([&] { meter.weight_rate("f32", 1 << 20, 1, 0, 0); }, "too few", "rows beyond the memory");
    check_throws<std::invalid_argument>([&] { DeviceMeter("CUDA7", options); }, "CPU", "a device that is not there");
}

void test_pieces_of_mapped_weights() {
    constexpr size_t page = 4096;
    constexpr size_t mebibyte = 1 << 20;
    const int files[2] = {};
    const auto pieces = [&](std::vector<MappedTensor> tensors) {
        std::vector<std::pair<uintptr_t, size_t>> found;
        for (const PinnedPiece & piece : pieces_of(std::move(tensors), page)) {
            found.emplace_back(piece.start, piece.n_bytes);
        }
        return found;
    };
    using Pieces = std::vector<std::pair<uintptr_t, size_t>>;
    const MappedTensor first{10 * page + 32, 100, &files[0]};
    check(pieces({}).empty(), "no tensors are no pieces");
    check(pieces({first}) == Pieces{{10 * page, page}}, "a piece is whole pages");
    check(pieces({{10 * page, page, &files[0]}}) == Pieces{{10 * page, page}}, "and no page more");
    check(pieces({{10 * page + mebibyte, 5, &files[0]}, first}) == Pieces{{10 * page, mebibyte + page}},
          "tensors less than a mebibyte apart are in one piece, whatever their order");
    check(pieces({first, {11 * page + mebibyte, 5, &files[0]}}) ==
              Pieces{{10 * page, page}, {11 * page + mebibyte, page}},
          "others are not");
    check(pieces({first, {12 * page, 5, &files[1]}}) == Pieces{{10 * page, page}, {12 * page, page}},
          "nor are those of two files");
    check(pieces({first, {10 * page + 200, page, &files[1]}}) == Pieces{{10 * page, 2 * page}},
          "what shares a page is in one piece");
    check(pieces({{10 * page, 9 * page, &files[0]}, {11 * page, page, &files[0]}}) == Pieces{{10 * page, 9 * page}},
          "what is within another is in its piece");
}

void test_damaged_files(const std::string & path, const std::filesystem::path & folder) {
    std::ifstream source(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(source), {}};
    const auto load = [&](const std::string & content) {
        const std::string damaged = (folder / "damaged.gguf").string();
        std::ofstream(damaged, std::ios::binary) << content;
        try {
            ModelOptions options;
            options.n_ctx = 64;
            const Model model(damaged, options);
            return false;
        } catch (const ModelLoadError & error) {
            return std::string(error.what()).find(damaged) == 0;
        }
    };
    for (size_t i = 0; i < 10; ++i) {
        check(load(bytes.substr(0, bytes.size() * i / 10)), "a truncated file is refused");
    }
    check(load("GGUF" + std::string(20, '\xFF')), "a file of nonsense is refused");
    check_throws<ModelLoadError>([&] { read_gguf(GgufHeader(folder.string())); }, "directory", "a directory");
    check_throws<ModelLoadError>([&] { read_gguf(GgufHeader((folder / "none").string())); }, "no such file",
                                 "a missing file");
    const GgufFile header = read_gguf(GgufHeader(path));
    const uint64_t n_bytes = std::accumulate(header.tensors.begin(), header.tensors.end(), uint64_t{0},
                                             [](uint64_t sum, const GgufTensor & t) { return sum + t.n_bytes; });
    check(n_bytes > 0 && n_bytes < header.n_bytes, "the tensors are smaller than the file");
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc != 1 && argc != 3) {
        std::fprintf(stderr, "usage: %s [MODEL.gguf FOLDER]\n", argv[0]);
        return 2;
    }
    capture_log();
    catch_assertions([](const char * failure) { std::fprintf(stderr, "%s\n", failure); });
    test_utf8_buffer();
    test_stop_strings();
    test_kernels();
    test_products();
    test_activations();
    test_sampler();
    test_row_threads();
    test_thread_pool();
    test_thread_count();
    test_batch_sizes();
    test_resting();
    test_pieces_of_mapped_weights();
    test_expert_replays();
    if (argc == 3) {
        test_feed_forwards();
        test_model(argv[1]);
        test_threads(argv[1]);
        for (const uint32_t n_parallel : {0U, 1U, 2U, 5U}) {
            test_crowd(argv[1], n_parallel);
        }
        test_views(argv[1]);
        test_expert_recorder(argv[1]);
        test_cached_experts(argv[1]);
        test_measurement();
        test_damaged_files(argv[1], argv[2]);
        check(log_pending() && !drain_log().empty() && !log_pending(), "llama.cpp's log was kept");
    }
    std::printf("%d passed, %d failed\n", n_checks - n_failures, n_failures);
    return n_failures == 0 ? 0 : 1;
}
