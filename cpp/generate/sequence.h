#pragma once

#include "base/utf8_buffer.h"
#include "generate/generation_options.h"
#include "generate/step_logits.h"
#include "generate/stop_reason.h"
#include "generate/token.h"
#include "model/breakdown.h"
#include "model/model.h"
#include "sample/row_threads.h"
#include "text/stop_strings.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace overspill {

// A prompt and the reply to it, as far as it has come: what turns logits into tokens and tokens into text.
class Sequence {
  public:
    // Throws std::invalid_argument. Keeps the model alive.
    Sequence(std::shared_ptr<Model> model, std::vector<int32_t> prompt, GenerationOptions options);

    // Takes the next token and says whether it is the last. `is_full` if no token has room after this one.
    StopReason choose(const StepLogits & row, bool is_full, Token & token, Breakdown & times,
                      const Constraint::ShouldStop & should_stop);
    // Lets go of what was asked of Python, and of the weights. Nothing is chosen afterwards.
    void release();
    // Forgets tokens of the prompt.
    void drop(uint32_t from, uint32_t to);

    const std::vector<int32_t> & tokens() const { return *tokens_; }
    size_t n_prompt() const { return n_prompt_; }
    GenerationOptions & options() { return options_; }
    const GenerationOptions & options() const { return options_; }
    // It never moves then, so that a chooser can look at it from Python.
    void reserve(size_t n) { tokens_->reserve(n); }

  private:
    // The model's, while no other stream has its turn.
    class ModelThreads : public RowThreads {
      public:
        explicit ModelThreads(Model & model) : model_(model) {}
        void use(const ThreadPool * threads) { threads_ = threads; }

      private:
        void run(const Pass & pass) override;

        Model & model_;
        const ThreadPool * threads_ = nullptr;
    };

    int32_t choose_id(const StepLogits & row, Token & token, Breakdown & times,
                      const Constraint::ShouldStop & should_stop);
    void accept_prompt();
    bool is_named(int32_t token) const;
    void constrain();  // compiles the grammar

    std::shared_ptr<Model> model_;
    std::shared_ptr<llama_model> loaded_;
    std::shared_ptr<std::vector<int32_t>> tokens_;  // prompt and reply
    bool has_accepted_prompt_ = false;
    size_t n_prompt_;
    GenerationOptions options_;
    Utf8Buffer characters_;
    StopStrings stops_;
    std::string bytes_;  // of one token, kept for its memory
    Logprobs logprobs_;  // the same
    ModelThreads threads_;
};

}  // namespace overspill
