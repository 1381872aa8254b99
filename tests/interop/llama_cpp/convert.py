"""Run llama.cpp's convert_hf_to_gguf.py on a checkpoint: convert.py LLAMA_CPP FOLDER OUT.gguf.

The converter refuses tokenizers whose hash it does not know; ours is new. The logits are compared
on token ids, so which pre-tokenizer is written down does not matter. Nor does ERNIE's vocabulary,
which the converter wants as SentencePiece.
"""

import runpy
import sys

source, folder, out = sys.argv[1:4]
sys.path[:0] = [source, f"{source}/gguf-py"]

from conversion.base import TextModel  # noqa: E402  (found through the path set above)
from conversion.ernie import Ernie4_5Model  # noqa: E402

TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
Ernie4_5Model.set_vocab = TextModel._set_vocab_gpt2
sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "bf16"]
runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
