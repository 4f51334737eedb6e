"""A language model as a GGUF file, which llama.cpp loads (its architecture `mamba2`), with the `gguf` library.

In float32, in bfloat16, or in 8 bits (llama.cpp's q8_0: whole numbers with a scale for every 32 weights). The matrices
take that form; convolutions, norms, A, D and dt_bias stay float32, as llama.cpp wants them.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from mlmamba.convert.language import EMBEDDING, HEAD, LanguageModel

FORMS = {"fp32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}
"""Our names of the precisions, and llama.cpp's."""
_FILE_TYPES = {"fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_NAMES = {  # of a block
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
_WHOLE = {EMBEDDING: "token_embd.weight", "backbone.norm_f.weight": "output_norm.weight", HEAD: "output.weight"}
_CONTEXT = 2**20  # tokens; a state has no end


def write_gguf(model: LanguageModel, destination: str | Path, form: str = "fp32", tokenizer: str | None = None) -> None:
    """Write a language model as one GGUF file with its tokenizer, whole or not at all; tensors one at a time.

    Args:
        form: one of FORMS.
        tokenizer: folder or hub name, for a model folder that holds none.

    Raises:
        FileExistsError: something is at `destination` already.
        ImportError: the `gguf` library is not installed.
        ValueError: llama.cpp cannot express the model, or its tokenizer.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf library: pip install 'mlmamba[gguf]'") from error
    destination, config = Path(destination), model.config
    if destination.exists():
        raise FileExistsError(f"{destination} exists already; delete it or choose another place")
    if form not in FORMS:
        raise ValueError(f"the precision of a GGUF file is {form!r}; expected one of {', '.join(FORMS)}")
    _check(model, form)
    own = (model.folder / "tokenizer.json").is_file()
    vocabulary = Vocabulary.read(str(model.folder) if own else tokenizer, config.vocab_size)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        out = gguf.GGUFWriter(partial, "mamba2")
        out.add_file_type(gguf.LlamaFileType[_FILE_TYPES[form]])
        out.add_context_length(_CONTEXT)
        out.add_embedding_length(config.hidden_size)
        out.add_feed_forward_length(0)
        out.add_head_count(0)
        out.add_block_count(config.num_hidden_layers)
        out.add_ssm_conv_kernel(config.conv_kernel)
        out.add_ssm_inner_size(config.num_heads * config.head_dim)
        out.add_ssm_state_size(config.state_size)
        out.add_ssm_time_step_rank(config.num_heads)
        out.add_ssm_group_count(config.n_groups)
        out.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        out.add_vocab_size(config.vocab_size)
        vocabulary.write(out)
        # Each tensor is made twice, for its size and to be written, so that there is never more than one of them.
        for name, data, kind in _tensors(model, form, gguf):
            out.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_ti_data_to_file()
        for _, data, _ in _tensors(model, form, gguf):
            out.write_tensor_data(data)
        out.close()
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)


class Vocabulary:
    """A byte-level BPE tokenizer (GPT-2's kind, as GPT-NeoX's and those trained here) in GGUF's words.

    What GGUF has no place for is GPT-NeoX's normalisation to NFC: llama.cpp takes text as it comes.

    Args:
        tokenizer: of transformers, fast.
        rows: of the embedding. Those without a token are marked as unused.

    Raises:
        ValueError: it is of another kind, or has more tokens than there are rows.
    """

    def __init__(self, tokenizer, rows: int):
        self._tokenizer, self._rows = tokenizer, rows
        self._raw = json.loads(tokenizer.backend_tokenizer.to_str())
        before, kind = self._raw.get("pre_tokenizer") or {}, self._raw["model"]["type"]
        splits = before.get("type") == "ByteLevel" and before.get("use_regex", True)
        if kind != "BPE" or not splits or before.get("add_prefix_space"):
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} is {kind} after {before.get('type')}; a GGUF file is written "
                "with GPT-2's kind only: byte-level BPE, without a space before the text"
            )
        most = max([*self._raw["model"]["vocab"].values(), *(entry["id"] for entry in self._raw["added_tokens"])])
        if most >= rows:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has the id {most:,}, the model {rows:,} rows")

    @classmethod
    def read(cls, name: str | None, rows: int) -> "Vocabulary":
        """From a folder or the hub. Raises ValueError also where there is none."""
        if name is None:
            raise ValueError("the model's folder holds no tokenizer, which a GGUF file needs; name one (--tokenizer)")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the tokenizer {name}: {error}") from error
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"the tokenizer {name} has no tokenizer.json, which a GGUF file is written from")
        return cls(tokenizer, rows)

    def write(self, out) -> None:
        """Add it to a GGUFWriter."""
        from gguf import TokenType

        names = [f"<unused{i}>" for i in range(self._rows)]
        kinds = [TokenType.UNUSED] * self._rows
        for name, token in self._raw["model"]["vocab"].items():
            names[token], kinds[token] = name, TokenType.NORMAL
        for entry in self._raw["added_tokens"]:
            names[entry["id"]] = entry["content"]
            kinds[entry["id"]] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
        merges = self._raw["model"]["merges"] or ["<unused> <unused>"]  # llama.cpp demands one; this never applies
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre("gpt-2")
        out.add_token_list(names)
        out.add_token_types(kinds)
        out.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
        for role, add in (("eos", out.add_eos_token_id), ("bos", out.add_bos_token_id), ("pad", out.add_pad_token_id)):
            if (token := getattr(self._tokenizer, f"{role}_token_id")) is not None:
                add(token)
        out.add_add_bos_token(False)
        if template := self._tokenizer.chat_template:  # marks of the parts that are trained on mean nothing to others
            for mark in ("generation", "endgeneration"):
                template = template.replace(f"{{%- {mark} -%}}", "")
            out.add_chat_template(template)


def _check(model: LanguageModel, form: str) -> None:
    """Raise ValueError for what llama.cpp's mamba2 has no place for."""
    config, folder = model.config, model.folder
    if getattr(config, "layers", None) is not None:
        kinds = ", ".join(sorted({*config.layers}))
        raise ValueError(f"{folder} is a hybrid, of {kinds} blocks; only a pure Mamba-2 is written as GGUF")
    if config.use_bias:
        raise ValueError(f"{folder} has biases in its projections (use_bias), which llama.cpp's mamba2 does not know")
    if tuple(config.time_step_limit) != (0.0, float("inf")):
        raise ValueError(
            f"{folder} limits its time steps to {tuple(config.time_step_limit)}; llama.cpp's mamba2 does not"
        )
    inner = config.num_heads * config.head_dim
    if form == "q8_0" and (odd := next((width for width in (config.hidden_size, inner) if width % 32), None)):
        raise ValueError(f"{folder} has rows of {odd} weights, and q8_0 takes 32 at a time; choose fp32 or bf16")


def _tensors(model: LanguageModel, form: str, gguf) -> Iterator[tuple[str, np.ndarray, object]]:
    """Name, data and type of each tensor as llama.cpp has them."""
    kind, groups = gguf.GGMLQuantizationType[FORMS[form]], model.config.n_groups
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "mixer.A_log": lambda t: -torch.exp(t)[:, None],
        "mixer.D": lambda t: t[:, None],
        "mixer.conv1d.weight": lambda t: t[:, 0],
        "mixer.norm.weight": lambda t: t.reshape(groups, -1),
    }
    for name, value in model.tensors.items():
        data, own = value.float(), _WHOLE.get(name)
        if own is None:
            _, _, block, part = name.split(".", 3)
            own, data = f"blk.{block}.{_NAMES[part]}", shapes.get(part, lambda t: t)(data)
        if own.endswith(("ssm_in.weight", "ssm_out.weight", "token_embd.weight", "output.weight")):
            yield own, gguf.quants.quantize(data.numpy(), kind), kind
        else:
            yield own, data.contiguous().numpy(), gguf.GGMLQuantizationType.F32
    if not model.config.use_conv_bias:  # llama.cpp wants one
        channels = model.tensors["backbone.layers.0.mixer.conv1d.weight"].shape[0]
        for block in range(model.config.num_hidden_layers):
            zeros = np.zeros(channels, dtype=np.float32)
            yield f"blk.{block}.ssm_conv1d.bias", zeros, gguf.GGMLQuantizationType.F32
