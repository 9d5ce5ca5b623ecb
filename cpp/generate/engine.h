// Decodes the streams of a model that are open at the same time, in one batch.
//
// There is no thread of its own: of the threads that wait for a token, one leads. It decodes a batch for all streams
// that are ready, chooses their tokens, wakes those who wait for them, and lets another one lead when it has its own.
#pragma once

#include "base/interrupt.h"
#include "generate/batch_sizes.h"
#include "generate/participant.h"
#include "generate/prompt_cache.h"
#include "model/model.h"

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

namespace overspill {

class Engine : public ModelPart {
  public:
    explicit Engine(Model & model) : model_(model), prompt_cache_(model.prompt_cache_bytes()) {}
    // The one of the model.
    static std::shared_ptr<Engine> of(Model & model);

    // Queues for a place. step() does that as well.
    void join(Participant & one);
    // Its next step. Throws CancelledError if `poll` or another thread stopped it, what its chooser threw, or Error.
    Step step(Participant & one, const Interrupt::Poll & poll);
    // Gives its place up; what was decoded stays until the place is needed. Its sequence is released, maybe later.
    void leave(Participant & one);
    // Ends its step, if one runs. From any thread.
    void cancel(Participant & one);

    // Puts what a KV cache has of a stream that has not left yet into `saved`, if it has a place. Throws CancelledError
    // if this thread was told to stop while others decoded, or Error; so do the next ones.
    void save(Participant & one);
    // The sequence that has most in common with the tokens, or of none, which was decoded last; null if there is none.
    std::shared_ptr<const SequenceState> save(const std::vector<int32_t> & tokens);
    // Puts a sequence into a free place.
    void restore(const SequenceState & saved);
    size_t prompt_cache_bytes() const { return prompt_cache_.n_bytes(); }
    void end_with_model() override { prompt_cache_.clear(); }

  private:
    using Lock = std::unique_lock<std::mutex>;
    using Run = std::vector<std::shared_ptr<Participant>>;
    struct Place {
        Seat seat;
        Participant * taken_by = nullptr;
        uint64_t run_at = 0;  // when its context had a batch
    };
    // While it exists, this thread leads. At the end it does what was left to it.
    class Leading {
      public:
        Leading(Engine & engine, Lock & lock);
        ~Leading();
        Leading(const Leading &) = delete;
        Leading & operator=(const Leading &) = delete;

      private:
        Engine & engine_;
        Lock & lock_;
    };

    void lead(Lock & lock, Participant & leader, const Interrupt::Poll & poll);
    void seat_waiting(Lock & lock);
    void seat_one(Lock & lock, Participant & one, Place & place);
    Place * place_for(const Participant & one);
    bool make_places(Lock & lock);
    void add_places(const std::shared_ptr<Context> & context);
    std::vector<std::shared_ptr<Context>> remove_unused_places();
    bool evict_idle();
    void free_place(Participant & one);
    void forget_waiting(Participant & one);
    void wait_for_more(Lock & lock);
    void choose_run();
    bool is_ready(const Participant & one) const;
    void compute(Participant & leader, const Interrupt::Poll & poll);
    void choose_tokens(Participant & leader, const Interrupt::Poll & poll, const Breakdown & shared);
    void publish(double seconds);
    void pass_on();
    std::vector<std::shared_ptr<Context>> take_contexts();
    uint32_t n_needed(const Participant & one) const;
    void alone(const std::function<void()> & work);
    size_t take_over(Context & context, uint32_t sequence, Participant & one);
    std::shared_ptr<const SequenceState> saved_for(const Context & context, uint32_t sequence, Participant & one);
    void put_away(Context & context, uint32_t sequence);
    void give_back(std::shared_ptr<Context> context) noexcept;

    Model & model_;
    std::mutex mutex_;  // guards what follows; not held while something is computed
    bool is_led_ = false;
    std::condition_variable arrived_;      // a stream that is asked for a token
    std::condition_variable ended_;        // a round
    size_t n_visitors_ = 0;                // that wait for the end of a round, and go before the next
    std::vector<std::thread::id> inside_;  // that wait for a step, or lead
    std::vector<Participant *> members_;   // in the order in which they came
    std::deque<Participant *> waiting_;    // for a place
    std::vector<Place> places_;
    size_t n_refused_ = 0;  // places that there was no memory for, since members left

    // Of the thread that leads.
    Run run_;
    std::vector<Participant *> ready_tokens_;  // kept for their memory
    std::vector<Participant *> ready_prompts_;
    std::vector<BatchToken> batch_;
    std::optional<Interrupt> run_interrupt_;
    bool is_prompt_ = false;  // the run reads prompts
    bool is_shared_ = false;  // others wait for their tokens meanwhile
    uint64_t n_runs_ = 0;
    uint64_t prompt_at_ = 0;  // the latest run that read prompts
    std::chrono::steady_clock::duration last_run_ = {};
    GroupSize group_size_;
    PieceSize piece_size_;
    double restored_bytes_per_s_ = 2e9;  // at first, a guess

    PromptCache prompt_cache_;
};

}  // namespace overspill
