"""A decode step without attention: our own, and compiled by torch (Inductor), side by side.

    python kernels/benchmarks/compiled.py --model /tmp/llama-50m --threads 2

What a compiler could save in a decode step is around the products: norms, rotary embedding and
gating become a few loops of C++. Attention reads pages and stays outside in any case. Needs a C++
compiler.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config as inductor
from torch.nn.functional import linear, rms_norm, silu
from transformers import AutoModelForCausalLM

from mell_ray.engine.fused import NoContext, fuse

TIMES = 200


class Plain(torch.nn.Module):
    """Llama as torch would have it written, with the projections joined."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.eps = model.config.rms_norm_eps
        self.embedding = model.model.embed_tokens
        self.layers = torch.nn.ModuleList(_Weights(layer) for layer in model.model.layers)
        self.norm = torch.nn.Parameter(model.model.norm.weight.float(), requires_grad=False)
        self.head = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)

    def forward(self, ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Logits of ``ids``, ``[T]``, whose queries are what attention gives."""
        x = self.embedding(ids).float()
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        for layer in self.layers:
            dtype = layer.qkv.dtype
            normed = rms_norm(x, (x.shape[-1],), layer.norm_1, self.eps).to(dtype)
            qkv = linear(normed, layer.qkv).view(len(x), heads + 2 * kv_heads, -1)
            both = qkv[:, : heads + kv_heads]
            both = torch.addcmul(both * cos, both.roll(both.shape[-1] // 2, -1), sin)
            x = x + linear(both[:, :heads].reshape(len(x), -1), layer.out).float()
            normed = rms_norm(x, (x.shape[-1],), layer.norm_2, self.eps).to(dtype)
            gate, up = linear(normed, layer.gate_up).chunk(2, dim=-1)
            x = x + linear(silu(gate) * up, layer.down).float()
        normed = rms_norm(x, (x.shape[-1],), self.norm, self.eps).to(self.head.dtype)
        return linear(normed, self.head)


class _Weights(torch.nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = {
            "qkv": torch.cat([each.weight for each in projections]),
            "out": attention.o_proj.weight.clone(),
            "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            "down": mlp.down_proj.weight.clone(),
            "norm_1": layer.input_layernorm.weight.float(),
            "norm_2": layer.post_attention_layernorm.weight.float(),
        }
        for name, weight in weights.items():
            setattr(self, name, torch.nn.Parameter(weight, requires_grad=False))


def best_ms(run: Callable[[], object]) -> str:
    times = []
    for _ in range(TIMES):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    times.sort()
    return f"{times[0]:.2f} (median {times[TIMES // 2]:.2f})"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory that make_model.py wrote")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inductor.freezing = True  # lets it pack the weights
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    plain = Plain(model.requires_grad_(False)).eval()
    compiled = torch.compile(plain, dynamic=False, fullgraph=True)
    fused = fuse(model, copies_share=0.25)
    if fused is None:
        raise SystemExit(f"{options.model} is not made of Llama's block")

    print("| rows | ours, ms | compiled, ms | to compile, s | not compiled, ms |")
    print("|---|---|---|---|---|")
    for rows in options.rows:
        ids = torch.randint(model.config.vocab_size, (rows,))
        at = torch.arange(rows)
        cos, sin = torch.randn(2, rows, 1, model.config.head_dim).to(torch.bfloat16)
        own = best_ms(lambda ids=ids, at=at: fused(ids, at, at, len(at), NoContext()))
        started = time.perf_counter()
        compiled(ids, cos, sin)
        cold_s = time.perf_counter() - started
        theirs = best_ms(lambda ids=ids, cos=cos, sin=sin: compiled(ids, cos, sin))
        eager = best_ms(lambda ids=ids, cos=cos, sin=sin: plain(ids, cos, sin))
        print(f"| {rows} | {own} | {theirs} | {cold_s:.0f} | {eager} |", flush=True)


if __name__ == "__main__":
    main()
