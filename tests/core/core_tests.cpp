// The core without Python, for the sanitizers. Usage: overspill_core_tests MODEL.gguf FOLDER
// MODEL is any small model that generates text; damaged copies of it are written to FOLDER.

#include "error.h"
#include "generation.h"
#include "gguf_file.h"
#include "log.h"
#include "model.h"
#include "utf8_buffer.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <numeric>
#include <random>
#include <thread>

using namespace overspill;

namespace {

int n_checks = 0;
int n_failures = 0;

void check(bool holds, const std::string & what) {
    ++n_checks;
    if (!holds) {
        ++n_failures;
        std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    }
}

template <typename Expected, typename Work>
void check_throws(Work && work, const std::string & text, const std::string & what) {
    try {
        work();
        check(false, what + ": nothing was thrown");
    } catch (const Expected & error) {
        check(std::string(error.what()).find(text) != std::string::npos, what + ": " + error.what());
    }
}

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

void test_argmax() {
    std::mt19937 random(7);
    const float infinity = std::numeric_limits<float>::infinity();
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (size_t n : {size_t{1}, size_t{2}, size_t{31}, size_t{32}, size_t{33}, size_t{4095}, size_t{4096}, size_t{4097},
                     size_t{8200}, size_t{50001}}) {
        for (int repeat = 0; repeat < 50; ++repeat) {
            std::vector<float> logits(n);
            // Few different values, so that there are ties, of which the first must win.
            for (auto & logit : logits) {
                logit = static_cast<float>(random() % (repeat < 25 ? 10U : 1000000U)) - 500.0F;
            }
            logits[random() % n] = -infinity;
            const auto expected = static_cast<size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
            check(argmax(logits.data(), n) == expected, "argmax of " + std::to_string(n));
            logits[n / 2] = nan;
            if (n > 2) {
                check(!std::isnan(logits[argmax(logits.data(), n)]), "NaN is never the largest");
            }
        }
        const std::vector<float> nothing(n, -infinity);
        check(argmax(nothing.data(), n) < n, "argmax of nothing stays inside");
    }
}

void test_sampler() {
    const std::vector<float> logits = {0.5F, 2.0F, -1.0F, 2.0F, 0.0F};
    double sum = 0;
    for (int32_t token = 0; token < 5; ++token) {
        sum += std::exp(log_probability(logits.data(), logits.size(), token));
    }
    check(std::abs(sum - 1) < 1e-5, "probabilities add up to one");
    SamplingOptions greedy;
    greedy.temperature = 0;
    check(Sampler(greedy, 5, 64).sample(logits.data()) == 1, "greedy takes the first of the largest");
    greedy.presence_penalty = 5;
    Sampler penalised(greedy, 5, 64);
    penalised.accept(1);
    check(penalised.sample(logits.data()) == 3, "a penalty moves greedy to the next");
    SamplingOptions one;
    one.top_k = 1;
    one.seed = 3;
    check(Sampler(one, 5, 64).sample(logits.data()) != 2, "top-k 1 keeps one of the largest");

    const std::vector<float> broken(5, std::numeric_limits<float>::quiet_NaN());
    const std::vector<float> nothing(5, -std::numeric_limits<float>::infinity());
    for (float temperature : {0.0F, 0.8F}) {
        SamplingOptions options;
        options.temperature = temperature;
        check_throws<Error>([&] { Sampler(options, 5, 64).sample(broken.data()); }, "not numbers", "NaN logits");
        check_throws<Error>([&] { Sampler(options, 5, 64).sample(nothing.data()); }, "not numbers", "-inf logits");
    }
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<std::pair<std::string, void (*)(SamplingOptions &, float)>> fields = {
        {"temperature", [](SamplingOptions & o, float value) { o.temperature = value; }},
        {"top_p", [](SamplingOptions & o, float value) { o.top_p = value; }},
        {"min_p", [](SamplingOptions & o, float value) { o.min_p = value; }},
        {"repeat_penalty", [](SamplingOptions & o, float value) { o.repeat_penalty = value; }},
    };
    for (const auto & [name, set] : fields) {
        for (float value : {nan, -1.0F, std::numeric_limits<float>::infinity()}) {
            SamplingOptions options;
            set(options, value);
            check_throws<std::invalid_argument>([&] { Sampler(options, 5, 64); }, name, name + " out of range");
        }
    }
}

std::string text_of(const std::shared_ptr<Model> & model, int64_t max_tokens) {
    GenerationOptions options;
    options.sampling.temperature = 0;
    options.max_tokens = max_tokens;
    const auto generation = Generation::start(model, {1, 2, 3}, options);
    std::string text;
    while (const auto token = generation->next({})) {
        text += std::to_string(token->id) + " ";
    }
    return text;
}

void test_model(const std::string & path) {
    ModelOptions options;
    options.n_ctx = 128;
    options.n_batch = 16;
    options.n_threads = 2;
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

    std::string first;
    std::string second;
    std::thread thread([&] { first = text_of(model, 20); });
    second = text_of(model, 20);
    thread.join();
    check(first == alone && second == alone, "two threads get what one gets alone");

    for (int i = 0; i < 20; ++i) {
        const auto abandoned = Generation::start(model, {1, 2, 3}, {});
        if (i % 2 == 0) {
            abandoned->next({});
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
    check_throws<ClosedError>([&] { closed->tokenize("x", true, true); }, "closed", "use after close");
    closed.reset();
    check(!open->next({}), "a stream outlives its model");
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
    check_throws<ModelLoadError>([&] { read_gguf(folder.string()); }, "directory", "a directory");
    check_throws<ModelLoadError>([&] { read_gguf((folder / "none").string()); }, "no such file", "a missing file");
    const GgufFile header = read_gguf(path);
    const uint64_t n_bytes = std::accumulate(header.tensors.begin(), header.tensors.end(), uint64_t{0},
                                             [](uint64_t sum, const GgufTensor & t) { return sum + t.n_bytes; });
    check(n_bytes > 0 && n_bytes < header.n_bytes, "the tensors are smaller than the file");
}

}  // namespace

int main(int argc, char ** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: %s MODEL.gguf FOLDER\n", argv[0]);
        return 2;
    }
    capture_log([](const char * message, const char * activity) {
        std::fprintf(stderr, "aborted while %s: %s\n", activity, message);
    });
    test_utf8_buffer();
    test_stop_strings();
    test_argmax();
    test_sampler();
    test_model(argv[1]);
    test_damaged_files(argv[1], argv[2]);
    check(log_pending() && !drain_log().empty() && !log_pending(), "llama.cpp's log was kept");
    std::printf("%d passed, %d failed\n", n_checks - n_failures, n_failures);
    return n_failures == 0 ? 0 : 1;
}
