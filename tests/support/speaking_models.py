"""Models that say a given text, whatever they are asked: each token leads to the next."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from model_files import gpt2_vocabulary

_HEAD = 32
_CERTAIN = 20.0


def write_speaking_model(path: Path, text: str, template: str, *, is_endless: bool = False) -> Path:
    """Write a llama whose answer is a text.

    Parameters
    ----------
    path
        The file to write.
    text
        The answer, of more than a few characters.
    template
        A chat template, whose prompts end with a line break.
    is_endless
        Whether the text begins again after its end.
    """
    vocabulary, merges = gpt2_vocabulary()
    pieces = _pieces(text, {*vocabulary})
    tokens = [*vocabulary, *pieces, "<|endoftext|>"]
    first, end = len(vocabulary), len(tokens) - 1
    said = [*range(first, end), first if is_endless else end]
    width = -(-len(said) // _HEAD) * _HEAD
    embedding, output = (np.zeros((len(tokens), width), np.float32) for _ in range(2))
    for place, (token, following) in enumerate(zip([tokens.index("Ċ"), *said[:-1]], said, strict=True)):
        embedding[token, place] = 1
        output[following, place] = _CERTAIN
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(1 << 17)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(_HEAD)
    writer.add_head_count(width // _HEAD)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * end + [gguf.TokenType.CONTROL])
    writer.add_token_merges(list(merges))
    writer.add_eos_token_id(end)
    writer.add_bos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)
    tensors = _idle_layer(width)
    tensors |= {"token_embd": embedding, "output": output, "output_norm": np.ones(width, np.float32)}
    for name, data in tensors.items():
        writer.add_tensor(f"{name}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _idle_layer(width: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return a layer that adds nothing."""
    norms = {f"blk.0.{name}_norm": np.ones(width, np.float32) for name in ("attn", "ffn")}
    shapes = {
        "attn_q": width,
        "attn_k": _HEAD,
        "attn_v": _HEAD,
        "attn_output": width,
        "ffn_gate": _HEAD,
        "ffn_up": _HEAD,
    }
    zeros = {f"blk.0.{name}": np.zeros((rows, width), np.float32) for name, rows in shapes.items()}
    return norms | zeros | {"blk.0.ffn_down": np.zeros((width, _HEAD), np.float32)}


def _pieces(text: str, taken: set[str]) -> list[str]:
    """Cut a text into tokens that are all different, as byte-level vocabularies write them."""
    letters = _letters_of_bytes()
    written = "".join(letters[byte] for byte in text.encode())
    pieces: list[str] = []
    start = 0
    while start < len(written):
        end = start + 6
        while written[start:end] in taken and end < len(written):
            end += 1
        piece = written[start:end]
        if piece in taken or len(piece) < 2:
            pieces[-1] += piece
        else:
            pieces.append(piece)
        taken.add(pieces[-1])
        start = end
    return pieces


def _letters_of_bytes() -> list[str]:
    """Return the letter that GPT-2's vocabulary has for each byte: itself if it can be seen."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]
