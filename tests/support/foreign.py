"""Small checkpoints of other forms, and what transformers and llama.cpp compute of them.

The expected values lie in tests/data, with the versions that gave them. They are written again with an interpreter
that has transformers and one that has xllamacpp (llama.cpp as a Python package):

    PYTHONPATH=tests:tests/model python -m foreign transformers PYTHON
    PYTHONPATH=tests:tests/model python -m foreign llama_cpp PYTHON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from model.test_import_gguf import byte_level_vocabulary, config, write
from model.test_import_huggingface import LLAMA, ROPE_LLAMA3, expected_tensors
from safetensors.torch import save_file
from torch import Tensor

from support.small_models import DATA, wide_tensors

PROMPT = [(37 * i * i + 11 * i + 5) % 61 for i in range(40)]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
FOLDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope_scaling beside rope_parameters": {
        "rope_theta": None,
        "rope_scaling": YARN,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    },
    "an empty rope_scaling beside rope_parameters": {
        "rope_theta": None,
        "rope_scaling": {},
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
    },
    "theta beside rope_parameters without one": {"rope_parameters": {"rope_type": "default"}},
    "theta within and beside": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "original_max_position_embeddings beside yarn": {
        "rope_scaling": {**YARN, "factor": 4.0},
        "original_max_position_embeddings": 16,
    },
    "original_max_position_embeddings beside llama3": {
        "rope_scaling": ROPE_LLAMA3,
        "original_max_position_embeddings": 32,
    },
    "llama3 without original_max_position_embeddings": {
        "rope_scaling": {k: v for k, v in ROPE_LLAMA3.items() if k != "original_max_position_embeddings"}
    },
    "yarn without original_max_position_embeddings": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "yarn without a factor": {"rope_scaling": {**YARN, "factor": None}},
    "yarn with an attention factor": {"rope_scaling": {**YARN, "attention_factor": 0.8}},
    "linear in the older form": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "a head of its own though tied": {"tie_word_embeddings": True},
    "tied, and the head alone is stored": {"tie_word_embeddings": True, "without": EMBEDDING},
    "tied, and the embedding alone is stored": {"tie_word_embeddings": True, "without": HEAD},
    "a stale index": {"stale_index": True},
    "heads of 8": {"head_dim": 8},
    "heads of 2": {"head_dim": 2, "num_attention_heads": 8},
}
FILES: dict[str, dict[str, str | float | int]] = {
    "plain": {},
    "linear": {"scaling.type": "linear", "scaling.factor": 4.0},
    "linear with attn_factor": {"scaling.type": "linear", "scaling.factor": 4.0, "scaling.attn_factor": 1.3},
    "attn_factor alone": {"scaling.attn_factor": 0.7},
    "yarn": {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16},
    "yarn without original_context_length": {"scaling.type": "yarn", "scaling.factor": 2.0},
    "yarn without a factor": {"scaling.type": "yarn", "scaling.original_context_length": 16},
    "yarn with attn_factor": {
        "scaling.type": "yarn",
        "scaling.factor": 4.0,
        "scaling.original_context_length": 16,
        "scaling.attn_factor": 0.8,
    },
    "yarn with fields that are not used": {
        "scaling.type": "yarn",
        "scaling.factor": 4.0,
        "scaling.original_context_length": 16,
        "scaling.yarn_beta_fast": 4.0,
        "scaling.yarn_ext_factor": 0.5,
        "scaling.yarn_attn_factor": 0.5,
    },
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 10000.0},
    "qwen2": {"rope_theta": 10000.0, "attention_bias": True, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def huggingface_folder(out: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    """A folder of the Llama form with one safetensors file; a change of None leaves the field out."""
    out.mkdir(parents=True, exist_ok=True)
    content = {name: value for name, value in {**LLAMA, **changes}.items() if value is not None}
    (out / "config.json").write_text(json.dumps(content))
    save_file(dict(tensors), out / "model.safetensors", metadata={"format": "pt"})
    return out


def folder_of(case: str, out: Path) -> Path:
    changes = dict(FOLDERS[case])
    sizes = {name: changes[name] for name in ("head_dim", "num_attention_heads") if name in changes}
    tensors = expected_tensors(**sizes)
    tensors.pop(changes.pop("without", ""), None)
    if changes.pop("stale_index", False):
        index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
        out.mkdir(parents=True)
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return huggingface_folder(out, tensors, **changes)


def file_of(case: str, architecture: str, out: Path) -> Path:
    """A GGUF file of float32 tensors."""

    def change(writer: gguf.GGUFWriter) -> None:
        for name, value in FILES[case].items():
            kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
            kinds[type(value)](f"{architecture}.rope.{name}", value)  # type: ignore[operator]

    model = config(**ARCHITECTURES[architecture])
    words = byte_level_vocabulary()  # llama.cpp tells nothing of a token that is part of a character
    words["tokens"][94:256] = [f"w{i}" for i in range(94, 256)]
    words["merges"], words["kinds"][:256] = ["H e"], [1] * 256
    write(out, wide_tensors(model), model, words, architecture, change, quantised=False)
    return out


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return found


TRANSFORMERS = """
import json, sys, torch, transformers
found = {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}, "logits": {}}
for case, folder in json.loads(sys.argv[1]).items():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0, -1]
    found["logits"][case] = [round(x, 4) for x in logits.tolist()]
print("\\n" + json.dumps(found))
"""
LLAMA_CPP = """
import importlib.metadata, json, sys, urllib.request, xllamacpp as x
found = {"versions": {"xllamacpp": importlib.metadata.version("xllamacpp")}, "logprobs": {}}
for case, file in json.loads(sys.argv[1]).items():
    p = x.CommonParams()
    p.model.path, p.n_ctx, p.warmup, p.n_parallel, p.verbosity, p.cpuparams.n_threads = file, 0, False, 1, 0, 1
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = x.Server(p)
    body = {"prompt": json.loads(sys.argv[2]), "n_predict": 1, "n_probs": 24, "temperature": 0.0, "ignore_eos": True}
    asked = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode())
    answer = json.load(urllib.request.urlopen(asked))
    first = answer["completion_probabilities"][0]["top_logprobs"]
    found["logprobs"][case] = {entry["id"]: round(entry["logprob"], 4) for entry in first}
print("\\n" + json.dumps(found))
"""


def main(name: str, interpreter: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if name == "transformers":
            paths = {case: str(folder_of(case, root / str(i))) for i, case in enumerate(FOLDERS)}
        else:
            cases = [(case, own) for case in FILES for own in ARCHITECTURES]
            paths = {
                f"{own}: {case}": str(file_of(case, own, root / f"{i}.gguf")) for i, (case, own) in enumerate(cases)
            }
        program = {"transformers": TRANSFORMERS, "llama_cpp": LLAMA_CPP}[name]
        asked = [interpreter, "-c", program, json.dumps(paths), json.dumps(PROMPT)]
        output = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout
    content = json.loads(output.strip().splitlines()[-1])
    (DATA / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
