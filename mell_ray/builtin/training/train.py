"""Trains ``mell-tiny`` and writes its directory.

The shipped weights come from these commands (one CPU thread, float32)::

    apt-get download r-cran-janeaustenr=1.0.0-1
    dpkg -x r-cran-janeaustenr_1.0.0-1_all.deb corpus
    python -m mell_ray.builtin.training.train --corpus-dir corpus --out weights

The seed fixes the documents, their order and the initial weights; another CPU or torch version
rounds differently and ends with slightly different weights.
"""

import json
import math
import time
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import Novel, join, load_novels
from .documents import IGNORED, Cutter, Document, held_out_documents
from .packing import Batch, batches
from .tokenizer import CONTEXT, train_tokenizer

BATCH_TOKENS = 2048
PEAK_RATE = 5e-3
WARM_UP_SHARE = 0.04
WEIGHT_DECAY = 0.1
REPORT_EVERY = 50


def configuration(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of 1.5 M parameters; queries share KV heads, as in the models it stands in for."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Summed cross entropy; logits are computed only where there is something to predict."""
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    learnt = batch.labels != IGNORED
    return functional.cross_entropy(
        model.lm_head(hidden[learnt]), batch.labels[learnt], reduction="sum"
    )


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, held_out: list[Batch]) -> float:
    """Nats per token over `held_out`."""
    model.eval()
    total = sum(batch_loss(model, batch).item() for batch in held_out)
    model.train()
    return total / sum(int((batch.labels != IGNORED).sum()) for batch in held_out)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    warm_up = max(1, round(steps * WARM_UP_SHARE))
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0},
        ],
        betas=(0.9, 0.99),
        fused=True,
    )


def fit(model: LlamaForCausalLM, schedule: list[Batch], held_out: list[Batch]) -> None:
    """One optimizer step per batch of `schedule`, reporting the losses on the way."""
    adam = optimizer(model)
    started = time.monotonic()
    seen, recent = 0, 0.0
    for step, batch in enumerate(schedule):
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, len(schedule))
        learnt = int((batch.labels != IGNORED).sum())
        loss = batch_loss(model, batch) / learnt
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        seen += batch.input_ids.numel()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == len(schedule):
            report = f"step {step + 1}/{len(schedule)} tokens {seen} train {recent:.3f}"
            if (step + 1) % (10 * REPORT_EVERY) == 0:
                report += f" held-out {mean_loss(model, held_out):.3f}"
            typer.echo(f"{report} {time.monotonic() - started:.0f} s")


def schedule_of(
    novels: list[Novel], tokenizer: PreTrainedTokenizerFast, passes: int, rng: Random
) -> list[Batch]:
    """Batches of `passes` passes over the training text, each cut and ordered anew."""
    cutter = Cutter(novels, tokenizer)
    plan: list[Batch] = []
    for _ in range(passes):
        plan.extend(batches(cutter.documents(rng), BATCH_TOKENS, tokenizer.pad_token_id, rng))
    return plan


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The directory ``from_pretrained`` reads, weights in bfloat16."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(
    corpus_dir: Annotated[Path, typer.Option(help="Where `dpkg -x` extracted the package.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    passes: Annotated[int, typer.Option(help="Passes over the training text.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the documents and of the weights.")] = 1811,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train the tokenizer and the model, report the held-out loss, save both."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = Random(seed)
    novels = load_novels(corpus_dir)
    tokenizer = train_tokenizer(join(part) for novel in novels for part in novel.train)
    held_out = _held_out(novels, tokenizer)
    plan = schedule_of(novels, tokenizer, passes, rng)
    model = LlamaForCausalLM(configuration(tokenizer))
    fit(model, plan, held_out)
    model.to(torch.bfloat16).float()
    loss = mean_loss(model, held_out)
    figures = {
        "parameters": model.num_parameters(),
        "steps": len(plan),
        "tokens": sum(batch.input_ids.numel() for batch in plan),
        "held_out_tokens": sum(int((batch.labels != IGNORED).sum()) for batch in held_out),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
    }
    save(model, tokenizer, out)
    typer.echo(json.dumps(figures))


def _held_out(novels: list[Novel], tokenizer: PreTrainedTokenizerFast) -> list[Batch]:
    documents: list[Document] = held_out_documents(novels, tokenizer)
    return batches(documents, BATCH_TOKENS, tokenizer.pad_token_id, Random(0))


if __name__ == "__main__":
    typer.run(main)
