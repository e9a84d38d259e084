"""How each row of logits is sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """One entry per row of logits, all tensors on the logits' device."""

    temperature: torch.Tensor  # [R] float32; 0: the likeliest token, nothing else counts
    top_k: torch.Tensor  # [R] int32; 0: off
    top_p: torch.Tensor  # [R] float32; 1: off
    log_min_p: torch.Tensor  # [R] float32, logarithm of min_p; -inf: off
    keys: torch.Tensor  # [R, 2] int32, see sampling.noise_key

    def select(self, rows: torch.Tensor) -> SamplingRows:
        return SamplingRows(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.log_min_p[rows],
            self.keys[rows],
        )
