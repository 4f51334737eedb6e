"""llama.cpp's server on a Mamba-2 language model, for benchmarks beside it. Run by a Python with xllamacpp and gguf:

PYTHON llama_server.py MODEL.safetensors SHAPE.json TOKENIZER.json OUT.gguf THREADS

SHAPE.json holds the language model's configuration. Prints one line of JSON with the server's address, and serves until
its input ends. In float32, which is what the weights are.
"""

import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

_NAMES = {  # ours, in a block -> llama.cpp's
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}


def read(file: Path) -> dict[str, np.ndarray]:
    """float32 tensors of a safetensors file."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    data = np.memmap(file, np.uint8, "r", 8 + size)
    header.pop("__metadata__", None)
    return {
        name: data[slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
        for name, entry in header.items()
        if entry["dtype"] == "F32"
    }


def write(weights: dict[str, np.ndarray], shape: dict, tokenizer: dict, out: Path) -> None:
    """A GGUF file of the language model."""
    inner = shape["expand"] * shape["hidden_size"]
    writer = gguf.GGUFWriter(out, "mamba2")
    writer.add_context_length(2**20)
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_ssm_conv_kernel(shape["conv_kernel"])
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(shape["state_size"])
    writer.add_ssm_time_step_rank(inner // shape["head_dim"])
    writer.add_ssm_group_count(shape["n_groups"])
    writer.add_layer_norm_rms_eps(shape["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    names = {token: name for name, token in tokenizer["model"]["vocab"].items()}
    names |= {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"<unused{i}>") for i in range(shape["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * shape["vocab_size"])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    head = "language_model.backbone."
    writer.add_tensor("token_embd.weight", weights[f"{head}embeddings.weight"])
    writer.add_tensor("output_norm.weight", weights[f"{head}norm_f.weight"])
    for block in range(shape["num_hidden_layers"]):
        for ours, theirs in _NAMES.items():
            value = np.array(weights[f"{head}layers.{block}.{ours}"])
            if ours == "mixer.A_log":
                value = -np.exp(value)
            if theirs in ("ssm_a", "ssm_d"):
                value = value.reshape(-1, 1)
            elif theirs == "ssm_conv1d.weight":
                value = value.reshape(value.shape[0], -1)
            elif theirs == "ssm_norm.weight":
                value = value.reshape(shape["n_groups"], -1)
            writer.add_tensor(f"blk.{block}.{theirs}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    weights, shape, tokenizer, out, threads = sys.argv[1:]
    write(read(Path(weights)), json.loads(Path(shape).read_text()), json.loads(Path(tokenizer).read_text()), Path(out))
    params = xllamacpp.CommonParams()
    params.model.path = out
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 4096, 1, 0
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.endpoint_slots, params.warmup, params.cache_prompt = True, True, True
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address, "build": xllamacpp.BUILD_INFO}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
