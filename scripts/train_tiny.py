"""Train the embedded model `dsc-tiny` from plain-text files and export it in the serving form.

    python scripts/train_tiny.py --corpus FOLDER --work RUN_FOLDER --out dsc_serve/models/dsc-tiny --minutes 30

FOLDER holds UTF-8 `*.txt` or `*.txt.xz` files, one paragraph a block with a blank line between. The last 2 % of every
file is held out; the script reports the loss and the bits per byte on it. A stopped run goes on from RUN_FOLDER.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

VOCAB, WIDTH, LAYERS, HEADS, CONTEXT = 4096, 256, 6, 4, 1024
ATOMS, PICKED, STATIC = 512, 4, 512
TAU, EPS, NORM_EPS, ROPE_THETA = 20.0, 1e-6, 1e-5, 10000.0
END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 0.02


def read_paragraphs(path: Path) -> list[str]:
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf8")
    return [block.strip() for block in text.split("\n\n") if block.strip()]


def split(paragraphs: list[str]) -> tuple[list[str], list[str]]:
    cut = int(len(paragraphs) * (1 - HELD_OUT))
    return paragraphs[:cut], paragraphs[cut:]


def train_tokenizer(files: list[Path], target: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((p for f in files for p in split(read_paragraphs(f))[0]), trainer)
    tokenizer.save(str(target))
    return tokenizer


def tokenise(
    files: list[Path], work: Path, tokenizer: Tokenizer
) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, int]]]:
    """Training ids of all files, and per file its held-out ids with their size in bytes."""
    train_path = work / "train.npy"
    end = tokenizer.token_to_id(END_OF_TEXT)
    rng = np.random.default_rng(0)
    held: dict[str, tuple[np.ndarray, int]] = {}
    pieces: list[np.ndarray] = []
    for file in files:
        train, test = split(read_paragraphs(file))
        text = "\n\n".join(test)
        held[file.name.split(".")[0]] = (np.array(tokenizer.encode(text).ids, dtype=np.uint16), len(text.encode()))
        if train_path.exists():
            continue
        start = 0
        while start < len(train):  # documents of 5 to 40 paragraphs, so that the model also learns to stop
            stop = start + int(rng.integers(5, 41))
            ids = tokenizer.encode("\n\n".join(train[start:stop])).ids
            pieces.append(np.array([*ids, end], dtype=np.uint16))
            start = stop
    if not train_path.exists():
        rng.shuffle(pieces)  # type: ignore[arg-type]
        np.save(train_path, np.concatenate(pieces))
    return np.load(train_path, mmap_mode="r"), held


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (z.view(b, t, HEADS, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))


class Dsc(nn.Module):
    """Algorithm 2 of arXiv 2512.23448; all latents are computed densely, which trains faster than gathers here."""

    def __init__(self) -> None:
        super().__init__()
        self.router_norm = nn.LayerNorm(WIDTH, eps=NORM_EPS)
        self.router = nn.Linear(WIDTH, ATOMS)
        self.u = nn.Parameter(torch.empty(ATOMS, WIDTH))
        self.v = nn.Parameter(torch.empty(ATOMS, WIDTH))
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.1))
        self.up = nn.Linear(WIDTH, STATIC, bias=False)
        self.down = nn.Linear(STATIC, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(self.router_norm(x)).float()
        r = logits.clamp(-TAU, TAU)
        phi, picked = F.softplus(r).topk(PICKED, dim=-1)
        signal = phi.sum(-1, keepdim=True)
        weights = phi / (signal + EPS) * signal.tanh()
        sparse = torch.zeros_like(r).scatter(-1, picked, weights)
        u = self.u / self.u.norm(dim=-1, keepdim=True).clamp_min(EPS)
        v = self.v / self.v.norm(dim=-1, keepdim=True).clamp_min(EPS)
        dynamic = ((x @ u.T) * sparse.to(x.dtype)) @ v * self.gamma
        load = ATOMS * r.softmax(-1).mean((0, 1)).square().sum()
        budget = (1.0 - signal.mean()).clamp_min(0).square()
        frame = sum((m.T @ m).square().sum() - (m * m).sum(-1).square().sum() for m in (u.float(), v.float()))
        z = logits.logsumexp(-1).square().mean()
        return self.down(F.gelu(self.up(x))) + dynamic, 0.01 * load + 0.01 * budget + 0.001 * frame + 1e-4 * z


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=NORM_EPS), nn.LayerNorm(WIDTH, eps=NORM_EPS)
        self.attention, self.ffn = Attention(), Dsc()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, eps=NORM_EPS)
        frequency = ROPE_THETA ** (-torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        angle = torch.arange(CONTEXT)[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if name.endswith((".u", ".v")):
                nn.init.orthogonal_(p)
                p.data.mul_(0.02)
            elif name.endswith("attention.out.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        t = ids.shape[1]
        cos, sin = self.cos[:t].to(x.dtype), self.sin[:t].to(x.dtype)
        extra = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x = x + block.attention(block.norm1(x), cos, sin)
            y, loss = block.ffn(block.norm2(x))
            x, extra = x + y, extra + loss
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), extra


def optimisers(model: Model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices; AdamW for the rest, the router at five times the rate as the paper says."""
    hidden = ("qkv.weight", "out.weight", "up.weight", "down.weight")
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "router": [], "matrix": [], "vector": []}
    for name, p in model.named_parameters():
        kind = (
            "router"
            if "router" in name
            else "hidden"
            if name.endswith(hidden)
            else "matrix"
            if p.dim() > 1
            else "vector"
        )
        groups[kind].append(p)
    return [
        torch.optim.Muon(
            groups["hidden"], lr=rate * 2, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": groups["router"], "lr": rate * 5, "weight_decay": 0.0},
                {"params": groups["matrix"], "lr": rate * 2, "weight_decay": 0.02},
                {"params": groups["vector"], "lr": rate * 2, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        ),
    ]


@torch.no_grad()
def held_out(model: Model, held: dict[str, tuple[np.ndarray, int]], windows: int | None) -> dict[str, float]:
    """Bits per byte of each file's held-out part, over full windows of CONTEXT without overlap."""
    bits: dict[str, float] = {}
    for name, (ids, size) in held.items():
        count = (len(ids) - 1) // CONTEXT
        rows = range(count) if windows is None else range(min(count, windows))
        losses = []
        for row in rows:
            piece = torch.from_numpy(ids[row * CONTEXT : (row + 1) * CONTEXT + 1].astype(np.int64))[None]
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(model(piece[:, :-1], piece[:, 1:])[0].item())
        bits[name] = sum(losses) / len(losses) / math.log(2) * len(ids) / size
    return bits


def export(model: Model, out: Path, tokenizer: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": model.embed.weight}
    tensors |= {f"model.norm.{k}": v for k, v in model.norm.state_dict().items()}
    for i, block in enumerate(model.blocks):
        p = f"model.layers.{i}."
        tensors |= {f"{p}input_layernorm.{k}": v for k, v in block.norm1.state_dict().items()}
        tensors |= {f"{p}post_attention_layernorm.{k}": v for k, v in block.norm2.state_dict().items()}
        for name, weight in zip("qkv", block.attention.qkv.weight.chunk(3), strict=True):
            tensors[f"{p}self_attn.{name}_proj.weight"] = weight
        tensors[f"{p}self_attn.o_proj.weight"] = block.attention.out.weight
        ffn = block.ffn
        tensors |= {f"{p}mlp.router_norm.{k}": v for k, v in ffn.router_norm.state_dict().items()}
        tensors |= {f"{p}mlp.router.{k}": v for k, v in ffn.router.state_dict().items()}
        tensors |= {f"{p}mlp.atoms_u": ffn.u, f"{p}mlp.atoms_v": ffn.v, f"{p}mlp.gamma": ffn.gamma}
        tensors |= {f"{p}mlp.static.up_proj.weight": ffn.up.weight, f"{p}mlp.static.down_proj.weight": ffn.down.weight}
    stored = {k: v.detach().to(torch.bfloat16).contiguous().clone() for k, v in tensors.items()}
    save_file(stored, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "model_type": "dsc",
        "architectures": ["DscForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": CONTEXT,
        "norm_type": "layernorm",
        "norm_eps": NORM_EPS,
        "position_embedding_type": "rope",
        "rope_theta": ROPE_THETA,
        "hidden_act": "gelu",
        "mlp_gated": False,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "torch_dtype": "bfloat16",
        "ffn": {
            "kind": "dsc",
            "num_atoms": ATOMS,
            "atoms_per_token": PICKED,
            "static_size": STATIC,
            "tau": TAU,
            "eps": EPS,
        },
    }
    template = "{% for message in messages %}{{ message.content }}\n\n{% endfor %}"
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "bos_token": END_OF_TEXT,
            "add_bos_token": False,
            "model_max_length": CONTEXT,
            "chat_template": template,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="tokens, tokenizer, checkpoint and log of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time of this run's whole schedule")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    options = parser.parse_args()
    torch.manual_seed(0)
    options.work.mkdir(parents=True, exist_ok=True)
    files = sorted(f for f in options.corpus.iterdir() if f.name.endswith((".txt", ".txt.xz")))
    target = options.work / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(target)) if target.exists() else train_tokenizer(files, target)
    data, held = tokenise(files, options.work, tokenizer)
    print(f"{len(data):,} training tokens", flush=True)
    model = Model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optims = optimisers(model, options.rate)
    base = [[g["lr"] for g in o.param_groups] for o in optims]
    step, spent = 0, 0.0
    saved = options.work / "state.pt"
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        for o, s in zip(optims, state["optims"], strict=True):
            o.load_state_dict(s)
        step, spent = state["step"], state["spent"]
    log = (options.work / "log.jsonl").open("a")
    limit, since_save = options.minutes * 60, 0.0
    while spent < limit:
        began = time.perf_counter()
        done = spent / limit
        length = (
            CONTEXT if done > 0.75 else 512
        )  # short windows first: cheaper, and the last quarter teaches the full context
        factor = min(1.0, (step + 1) / 60) * (
            1.0 if done < 0.4 else max(0.02, (1 - done) / 0.6)
        )  # warm up, hold, decay
        for o, rates in zip(optims, base, strict=True):
            for g, lr in zip(o.param_groups, rates, strict=True):
                g["lr"] = lr * factor
        rng = np.random.default_rng(step)
        total = 0.0
        micro = max(1, options.tokens_per_step // (4 * length))
        for _ in range(4):
            starts = rng.integers(0, len(data) - length - 1, micro)
            batch = torch.from_numpy(np.stack([data[s : s + length + 1] for s in starts]).astype(np.int64))
            with torch.autocast("cpu", torch.bfloat16):
                loss, extra = model(batch[:, :-1], batch[:, 1:])
            ((loss + extra) / 4).backward()
            total += loss.item() / 4
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optims:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        took = time.perf_counter() - began
        spent, since_save = spent + took, since_save + took
        if step % 10 == 0:
            line = {
                "step": step,
                "loss": round(total, 4),
                "seconds": round(spent, 1),
                "tokens": step * options.tokens_per_step,
            }
            print(line, f"{options.tokens_per_step / took:.0f} tokens/s", flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
        if since_save > 120 or spent >= limit:
            since_save = 0.0
            part = saved.with_suffix(".part")
            torch.save(
                {"model": model.state_dict(), "optims": [o.state_dict() for o in optims], "step": step, "spent": spent},
                part,
            )
            part.replace(saved)
            bits = held_out(model, held, 2)
            print("held out, bits per byte:", round(sum(bits.values()) / len(bits), 4), flush=True)
    bits = held_out(model, held, None)
    print(json.dumps({"held_out_bits_per_byte": bits, "steps": step, "seconds": spent}), flush=True)
    export(model, options.out, target)


if __name__ == "__main__":
    main()
