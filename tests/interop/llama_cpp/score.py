"""Logits of llama.cpp for token ids: score.py MODEL.gguf IDS.npy LOGITS.npy."""

import sys

import llama_cpp as llama
import numpy as np

model_path, ids_path, out_path = sys.argv[1:4]
ids = np.load(ids_path)
llama.llama_backend_init()
model = llama.llama_model_load_from_file(model_path.encode(), llama.llama_model_default_params())
params = llama.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = max(512, len(ids))
context = llama.llama_init_from_model(model, params)
vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

batch = llama.llama_batch_init(len(ids), 0, 1)
batch.n_tokens = len(ids)
for i, token in enumerate(ids.tolist()):
    batch.token[i], batch.pos[i] = token, i
    batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
status = llama.llama_decode(context, batch)
if status != 0:
    raise SystemExit(f"llama_decode failed with status {status}")
logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), vocab_size))
np.save(out_path, logits)
