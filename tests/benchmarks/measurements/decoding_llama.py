"""llama.cpp's side of decoding.py, for an interpreter with xllamacpp, gguf and numpy: nothing of mlmamba is imported.

    PYTHON decoding_llama.py FOLDER FORM THREADS BATCH...

FOLDER holds shape.json and weights.npz, under transformers' names. Prints tokens per CPU second of each batch as JSON:
the time for more tokens without that for a few, so that reading the prompt is left out.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

FEW, MORE = 4, 24


def write(folder: Path, form: str) -> Path:
    """The weights as a GGUF file of the architecture mamba2."""
    shape, weights = json.loads((folder / "shape.json").read_text()), np.load(folder / "weights.npz")
    kind = {"f32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}[form]
    path = folder / f"{form}.gguf"
    out = gguf.GGUFWriter(path, "mamba2")
    out.add_context_length(2**16)
    out.add_embedding_length(shape["hidden_size"])
    out.add_feed_forward_length(0)
    out.add_head_count(0)
    out.add_block_count(shape["num_hidden_layers"])
    out.add_ssm_conv_kernel(shape["conv_kernel"])
    out.add_ssm_inner_size(shape["num_heads"] * shape["head_dim"])
    out.add_ssm_state_size(shape["state_size"])
    out.add_ssm_time_step_rank(shape["num_heads"])
    out.add_ssm_group_count(shape["n_groups"])
    out.add_layer_norm_rms_eps(shape["layer_norm_epsilon"])
    out.add_file_type({"f32": 0, "bf16": 32, "q8_0": 7}[form])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list([f"t{i}" for i in range(shape["vocab_size"])])
    out.add_token_types([gguf.TokenType.NORMAL] * shape["vocab_size"])
    out.add_token_merges(["t 1"])
    out.add_eos_token_id(0)
    for name in weights.files:
        own, data = renamed(name, weights[name], shape["n_groups"])
        if data.ndim == 2 and own.endswith(("ssm_in.weight", "ssm_out.weight", "token_embd.weight")):
            quantized = getattr(gguf.GGMLQuantizationType, kind)
            out.add_tensor(own, gguf.quants.quantize(data, quantized), raw_dtype=quantized)
        else:
            out.add_tensor(own, data)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def renamed(name: str, data: np.ndarray, groups: int) -> tuple[str, np.ndarray]:
    """llama.cpp's name and form of a tensor."""
    parts = name.split(".")
    if parts[1] == "embeddings":
        return "token_embd.weight", data
    if parts[1] == "norm_f":
        return "output_norm.weight", data
    block, part = f"blk.{parts[2]}", ".".join(parts[3:])
    if part == "norm.weight":
        return f"{block}.attn_norm.weight", data
    part = part.removeprefix("mixer.")
    if part == "A_log":
        return f"{block}.ssm_a", -np.exp(data)[:, None]
    if part == "D":
        return f"{block}.ssm_d", data[:, None]
    if part == "norm.weight":
        return f"{block}.ssm_norm.weight", data.reshape(groups, -1)
    if part == "dt_bias":
        return f"{block}.ssm_dt.bias", data
    own = part.replace("in_proj", "ssm_in").replace("out_proj", "ssm_out").replace("conv1d", "ssm_conv1d")
    return f"{block}.{own}", data[:, 0] if part == "conv1d.weight" else data


def rates(path: Path, threads: int, batches: list[int]) -> dict[str, float]:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.warmup = max(batches), 256 * max(batches), True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server, pool = xllamacpp.Server(params), ThreadPoolExecutor(max(batches))

    def cpu_seconds(batch: int, tokens: int) -> float:
        asked = {"prompt": list(range(5, 13)), "n_predict": tokens, "ignore_eos": True, "temperature": 0.0}
        start = time.process_time()
        list(pool.map(lambda _: server.handle_completions(asked | {"cache_prompt": False}), range(batch)))
        return time.process_time() - start

    found = {}
    for batch in batches:
        best = [min(cpu_seconds(batch, tokens) for _ in range(2)) for tokens in (FEW, MORE)]
        found[f"{batch} rows"] = batch * (MORE - FEW) / (best[1] - best[0])
    return found


if __name__ == "__main__":
    folder, form, threads, *batches = sys.argv[1:]
    print(json.dumps(rates(write(Path(folder), form), int(threads), [int(batch) for batch in batches])))
