#include "model/device_times.h"

#include "base/error.h"
#include "base/stopwatch.h"
#include "device/devices.h"
#include "model/model.h"

#include <ggml-backend.h>

#include <algorithm>
#include <string>

namespace overspill {

namespace {

bool only_looks(const ggml_tensor & node) {
    switch (node.op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE: return true;
        default: return false;
    }
}

// llama.cpp asks of each node of a piece of the graph, in order, whether it is waited for; computes up to one that is,
// or to the end of the piece; and tells of one that is when it is done. So the first token shows where pieces end, and
// the others are waited for there.
class PieceClock {
  public:
    enum class Mode { off, learning, timing };

    void start(Mode mode) {
        mode_ = mode;
        n_asked_ = 0;
        if (mode == Mode::learning) {
            devices_.clear();
        }
        ended_s_ = -1;
    }

    static bool ask(ggml_tensor * node, bool is_question, void * data) {
        return static_cast<PieceClock *>(data)->answer(*node, is_question);
    }

    // False if the graph was another one than the one that was learned.
    bool is_whole() const { return n_asked_ == devices_.size(); }

    DeviceTimes times;

  private:
    bool answer(const ggml_tensor & node, bool is_question) {
        if (mode_ == Mode::off) {
            return false;
        }
        if (!is_question) {
            ended_s_ = watch_.seconds();
            DeviceTime & time = times.devices[devices_[n_asked_ - 1]];
            time.seconds += ended_s_ - started_s_;
            ++time.n_pieces;
            return true;
        }
        if (mode_ == Mode::learning) {
            // What only looks at another's memory is never the first of a piece.
            const bool same = only_looks(node) && !devices_.empty();
            devices_.push_back(same ? devices_.back() : device_of(ggml_backend_buffer_get_type(node.buffer)));
            return false;
        }
        const size_t at = n_asked_++;
        if (at >= devices_.size()) {
            return false;
        }
        if (at == 0 || devices_[at] != devices_[at - 1]) {
            started_s_ = watch_.seconds();
            times.moving_s += ended_s_ < 0 ? 0 : started_s_ - ended_s_;
        }
        return at + 1 == devices_.size() || devices_[at + 1] != devices_[at];
    }

    Mode mode_ = Mode::off;
    std::vector<std::string> devices_;  // of each node
    size_t n_asked_ = 0;
    Stopwatch watch_;
    double started_s_ = 0;
    double ended_s_ = -1;
};

}  // namespace

DeviceTimes time_devices(Model & model, const std::vector<int32_t> & tokens, uint32_t n, const Interrupt::Poll & poll) {
    constexpr size_t n_before = 2;  // a prompt, and the token that shows the graph
    if (n < 1 || tokens.size() < n + n_before) {
        throw std::invalid_argument("n must be 1 to the number of tokens less 2, not " + std::to_string(n));
    }
    for (const int32_t token : tokens) {
        model.check_token("tokens", token);
    }
    PieceClock clock;
    model.take_context().reset();  // its memory first
    const std::shared_ptr<Context> context = model.make_timed_context(&PieceClock::ask, &clock);
    Interrupt interrupt;
    const size_t n_prompt = tokens.size() - n - 1;
    for (size_t done = 0; done < n_prompt;) {
        const auto n_now = static_cast<uint32_t>(std::min<size_t>(context->n_batch(), n_prompt - done));
        const Turn turn(model.turns(), interrupt);
        context->decode(tokens.data() + done, n_now, interrupt, poll);
        done += n_now;
    }
    uint32_t n_timed = 0;
    bool learned = false;
    for (size_t i = n_prompt; i < tokens.size(); ++i) {
        const DeviceTimes before = clock.times;
        const Turn turn(model.turns(), interrupt);
        clock.start(learned ? PieceClock::Mode::timing : PieceClock::Mode::learning);
        const Stopwatch watch;
        context->decode(&tokens[i], 1, interrupt, poll);
        if (learned && clock.is_whole()) {
            clock.times.total_s += watch.seconds();
            ++n_timed;
        } else {
            clock.times = before;
        }
        learned = !learned || clock.is_whole();
    }
    if (n_timed == 0) {
        throw Error("the graph was another one for each token, so that its pieces could not be timed");
    }
    DeviceTimes result = std::move(clock.times);
    result.moving_s /= n_timed;
    result.total_s /= n_timed;
    for (auto & [device, time] : result.devices) {
        time.seconds /= n_timed;
        time.n_pieces /= static_cast<int32_t>(n_timed);
    }
    return result;
}

}  // namespace overspill
