"""For programs written for llama-cpp-python: change one line, and the rest stays.

>>> from overspill.compat import Llama  # was: from llama_cpp import Llama
>>> llm = Llama(model_path="model.gguf", n_gpu_layers=-1, n_ctx=4096)
>>> llm.create_chat_completion(messages=[{"role": "user", "content": "Hello"}])["choices"][0]["message"]["content"]

Names, defaults and answers are those of llama-cpp-python 0.3. An argument that has no effect here may have its default
alone; any other value is an error that names the argument, and says what to do instead.
"""

from overspill.compat.call_arguments import LlamaGrammar, LogitsProcessorList, StoppingCriteriaList
from overspill.compat.llama import Llama

__all__ = ["Llama", "LlamaGrammar", "LogitsProcessorList", "StoppingCriteriaList"]
